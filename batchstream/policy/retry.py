"""Whether a failed attempt is tried again, and when: decisions without a clock.

The practice (sources: AWS "Exponential backoff and jitter", Google SRE book ch. 21-22, RFC 9110 10.2.3):
full jitter, a wait that the server states is a floor with jitter upwards only, waits for a rate limit
do not eat attempts, and a wait beyond what the user allows is not shortened but refused.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from batchstream.records import Failure

BACKOFF_CAP_S = 60.0
RATE_LIMIT_PATIENCE_S = 3600.0
"""How long one row may wait for a rate limit altogether before the row is given up."""

ACCOUNT_KINDS = frozenset({"auth", "permission", "quota"})
"""The account's trouble, not the row's: such a row stays pending and is asked when the cause is mended."""

NOT_THE_ROWS = ACCOUNT_KINDS | {"connect", "tls", "redirect"}
"""What says nothing about the row: nobody to ask, or nobody who may be asked."""

_BASE_S = {"rate_limit": 1.0, "overloaded": 1.0}  # others: a quarter of a second
_UNCOUNTED = frozenset({"rate_limit"})


class RetryPolicy(msgspec.Struct, frozen=True):
    """`max_attempts` counts attempts that did not fail for a rate limit (1 means: each row is asked once,
    whatever comes); `max_wait` is the longest wait in seconds that a server may ask for."""

    max_attempts: int = 5
    max_wait: float = 300.0

    def may_retry(self, failures: list[Failure], waited_for_limit: float, excused: int = 0) -> bool:
        """After these failed attempts of a row (the last one just now), is there another?

        `waited_for_limit`: seconds this row has already waited for rate limits; `excused`: attempts among them that do
        not count, for the endpoint was down.
        """
        last = failures[-1]
        if not last.retryable or self.too_long(last) or self.max_attempts == 1:
            return False
        if last.kind in _UNCOUNTED:
            return waited_for_limit < RATE_LIMIT_PATIENCE_S
        return sum(f.kind not in _UNCOUNTED for f in failures) - excused < self.max_attempts

    def too_long(self, failure: Failure) -> bool:
        """The server asks for more patience than the user has."""
        return failure.retryable and failure.retry_after is not None and failure.retry_after > self.max_wait

    def wait(self, failures: list[Failure], uniform: Callable[[float, float], float]) -> float:
        """Seconds to wait after the last of `failures`; `uniform(a, b)` is the source of chance."""
        last = failures[-1]
        if last.retry_after is not None:
            return last.retry_after + uniform(0.0, max(0.5, last.retry_after * 0.1))
        same = sum(f.kind == last.kind for f in failures)
        ceiling = min(BACKOFF_CAP_S, _BASE_S.get(last.kind, 0.25) * 2.0 ** (min(same, 20) - 1))
        return uniform(0.0, ceiling)


def daily_limit(failure: Failure) -> bool:
    """A 429 whose text names the day: not the account's end, only today's (ShuttleAI, Gemini)."""
    words = failure.message.lower()
    return failure.kind == "quota" and failure.status == 429 and ("daily" in words or "per day" in words)


BUCKET = 100
"""Tokens of a lane's retry budget when it is full (gRPC's retry throttling and the SDKs of AWS do the like)."""

RETRY_COSTS, TIMEOUT_COSTS = 5, 10
"""What a retry takes out; a success that needed it puts the same back, any other success puts back one."""

TRICKLE_S = 0.1
"""With an empty budget one retry leaves in so many seconds: it is a brake, no row is given up for it."""


class RetryBudget:
    """Retries of one lane, at most a share of its requests: while much fails, retries give way to fresh rows, and a
    dead backend sees few of either. Waits for a rate limit are no retries in this sense."""

    __slots__ = ("_next", "tokens")

    def __init__(self) -> None:
        self.tokens = float(BUCKET)
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Seconds until a retry may leave."""
        return 0.0 if self.tokens >= RETRY_COSTS else max(0.0, self._next - now)

    def take(self, now: float, kind: str) -> float:
        """A retry after a failure of `kind` leaves; what it has taken out."""
        costs = float(min(self.tokens, TIMEOUT_COSTS if kind == "timeout" else RETRY_COSTS))
        self.tokens -= costs
        self._next = now + TRICKLE_S
        return costs

    def succeeded(self, taken: float) -> None:
        """A success, for which `taken` had been taken out (0.0: it needed no retry)."""
        self.tokens = min(float(BUCKET), self.tokens + max(taken, 1.0))
