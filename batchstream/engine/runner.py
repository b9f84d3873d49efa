"""Many requests at once: bounded concurrency, retries that give their slot back, one stop for all.

Rows are taken in a little ahead of their turn and wait for it in `engine.departures`: a slot, and their lane, with its
rates and the gate that a 429 closes for everybody. A row becomes a task when its first request leaves. It holds a slot
to the end of the response; waiting for a retry it holds none, so the slots stay busy with fresh rows. The number of
rows alive is bounded, which keeps memory flat whatever the file's length.

Ending: `stop(reason)` admits nothing more and lets what is on the wire finish (drain); `abort()` cuts it.
Rows that are waiting when the run stops stay pending, as do rows that failed for the account's or the
endpoint's sake and not for their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal, Protocol

import msgspec

from batchstream.engine.client import Client
from batchstream.engine.course import Course
from batchstream.engine.departures import UNDER_WAY_PER_SLOT, Departures
from batchstream.engine.outcome import invalid_result, result_of
from batchstream.engine.progress import Progress
from batchstream.policy.breaker import Breaker, Outage
from batchstream.policy.budget import Budget, Estimator, Ledger, Prices, Spending
from batchstream.policy.concurrency import Concurrency
from batchstream.policy.limits import NOTHING, ONE, Cost, Lane, Lanes
from batchstream.policy.retry import ACCOUNT_KINDS, NOT_THE_ROWS, RetryPolicy, daily_limit
from batchstream.records import Attempt, Failure, InvalidRow, Request, Result, Usage

_ANSWER_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

READ_AHEAD = 64
"""Rows taken in at least, so that the next one is at hand when a slot becomes free …"""

LEDGER_S = 0.05
"""Where a budget is shared: how often those who wait look what others have spent."""

READ_AHEAD_LANES = 1024
"""… and where rows go by several lanes, so that those of a narrow one do not hide the others' from us."""


LEAD_S = 0.05
"""From the begin of a run to the first instant of its schedule: so long the first rows may take to be read."""


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
        """The first request of a row is about to be written. False: it must not, wait for `room` and ask again."""

    def done(self, row: Request | InvalidRow, result: Result) -> None:
        """The row has its result."""

    def gave_up(self, request: Request, *, maybe_billed: bool) -> None:
        """An admitted row stays pending after all: nothing of it is stored."""


class _NotNow(Exception):  # noqa: N818  (no error)
    """A request that was about to leave must wait for the disk."""


class Runner:
    """Runs rows through a client into a sink. One use; all methods on one event loop.

    `concurrency`: so many requests at once, or what finds out how many are good. `lanes` gives the lane of each model.
    `prices` are for `budget.cost` and for the figures; `outage` waits for an endpoint that is down; the `ledger` is
    shared with the processes whose budget it is as well. `schedule`: when
    the rows are due, one by one, in seconds from the begin (an open loop: `concurrency` then only guards this machine);
    rows beyond its end are not taken.
    `on_failure(request, failure, attempt)` is told of every attempt that failed, the row's first being 1 (for logs);
    `on_gate(lane_key, until)` when a 429 has closed a lane's gate until that instant of the monotonic clock, so that
    other processes at the same endpoint can be told (`close_gate`).
    """

    def __init__(
        self,
        client: Client,
        sink: Sink,
        progress: Progress,
        *,
        concurrency: int | Concurrency,
        policy: RetryPolicy,
        lanes: Lanes,
        breaker: Breaker,
        budget: Budget,
        prices: Prices | None = None,
        outage: Outage | None = None,
        ledger: Ledger | None = None,
        schedule: Iterator[float] | None = None,
        on_failure: Callable[[Request, Failure, int], None] | None = None,
        on_gate: Callable[[str, float], None] | None = None,
    ) -> None:
        self.stop_reason: Stop | None = None
        self._client = client
        self._sink = sink
        self._progress = progress
        self._policy = policy
        self._lanes = lanes
        self._fraction = 1.0
        self._held_until = 0.0
        self._adaptive = concurrency if isinstance(concurrency, Concurrency) else None
        slots = concurrency.level if isinstance(concurrency, Concurrency) else concurrency
        self._outage = outage or Outage(0.0, enabled=False)
        self._departures = Departures(self._lane_of, self._leave, slots, self._outage, progress)
        self._breaker = breaker
        self._spending = Spending(budget, prices or {}, ledger)
        self._counts_tokens = lanes.rates.tpm is not None or budget.tokens is not None or budget.cost is not None
        self._estimator = Estimator()
        self._schedule = schedule
        self._began = 0.0
        self._on_failure = on_failure
        self._on_gate = on_gate
        self._tasks: dict[asyncio.Task[None], Course] = {}
        self._alive = 0
        self._place = asyncio.Event()
        self._refused: list[tuple[Course, Attempt]] = []
        self._stopped = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._asking: asyncio.TimerHandle | None = None
        # One reading of the two clocks: instants become dates by it, whatever the wall clock does later.
        self._epoch = time.time() - time.monotonic()

    def share(self, slots: int, fraction: float) -> None:
        """From now on: so many requests at once (where their number is being found out: at most so many), and this
        fraction of every lane's rates. For workers of one job, which divide both among them and divide them anew when
        one ends. May be called at any time, on the loop."""
        self._fraction = fraction
        for lane in self._departures.lanes():
            lane.share(fraction)
        if self._adaptive is None:
            self._resize(slots)
        else:
            self._adaptive.most = slots
            self._resize(min(self._adaptive.level, slots))
        self._departures.look()

    def hold(self, until: float) -> None:
        """Let no lane that is new begin before `until` (as in `close_gate`): what the process in whose place this one
        stands has taken of the limits is still counted against them. Before the first row."""
        self._held_until = until

    def close_gate(self, lane_key: str, until: float) -> None:
        """Let nothing leave by that lane before `until` (instant of the monotonic clock, the same in all processes of
        a machine): another process was told to wait. `on_gate` is not called."""
        self._departures.lane(lane_key).close(until, time.monotonic())
        self._progress.gate_until = max(until, self._progress.gate_until or 0.0)
        self._departures.look()

    def _lane_of(self, key: str) -> Lane:
        lane = self._lanes(key)
        lane.share(self._fraction)
        if self._held_until > (now := time.monotonic()):
            lane.close(self._held_until, now)
        lane.crowd = self._departures.slots
        return lane

    def _resize(self, slots: int) -> None:
        self._departures.slots = self._progress.slots = slots
        for lane in self._departures.lanes():
            lane.crowd = slots
        self._make_places()

    def stop(self, reason: Stop) -> None:
        """Admit nothing more; rows on the wire finish, rows waiting stay pending. The first reason counts."""
        if self.stop_reason is not None:
            return
        self.stop_reason = reason
        self._halt()

    @property
    def stopped(self) -> bool:
        """Nothing more is admitted: it was stopped, or it failed."""
        return self._stopped.is_set()

    def _halt(self) -> None:
        self._stopped.set()
        self._place.set()
        self._departures.close()
        if not self._tasks:
            self._idle.set()
        myself = asyncio.current_task()  # a row whose own news is the reason has its result already
        for task, course in list(self._tasks.items()):
            if not course.on_wire and task is not myself:
                task.cancel()

    def abort(self) -> None:
        """Cut what is on the wire, now. What was cut stays pending and may have been billed."""
        self._departures.close()
        for task in list(self._tasks):
            task.cancel()

    async def run(self, rows: AsyncIterator[list[Request | InvalidRow]], *, drain_timeout: float) -> Stop | None:
        """Serve all rows, or stop early and say why. Raises bugs, and what `rows` or the sink raise: what is on the
        wire by then has been paid for, so it is waited for as after a stop."""
        alarm = None
        budget = self._spending.budget
        progress = self._progress
        progress.slots = self._departures.slots
        self._began = time.monotonic() + LEAD_S
        if self._adaptive is not None:
            progress.adaptive, progress.levels = True, self._adaptive.path
        if (why := self._spending.used_up()) is not None:  # by earlier runs
            self.stop(Stop("budget", why))
        if budget.seconds is not None:
            reason = Stop("budget", f"{budget.why} is over")
            alarm = asyncio.get_running_loop().call_later(budget.seconds, self.stop, reason)
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
            ended = time.monotonic()
            progress.held, progress.binding_since = progress.held_until(ended), ended
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
        """Take one row in, when there is a place for it; False when the run has stopped and the row was not taken."""
        while self._alive >= self._places():
            self._place.clear()
            await self._place.wait()
            if self._stopped.is_set():
                return False
        if self._stopped.is_set():
            return False
        model = row.body.get("model")
        key = model if isinstance(model, str) else ""
        course = Course(row, self._policy, self._send, self._park, key, self._estimate(row, key))
        if self._schedule is not None:
            offset = next(self._schedule, None)
            if offset is None:
                return False
            course.due = self._began + offset
        self._alive += 1
        self._idle.clear()
        self._departures.add(course, course.due)
        if self._progress.per_minute is None and self._lanes.rates.known:
            self._progress.per_minute = self._departures.lane(key).per_minute(course.cost)
        return not self._stopped.is_set()

    def _places(self) -> int:
        if self._schedule is not None:
            return self._departures.under_way + READ_AHEAD_LANES
        ahead = READ_AHEAD_LANES if self._departures.several else READ_AHEAD
        return max(self._departures.slots * UNDER_WAY_PER_SLOT, ahead)

    def _make_places(self) -> None:
        """Wake who takes rows in, once it is worth it: not for every single row."""
        if self._alive <= self._places() * 3 // 4:
            self._place.set()

    def _estimate(self, row: Request, model: str) -> Cost:
        """What a request of this row will take from its lane and from the budget."""
        weight = self._lanes.rates.weight(model)
        if not self._counts_tokens:
            return ONE if weight == 1.0 else Cost(weight)
        body = row.body
        limit = next((body[name] for name in _ANSWER_LIMITS if isinstance(body.get(name), int)), None)
        if limit is not None and isinstance(body.get("n"), int):
            limit *= body["n"]
        return self._estimator.cost(weight, len(msgspec.json.encode(body)), limit)

    def _leave(self, course: Course) -> bool:
        """It is this row's turn (`engine.departures`); False: what is on the wire may use up the budget."""
        if not self._spending.take(course.lane_key, course.cost):
            if self._spending.ledger is not None:
                self._ask_the_ledger_again()
            return False
        if course.turn is not None:
            course.holds_slot = True
            course.turn.set_result(None)
            return True
        course.under_way = course.holds_slot = True
        self._departures.under_way += 1
        if course.due is not None:
            self._progress.slips.append(time.monotonic() - course.due)
            self._make_places()
        task = asyncio.create_task(self._serve(course))
        self._tasks[task] = course
        task.add_done_callback(self._ended)
        return True

    def _ask_the_ledger_again(self) -> None:
        """Of what other processes spend, or turn out not to need, no news comes."""
        if (why := self._spending.used_up()) is not None:
            self.stop(Stop("budget", why))
        elif self._asking is None or self._asking.when() <= asyncio.get_running_loop().time():
            self._asking = asyncio.get_running_loop().call_later(LEDGER_S, self._departures.look)

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
        self._alive -= 1
        self._departures.under_way -= 1
        if task.cancelled():
            self._keep_pending(course, maybe_billed=course.on_wire)
        elif (error := task.exception()) is not None:
            self._fail(error)
        if course.holds_slot:
            course.holds_slot = False
            self._departures.came_back()
        else:
            self._departures.look()
        self._make_places()
        if not self._alive or (self._stopped.is_set() and not self._tasks):
            self._idle.set()

    def _fail(self, error: BaseException) -> None:
        """A bug, or what a sink raises: the end of the run."""
        if self._error is None:
            self._error = error
            self._stopped.set()
            self._place.set()
            self.abort()

    async def _drain(self, patience: float) -> None:
        """Wait for the rows under way: as long as it takes, or for `patience` seconds once stopped."""
        if not self._idle.is_set() and not await self._unless_stopped(self._idle.wait):
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
            self._own_trouble(attempt)
            self._finish(course, attempt)
        elif self._breaker.enabled and self._policy.too_long(failure):
            self._keep_pending(course)
            asked = f"the endpoint asks to wait {failure.retry_after:.0f} s, more than --max-wait"
            back = f"go on at {self._date(attempt, failure.retry_after or 0.0)}"
            self.stop(Stop("budget", f"{asked} {self._policy.max_wait:.0f}; {back}: {failure.message}"))
        elif self._breaker.enabled and daily_limit(failure):
            self._keep_pending(course)
            back = f"go on at {self._date(attempt, failure.retry_after)}"
            self.stop(Stop("budget", f"the provider's daily limit is used up; {back}: {failure.message}"))
        elif self._breaker.enabled and failure.kind in NOT_THE_ROWS:
            self._refused.append((course, attempt))
            if (reason := self._breaker.refused(failure)) is not None:
                self.stop(Stop("account" if failure.kind in ACCOUNT_KINDS else "endpoint", reason))
        else:
            self._finish(course, attempt)
            if (reason := self._breaker.row_failed(failure)) is not None:
                self.stop(Stop("endpoint", reason))

    def _date(self, attempt: Attempt, wait: float | None) -> str:
        """When the same command can go on (ISO 8601, local): `wait` seconds after an attempt; where the endpoint names
        no wait for its day, when the next day of UTC begins."""
        ended = datetime.fromtimestamp(self._epoch + (attempt.timing.ended or time.monotonic()), UTC)
        if wait is None:
            tomorrow = datetime(ended.year, ended.month, ended.day, tzinfo=UTC) + timedelta(days=1)
            return f"{tomorrow.astimezone().isoformat(timespec='seconds')} (midnight UTC, as it named no time)"
        return (ended + timedelta(seconds=math.ceil(wait))).astimezone().isoformat(timespec="seconds")

    def _keep_pending(self, course: Course, *, maybe_billed: bool = False) -> None:
        """Of what was never admitted the sink knows nothing."""
        if course.admitted:
            self._sink.gave_up(course.request, maybe_billed=maybe_billed)

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
            self._keep_pending(course)
            if self.stop_reason is None and (failure := attempt.failure) is not None:
                cause: Literal["account", "endpoint"] = "account" if failure.kind in ACCOUNT_KINDS else "endpoint"
                way_out = "if only these rows are refused, --breaker off records them as failed"
                self.stop_reason = Stop(cause, f"{failure.kind}: {failure.message}; {way_out}")
        self._refused.clear()

    def _finish(self, course: Course, attempt: Attempt) -> None:
        self._sink.done(course.request, result_of(course.request, attempt, course.retries, self._epoch))

    async def _send(self, course: Course) -> Attempt:
        """One attempt, whose turn has come: onto the wire, and the news it brings for the lane."""
        while True:
            try:
                return await self._attempt(course)
            except _NotNow:
                if self._stopped.is_set():
                    raise asyncio.CancelledError from None
                await self._sink.room()

    async def _attempt(self, course: Course) -> Attempt:
        progress, spending = self._progress, self._spending
        due, course.due = course.due, None
        course.on_wire = True
        progress.in_flight += 1
        spending.requests += 1
        if spending.budget.requests is not None and (why := spending.used_up()) is not None:
            self.stop(Stop("budget", why))
        try:
            depart = None if course.admitted else partial(self._admit, course)
            attempt = await self._client.attempt(
                course.request, time.monotonic() if due is None else due, depart=depart
            )
        except _NotNow:
            course.on_wire = False
            spending.requests -= 1
            raise
        finally:
            progress.in_flight -= 1
        course.on_wire = False
        usage = attempt.completion.usage if attempt.completion is not None else None
        spending.ended(course.lane_key, course.cost, usage, 0 if attempt.failure else attempt.timing.chunks)
        progress.requests += attempt.timing.sent is not None
        self._learn(course, attempt, usage)
        return attempt

    def _admit(self, course: Course) -> None:
        """The row's first request is about to be written: the sink is told first, so that whatever is asked is known.
        Raises _NotNow when the disk must catch up before."""
        if not self._sink.admit(course.request):
            raise _NotNow
        course.admitted = True

    def _learn(self, course: Course, attempt: Attempt, usage: Usage | None) -> None:
        """What an attempt says about budget, limits, and the endpoint's health."""
        progress, failure, timing, now = self._progress, attempt.failure, attempt.timing, time.monotonic()
        lane, reserved = self._departures.lane(course.lane_key), course.reserved
        sent = timing.sent or now
        if usage is not None:
            progress.tokens += usage.completion_tokens or 0
            if self._counts_tokens:
                self._learn_usage(course, usage)
        if self._spending.prices:
            progress.cost = self._spending.cost
        if (why := self._spending.used_up()) is not None:
            self.stop(Stop("budget", why))
        if attempt.rates is not None and reserved is not None:
            lane.learn(attempt.rates, now, reserved)
        if failure is None:
            self._outage.answered()
            lane.succeeded()
            lane.retries.succeeded(course.retry_tokens)
            if timing.sent is not None and timing.first_output is not None:
                progress.ttft.append(timing.first_output - timing.sent)
            if self._adaptive is not None:
                busy = self._departures.on_wire >= self._departures.slots
                self._adaptive.ended(now, sent, float(timing.chunks or 1), busy=busy)
                self._resize(self._adaptive.level)
            return
        if reserved is not None and timing.sent is None:
            lane.settle(reserved, NOTHING)  # it never left
        self._learn_failure(course, failure, sent, now)
        if self._on_failure is not None:
            self._on_failure(course.request, failure, len(course.retries) + 1)

    def _learn_usage(self, course: Course, usage: Usage) -> None:
        self._estimator.learn(course.cost, usage)
        if course.reserved is not None:
            prompt, answer = usage.prompt_tokens, usage.completion_tokens
            spent = Cost(
                course.cost.requests,
                course.cost.input if prompt is None else float(prompt),
                course.cost.output if answer is None else float(answer),
            )
            self._departures.lane(course.lane_key).settle(course.reserved, spent)

    def _learn_failure(self, course: Course, failure: Failure, sent: float, now: float) -> None:
        if failure.status is not None and failure.status < 500:
            self._outage.answered()
        else:
            self._outage.failed(failure, now)
            course.excused += self._outage.down
            if (why := self._outage.over(now)) is not None:
                self.stop(Stop("endpoint", why))
        if self._adaptive is not None and (failure.kind in ("rate_limit", "overloaded")):
            self._adaptive.refused(now, sent)
            self._resize(self._adaptive.level)
        # A wait beyond --max-wait is not waited for: the run stops, or (--breaker off) only this row is given up.
        if failure.kind == "rate_limit" and not self._policy.too_long(failure):
            self._limited(course, failure, now)

    def _limited(self, course: Course, failure: Failure, now: float) -> None:
        """A 429 is news for the lane: close its gate, and say so."""
        lane = self._departures.lane(course.lane_key)
        before = lane.closed_until
        self._progress.limited += 1
        lane.rate_limited(failure, now, now + self._epoch, random.uniform, course.reserved)
        self._progress.per_minute = lane.per_minute(course.cost)
        if lane.closed_until > before:
            self._progress.gate_until = lane.closed_until
            if self._on_gate is not None:
                self._on_gate(course.lane_key, lane.closed_until)

    async def _park(self, course: Course, seconds: float) -> None:
        """Wait for a retry without holding a slot, then for a slot and the lane again."""
        progress = self._progress
        progress.retries += 1
        progress.retry_kinds[course.retries[-1].kind] += 1
        if self._stopped.is_set():
            raise asyncio.CancelledError
        progress.waiting += 1
        course.turn = asyncio.get_running_loop().create_future()
        course.holds_slot = False
        if self._outage.down:
            seconds = min(seconds, 1.0)  # the outage's own pauses are what keeps it from leaving
        self._departures.add(course, due=time.monotonic() + seconds)
        self._departures.came_back()
        try:
            await course.turn
        finally:
            course.turn = None
            progress.waiting -= 1
