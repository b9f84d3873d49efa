"""What comes before the first request: the input opened and checked, the journal locked, compared and recovered.

Each step blocks on files (or on a pipe that may say nothing for ever), so each runs in a thread, and a stop that comes
meanwhile raises `Interrupted`: nothing has been sent, nothing is lost.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import batchstream
from batchstream.connect import Plan
from batchstream.errors import InputError, LockedError, UsageError
from batchstream.files.fingerprint import input_fingerprint
from batchstream.files.journal import JournalDir
from batchstream.files.lock import Lock, hold, lock_path
from batchstream.files.manifest import Manifest
from batchstream.files.source import Source
from batchstream.files.spool import spool_stdin
from batchstream.intake import identity, open_job_source
from batchstream.job import Job
from batchstream.policy.sharding import Shard
from batchstream.records import InvalidRow
from batchstream.shard import Control

_T = TypeVar("_T")


class Interrupted(Exception):  # noqa: N818  (no error)
    """The run is to stop, and no request has left yet."""


class Skipped(Exception):  # noqa: N818  (no error)
    """Another run holds the job, and the user wants that passed over (--if-locked skip)."""


class Opening:
    """Opens the input and the journal of `job`, or of a `shard` of it, whose results go to `out`."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        out: Path,
        control: Control,
        started_at: str,
        more: dict[str, Any] | None = None,
        *,
        shard: Shard | None = None,
    ) -> None:
        """`more` belongs to the job's identity as well."""
        self._job = job
        self._shard = shard
        self._more = more or {}
        self._plan = plan
        self._out = out
        self._control = control
        self._started_at = started_at

    async def open(self) -> tuple[Source, JournalDir]:
        """The checked input and the locked journal, which the caller closes.

        Raises Interrupted, Skipped, and the BatchstreamError that says what keeps the run from starting."""
        lock = None
        # What comes over a pipe can be read once only: it is kept in the journal, and that wants the lock first. Where
        # there is a lock file, it comes first as well: who comes second hears so at once, whatever the input's size.
        if self._job.input == "-" or lock_path(self._out, self._shard).exists():
            lock = await self._patiently(hold, self._out, started=self._started_at, shard=self._shard)
        try:
            source = await self._unless_stopped(self._source, lock if self._job.input == "-" else None)
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return source, await self._journal(source, lock)

    def _source(self, lock: Lock | None) -> Source:
        """The input, checked as far as it can be before the first request."""
        job, spool = self._job, None
        if lock is not None:
            stdin = _Stdin(self._control)
            spool = str(spool_stdin(stdin, lock.path, new_job=job.new_job, allow_append=job.allow_append))
        source = open_job_source(job, self._plan, spool, self._shard)
        if job.invalid == "fail":
            for bad in (row for batch in source.batches() for row in batch if isinstance(row, InvalidRow)):
                raise InputError(f"{bad.message} (--invalid record goes on without such rows)")
        for row in next(source.batches(), []):
            if not isinstance(row, InvalidRow) and "model" not in row.body:
                raise UsageError("no model: name one with --model, or in each row")
        return source

    async def _journal(self, source: Source, lock: Lock | None) -> JournalDir:
        job = self._job
        manifest = Manifest(
            job={**identity(job, self._plan), **self._more},
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
            shard=self._shard,
        )

    async def _patiently(self, take: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `take` in a thread; while another run holds the job, wait as long as --lock-wait says."""
        deadline = time.monotonic() + self._job.lock_wait
        while True:
            try:
                return await asyncio.to_thread(take, *args, **kwargs)
            except LockedError:
                if self._control.stopping:
                    raise Interrupted from None
                if time.monotonic() < deadline:
                    await asyncio.sleep(0.2)
                elif self._job.if_locked == "skip":
                    raise Skipped from None
                else:
                    raise

    async def _unless_stopped(self, read: Callable[..., _T], *args: Any) -> _T:
        """Call `read` in a thread that a stop leaves behind: a pipe may say nothing for ever. Raises Interrupted."""
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
            raise Interrupted
        return reading.result()


class _Stdin:
    """What is piped in, until the run is to stop: Ctrl-C also ends whoever writes the pipe, and an input that ends
    there must not be taken for the whole."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def read(self, size: int, /) -> bytes:
        data = sys.stdin.buffer.read(size)
        if self._control.stopping:
            raise Interrupted
        return data
