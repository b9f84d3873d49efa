"""The whole of a run: lock, recover, serve, publish, sum up. What `batchstream run` and the Python API call.

The order is the durability protocol's: options and input are checked first, then the lock is taken, the
journal compared and recovered and a new segment made durable; only then may a request leave. When every
row has an outcome the results are built from the journal and put in place atomically; FINAL.json comes last.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

import batchstream
from batchstream.connect import Plan, opened, plan
from batchstream.engine.gauges import Gauges, quiet_gc
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Stop
from batchstream.errors import InputError, LockedError, UsageError
from batchstream.figures.evidence import Evidence
from batchstream.figures.summary import Run, Summary, Tally, summary
from batchstream.files.fingerprint import input_fingerprint
from batchstream.files.journal import JournalDir
from batchstream.files.lock import Lock, hold, journal_path
from batchstream.files.manifest import Final, Manifest
from batchstream.files.recovery import recover
from batchstream.files.source import Row, Source
from batchstream.files.spool import spool_stdin
from batchstream.intake import identity, open_job_source, output_of
from batchstream.job import Job
from batchstream.records import InvalidRow
from batchstream.shard import Control, Hooks, run_shard

EXIT_OF = {"account": 4, "endpoint": 4, "budget": 5, "storage": 14}

_T = TypeVar("_T")

Watch = Callable[[Progress], AbstractContextManager[Any]]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. `message`: one line, why it was not exit 0 and whether the same command resumes."""

    exit_code: int
    message: str
    output: Path
    journal: Path
    summary: Summary | None
    stop: Stop | None = None
    published: bool = False
    warnings: tuple[str, ...] = ()


def run(job: Job, *, watch: Watch | None = None, hooks: Hooks | None = None, handle_signals: bool = False) -> Report:
    """Run a job to its end, or to its stop. Blocking; `run_async` is the same on a loop that already runs.

    `watch(progress)` is entered while requests run (a display). With `handle_signals` the first SIGINT, SIGTERM or
    SIGHUP drains and the second cuts; the caller then dies of `report.stop.signal`.
    Raises `BatchstreamError`s for what keeps a run from starting.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
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
    whole = _Run(job, plan(job), control, hooks or Hooks(), watch or nullcontext)
    restore = _listen(control, whole.say_signal) if handle_signals else None
    try:
        return await whole.go()
    finally:
        if restore is not None:
            restore()


class _Stored(NamedTuple):
    """What the journal holds, counted; answers bought twice; requests that went out and have no answer."""

    tally: Tally
    duplicates: int
    unanswered: int = 0


class _Interrupted(Exception):  # noqa: N818  (no error)
    """The run is to stop, and no request has left yet."""


class _Stdin:
    """What is piped in, until the run is to stop: Ctrl-C also ends whoever writes the pipe, and an input that ends
    there must not be taken for the whole."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def read(self, size: int, /) -> bytes:
        data = sys.stdin.buffer.read(size)
        if self._control.stopping:
            raise _Interrupted
        return data


class _Run:
    def __init__(self, job: Job, plan: Plan, control: Control, hooks: Hooks, watch: Watch) -> None:
        self._job = job
        self._plan = plan
        self._control = control
        self._hooks = hooks
        self._watch = watch
        self._served_s = 0.0
        self._started_at = now_iso()
        self._yielded = 0
        self._skipped = 0
        self._exhausted = False
        self._evidence: Evidence | None = None
        self._progress: Progress | None = None

    def say_signal(self, number: signal.Signals, again: bool) -> None:
        in_flight = self._progress.in_flight if self._progress is not None else 0
        if again:
            text = f"{number.name} again: cutting {in_flight} requests"
        else:
            limit = f"--drain-timeout {self._job.drain_timeout:g} s"
            text = f"{number.name}: draining {in_flight} requests ({limit}); once more cuts them"
        if self._progress is not None:
            self._progress.message = text
        if self._hooks.on_note is not None:
            self._hooks.on_note(text)

    async def go(self) -> Report:
        self._out = output_of(self._job)
        try:
            return await self._go()
        except _Interrupted:
            stop = await self._control.stopped()
            return Report(
                exit_code=128 + stop.signal,
                message=f"stopped: {stop.message}; nothing was sent",
                output=self._out,
                journal=journal_path(self._out),
                summary=None,
                stop=stop,
            )

    async def _go(self) -> Report:
        lock = None
        if self._job.input == "-":
            # What comes over a pipe can be read once only: it is kept in the journal, and that wants the lock first.
            lock = await self._patiently(hold, self._out, started=self._started_at)
            if lock is None:
                return self._skipped_run()
        try:
            source = await self._unless_stopped(self._open, lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        journal = await self._acquire(source, lock)
        if journal is None:
            return self._skipped_run()
        try:
            if journal.final is not None:
                return await self._already_done(journal, journal.final)
            if self._control.stopping:
                raise _Interrupted
            return await self._serve(source, journal)
        finally:
            await asyncio.to_thread(journal.close)

    async def _unless_stopped(self, read: Callable[..., _T], *args: Any) -> _T:
        """Call `read` in a thread that a stop leaves behind: a pipe may say nothing for ever. Raises _Interrupted."""
        outcome: Future[_T] = Future()

        def work() -> None:
            try:
                outcome.set_result(read(*args))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=work, name="input", daemon=True).start()
        reading = asyncio.wrap_future(outcome)
        stopped = asyncio.ensure_future(self._control.stopped())
        await asyncio.wait((reading, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not reading.done():
            raise _Interrupted
        return reading.result()

    def _open(self, lock: Lock | None) -> Source:
        """The input, checked as far as it can be before the first request."""
        job, spool = self._job, None
        if lock is not None:
            stdin = _Stdin(self._control)
            spool = str(spool_stdin(stdin, lock.path, new_job=job.new_job, allow_append=job.allow_append))
        source = open_job_source(job, self._plan, spool)
        if job.invalid == "fail":
            for bad in (row for batch in source.batches() for row in batch if isinstance(row, InvalidRow)):
                raise InputError(f"{bad.message} (--invalid record goes on without such rows)")
        for row in next(source.batches(), []):
            if not isinstance(row, InvalidRow) and "model" not in row.body:
                raise UsageError("no model: name one with --model, or in each row")
        return source

    async def _acquire(self, source: Source, lock: Lock | None) -> JournalDir | None:
        """The locked, recovered journal; None when another run holds it and that is all right."""
        job = self._job
        manifest = Manifest(
            job=identity(job, self._plan),
            input=input_fingerprint(source),
            created=self._started_at,
            version=batchstream.__version__,
        )
        return await self._patiently(
            JournalDir.acquire,
            self._out,
            manifest,
            new_job=job.new_job,
            overwrite=job.overwrite,
            allow_append=job.allow_append,
            retry_failed=job.retry_failed,
            durability=job.durability,
            spill_dir=Path(job.spill_dir) if job.spill_dir else None,
            lock=lock,
        )

    async def _patiently(self, take: Callable[..., _T], *args: Any, **kwargs: Any) -> _T | None:
        """Call `take` in a thread; while another run holds the job, wait as long as --lock-wait says.
        None: it still does, and the user wants that skipped."""
        deadline = time.monotonic() + self._job.lock_wait
        while True:
            try:
                return await asyncio.to_thread(take, *args, **kwargs)
            except LockedError:
                if self._control.stopping:
                    raise _Interrupted from None
                if time.monotonic() < deadline:
                    await asyncio.sleep(0.2)
                elif self._job.if_locked == "skip":
                    return None
                else:
                    raise

    def _skipped_run(self) -> Report:
        message = "another run holds the job; skipped (--if-locked skip)"
        journal = journal_path(self._out)
        return Report(exit_code=0, message=message, output=self._out, journal=journal, summary=None)

    async def _already_done(self, journal: JournalDir, final: Final) -> Report:
        """A finished job: nothing is sent; the exit code is what the rows say."""
        exit_code = 3 if final.failed > self._job.max_failures else 0
        stored = await asyncio.to_thread(self._stored, journal)
        figures = self._summary(journal, stored, None, exit_code)
        message = f"finished before ({final.rows} rows); nothing was sent"
        if exit_code:
            message = f"{message}; {_too_many(figures, self._job.max_failures)}"
        return self._report(journal, exit_code, message, figures, published=True)

    async def _serve(self, source: Source, journal: JournalDir) -> Report:
        job, recovered = self._job, journal.recovered
        before = recovered.rows_done
        progress = self._progress = Progress(time.monotonic(), total=None, resumed=before)
        counting = asyncio.create_task(self._count_rows(source, progress))
        proven = journal.proven(source)
        gauges = Gauges()
        try:
            async with opened(job, self._plan) as target:
                try:
                    with quiet_gc(), self._watch(progress):
                        gauges.start()
                        began = time.monotonic()
                        stop = await run_shard(
                            job, target, journal, self._taken(iter(proven)), proven.take_blocks,
                            progress, self._control, self._hooks, rpm=self._plan.rpm,
                            secret=self._plan.secret,
                        )  # fmt: skip
                        self._served_s = time.monotonic() - began
                finally:
                    gauges.stop()
                    self._evidence = gauges.evidence()
        finally:
            counting.cancel()
        return await asyncio.to_thread(self._conclude, journal, progress, stop, before)

    def _taken(self, batches: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """The rows to serve, counted; invalid ones left out when they are to be skipped."""
        for batch in batches:
            taken = batch
            if self._job.invalid == "skip":
                taken = [row for row in batch if not isinstance(row, InvalidRow)]
                self._skipped += len(batch) - len(taken)
            self._yielded += len(taken)
            if taken:
                yield taken
        self._exhausted = True

    async def _count_rows(self, source: Source, progress: Progress) -> None:
        """The total for the display, found in the background; a run does not wait for it."""
        progress.total = await asyncio.to_thread(source.count)

    def _conclude(self, journal: JournalDir, progress: Progress, stop: Stop | None, before: int) -> Report:
        """After the last request: publish, or say why not."""
        job = self._job
        complete = self._exhausted and progress.done == self._yielded
        if not complete or (stop is not None and stop.cause == "signal"):
            stop = self._clean(stop or Stop("endpoint", "some rows have no result although each was taken in"))
            exit_code = 128 + stop.signal if stop.cause == "signal" else EXIT_OF[stop.cause]
            figures = self._summary(journal, self._stored(journal), stop, exit_code, progress.total)
            return self._report(journal, exit_code, _stopped(stop, figures), figures, stop=stop)
        total = before + self._yielded
        if total == 0:
            journal.warnings.append(f"{job.input}: no rows; the results are empty")
        failed = progress.failed + (journal.recovered.rows_done - journal.recovered.ok)
        exit_code = 3 if failed > job.max_failures else 0
        tally = Tally(since=self._started_at)
        final = journal.publish(rows=total, exit_code=exit_code, finished=now_iso(), observe=tally.add)
        figures = self._summary(journal, _Stored(tally, final.duplicates), None, exit_code)
        message = _too_many(figures, job.max_failures) if exit_code else "finished"
        return self._report(journal, exit_code, message, figures, published=True)

    def _clean(self, stop: Stop) -> Stop:
        """Endpoints like to repeat the key in the message that refuses it."""
        secret = self._plan.secret
        return stop if secret is None else msgspec.structs.replace(stop, message=stop.message.replace(secret, "[key]"))

    def _stored(self, journal: JournalDir) -> _Stored:
        tally = Tally(since=self._started_at)
        stored = recover(journal.path, journal.manifest.salt)
        for _, result in stored.results():
            tally.add(result)
        return _Stored(tally, stored.duplicates, stored.asked_again)

    def _summary(
        self, journal: JournalDir, stored: _Stored, stop: Stop | None, exit_code: int, total: int | None = None
    ) -> Summary:
        tally = stored.tally
        known = journal.recovered
        before = known.rows_done
        pending = None
        if stop is None:
            pending = 0
        elif self._exhausted:
            pending = before + self._yielded - tally.rows
        elif total is not None:
            pending = total - tally.rows - self._skipped
        facts = Run(
            started_at=self._started_at,
            ended_at=now_iso(),
            elapsed_s=round(self._served_s, 3),
            exit_code=exit_code,
            stop=None if stop is None else stop.message,
            endpoint=self._plan.label,
            model=self._plan.model,
            output=str(self._out),
            journal=str(journal.path),
            pending=pending,
            resumed=before,
            skipped=self._skipped,
            asked_again=known.asked_again,
            unanswered=stored.unanswered,
            duplicates=stored.duplicates,
        )
        return summary(tally, facts, self._evidence if tally.new_rows else None)

    def _report(
        self,
        journal: JournalDir,
        exit_code: int,
        message: str,
        figures: Summary,
        *,
        stop: Stop | None = None,
        published: bool = False,
    ) -> Report:
        return Report(
            exit_code=exit_code,
            message=message,
            output=self._out,
            journal=journal.path,
            summary=figures,
            stop=stop,
            published=published,
            warnings=tuple(journal.warnings),
        )


def now_iso() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _too_many(figures: Summary, allowed: int) -> str:
    """Why a finished run is no success, and what helps."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures.failures.items())
    said = f"{figures.rows.failed} rows failed ({kinds}), {allowed} allowed (--max-failures)"
    if figures.rows.invalid:
        said += "; `batchstream check` names the malformed lines, nothing was sent for them"
    return f"{said}; --retry-failed asks the failed rows again, with what was mended in them"


def _stopped(stop: Stop, figures: Summary) -> str:
    """Why a run stopped, and what of it the same command will not do by itself."""
    said = f"stopped: {stop.message}"
    if figures.run.unanswered:
        said += f"; {figures.run.unanswered} requests were cut, may be billed and will be asked again"
    if figures.rows.failed:
        said += f"; {figures.rows.failed} rows have failed so far (--retry-failed asks them again)"
    return said


def _listen(control: Control, say: Callable[[signal.Signals, bool], None]) -> Callable[[], None]:
    """SIGINT, SIGTERM and SIGHUP: the first drains, the second cuts; `say` tells of each. Returns what undoes it.

    What we were started to ignore stays ignored: `nohup` means that a closed terminal ends nothing.
    """
    loop = asyncio.get_running_loop()
    listened = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [number for number in listened if signal.getsignal(number) is not signal.SIG_IGN]

    def on_signal(number: signal.Signals) -> None:
        say(number, control.stopping)
        if control.stopping:
            control.abort()
        control.stop(Stop("signal", f"got {number.name}", int(number)))

    for number in signals:
        loop.add_signal_handler(number, on_signal, number)

    def restore() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    return restore


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it exists: the largest single gain on paced streams."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
