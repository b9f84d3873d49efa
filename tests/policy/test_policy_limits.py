from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchstream.policy.limits import SHUT_AFTER, SLOWER, Cost, Lane, Lanes, Rates, rolling
from batchstream.policy.retry import BUCKET, RETRY_COSTS, TRICKLE_S, RetryBudget
from batchstream.records import Failure, RateNews

LIMITED = Failure("rate_limit", "", True, 429)


def told(seconds: float) -> Failure:
    return Failure("rate_limit", "", True, 429, retry_after=seconds)


def upper(_: float, b: float) -> float:
    return b


def lower(a: float, _: float) -> float:
    return a


def test_a_lane_without_limits_never_waits() -> None:
    lane = Lane()
    for _ in range(100):
        assert lane.wait(5.0) == 0.0
        lane.take(5.0)


def test_a_stated_wait_closes_the_gate_for_everybody() -> None:
    lane = Lane()
    lane.rate_limited(told(7.0), 100.0, 0.0, upper)
    assert lane.wait(101.0) == 6.0
    assert lane.binding(101.0) == "gate"
    assert lane.wait(107.0) == 0.0


def test_a_later_and_shorter_wait_does_not_open_the_gate_early() -> None:
    lane = Lane()
    lane.rate_limited(told(30.0), 100.0, 0.0, upper)
    lane.rate_limited(told(1.0), 101.0, 0.0, upper)
    assert lane.wait(110.0) == 20.0


@given(st.floats(0.1, 120), st.integers(2, 2000))
def test_a_crowd_leaves_by_and_by_when_a_gate_opens_and_never_before(closed_for: float, crowd: int) -> None:
    lane, left = Lane(), []
    lane.crowd = crowd
    lane.rate_limited(told(closed_for), 100.0, 0.0, upper)
    now = 100.0
    for _ in range(crowd):
        while (wait := lane.wait(now)) > 0:
            now += wait
        lane.take(now)
        left.append(now)
    opens = 100.0 + closed_for
    assert left[0] >= opens
    assert 0.3 <= left[-1] - opens <= 5.0
    quarter = (left[-1] - opens) / 4
    assert sum(at <= opens + quarter for at in left) <= crowd / 16 + 2, "slowly at first"


def test_without_a_known_limit_a_few_refusals_are_chance_and_more_are_a_used_up_minute() -> None:
    lane = Lane()
    for _ in range(SHUT_AFTER - 1):
        lane.rate_limited(LIMITED, 100.0, 1_000_010.0, upper)
    assert lane.wait(100.0) == 0.0
    lane.rate_limited(LIMITED, 100.0, 1_000_010.0, upper)
    into_minute = 1_000_010.0 % 60
    assert lane.wait(100.0) == 60 - into_minute + 1.0


def test_a_success_between_two_refusals_keeps_the_gate_open() -> None:
    lane = Lane()
    for _ in range(20):
        lane.rate_limited(LIMITED, 100.0, 0.0, upper)
        lane.succeeded()
    assert lane.wait(100.0) == 0.0


def test_a_burst_of_refusals_for_requests_that_left_together_is_one_piece_of_news() -> None:
    lane = Lane()
    together = [lane.take(100.0) for _ in range(50)]
    for reserved in together:
        lane.rate_limited(LIMITED, 100.5, 0.0, upper, reserved)
    assert lane.wait(100.5) == 0.0


def test_a_rolling_limit_that_is_refused_although_it_was_kept_pauses_and_slows_down() -> None:
    lane = rolling(60)
    lane.rate_limited(LIMITED, 100.0, 0.0, lower, lane.take(99.0))
    assert 0.4 < lane.wait(100.0) < 1.0
    assert lane.per_minute() == pytest.approx(60 * SLOWER)
    lane.take(400.0)
    assert lane.per_minute() == pytest.approx(60 * (SLOWER + 0.05))


def test_a_fixed_lane_waits_for_its_next_window_at_the_first_refusal() -> None:
    lane = Lanes(Rates(rpm=30, fixed=True))("m")
    lane.rate_limited(LIMITED, 70.0, 0.0, lower, lane.take(69.0))
    assert lane.wait(70.0) == pytest.approx(50.9, abs=0.1)


def test_a_share_of_a_lane_is_that_share_of_its_limits() -> None:
    lane = rolling(60)
    lane.share(0.25)
    assert lane.per_minute() == 15


def test_tokens_hold_up_a_request_that_requests_would_let_leave() -> None:
    lane = Lanes(Rates(rpm=600, tpm=1000, tpm_counts="output"))("m")
    lane.take(0.0, Cost(1, input=10_000, output=500))
    assert lane.binding(1.0, Cost(1, 10_000, 500)) == "tpm"
    assert lane.wait(1.0, Cost(1, 10_000, 500)) == pytest.approx(29, rel=0.02)


def test_models_with_limits_of_their_own_share_what_is_stated_for_all() -> None:
    lanes = Lanes(Rates(rpm={"small": 60}))
    assert lanes("small").limits
    assert not lanes("large").limits
    assert lanes("small") is lanes("small")
    both = Lanes(Rates(rpm=60))
    both("small").take(0.0)
    assert both("large").wait(0.0) > 0.9
    assert both("large") is not both("small"), "a 429 for one closes no gate for the other"
    account = Lanes(Rates(rpm=60, together=True))
    assert account("large") is account("small")
    stated = Lanes(Rates(rpm={"small": 60, "large": 120}, together=True))
    assert (stated("small").per_minute(), stated("large").per_minute()) == (60, 120)


@pytest.mark.parametrize(("remaining", "after", "leave"), [(3, 0, 3), (3, 2, 1), (0, 0, 0), (1, 5, 0)])
def test_what_left_after_the_answered_request_is_taken_off_what_remains(remaining, after, leave) -> None:
    lane = Lane()
    answered = lane.take(0.0)
    for _ in range(after):
        lane.take(0.1)
    lane.learn(RateNews(remaining_requests=remaining, reset_requests=20.0), 1.0, answered)
    left = 0
    while lane.wait(1.0) == 0.0:
        lane.take(1.0)
        left += 1
    assert left == leave
    assert lane.wait(1.0) == 20.0
    assert lane.wait(21.0) == 0.0


def test_the_reset_in_the_headers_tells_the_phase_of_fixed_windows() -> None:
    lane = Lanes(Rates(rpm=30, fixed=True))("m")
    lane.learn(RateNews(remaining_requests=29, reset_requests=17.0), 100.0, lane.take(99.0))
    assert lane.limits[0].window.phase == pytest.approx(117.0 % 60)  # type: ignore[union-attr]


def test_retries_have_a_budget_that_successes_fill_and_an_empty_one_only_brakes() -> None:
    budget = RetryBudget()
    taken = [budget.take(0.0, "server") for _ in range(BUCKET // RETRY_COSTS)]
    assert budget.wait(0.0) == TRICKLE_S
    assert budget.wait(TRICKLE_S) == 0.0
    budget.succeeded(taken[0])
    assert budget.wait(0.0) == 0.0, "a retry that was of use gives back what it took"
    for _ in range(1000):
        budget.succeeded(0.0)
    assert budget.tokens == BUCKET
