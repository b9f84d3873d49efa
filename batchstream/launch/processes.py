"""Several worker processes for one job: rows handed out as workers become free, limits shared out, one account.

The parent reads the input, hands out rows and counts; each worker runs the ordinary `run_shard` with a segment of the
journal of its own. A worker holds only a few rows beyond its slots, so that none is left with a long tail. Slots and
rates are divided among those that still work, and divided anew when one ends: slots at once, its part of the rates a
minute later, when nothing of what it took counts any more. A 429's gate is told to all.

A worker that dies (killed, out of memory): what it had stored counts, from its segment; the rows it still had go to a
fresh process in its place, and of these only the ones that were in flight are asked again. The fresh one opens a later
segment, so that whoever reads the journal in order finds the second request after the first.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing
from datetime import datetime
from typing import Any

import msgspec

from batchstream.engine.gauges import cpu_seconds
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Stop
from batchstream.errors import StorageError
from batchstream.figures.evidence import Evidence, together
from batchstream.files.journal import JournalDir
from batchstream.job import Job
from batchstream.launch.channel import (
    Begin,
    Broken,
    Channel,
    Cut,
    Durable,
    Ended,
    Failed,
    Gate,
    Given,
    Halt,
    News,
    NoMoreRows,
    Share,
    Told,
)
from batchstream.launch.ledger import SharedLedger, create
from batchstream.policy.concurrency import MOST
from batchstream.policy.limits import Rates
from batchstream.records import InvalidRow, Request, Result
from batchstream.shard import Hooks, ahead, budget_of

STREAMS_A_WORKER = 64
"""`--workers auto` starts one for so many slots; one event loop carries several times that without being late."""

TOKENS_A_WORKER = 50_000
"""Tokens a minute that a worker is given at least, as a request that is larger than its part must be let go as well."""

DEATHS_A_WORKER = 3
"""So many times a worker is replaced; then something kills them all (memory, mostly), and more would die."""

GRACE_S = 10.0
"""After the drain: how long a worker may take to store and say goodbye before it is killed."""

AHEAD_PER_SLOT, AHEAD = 4, 16
"""Rows that a worker holds at most: those under way (`engine.departures`), and a few that wait for the next slot."""


def worker_count(job: Job, slots: int | None, rates: Rates) -> int:
    """How many processes serve `job` with `slots` requests at once (None: as many as are found to be good) and within
    `rates`. None has less than one slot, or a part of a rate that a single request could be too large for."""
    cores = len(os.sched_getaffinity(0))
    if job.workers == "auto":  # within a rate one is always enough
        wanted = 1 if rates.known or slots is None else min(cores, slots // STREAMS_A_WORKER)
    else:
        wanted = job.workers if slots is None else min(job.workers, slots)
    heaviest = max(rates.weights.values(), default=1.0)
    for limit, least in ((rates.rpm, heaviest), (rates.tpm, TOKENS_A_WORKER)):
        for number in limit.values() if isinstance(limit, dict) else (limit,):
            if number is not None:
                wanted = min(wanted, int(number / least))
    return max(1, wanted)


class _Worker:
    """One process, as the parent sees it. `rows`: what it has and has not stored yet, by ordinal."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.rows: dict[int, Request | InvalidRow] = {}
        self.counts: dict[str, Any] = {}
        self.ended: Ended | None = None
        self.slots = 1
        self.fraction = 0.0
        self.ledger: SharedLedger | None = None

    @property
    def room(self) -> int:
        return AHEAD_PER_SLOT * self.slots + AHEAD - len(self.rows)


class Pool:
    """The workers of one run. `serve` is `run_shard` for several processes; for `Control` it is the runner."""

    def __init__(self, count: int, begin: Begin, journal: JournalDir, progress: Progress, hooks: Hooks) -> None:
        """`count` processes; `begin` is what each of them is told first."""
        self._count_of_workers = count
        self._begin = msgspec.structs.replace(
            begin, durable=hooks.on_durable is not None, failures=hooks.on_failure is not None
        )
        self._slots = begin.slots if begin.slots is not None else MOST
        self._journal = journal
        self._progress = progress
        self._hooks = hooks
        self._workers: dict[int, _Worker] = {}
        self._listening: dict[asyncio.Task[None], int] = {}
        self._past: list[dict[str, Any]] = []  # counts of processes that are gone
        self._deaths: Counter[int] = Counter()
        self._evidence: list[Evidence] = []
        self._gates: dict[str, float] = {}
        self._room = asyncio.Event()
        self._stop: Stop | None = None
        self._error: Exception | None = None
        self._no_more = False
        self.asked_again = 0
        self._decode = msgspec.json.Decoder(Result).decode
        self._ledger_fd: int | None = None
        self._started = 0
        self._cpu_began = cpu_seconds()

    async def serve(
        self, rows: Iterator[list[Request | InvalidRow]], take_blocks: Callable[[], list[tuple[int, int, bytes]]]
    ) -> Stop | None:
        """Serve `rows`. Returns why it stopped early, or None. Raises what a worker could not
        cope with (StorageError; RuntimeError with the traceback of a bug)."""
        job = self._begin.job
        budget = budget_of(job, datetime.now().astimezone())
        alarm = None
        if budget.seconds is not None:  # here: a worker that replaces another one began later
            reason = Stop("budget", f"{budget.why} is over")
            alarm = asyncio.get_running_loop().call_later(budget.seconds, self.stop, reason)
        try:
            if not all(cap is None for cap in (budget.requests, budget.tokens, budget.cost)):
                self._ledger_fd = create(self._count_of_workers * (1 + DEATHS_A_WORKER))
            for number in range(self._count_of_workers):
                await self._start(number, 1 / self._count_of_workers)
            self._share_out()
            try:
                await self._hand_out(rows, take_blocks)
            except Exception as error:
                self._fail(error)
            self._no_more = True
            for worker in self._workers.values():
                worker.channel.send(NoMoreRows())
            await self._all_ended()
        finally:
            if alarm is not None:
                alarm.cancel()
            await self._dismiss()
            if self._ledger_fd is not None:
                os.close(self._ledger_fd)
        if self._error is not None:
            raise self._error
        return self._stop

    def evidence(self) -> Evidence | None:
        """That of all workers together; None when none lived to tell."""
        return together(self._evidence, cpu_seconds() - self._cpu_began) if self._evidence else None

    def stop(self, reason: Stop) -> None:
        """Admit nothing more, drain."""
        if self._stop is None:
            self._stop = reason
            for worker in self._workers.values():
                worker.channel.send(Halt(reason))
            self._room.set()

    def abort(self) -> None:
        """Cut what is on the wire, now."""
        for worker in self._workers.values():
            worker.channel.send(Cut())

    async def _start(self, number: int, fraction: float, held_until: float = 0.0) -> _Worker:
        """A process with this part of the rates, which it may use from `held_until` on."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        fds = [*self._journal.lock_fds, *([] if self._ledger_fd is None else [self._ledger_fd])]
        with theirs:
            process = _spawn(theirs.fileno(), fds)
        worker = self._workers[number] = _Worker(number, process, await Channel.over(ours, News))
        worker.fraction = fraction
        place, self._started = self._started, self._started + 1
        if self._ledger_fd is not None:
            worker.ledger = SharedLedger(self._ledger_fd, place)
        begin = msgspec.structs.replace(
            self._begin, worker=number, ledger_fd=self._ledger_fd, place=place, held_until=held_until
        )
        worker.channel.send(begin)
        for lane, until in self._gates.items():
            worker.channel.send(Gate(lane, until))
        if self._stop is not None:
            worker.channel.send(Halt(self._stop))
        self._listening[asyncio.create_task(self._listen(worker))] = number
        return worker

    async def _hand_out(
        self, rows: Iterator[list[Request | InvalidRow]], take_blocks: Callable[[], list[tuple[int, int, bytes]]]
    ) -> None:
        blocks: list[tuple[int, int, bytes]] = []
        async with aclosing(ahead(rows, lambda: blocks.extend(take_blocks()))) as batches:
            async for batch in batches:
                while batch:
                    worker = await self._free()
                    if worker is None:
                        return
                    room = worker.room
                    self._give(worker, batch[:room], blocks)
                    batch = batch[room:]
        if blocks and (worker := next(iter(self._workers.values()), None)) is not None:
            self._give(worker, [], blocks)

    async def _free(self) -> _Worker | None:
        """The worker with the most room, as soon as one has any; None when the run has stopped."""
        while self._stop is None and self._error is None:
            worker = max(self._workers.values(), key=lambda worker: worker.room, default=None)
            if worker is not None and worker.room > 0:
                return worker
            self._room.clear()
            await self._room.wait()
        return None

    def _give(self, worker: _Worker, rows: list[Request | InvalidRow], blocks: list[tuple[int, int, bytes]]) -> None:
        worker.rows.update((row.row, row) for row in rows)
        requests = [row for row in rows if isinstance(row, Request)]
        invalid = [row for row in rows if isinstance(row, InvalidRow)]
        worker.channel.send(Given(requests, invalid, blocks[:]))
        blocks.clear()

    async def _listen(self, worker: _Worker) -> None:
        """Hear a worker out, until it has ended or died."""
        hooks = self._hooks
        while (news := await worker.channel.read()) is not None:
            match news:
                case Told():
                    self._count(worker, news)
                case Gate(lane, until):
                    self._gates[lane] = max(until, self._gates.get(lane, 0.0))
                    for other in self._workers.values():
                        if other is not worker:
                            other.channel.send(Gate(lane, until))
                case Durable(result):
                    if hooks.on_durable is not None:
                        hooks.on_durable(self._decode(result))
                case Failed(row, failure, attempt):
                    request = worker.rows.get(row)
                    if hooks.on_failure is not None and isinstance(request, Request):
                        hooks.on_failure(request, failure, attempt)
                case Ended():
                    worker.ended = news
                case Broken(message, storage):
                    self._fail(StorageError(message) if storage else RuntimeError(f"in a worker:\n{message}"))
        await asyncio.to_thread(worker.process.wait)
        await worker.channel.close()
        if worker.ledger is not None:
            worker.ledger.died()
        del self._workers[worker.number]
        if worker.ended is not None:
            self._past.append(worker.counts)
            self._evidence.append(worker.ended.evidence)
            if worker.ended.stop is not None:
                self.stop(worker.ended.stop)
        elif self._error is None:
            await self._take_over(worker)
        if worker.number not in self._workers:
            minute = self._begin.rates.minute if self._begin.rates.known else 0.0
            asyncio.get_running_loop().call_later(minute, self._return, worker.fraction)
        self._share_out()
        self._room.set()

    def _count(self, worker: _Worker, news: Told) -> None:
        for row in news.stored:
            worker.rows.pop(row, None)
        worker.counts = news.counts
        self._progress.ttft.extend(news.ttft)
        self._add_up()
        if news.stored:
            self._room.set()

    def _add_up(self) -> None:
        merge(self._progress, [*self._past, *(worker.counts for worker in self._workers.values())])
        if self._progress.cost is not None:
            self._progress.cost += self._begin.spent

    async def _take_over(self, dead: _Worker) -> None:
        """A worker died without a word. Its rows that are stored count; a fresh process takes the others."""
        self._deaths[dead.number] += 1
        stored, in_flight = await asyncio.to_thread(self._journal.left_behind, dead.rows.keys())
        counts = {**dead.counts, "in_flight": 0, "waiting": 0}
        for row, result in stored.items():
            del dead.rows[row]
            found = self._decode(result)
            kind = None if found.error is None else found.error.kind
            counts["done"] = counts.get("done", 0) + 1
            counts["ok" if kind is None else "failed"] = counts.get("ok" if kind is None else "failed", 0) + 1
            if kind is not None:
                counts["failures"] = {**counts.get("failures", {}), kind: counts.get("failures", {}).get(kind, 0) + 1}
            if self._hooks.on_durable is not None:
                self._hooks.on_durable(found)
        self._past.append(counts)
        self.asked_again += len(in_flight)
        how = f"worker {dead.number} died ({_how(dead.process.returncode)})"
        if self._stop is not None:
            return
        if self._deaths[dead.number] > DEATHS_A_WORKER:
            self.stop(
                Stop("endpoint", f"{how} for the {self._deaths[dead.number]}th time; is this machine out of memory?")
            )
            return
        if self._hooks.on_note is not None:
            self._hooks.on_note(
                f"{how}; another takes over its {len(dead.rows)} rows, {len(in_flight)} of them asked again"
            )
        rates = self._begin.rates
        held_until = time.monotonic() + rates.minute if rates.known else 0.0
        fresh = await self._start(dead.number, dead.fraction, held_until)
        self._give(fresh, list(dead.rows.values()), [])
        if self._no_more:
            fresh.channel.send(NoMoreRows())

    def _return(self, fraction: float) -> None:
        """A part of the rates that was the part of a worker that has ended."""
        for worker in self._workers.values():
            worker.fraction += fraction / len(self._workers)
        self._share_out()

    def _share_out(self) -> None:
        """Divide the slots among those that work, and tell them their part of slots and rates."""
        working = sorted(self._workers)
        for place, number in enumerate(working):
            worker = self._workers[number]
            slots = self._slots // len(working) + (place < self._slots % len(working))
            worker.slots = max(1, slots)
            worker.channel.send(Share(worker.slots, min(1.0, worker.fraction)))

    def _fail(self, error: Exception) -> None:
        """The end of the run: what is on the wire elsewhere has been paid for and is waited for as after a stop."""
        self._error = self._error or error
        self.stop(Stop("storage", str(error)))

    async def _all_ended(self) -> None:
        deadline: float | None = None
        while self._listening:
            if self._stop is not None and deadline is None:
                deadline = time.monotonic() + self._begin.job.drain_timeout + GRACE_S
            patience = 0.5 if deadline is None else max(0.0, min(0.5, deadline - time.monotonic()))
            done, _ = await asyncio.wait(self._listening, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._listening[task]
                task.result()
            if deadline is not None and time.monotonic() >= deadline:
                for worker in self._workers.values():
                    worker.process.kill()

    async def _dismiss(self) -> None:
        """Nobody is left behind, whatever has happened."""
        for worker in self._workers.values():
            worker.process.kill()
        if self._listening:
            self._error = self._error or RuntimeError("the workers were dismissed")
            await asyncio.wait(self._listening)


def merge(progress: Progress, counts: list[dict[str, Any]]) -> None:
    """Into `progress` the sum of what the workers have counted: numbers and counts by name add up, of instants the
    latest holds, of texts the first that says something. An adaptive concurrency's path is that of the sum."""
    for name in {name for each in counts for name in each}:
        values = [each[name] for each in counts if each.get(name) is not None]
        if not values:
            continue
        first = values[0]
        if isinstance(first, dict):
            total: Counter[str] = Counter()
            for value in values:
                total.update(value)
            setattr(progress, name, total if name != "held" else dict(total))
        elif isinstance(first, bool):
            setattr(progress, name, any(values))
        elif isinstance(first, str):
            setattr(progress, name, next((value for value in values if value), ""))
        elif name.endswith("_until"):
            setattr(progress, name, max(values))
        else:
            setattr(progress, name, sum(values))
    if progress.adaptive and (not progress.levels or progress.levels[-1][1] != progress.slots):
        progress.levels.append((time.monotonic(), progress.slots))


def _spawn(fd: int, more_fds: list[int]) -> subprocess.Popen[bytes]:
    """A worker process with that end of the socket pair, with the job's lock, which lasts as long as any of us, and
    with the account of its budget."""
    return subprocess.Popen(  # noqa: S603  (ourselves)
        [sys.executable, "-m", "batchstream.launch.worker", str(fd)],
        pass_fds=[fd, *more_fds],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def _how(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
