from __future__ import annotations

import itertools

import pytest

from batchstream.policy.breaker import DOWN_AFTER, ON, Breaker, BreakerSettings, Outage, parse_breaker
from batchstream.records import Failure

ALIKE_LIMIT, REFUSALS = ON.failures, ON.refusals

AUTH = Failure("auth", "bad key", retryable=False, status=401)
SERVER = Failure("server", "boom", retryable=True, status=500)


def test_the_third_refusal_of_the_account_in_a_row_stops_the_run() -> None:
    breaker = Breaker()
    reasons = [breaker.refused(AUTH) for _ in range(REFUSALS)]
    assert reasons == [None, None, "auth: bad key"]


def test_a_success_begins_the_count_anew() -> None:
    breaker = Breaker()
    for _ in range(10):
        assert breaker.refused(AUTH) is None
        assert breaker.refused(AUTH) is None
        breaker.succeeded()


def test_a_row_of_rows_failing_alike_stops_the_run() -> None:
    breaker = Breaker()
    reasons = [breaker.row_failed(SERVER) for _ in range(ALIKE_LIMIT)]
    assert reasons[:-1] == [None] * (ALIKE_LIMIT - 1)
    assert reasons[-1] is not None
    assert "boom" in reasons[-1]


def test_rows_that_fail_differently_do_not() -> None:
    breaker = Breaker()
    kinds = ["server", "decode"] * ALIKE_LIMIT
    assert all(breaker.row_failed(Failure(kind, "", retryable=True)) is None for kind in kinds)


def test_a_file_full_of_rows_too_long_for_the_model_is_worked_off() -> None:
    breaker = Breaker()
    long = Failure("context_length", "too long", retryable=False, status=400)
    assert all(breaker.row_failed(long) is None for _ in range(10 * ALIKE_LIMIT))


def test_off_means_off() -> None:
    breaker = Breaker(BreakerSettings(enabled=False))
    assert all(breaker.refused(AUTH) is None and breaker.row_failed(SERVER) is None for _ in range(10 * ALIKE_LIMIT))


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("on", BreakerSettings(20, 3)),
        ("off", BreakerSettings(enabled=False)),
        ("failures=5", BreakerSettings(5, 3)),
        ("refusals=1, failures=0", BreakerSettings(0, 1)),
    ],
)
def test_the_breaker_is_set_in_words(text: str, settings: BreakerSettings) -> None:
    assert parse_breaker(text) == settings


@pytest.mark.parametrize(
    "text", ["", "maybe", "failures", "failures=-1", "failures=x", "rows=3", "failures=3;refusals=1"]
)
def test_a_setting_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="failures=20,refusals=3"):
        parse_breaker(text)


def test_zero_failures_are_never_too_many() -> None:
    breaker = Breaker(BreakerSettings(failures=0, refusals=0))
    assert not any(breaker.refused(AUTH) or breaker.row_failed(SERVER) for _ in range(100))


GONE = Failure("connect", "connection refused", retryable=True)
GATEWAY = Failure("server", "bad gateway", retryable=True, status=502)


def down(now: float = 100.0, longest: float = 300.0) -> Outage:
    outage = Outage(longest)
    outage.answered()
    for _ in range(DOWN_AFTER):
        assert not outage.down
        outage.failed(GATEWAY, now)
    return outage


def test_an_endpoint_that_is_down_is_asked_by_one_request_at_a_time_more_and_more_seldom() -> None:
    outage, now, asked = down(), 100.0, []
    assert outage.down
    for _ in range(8):
        now += outage.wait(now)
        asked.append(now)
        outage.take()
        assert outage.wait(now) == float("inf"), "one is asking"
        outage.failed(GONE, now)
    gaps = [round(b - a) for a, b in itertools.pairwise(asked)]
    assert gaps == [1, 2, 4, 8, 16, 30, 30]


def test_an_answer_ends_the_outage() -> None:
    outage = down()
    outage.answered()
    assert (outage.down, outage.wait(100.0)) == (False, 0.0)


def test_an_outage_that_lasts_too_long_is_a_reason_to_stop() -> None:
    outage = down(longest=60)
    assert outage.over(159.0) is None
    reason = outage.over(161.0)
    assert reason is not None
    assert "61 s" in reason
    assert "--max-outage 60" in reason


def test_an_endpoint_that_has_never_answered_is_no_outage() -> None:
    outage = Outage(300)
    for _ in range(100):
        outage.failed(GONE, 1.0)
    assert not outage.down


def test_other_failures_are_no_outage_but_end_a_probe() -> None:
    outage = Outage(300)
    outage.answered()
    for _ in range(100):
        outage.failed(SERVER, 1.0)
    assert not outage.down
    outage = down()
    outage.take()
    outage.failed(Failure("timeout", "", retryable=True), 200.0)
    assert outage.wait(200.0) < float("inf")
