"""Rolling and fixed windows in virtual time: never more than the limit, never idle while it allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchstream.policy.windows import GUARD, SLACK, Fixed, Rolling, Window

weights = st.sampled_from([1.0, 1.5, 2.0, 3.0])
pauses = st.lists(st.tuples(st.floats(0, 30), weights), min_size=1, max_size=150)


def leave(window: Window, thinking: list[tuple[float, float]], now: float) -> list[tuple[float, float]]:
    """Requests that come after these pauses with these costs, each leaving as soon as it may: (instant, cost)."""
    left = []
    for pause, cost in thinking:
        now += pause
        while (wait := window.wait(now, cost)) > 0:
            now += wait
        window.take(now, cost)
        left.append((now, cost))
    return left


@given(st.floats(4, 600), pauses, st.floats(0, 1e6))
def test_no_minute_of_any_alignment_holds_more_than_a_rolling_limit(limit, thinking, start) -> None:
    left = leave(Rolling(limit), thinking, start)
    for edge, _ in left:
        assert sum(cost for at, cost in left if edge <= at < edge + 60) <= limit + 1e-4


@given(st.floats(4, 600), pauses, st.floats(0, 1e6), st.floats(0, 59))
def test_no_window_holds_more_than_a_fixed_limit(limit, thinking, start, phase) -> None:
    left = leave(Fixed(limit, 60.0, phase), thinking, start)
    held: dict[int, float] = {}
    for at, cost in left:
        index = int((at - phase) // 60)
        held[index] = held.get(index, 0.0) + cost
    assert max(held.values()) <= limit + 1e-4


@given(st.integers(2, 600), st.sampled_from([1.0, 1.5, 2.0]), st.booleans())
@settings(max_examples=50)
def test_it_is_never_idle_while_the_limit_allows(limit, weight, fixed) -> None:
    window: Window = Fixed(limit, 60.0, 7.0) if fixed else Rolling(limit)
    now, minutes, calls = 7.0, 10, 0
    end = now + 60 * minutes
    while now < end:
        wait = window.wait(now, weight)
        if wait == 0.0:
            window.take(now, weight)
            calls += 1
        now += wait
    allowed = limit // weight * minutes
    assert calls >= allowed * (1 - SLACK) - 2


@pytest.mark.parametrize("window", [Fixed(4.0), Rolling(4.0)])
def test_a_request_that_costs_more_than_the_limit_leaves_when_nothing_else_has(window: Window) -> None:
    assert window.wait(30.0, 9.0) == 0.0
    window.take(30.0, 9.0)
    assert window.wait(31.0, 1.0) > 28


def test_a_fixed_window_leaves_its_edges_alone() -> None:
    window = Fixed(10)
    assert window.wait(0.0, 1) == pytest.approx(60 * GUARD)
    assert window.wait(30.0, 1) == 0.0
    assert window.wait(59.9, 1) == pytest.approx(0.1 + 60 * GUARD)


@pytest.mark.parametrize("make", [Fixed, Rolling])
def test_what_cost_less_than_reserved_makes_room_and_what_cost_more_takes_it(make) -> None:
    window = make(100.0)
    ticket = window.take(10.0, 80.0)
    assert window.wait(20.0, 40.0) > 1
    window.settle(ticket, 10.0)
    assert window.wait(20.0, 40.0) == 0.0
    window.settle(ticket, 100.0)
    assert window.wait(20.0, 40.0) > 1


class Provider:
    """Fixed windows as a provider counts them, with a phase of its own."""

    def __init__(self, limit: float, phase: float) -> None:
        self.limit, self.phase, self.used, self.index = limit, phase, 0.0, -1
        self.refused: dict[int, int] = {}
        self.accepted: dict[int, float] = {}

    def asks(self, now: float, cost: float) -> bool:
        index = int((now - self.phase) // 60)
        if index != self.index:
            self.index, self.used = index, 0.0
        if self.used + cost > self.limit + 1e-9:
            self.refused[index] = self.refused.get(index, 0) + 1
            return False
        self.used += cost
        self.accepted[index] = self.accepted.get(index, 0.0) + cost
        return True


def live(window: Fixed, provider: Provider, *, pace: float, weight: float, now: float, minutes: int) -> None:
    """Ask for so many minutes, `pace` seconds between two requests; a 429 states no wait."""
    end = now + 60 * minutes
    gate = 0.0
    while now < end:
        wait = max(window.wait(now, weight), gate - now)
        if wait > 0:
            now += wait
            continue
        ticket = window.take(now, weight)
        if not provider.asks(now, weight):
            window.settle(ticket, 0.0)
            opens = window.refused(now, weight, now)
            assert opens is not None
            gate = opens
        now += pace


@given(st.floats(0, 59.9), st.floats(0, 60), st.sampled_from([1.0, 1.5, 2.0]), st.floats(0.01, 1.9))
@settings(max_examples=200)
def test_an_unknown_phase_costs_few_refusals_and_then_none(phase, start, weight, pace) -> None:
    provider, window = Provider(30, phase), Fixed(30)
    live(window, provider, pace=pace, weight=weight, now=start, minutes=30)
    indexes = sorted(provider.accepted)
    assert max(provider.refused.values(), default=0) <= 1, "one request finds out, the others wait"
    settled = indexes[10:-1]
    assert sum(provider.refused.get(index, 0) for index in settled) <= 1
    full = sum(provider.accepted[index] for index in settled)
    assert full >= 0.97 * len(settled) * (30 // weight * weight) - 2 * weight


@given(st.integers(3, 25), st.floats(0, 60))
@settings(max_examples=50)
def test_a_limit_stated_too_high_is_learnt_and_tried_again_now_and_then(true, start) -> None:
    provider, window = Provider(true, 0.0), Fixed(30)
    live(window, provider, pace=0.1, weight=1.0, now=start, minutes=60)
    indexes = sorted(provider.accepted)[1:-1]
    assert max(provider.refused.values()) == 1
    assert sum(provider.accepted[index] for index in indexes) >= 0.97 * true * len(indexes)
    assert sum(provider.refused.values()) <= 12, "five windows until the first look, twice as many until each next"


def test_a_learnt_limit_rises_again_when_the_provider_allows_more() -> None:
    provider, window = Provider(10, 0.0), Fixed(30)
    live(window, provider, pace=0.1, weight=1.0, now=2.0, minutes=5)
    assert window.limit_now() <= 11
    provider.limit = 30
    live(window, provider, pace=0.1, weight=1.0, now=302.0, minutes=300)
    assert window.limit_now() == 30
