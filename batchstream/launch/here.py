"""The whole of a run: lock, recover, serve, publish, sum up. What `batchstream run` and the Python API call.

The order is the durability protocol's: options and input are checked first, then the lock is taken, the
journal compared and recovered and a new segment made durable; only then may a request leave. When every
row has an outcome the results are built from the journal and put in place atomically; FINAL.json comes last.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from batchstream.connect import Plan, opened, plan, rates_of, secrets, slots_of
from batchstream.engine.client import Target
from batchstream.engine.gauges import Gauges, quiet_gc
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Stop
from batchstream.figures.cost import cost_of
from batchstream.files.fingerprint import ProvenRows
from batchstream.files.journal import JournalDir
from batchstream.files.source import Row, Source
from batchstream.intake import output_of, shard_of
from batchstream.job import Job
from batchstream.launch.channel import Begin
from batchstream.launch.conclusion import Conclusion, Report, Serving, now_iso
from batchstream.launch.loops import loop_factory
from batchstream.launch.opening import Interrupted, Opening, Skipped
from batchstream.launch.processes import Pool, worker_count
from batchstream.launch.signals import listen
from batchstream.policy.sharding import Shard
from batchstream.records import InvalidRow
from batchstream.shard import Control, Hooks, run_shard

Watch = Callable[[Progress], AbstractContextManager[Any]]


def run(job: Job, *, watch: Watch | None = None, hooks: Hooks | None = None, handle_signals: bool = False) -> Report:
    """Run a job to its end, or to its stop. Blocking; `run_async` is the same on a loop that already runs.

    `watch(progress)` is entered while requests run (a display). With `handle_signals` the first SIGINT, SIGTERM or
    SIGHUP drains and the second cuts; the caller then dies of `report.stop.signal`.
    Raises `BatchstreamError`s for what keeps a run from starting.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run_async(job, watch=watch, hooks=hooks, handle_signals=handle_signals))


async def run_async(
    job: Job,
    *,
    watch: Watch | None = None,
    hooks: Hooks | None = None,
    handle_signals: bool = False,
    control: Control | None = None,
) -> Report:
    """See `run`. `control` stops the run from outside."""
    control = control or Control()
    whole = _Run(job, plan(job), shard_of(job), control, hooks or Hooks(), watch or nullcontext)
    restore = listen(control, whole.say_signal) if handle_signals else None
    try:
        return await whole.go()
    finally:
        if restore is not None:
            restore()


class _Run:
    def __init__(self, job: Job, plan: Plan, shard: Shard | None, control: Control, hooks: Hooks, watch: Watch) -> None:
        self._shard = shard
        self._job = job
        self._plan = plan
        self._control = control
        self._hooks = hooks
        self._watch = watch
        self._serving = Serving()
        self._progress: Progress | None = None

    def say_signal(self, number: signal.Signals, again: bool) -> None:
        in_flight = self._progress.in_flight if self._progress is not None else 0
        if self._serving.over:
            text = f"{number.name}: publishing the results; " + ("stopping" if again else "once more stops that")
        elif again:
            text = f"{number.name} again: cutting {in_flight} requests"
        else:
            limit = f"--drain-timeout {self._job.drain_timeout:g} s"
            text = f"{number.name}: draining {in_flight} requests ({limit}); once more cuts them"
        if self._progress is not None:
            self._progress.message = text
        if self._hooks.on_note is not None:
            self._hooks.on_note(text)

    async def go(self) -> Report:
        job, started_at = self._job, now_iso()
        out = output_of(job)
        conclusion = Conclusion(job, self._plan, out, started_at, self._control, self._shard)
        try:
            source, journal = await Opening(job, self._plan, out, self._control, started_at, shard=self._shard).open()
            try:
                if journal.final is not None:
                    return await asyncio.to_thread(conclusion.finished_before, journal, journal.final)
                if self._control.stopping:
                    raise Interrupted
                return await self._serve(source, journal, conclusion)
            finally:
                await asyncio.to_thread(journal.close)
        except Skipped:
            return conclusion.skipped()
        except Interrupted:
            return conclusion.interrupted(await self._control.stopped())

    async def _serve(self, source: Source, journal: JournalDir, conclusion: Conclusion) -> Report:
        job, serving = self._job, self._serving
        progress = self._progress = Progress(time.monotonic(), total=None, resumed=journal.recovered.rows_done)
        counting = asyncio.create_task(self._count_rows(source, progress))
        proven = journal.proven(source)
        try:
            async with opened(job, self._plan) as target:
                with quiet_gc(), self._watch(progress):
                    stop = await self._ask(proven, target, journal, progress)
        finally:
            counting.cancel()
            serving.over = True
            serving.requests = progress.requests
            serving.input_rows = source.total
        return await asyncio.to_thread(conclusion.after, journal, progress, serving, stop)

    async def _ask(self, proven: ProvenRows, target: Target, journal: JournalDir, progress: Progress) -> Stop | None:
        """Serve the rows that remain, here or in worker processes, and measure how late we were at that."""
        job, serving, note = self._job, self._serving, self._hooks.on_note or (lambda _: None)
        rows = self._taken(iter(proven))
        rates = await rates_of(job, self._plan, target, note)
        slots, hidden = slots_of(job, self._plan), secrets(job, self._plan)
        workers = worker_count(job, slots, rates)
        spent = await asyncio.to_thread(_spent_before, journal, self._plan)
        if self._shard is not None and rates.known:
            note(f"the limits are this shard's own: what {self._shard.of} of them may use together is up to you")
        began = time.monotonic()
        if workers > 1:
            begin = Begin.of(job, target, journal, rates, slots, hidden, spent)
            pool = Pool(workers, begin, journal, progress, self._hooks)
            self._control.bind(pool)
            try:
                stop = await pool.serve(rows, proven.take_blocks)
            finally:
                serving.evidence, serving.taken_over = pool.evidence(), pool.asked_again
        else:
            gauges = Gauges()
            gauges.start()
            try:
                stop = await run_shard(
                    job, target, journal, rows, proven.take_blocks, progress, self._control, self._hooks,
                    rates=rates, slots=slots, secrets=hidden, spent=spent,
                )  # fmt: skip
            finally:
                gauges.stop()
                serving.evidence = gauges.evidence(progress.traffic)
        serving.seconds = time.monotonic() - began
        return stop

    def _taken(self, batches: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """The rows to serve, counted; invalid ones left out when they are to be skipped."""
        for batch in batches:
            taken = batch
            if self._job.invalid == "skip":
                taken = [row for row in batch if not isinstance(row, InvalidRow)]
                self._serving.skipped += len(batch) - len(taken)
            self._serving.taken += len(taken)
            if taken:
                yield taken
        self._serving.exhausted = True

    async def _count_rows(self, source: Source, progress: Progress) -> None:
        """The total for the display, found in the background; a run does not wait for it."""
        progress.total = await asyncio.to_thread(source.count)


def _spent_before(journal: JournalDir, plan: Plan) -> float:
    """What the job's earlier runs have cost; 0.0 where no prices are given."""
    known = journal.recovered
    return cost_of((result for _, result in known.results()), plan.prices, plan.model) if plan.prices else 0.0
