"""Settings, latencies and the grammar of faults: what is accepted, what is refused and in which words."""

from __future__ import annotations

import contextlib
import random
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchstream.endpoints.sim.faultplan import KINDS, parse_faults
from batchstream.endpoints.sim.latency import parse_distribution
from batchstream.endpoints.sim.windows import Window
from batchstream.endpoints.simulate import SimulateConfig, make_config
from batchstream.errors import UsageError

# How fast a machine is must not decide a test: on a fresh checkout the first text drawn takes seconds.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_settings_come_as_texts_from_a_command_line() -> None:
    config = make_config(
        {"ttft": "0.1..0.2", "seed": "7", "role_early": "false", "faults": "429=0.05; 500@3", "apis": "chat,messages"}
    )
    assert config == SimulateConfig(
        ttft="0.1..0.2", seed=7, role_early=False, faults=("429=0.05", "500@3"), apis=("chat", "messages")
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ttfs": 1}, "unknown setting 'ttfs' \\(did you mean 'ttft'"),
        ({"seed": "x"}, "seed: expected .*got 'x'"),
        ({"ttft": "fast"}, "ttft: expected seconds as 0.2.*got 'fast'"),
        ({"gap": "0.3..0.1"}, "gap: expected LOW..HIGH"),
        ({"gap": "exp(0)"}, "gap: expected exp"),
        ({"tokens": "0"}, "tokens: expected"),
        ({"tokens": "9..3"}, "tokens: expected"),
        ({"speedup": 0}, "speedup: expected a number above 0, got 0"),
        ({"jitter": -1}, "jitter: expected 0 or more"),
        ({"plan": "gold"}, "plan: invalid enum value"),
        ({"faults": "429"}, "expected KIND=P"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(values: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_config(values)


def test_the_plan_sets_the_rate_and_an_explicit_rate_wins() -> None:
    assert make_config({"plan": "premium"}).requests_per_minute == 30
    assert make_config({"plan": "premium", "rpm": 7}).requests_per_minute == 7
    assert make_config({}).requests_per_minute is None


@pytest.mark.parametrize(
    ("text", "mean", "least", "most"),
    [
        ("0.2", 0.2, 0.2, 0.2),
        ("0.1..0.3", 0.2, 0.1, 0.3),
        ("exp(0.2)", 0.2, 0, 9),
        ("lognormal(0.2, 0.5)", 0.2266, 0, 9),
    ],
)
def test_a_distribution_has_the_mean_and_the_range_it_says(text: str, mean: float, least: float, most: float) -> None:
    draw = parse_distribution(text, "ttft").drawer(random.Random(1))
    values = [draw() for _ in range(5000)]
    assert least <= min(values)
    assert max(values) <= most
    assert statistics.fmean(values) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("kind", ["429", "500", "529", "402", *KINDS])
def test_every_kind_can_be_given_in_each_of_the_three_ways(kind: str) -> None:
    plan = parse_faults([f"{kind}@17", f"{kind}~poison", f"{kind}=0.5"])
    assert plan.choose(17, b"", 1, 0.9) is plan.scripted[0]
    assert plan.choose(1, b"the poison row", 1, 0.9) is plan.scripted[1]
    assert plan.choose(1, b"", 1, 0.4) is plan.random[0]
    assert plan.choose(1, b"", 1, 0.6) is None


def test_options_and_labels_are_read_as_written() -> None:
    (fault,) = parse_faults(["429(retry-after=2,message=Daily limit exceeded)@3..5"]).scripted
    assert fault.numbers == {"retry-after": 2}
    assert fault.texts == {"message": "Daily limit exceeded"}
    assert fault.requests == (3, 5)
    assert fault.label == "429(retry-after=2,message=Daily limit exceeded)"


def test_a_fault_stops_after_its_times_and_its_share_goes_to_no_other() -> None:
    plan = parse_faults(["500(times=2)=0.5", "reset=0.5", "503(times=1)~once"])
    hits = [plan.choose(1, b"", attempt, 0.1) for attempt in (1, 2, 3)]
    assert [hit.kind if hit else None for hit in hits] == ["500", "500", None]
    reset = plan.choose(1, b"", 3, 0.7)
    assert reset is not None
    assert reset.kind == "reset"
    assert [plan.choose(1, b"once", attempt, 0.1) is plan.scripted[0] for attempt in (1, 2)] == [True, False]


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("429", "expected KIND=P, KIND@N or KIND~TEXT"),
        ("boom=0.1", "unknown kind 'boom'"),
        ("200=0.1", "unknown kind '200'"),
        ("429=1.5", "a probability between 0 and 1, got '1.5'"),
        ("429=nan", "a probability between 0 and 1, got 'nan'"),
        ("500@0", "a request number from 1"),
        ("500@9..3", "a request number from 1"),
        ("500@x", "a request number from 1"),
        ("500(when=1)@1", "unknown option 'when'"),
        ("reset(k=-1)@1", "k: expected a number of at least 0"),
        ("reset(times=0)@1", "times: expected a number of at least 1"),
    ],
)
def test_a_wrong_fault_is_refused_with_what_was_expected(spelling: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_faults([spelling])


def test_probabilities_may_not_pass_one() -> None:
    parse_faults(["429=0.5", "500=0.5"])
    with pytest.raises(UsageError, match=r"add up to 1\.1"):
        parse_faults(["429=0.6", "500=0.5"])


@CALM
@given(st.text(max_size=40))
def test_no_text_escapes_the_grammar_as_anything_but_a_usage_error(text: str) -> None:
    for parse in (lambda: parse_faults([text]), lambda: parse_distribution(text, "ttft")):
        with contextlib.suppress(UsageError):
            parse()


def test_a_window_refuses_what_does_not_fit_and_opens_again_with_the_next() -> None:
    window = Window(limit=3, length=60, phase=0)
    taken = []
    for now in (10, 20, 30, 40, 59.9, 60):
        taken.append(window.fits(now, 1))
        if taken[-1]:
            window.take(now, 1)
    assert taken == [True, True, True, False, False, True]
    assert window.reset_in(59) == 1
    assert window.remaining(60) == 2


def test_a_window_counts_multipliers_and_begins_at_its_phase() -> None:
    window = Window(limit=3, length=60, phase=15)
    window.take(20, 1.5)
    assert window.fits(74, 1.5)
    assert not window.fits(74, 2)
    assert window.fits(75, 2)
    assert Window(1, 60).fits(0, 2), "a model dearer than the whole limit can still be asked"


@CALM
@given(st.lists(st.tuples(st.floats(0, 1000), st.sampled_from([1, 1.5, 2])), max_size=60), st.integers(2, 9))
def test_no_window_ever_takes_more_than_its_limit(asks: list[tuple[float, float]], limit: int) -> None:
    window = Window(limit, 60)
    used: dict[int, float] = {}
    for now, cost in sorted(asks):
        if window.fits(now, cost):
            window.take(now, cost)
            used[int(now // 60)] = used.get(int(now // 60), 0) + cost
    assert all(total <= limit for total in used.values())
