"""One row's way through its attempts: tenacity drives, our policy decides, every failure is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_result

from batchstream.engine.outcome import retry_of
from batchstream.policy.retry import ACCOUNT_KINDS, RetryPolicy
from batchstream.records import Attempt, Failure, Request, Retry


class Course:
    """The attempts at one row so far. `send` makes one attempt, `park` waits without a slot.

    For the runner: `lane_key` names the lane the row goes by, `due` is the instant at which the next attempt may or
    should leave, `turn` is set while a retry waits for it; `under_way`: its first turn has come; `admitted`: the sink
    knows that a request of it leaves; `holds_slot` and `on_wire`: it may be sent, it is being sent.
    """

    __slots__ = (
        "_failures",
        "_limit_waits",
        "_park",
        "_policy",
        "_send",
        "admitted",
        "due",
        "holds_slot",
        "lane_key",
        "on_wire",
        "request",
        "retries",
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
    ) -> None:
        self.request = request
        self.retries: list[Retry] = []
        self.lane_key = lane_key
        self.due: float | None = None
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

    async def run(self) -> Attempt:
        """Attempt until the policy is content or gives up; the last attempt is returned."""
        attempt = await self._send(self)
        if not _failed_for_now(attempt) or not self._policy.may_retry([_failure(attempt)], 0.0):
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
        return not self._policy.may_retry(self._failures, self._limit_waits)

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
