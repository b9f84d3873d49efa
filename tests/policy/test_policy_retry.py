from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from batchstream.policy.retry import BACKOFF_CAP_S, RATE_LIMIT_PATIENCE_S, RetryPolicy
from batchstream.records import Failure

KINDS = ["server", "timeout", "truncated", "overloaded", "connect", "rate_limit", "decode"]


def failure(kind: str, *, retryable: bool = True, retry_after: float | None = None) -> Failure:
    return Failure(kind, "why", retryable, retry_after=retry_after)


def test_five_attempts_mean_four_retries() -> None:
    policy = RetryPolicy(max_attempts=5)
    allowed = [policy.may_retry([failure("server")] * n, 0.0) for n in range(1, 7)]
    assert allowed == [True, True, True, True, False, False]


def test_rate_limits_do_not_eat_attempts() -> None:
    policy = RetryPolicy(max_attempts=2)
    assert policy.may_retry([failure("rate_limit")] * 50, 0.0)
    assert policy.may_retry([failure("rate_limit")] * 50 + [failure("server")], 0.0)
    assert not policy.may_retry([failure("server"), *[failure("rate_limit")] * 50, failure("server")], 0.0)


def test_one_attempt_means_one_request_even_for_a_rate_limit() -> None:
    assert not RetryPolicy(max_attempts=1).may_retry([failure("rate_limit")], 0.0)


def test_a_row_does_not_wait_for_a_rate_limit_forever() -> None:
    assert not RetryPolicy().may_retry([failure("rate_limit")], RATE_LIMIT_PATIENCE_S)


def test_what_is_not_retryable_is_not_retried() -> None:
    assert not RetryPolicy().may_retry([failure("invalid_request", retryable=False)], 0.0)


def test_a_wait_beyond_the_users_patience_is_refused_and_not_shortened() -> None:
    policy = RetryPolicy(max_wait=300.0)
    patient = failure("rate_limit", retry_after=300.0)
    endless = failure("rate_limit", retry_after=301.0)
    assert policy.may_retry([patient], 0.0)
    assert not policy.too_long(patient)
    assert not policy.may_retry([endless], 0.0)
    assert policy.too_long(endless)


@given(st.floats(0, 300), st.integers(0, 2**32))
def test_a_stated_wait_is_a_floor_with_jitter_upwards(stated: float, seed: int) -> None:
    wait = RetryPolicy().wait([failure("rate_limit", retry_after=stated)], random.Random(seed).uniform)
    assert stated <= wait <= stated + max(0.5, stated * 0.1)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=40), st.integers(0, 2**32))
def test_backoff_is_full_jitter_under_a_doubling_ceiling(kinds: list[str], seed: int) -> None:
    wait = RetryPolicy().wait([failure(kind) for kind in kinds], random.Random(seed).uniform)
    base = 1.0 if kinds[-1] in ("rate_limit", "overloaded") else 0.25
    assert 0.0 <= wait <= min(BACKOFF_CAP_S, base * 2 ** (kinds.count(kinds[-1]) - 1))
