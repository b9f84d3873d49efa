"""One row's way through its attempts: tenacity drives, our policy decides, every failure is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_result

from batchstream.engine.outcome import retry_of
from batchstream.policy.limits import ONE, Cost, Reserved
from batchstream.policy.retry import ACCOUNT_KINDS, RetryPolicy
from batchstream.records import Attempt, Failure, Request, Retry


class Course:
    """The attempts at one row so far. `send` makes one attempt, `park` waits without a slot.

    For the runner: `lane_key` names the lane the row goes by, `due` is the instant at which the next attempt may or
    should leave, `turn` is set while a retry waits for it; `under_way`: its first turn has come; `admitted`: the sink
    knows that a request of it leaves; `holds_slot` and `on_wire`: it may be sent, it is being sent; `cost`: what a
    request of it takes from its lane, by estimate; `reserved`: what it has taken; `retry_tokens`: what its retries have
    taken from the lane's retry budget; `excused`: attempts that failed because the endpoint was down, which do not
    count.
    """

    __slots__ = (
        "_failures",
        "_limit_waits",
        "_park",
        "_policy",
        "_send",
        "admitted",
        "cost",
        "due",
        "excused",
        "holds_slot",
        "lane_key",
        "on_wire",
        "request",
        "reserved",
        "retries",
        "retry_tokens",
        "turn",
        "under_way",
    )

    def __init__(
        self,
        request: Request,
        policy: RetryPolicy,
        send: Callable[[Course], Awaitable[Attempt]],
        park: Callable[[Course, float], Awaitable[None]],
        lane_key: str = "",
        cost: Cost = ONE,
    ) -> None:
        self.request = request
        self.retries: list[Retry] = []
        self.lane_key = lane_key
        self.due: float | None = None
        self.cost = cost
        self.reserved: Reserved | None = None
        self.retry_tokens = 0.0
        self.excused = 0
        self.turn: asyncio.Future[None] | None = None
        self.under_way = False
        self.admitted = False
        self.holds_slot = False
        self.on_wire = False
        self._policy = policy
        self._send = send
        self._park = park
        self._failures: list[Failure] = []
        self._limit_waits = 0.0

    @property
    def limited(self) -> bool:
        """Whether the last attempt met a rate limit, or a dead endpoint: it comes again for no fault of its own."""
        return bool(self.retries) and (self.retries[-1].kind == "rate_limit" or self.excused > 0)

    async def run(self) -> Attempt:
        """Attempt until the policy is content or gives up; the last attempt is returned."""
        attempt = await self._send(self)
        if not _failed_for_now(attempt) or not self._policy.may_retry([_failure(attempt)], 0.0, self.excused):
            return attempt
        # The first attempt is made before tenacity takes over: its bookkeeping costs 20 µs of CPU,
        # which nearly every row can do without.
        first: list[Attempt] = [attempt]

        async def next_attempt() -> Attempt:
            attempt = first.pop() if first else await self._send(self)
            if attempt.failure is not None:
                # Noted here and not in a hook: tenacity asks for the wait before it asks whether to stop.
                self._failures.append(attempt.failure)
            return attempt

        retrying = AsyncRetrying(
            retry=retry_if_result(_failed_for_now),
            stop=self._give_up,
            wait=self._wait,
            sleep=self._sleep,
            before_sleep=self._note,
            retry_error_callback=_last,
        )
        return await retrying(next_attempt)

    def _give_up(self, state: RetryCallState) -> bool:
        return not self._policy.may_retry(self._failures, self._limit_waits, self.excused)

    def _wait(self, state: RetryCallState) -> float:
        return self._policy.wait(self._failures, random.uniform)

    def _note(self, state: RetryCallState) -> None:
        assert state.next_action is not None  # noqa: S101  (tenacity sets it before it sleeps)
        seconds = state.next_action.sleep
        attempt = _last(state)
        if _failure(attempt).kind == "rate_limit":
            self._limit_waits += seconds
        self.retries.append(retry_of(attempt, seconds))

    async def _sleep(self, seconds: float) -> None:
        await self._park(self, seconds)


def _failed_for_now(attempt: Attempt) -> bool:
    failure = attempt.failure
    return failure is not None and failure.retryable and failure.kind not in ACCOUNT_KINDS


def _failure(attempt: Attempt) -> Failure:
    assert attempt.failure is not None  # noqa: S101  (asked only of failed attempts)
    return attempt.failure


def _last(state: RetryCallState) -> Attempt:
    assert state.outcome is not None  # noqa: S101  (an attempt has ended)
    attempt: Attempt = state.outcome.result()
    return attempt
