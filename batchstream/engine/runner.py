"""Many requests at once: bounded concurrency, retries that give their slot back, one stop for all.

Each row is one task. It holds a slot only from its turn in the lane to the end of the response; waiting
for a retry it holds none, so the slots stay busy with fresh rows. The number of rows alive (on the wire
or waiting) is bounded too, which keeps memory flat whatever the file's length. Before a request leaves
it passes its lane: the rate, and the gate that a 429 closes for everybody.

Ending: `stop(reason)` admits nothing more and lets what is on the wire finish (drain); `abort()` cuts it.
Rows that are waiting when the run stops stay pending, as do rows that failed for the account's or the
endpoint's sake and not for their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Literal, Protocol

import msgspec

from batchstream.engine.client import Client
from batchstream.engine.course import Course
from batchstream.engine.outcome import invalid_result, result_of
from batchstream.engine.progress import Progress
from batchstream.policy.breaker import Breaker
from batchstream.policy.limits import Lane
from batchstream.policy.retry import ACCOUNT_KINDS, NOT_THE_ROWS, RetryPolicy, daily_limit
from batchstream.records import Attempt, Failure, InvalidRow, Request, Result

ALIVE_PER_SLOT = 4
"""Rows alive for each slot: one on the wire, the others waiting for their retry."""


class Stop(msgspec.Struct, frozen=True):
    """Why a run ended before its rows did. `cause` decides the exit code."""

    cause: Literal["signal", "account", "endpoint", "budget", "storage"]
    message: str
    signal: int = 0


class Sink(Protocol):
    """Where the runner puts what happens to a row: the journal, or a caller's queue."""

    async def room(self) -> None:
        """Returns once more rows may be taken in (the disk has caught up)."""

    def admit(self, request: Request) -> bool:
        """Just before the first request of a row may leave. False: it must not, wait for `room` and ask again."""

    def done(self, row: Request | InvalidRow, result: Result) -> None:
        """The row has its result."""

    def gave_up(self, request: Request, *, maybe_billed: bool) -> None:
        """An admitted row stays pending after all: nothing of it is stored."""


class Budget(msgspec.Struct, frozen=True):
    """Limits the user set on one run; None is no limit. `seconds` count from the start of admission."""

    seconds: float | None = None
    requests: int | None = None
    tokens: int | None = None


class Runner:
    """Runs rows through a client into a sink. One use; all methods on one event loop.

    `on_failure(request, failure, attempt)` is told of every attempt that failed, the row's first being 1 (for logs).
    """

    def __init__(
        self,
        client: Client,
        sink: Sink,
        progress: Progress,
        *,
        concurrency: int,
        policy: RetryPolicy,
        lane: Lane,
        breaker: Breaker,
        budget: Budget,
        on_failure: Callable[[Request, Failure, int], None] | None = None,
    ) -> None:
        self.stop_reason: Stop | None = None
        self._client = client
        self._sink = sink
        self._progress = progress
        self._slots = asyncio.Semaphore(concurrency)
        self._alive = asyncio.Semaphore(concurrency * ALIVE_PER_SLOT)
        self._turn = asyncio.Lock()
        self._policy = policy
        self._lane = lane
        self._breaker = breaker
        self._budget = budget
        self._on_failure = on_failure
        self._tasks: dict[asyncio.Task[None], Course] = {}
        self._refused: list[tuple[Course, Attempt]] = []
        self._stopped = asyncio.Event()
        self._idle = asyncio.Event()
        self._requests = 0
        self._tokens = 0
        self._error: BaseException | None = None
        # One reading of the two clocks: instants become dates by it, whatever the wall clock does later.
        self._epoch = time.time() - time.monotonic()

    def stop(self, reason: Stop) -> None:
        """Admit nothing more; rows on the wire finish, rows waiting stay pending. The first reason counts."""
        if self.stop_reason is not None:
            return
        self.stop_reason = reason
        self._halt()

    def _halt(self) -> None:
        self._stopped.set()
        myself = asyncio.current_task()  # a row whose own news is the reason has its result already
        for task, course in list(self._tasks.items()):
            if not course.on_wire and task is not myself:
                task.cancel()

    def abort(self) -> None:
        """Cut what is on the wire, now. What was cut stays pending and may have been billed."""
        for task in list(self._tasks):
            task.cancel()

    async def run(self, rows: AsyncIterator[list[Request | InvalidRow]], *, drain_timeout: float) -> Stop | None:
        """Serve all rows, or stop early and say why. Raises bugs, and what `rows` or the sink raise: what is on the
        wire by then has been paid for, so it is waited for as after a stop."""
        alarm = None
        if self._budget.seconds is not None:
            reason = Stop("budget", f"--max-time {self._budget.seconds:g} s is over")
            alarm = asyncio.get_running_loop().call_later(self._budget.seconds, self.stop, reason)
        try:
            try:
                await self._take_in(rows)
            except Exception as error:
                self._error = self._error or error
                self._halt()
            await self._drain(drain_timeout)
        except BaseException:
            await self._cut()
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if self._error is not None:
            raise self._error
        self._keep_refused_pending()
        return self.stop_reason

    async def _take_in(self, rows: AsyncIterator[list[Request | InvalidRow]]) -> None:
        """Start row after row, until there are no more or the run stops."""
        async for batch in rows:
            if not await self._unless_stopped(self._sink.room):
                return
            for row in batch:
                if isinstance(row, InvalidRow):
                    self._sink.done(row, invalid_result(row))
                elif not await self._admitted(row):
                    return
            if self._stopped.is_set():
                return

    async def _admitted(self, row: Request) -> bool:
        """Start one row; False when the run has stopped and the row was not taken.
        (After a stop nobody asks for a place any more, so none is given back.)"""
        for room in (self._alive, self._slots):
            if not room.locked():
                await room.acquire()
            elif not await self._unless_stopped(room.acquire):
                return False
        while self._stopped.is_set() or not self._sink.admit(row):
            if not await self._unless_stopped(self._sink.room):
                return False
        course = Course(row, self._policy, self._send, self._park)
        task = asyncio.create_task(self._serve(course))
        self._tasks[task] = course
        self._idle.clear()
        task.add_done_callback(self._ended)
        return True

    async def _unless_stopped(self, wait: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        """Wait, and say True, unless the run has stopped or stops first."""
        if self._stopped.is_set():
            return False
        waiting = asyncio.ensure_future(wait())
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((waiting, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            stopped.cancel()
        return not self._stopped.is_set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        course = self._tasks.pop(task)
        if not self._tasks:
            self._idle.set()
        self._alive.release()
        if course.holds_slot:
            self._slots.release()
        if task.cancelled():
            self._sink.gave_up(course.request, maybe_billed=course.on_wire)
        elif (error := task.exception()) is not None and self._error is None:
            self._error = error
            self._stopped.set()
            self.abort()

    async def _drain(self, patience: float) -> None:
        """Wait for the rows under way: as long as it takes, or for `patience` seconds once stopped."""
        if self._tasks and not await self._unless_stopped(self._idle.wait):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), patience)
        await self._cut()

    async def _cut(self) -> None:
        while self._tasks:
            self.abort()
            await asyncio.wait(tuple(self._tasks), timeout=1.0)

    async def _serve(self, course: Course) -> None:
        attempt = await course.run()
        failure = attempt.failure
        if failure is None:
            self._breaker.succeeded()
            self._lane.succeeded()
            self._own_trouble(attempt)
            self._finish(course, attempt)
        elif self._breaker.enabled and self._policy.too_long(failure):
            self._sink.gave_up(course.request, maybe_billed=False)
            asked = f"the endpoint asks to wait {failure.retry_after:.0f} s, more than --max-wait"
            self.stop(Stop("budget", f"{asked} {self._policy.max_wait:.0f}: {failure.message}"))
        elif self._breaker.enabled and daily_limit(failure):
            self._sink.gave_up(course.request, maybe_billed=False)
            self.stop(Stop("budget", f"the provider's daily limit is used up: {failure.message}"))
        elif self._breaker.enabled and failure.kind in NOT_THE_ROWS:
            self._refused.append((course, attempt))
            if (reason := self._breaker.refused(failure)) is not None:
                self.stop(Stop("account" if failure.kind in ACCOUNT_KINDS else "endpoint", reason))
        else:
            self._finish(course, attempt)
            if (reason := self._breaker.row_failed(failure)) is not None:
                self.stop(Stop("endpoint", reason))

    def _own_trouble(self, success: Attempt) -> None:
        """What was refused before this success was even sent is the refused rows' own trouble: account and
        endpoint work. (A success that was on its way already proves nothing.)"""
        sent = success.timing.sent or 0.0
        waiting = self._refused
        self._refused = [held for held in waiting if (held[1].timing.ended or 0.0) >= sent]
        for course, attempt in waiting:
            if (attempt.timing.ended or 0.0) < sent:
                self._finish(course, attempt)

    def _keep_refused_pending(self) -> None:
        for course, attempt in self._refused:
            self._sink.gave_up(course.request, maybe_billed=False)
            if self.stop_reason is None and (failure := attempt.failure) is not None:
                cause: Literal["account", "endpoint"] = "account" if failure.kind in ACCOUNT_KINDS else "endpoint"
                way_out = "if only these rows are refused, --breaker off records them as failed"
                self.stop_reason = Stop(cause, f"{failure.kind}: {failure.message}; {way_out}")
        self._refused.clear()

    def _finish(self, course: Course, attempt: Attempt) -> None:
        self._sink.done(course.request, result_of(course.request, attempt, course.retries, self._epoch))

    async def _send(self, course: Course) -> Attempt:
        """One attempt: through the lane, onto the wire, and the news it brings for the lane."""
        await self._pass_lane()
        progress = self._progress
        course.on_wire = True
        progress.in_flight += 1
        self._requests += 1
        if self._requests == self._budget.requests:
            self.stop(Stop("budget", f"--max-requests {self._budget.requests} are used up"))
        try:
            attempt = await self._client.attempt(course.request, time.monotonic())
        finally:
            progress.in_flight -= 1
        course.on_wire = False
        self._learn(course, attempt)
        return attempt

    def _learn(self, course: Course, attempt: Attempt) -> None:
        progress, failure, completion = self._progress, attempt.failure, attempt.completion
        if completion is not None and completion.usage is not None:
            self._tokens += completion.usage.total_tokens or 0
            progress.tokens += completion.usage.completion_tokens or 0
            if self._budget.tokens is not None and self._tokens >= self._budget.tokens:
                used = f"({self._tokens} so far)"
                self.stop(Stop("budget", f"--max-tokens-total {self._budget.tokens} are used up {used}"))
        if failure is None:
            timing = attempt.timing
            if timing.sent is not None and timing.first_output is not None:
                progress.ttft.append(timing.first_output - timing.sent)
            return
        # A wait beyond --max-wait is not waited for: the run stops, or (--breaker off) only this row is given up.
        if failure.kind == "rate_limit" and not self._policy.too_long(failure):
            self._lane.rate_limited(failure, time.monotonic(), time.time(), random.uniform)
            progress.gate_until = self._lane.closed_until
        if self._on_failure is not None:
            self._on_failure(course.request, failure, len(course.retries) + 1)

    async def _park(self, course: Course, seconds: float) -> None:
        """Wait for a retry without holding a slot, then take one again."""
        progress = self._progress
        progress.retries += 1
        progress.retry_kinds[course.retries[-1].kind] += 1
        if self._stopped.is_set():
            raise asyncio.CancelledError
        progress.waiting += 1
        course.holds_slot = False
        self._slots.release()
        try:
            await asyncio.sleep(seconds)
            await self._slots.acquire()
            course.holds_slot = True
        finally:
            progress.waiting -= 1

    async def _pass_lane(self) -> None:
        """Wait until the lane lets a request leave, in the order of asking."""
        lane = self._lane
        if not self._turn.locked() and lane.reserve(time.monotonic()) == 0.0:
            return
        async with self._turn:
            while (wait := lane.reserve(time.monotonic())) > 0.0:  # noqa: ASYNC110  (time itself opens the lane)
                await asyncio.sleep(wait)
