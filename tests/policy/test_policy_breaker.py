from __future__ import annotations

from batchstream.policy.breaker import ALIKE_LIMIT, REFUSALS, Breaker
from batchstream.records import Failure

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
    breaker = Breaker(enabled=False)
    assert all(breaker.refused(AUTH) is None and breaker.row_failed(SERVER) is None for _ in range(10 * ALIKE_LIMIT))
