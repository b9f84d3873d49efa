"""Schedules of a measurement: fixed in advance, repeatable, as dense as was asked for."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchstream.policy.arrivals import Load, next_level, offsets


def schedule(load: Load, seed: int = 1, **end: float) -> list[float]:
    return list(offsets(load, random.Random(seed), **end))  # type: ignore[arg-type]


def test_a_constant_rate_is_evenly_spaced_and_does_not_drift() -> None:
    due = schedule(Load(arrival="constant", rate=1000.0), seconds=30.0)
    assert len(due) == 30_000
    assert due[-1] == 29.999


@pytest.mark.parametrize(
    "load", [Load(arrival="poisson", rate=200.0), Load(arrival="gamma", rate=200.0, burstiness=0.5)]
)
def test_random_arrivals_have_the_rate_that_was_asked_for(load: Load) -> None:
    counts = [len(schedule(load, seed, seconds=30.0)) for seed in range(30)]
    assert statistics.mean(counts) == pytest.approx(6000, rel=0.01)


def test_the_burstiness_is_the_shape_of_the_gaps() -> None:
    for shape, expected in ((0.25, 2.0), (1.0, 1.0), (4.0, 0.5)):
        due = schedule(Load(arrival="gamma", rate=100.0, burstiness=shape), count=50_000)
        gaps = [b - a for a, b in itertools.pairwise(due)]
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(expected, rel=0.05)


def test_a_ramp_grows_evenly() -> None:
    due = schedule(Load(arrival="ramp", rate=10.0, rate_to=50.0), seconds=60.0)
    assert len(due) == pytest.approx(60 * 30, abs=1)
    first, last = (sum(begin <= at < begin + 6 for at in due) for begin in (0, 54))
    assert (first, last) == (pytest.approx(72, abs=1), pytest.approx(288, abs=1))


@given(
    st.sampled_from(["constant", "poisson", "gamma"]), st.floats(0.1, 500), st.integers(0, 2**32), st.integers(1, 300)
)
def test_a_schedule_is_ascending_ends_as_said_and_repeats_with_its_seed(
    arrival: str, rate: float, seed: int, count: int
) -> None:
    load = Load(arrival=arrival, rate=rate, burstiness=2.0)  # type: ignore[arg-type]
    due = schedule(load, seed, count=count)
    assert len(due) == count
    assert due == sorted(due)
    assert due[0] == 0.0
    assert due == schedule(load, seed, count=count)
    inside = schedule(load, seed, count=count, seconds=due[-1] / 2 + 1e-9)
    assert inside == due[: len(inside)]


def test_a_closed_loop_has_no_schedule() -> None:
    with pytest.raises(ValueError, match="no schedule"):
        schedule(Load(arrival="closed", concurrency=2), count=1)


@given(st.floats(0.5, 2000.0), st.booleans())
def test_a_search_ends_just_below_the_limit(limit: float, whole: bool) -> None:
    """Whatever the endpoint can bear, the highest good level is found without knowing it, in a few stages."""
    tried: list[tuple[float, bool]] = []
    while (level := next_level(tried, first=1.0, whole=whole)) is not None:
        tried.append((level, level <= limit))
        assert len(tried) < 30
    best = max((level for level, good in tried if good), default=0.0)
    if limit < 1.0 and whole:
        assert best == 0.0
    elif whole:
        assert best == int(limit)
    else:
        assert limit * 0.94 - 0.06 <= best <= limit
