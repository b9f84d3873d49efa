"""`run_shard`: the one unit of work. Rows through an endpoint into one segment of the journal.

The same for one process, for N of them, for a hand-made shard and for a cluster: whoever launches it
brings the rows (blocks that nobody else serves), the journal to write to, and a `Control` to stop it with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import msgspec

from batchstream.engine.client import Client, Target
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Runner, Sink, Stop
from batchstream.engine.store import Store
from batchstream.files.journal import GroupSync, JournalDir
from batchstream.job import Job, parse_deadline
from batchstream.net.deadlines import Limits
from batchstream.net.exchange import Traffic
from batchstream.net.transport import Transport
from batchstream.policy.breaker import Breaker, Outage, parse_breaker
from batchstream.policy.budget import Budget, Ledger, parse_prices
from batchstream.policy.concurrency import Concurrency
from batchstream.policy.limits import Lanes, Rates
from batchstream.policy.retry import RetryPolicy
from batchstream.records import Failure, InvalidRow, Request, Result

Rows = AsyncIterator[list[Request | InvalidRow]]


class Hooks(msgspec.Struct, frozen=True):
    """What a caller may listen to. `on_durable`: each result once it is on stable storage;
    `on_note`: what a person at the terminal should know now; `on_failure`: each failed attempt, as it
    happens, with its number among the row's (1 = the first). For who leads several processes: `on_stored`: rows that
    are on stable storage now; `on_gate`: a 429 has closed a lane until an instant (`engine.runner`)."""

    on_durable: Callable[[Result], None] | None = None
    on_note: Callable[[str], None] | None = None
    on_failure: Callable[[Request, Failure, int], None] | None = None
    on_stored: Callable[[list[int]], None] | None = None
    on_gate: Callable[[str, float], None] | None = None


class Stoppable(Protocol):
    """What serves rows: a runner, or the workers of a job."""

    def stop(self, reason: Stop) -> None: ...
    def abort(self) -> None: ...


class Control:
    """How a run in progress is stopped from outside: first `stop`, then, if need be, `abort`.
    A stop that comes before the runner exists is kept for it; `aborted`: nothing more is waited for, not even the
    making of the results."""

    def __init__(self) -> None:
        self._runner: Stoppable | None = None
        self._early: Stop | None = None
        self._stopped = asyncio.Event()
        self.aborted = False

    def bind(self, runner: Stoppable) -> None:
        self._runner = runner
        if self._early is not None:
            runner.stop(self._early)

    @property
    def stopping(self) -> bool:
        return self._early is not None

    async def stopped(self) -> Stop:
        """Returns when the run is to stop, with the reason."""
        await self._stopped.wait()
        assert self._early is not None  # noqa: S101  (set first)
        return self._early

    def stop(self, reason: Stop) -> None:
        self._early = self._early or reason
        self._stopped.set()
        if self._runner is not None:
            self._runner.stop(reason)

    def abort(self) -> None:
        self.aborted = True
        if self._runner is not None:
            self._runner.abort()


async def run_shard(
    job: Job,
    target: Target,
    journal: JournalDir,
    rows: Iterator[list[Request | InvalidRow]],
    take_blocks: Callable[[], list[tuple[int, int, bytes]]],
    progress: Progress,
    control: Control,
    hooks: Hooks,
    *,
    rates: Rates,
    slots: int | None,
    secrets: tuple[str, ...],
    spent: float = 0.0,
    ledger: Ledger | None = None,
    worker: int = 0,
    schedule: Iterator[float] | None = None,
) -> Stop | None:
    """Serve `rows` (a blocking iterator, pulled from a thread) and store their results.

    `secrets` are kept out of everything that is stored; `take_blocks` gives the hashes of input blocks read since
    the last call: (index, rows, hash). `rates` and `slots` as `connect` knows them; `spent` is what the job's earlier
    runs have cost, where --max-cost asks; `schedule`: when the rows are due (`engine.runner`);
    `ledger`: what other processes of the job spend of its budget meanwhile.
    Returns why it stopped early, or None. Raises StorageError when results could not be stored.
    """
    segment = await asyncio.to_thread(journal.segment, worker)
    store = Store(
        segment,
        progress,
        GroupSync(job.durability),
        secrets=secrets,
        spill_dir=Path(job.spill_dir) if job.spill_dir else None,
        stop=control.stop,
        on_durable=hooks.on_durable,
        on_stored=hooks.on_stored,
    )

    def note_blocks() -> None:
        for index, count, digest in take_blocks():
            segment.block(index, count, digest)

    store.start()
    stop: Stop | None = None
    clean = False
    try:
        async with transport_for(job, progress.traffic) as transport:
            client = Client(transport, target, limits_of(job))
            runner = runner_for(job, client, store, progress, rates, slots, spent, hooks, schedule, ledger)
            control.bind(runner)
            async with aclosing(ahead(rows, note_blocks)) as batches:
                stop = await runner.run(batches, drain_timeout=job.drain_timeout)
        clean = stop is None
    finally:
        await store.close(clean=clean)
    return stop


def transport_for(job: Job, traffic: Traffic | None = None) -> Transport:
    timeout = job.connect_timeout
    return Transport(connect_timeout=timeout, ca_file=job.ca_file, trust_env=job.trust_env, traffic=traffic)


def limits_of(job: Job) -> Limits:
    return Limits(job.connect_timeout, job.first_token_timeout, job.idle_timeout, job.total_timeout)


def runner_for(
    job: Job,
    client: Client,
    sink: Sink,
    progress: Progress,
    rates: Rates,
    slots: int | None,
    spent: float,
    hooks: Hooks,
    schedule: Iterator[float] | None = None,
    ledger: Ledger | None = None,
) -> Runner:
    """A runner with the job's policy; `slots` None: it finds out how many are good."""
    settings = parse_breaker(job.breaker)
    return Runner(
        client,
        sink,
        progress,
        concurrency=slots if slots is not None else Concurrency(time.monotonic()),
        policy=RetryPolicy(job.max_attempts, job.max_wait),
        lanes=Lanes(rates),
        breaker=Breaker(settings),
        budget=budget_of(job, datetime.now().astimezone(), spent),
        prices=parse_prices(job.price),
        outage=Outage(job.max_outage, enabled=settings.enabled),
        ledger=ledger,
        schedule=schedule,
        on_failure=hooks.on_failure,
        on_gate=hooks.on_gate,
    )


def budget_of(job: Job, now: datetime, spent: float = 0.0) -> Budget:
    """The job's budget for a run that begins `now` (with its zone)."""
    seconds, why = job.max_time, "" if job.max_time is None else f"--max-time {job.max_time:g} s"
    if job.deadline is not None:
        seconds, why = until(job.deadline, now), f"--deadline {job.deadline}"
    return Budget(seconds, job.max_requests, job.max_tokens_total, job.max_cost, spent, why)


def until(deadline: str, now: datetime) -> float:
    """Seconds from `now` to a deadline as the user writes it: the next 06:00, or a date; 0.0 when that is over."""
    wanted = parse_deadline(deadline)
    if isinstance(wanted, datetime):
        return max(0.0, (wanted - now).total_seconds())
    # The wall clock's: in a night when the clocks change, six o'clock is nearer or farther.
    local = now.replace(tzinfo=None)
    day = local.date() if local.time() < wanted else local.date() + timedelta(days=1)
    return max(0.0, (datetime.combine(day, wanted).astimezone() - now).total_seconds())


async def ahead(
    rows: Iterator[list[Request | InvalidRow]], after_each: Callable[[], None] = lambda: None
) -> AsyncGenerator[list[Request | InvalidRow], None]:
    """Pull a blocking iterator from a helper thread, one batch ahead of its use, so that reading, decompressing
    and decoding a prompt file never stands in the way of a token."""
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="source")
    coming = loop.run_in_executor(thread, next, rows, None)
    try:
        while (batch := await coming) is not None:
            after_each()
            coming = loop.run_in_executor(thread, next, rows, None)
            yield batch
        after_each()
    finally:
        # After a stop the thread may still be reading: it is waited for, and an error it meets is nobody's any more.
        await asyncio.gather(coming, return_exceptions=True)
        thread.shutdown()
