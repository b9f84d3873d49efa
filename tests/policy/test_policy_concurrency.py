"""Concurrency that finds its level, against endpoints in virtual time that have a capacity, a wall or a knee."""

from __future__ import annotations

import pytest
from virtual_endpoint import Outcome, Shape, closed_loop

from batchstream.policy.concurrency import MOST, Concurrency

SHAPES = {
    "8 slots with a queue": (Shape(slots=8), 8, 4_000),
    "64 slots with a queue": (Shape(slots=64), 64, 6_400),
    "a wall of 429s at 8": (Shape(wall=8), 8, 4_000),
    "a wall of 429s at 64": (Shape(wall=64), 64, 6_400),
    "a knee at 16": (Shape(knee=16, slope=1.5), 16, 4_000),
    "a knee at 64": (Shape(knee=64, slope=1.5), 64, 12_800),
}
LARGE = {
    "512 slots with a queue": (Shape(slots=512), 512, 51_200),
    "a wall of 429s at 512": (Shape(wall=512), 512, 51_200),
    "a knee at 256": (Shape(knee=256, slope=1.5), 256, 51_200),
}


def best_fixed(shape: Shape, capacity: int, rows: int) -> Outcome:
    """The best of the fixed numbers around the capacity, which we would have to know."""
    shares = (0.9, 1.0) if shape.wall < 1e9 else (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
    return max(closed_loop(shape, rows, int(capacity * share)) for share in shares)


def check(name: str, shape: Shape, capacity: int, rows: int, seeds: int) -> None:
    best = best_fixed(shape, capacity, rows)
    found = [closed_loop(shape, rows, Concurrency(0.0), seed) for seed in range(1, seeds + 1)]
    for outcome in found:
        share, refused = outcome.rows_per_s / best.rows_per_s, outcome.refused / outcome.requests
        print(f"{name}: {share:.3f} of the best fixed, {refused:.2%} refused, ends at {outcome.level}")  # noqa: T201
        assert share >= 0.9
        assert refused < 0.02


@pytest.mark.parametrize("name", SHAPES)
def test_it_comes_within_a_tenth_of_the_best_fixed_number_without_knowing_it(name: str) -> None:
    check(name, *SHAPES[name], seeds=2)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [*SHAPES, *LARGE])
def test_it_does_so_at_any_size_and_by_no_luck(name: str) -> None:
    check(name, *{**SHAPES, **LARGE}[name], seeds=10)


def test_it_saves_latency_where_more_brings_nothing() -> None:
    control = Concurrency(0.0)
    closed_loop(Shape(slots=8), 4000, control)
    assert control.level <= 16


def test_a_few_refusals_by_chance_do_not_drive_it_to_the_floor() -> None:
    control = Concurrency(0.0)
    closed_loop(Shape(slots=64, refused_anyway=0.04), 4000, control)
    assert control.level >= 16


def test_it_never_goes_beyond_what_it_may() -> None:
    control = Concurrency(0.0, most=30)
    closed_loop(Shape(slots=512), 3000, control)
    assert max(level for _, level in control.path) == 30 < MOST


def test_it_stays_where_it_is_while_something_else_limits_us() -> None:
    control = Concurrency(0.0)
    for i in range(1000):
        control.ended(float(i), i - 1.0, 1.0, busy=False)
    assert control.level == 20


def test_its_path_is_kept_short_and_ends_where_it_is() -> None:
    control = Concurrency(0.0)
    closed_loop(Shape(slots=64), 20_000, control)
    assert len(control.path) <= 500
    assert control.path[0] == (0.0, 20)
    assert control.path[-1][1] == control.level
