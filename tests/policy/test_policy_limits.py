from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchstream.policy.limits import SHUT_AFTER, Lane
from batchstream.records import Failure


def upper(_: float, b: float) -> float:
    return b


def test_a_lane_without_limits_never_waits() -> None:
    lane = Lane()
    assert [lane.reserve(5.0) for _ in range(100)] == [0.0] * 100


@given(st.floats(1, 6000), st.lists(st.floats(0, 3), max_size=200))
def test_no_minute_holds_more_than_the_limit_and_one(rpm: float, thinking: list[float]) -> None:
    lane, now, left = Lane(rpm), 1000.0, []
    for pause in thinking:
        now += pause
        while (wait := lane.reserve(now)) > 0:
            now += wait
        left.append(now)
    for start in left:
        assert sum(start <= t < start + 59.999 for t in left) <= rpm + 1


def test_a_lane_is_never_idle_while_a_request_is_allowed() -> None:
    lane, now, left = Lane(60), 0.0, 0
    while now < 600:
        wait = lane.reserve(now)
        left += wait == 0
        now += wait
    assert left >= 600


def test_a_stated_wait_closes_the_gate_for_everybody() -> None:
    lane = Lane()
    lane.rate_limited(Failure("rate_limit", "", True, 429, retry_after=7.0), 100.0, 0.0, upper)
    assert lane.reserve(101.0) == 6.0
    assert lane.reserve(107.0) == 0.0


def test_a_later_and_shorter_wait_does_not_open_the_gate_early() -> None:
    lane = Lane()
    lane.rate_limited(Failure("rate_limit", "", True, 429, retry_after=30.0), 100.0, 0.0, upper)
    lane.rate_limited(Failure("rate_limit", "", True, 429, retry_after=1.0), 101.0, 0.0, upper)
    assert lane.reserve(110.0) == 20.0


def test_a_used_up_window_without_a_hint_waits_for_the_next_minute() -> None:
    lane = Lane()
    for _ in range(SHUT_AFTER - 1):
        lane.rate_limited(Failure("rate_limit", "", True, 429), 100.0, 1_000_010.0, upper)
    assert lane.reserve(100.0) == 0.0
    lane.rate_limited(Failure("rate_limit", "", True, 429), 100.0, 1_000_010.0, upper)
    into_minute = 1_000_010.0 % 60
    assert lane.reserve(100.0) == 60 - into_minute + 1.0


def test_a_success_between_two_refusals_keeps_the_gate_open() -> None:
    lane = Lane()
    for _ in range(20):
        lane.rate_limited(Failure("rate_limit", "", True, 429), 100.0, 0.0, upper)
        lane.succeeded()
    assert lane.reserve(100.0) == 0.0
