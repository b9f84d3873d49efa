"""The runner's sink that keeps: results go to the journal at once, count once they are durable.

A result is written the moment it ends (a killed process loses nothing that was written) and synced in
groups by a helper thread; the event loop never waits for the disk. Only the sync that covers a row makes
it `done` for progress and callers. When the disk refuses, nothing more is admitted, what is in flight is
kept in memory and the sync is tried again for a minute; then unsaved results are spilled and the run stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from batchstream.endpoints.credentials import spellings
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Stop
from batchstream.errors import StorageError
from batchstream.files.journal import GroupSync, Segment
from batchstream.records import InvalidRow, Request, Result

PENDING_MAX = 64 << 20
"""Bytes of results that may wait for a sync before admission pauses."""

PATIENCE_S = 60.0
"""How long a disk that refuses is tried again before the run stops."""

_DISK = "disk: "  # how our own messages begin

_encode = msgspec.json.Encoder().encode


class Store:
    """A sink (`engine.runner.Sink`) over one journal segment; `stop` is called when the disk has failed for good.

    `secrets` never reach the journal, whatever an endpoint echoes. `on_durable(result)` is told of each result
    once it is on stable storage, `on_stored(rows)` of the rows that a sync has covered.
    """

    def __init__(
        self,
        segment: Segment,
        progress: Progress,
        group: GroupSync,
        *,
        secrets: Iterable[str] = (),
        spill_dir: Path | None = None,
        stop: Callable[[Stop], None],
        on_durable: Callable[[Result], None] | None = None,
        on_stored: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._segment = segment
        self._progress = progress
        self._group = group
        self._secrets = tuple(spelled for secret in secrets for spelled in spellings(secret))
        self._spelled = tuple(_encode(text)[1:-1] for text in self._secrets)  # as they stand in a record
        self._spill_dir = spill_dir
        self._stop = stop
        self._on_durable = on_durable
        self._on_stored = on_stored
        self._unsynced: dict[int, tuple[bool, str, Result | None]] = {}
        self._oldest: float | None = None
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._refused: StorageError | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._sync_loop())
        self._task.add_done_callback(self._sync_ended)

    async def room(self) -> None:
        await self._room.wait()

    def admit(self, request: Request) -> bool:
        if self._refused is None and self._segment.admit((request.row,)):
            return True
        # It changes to a fresh file just now, or the disk refuses: either way the next sync tells.
        self._room.clear()
        self._wake.set()
        return False

    def done(self, row: Request | InvalidRow, result: Result) -> None:
        data = _encode(result)
        for spelled in self._spelled:
            if spelled in data:
                data = _encode(_without(msgspec.json.decode(data), self._secrets))
                result = msgspec.json.decode(data, type=Result)
                break
        ok = result.status == "ok"
        kind = "" if result.error is None else result.error.kind
        self._unsynced[row.row] = (ok, kind, result if self._on_durable is not None else None)
        self._segment.append(row.row, row.digest, ok, data)
        if self._oldest is None:
            self._oldest = time.monotonic()
        self._wake.set()
        if self._segment.trouble is not None or self._segment.pending_bytes > PENDING_MAX:
            self._make_room()

    def gave_up(self, request: Request, *, maybe_billed: bool) -> None:
        self._segment.gave_up((request.row,), maybe_billed=maybe_billed)

    async def close(self, *, clean: bool) -> None:
        """Final sync; call it when the runner has ended. Raises StorageError when results could not be synced,
        saying where they were spilled or that they are lost."""
        self._closing = True
        self._wake.set()
        try:
            if self._task is not None:
                await self._task
            try:
                # Also after a refusal: the disk may have been cured while the last answers came in.
                self._count(await self._in_thread(lambda: self._segment.close(clean=clean)))
            except StorageError as error:
                self._refused = self._refused or error
            if self._refused is not None:
                message = await self._last_resort(self._refused)
                self._segment.abandon()
                raise StorageError(message)
        finally:
            self._thread.shutdown(wait=True)

    async def _in_thread(self, call: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _sync_loop(self) -> None:
        refused_since: float | None = None
        backoff = 0.25
        while True:
            wait = self._group.wait(self._segment.pending_bytes, self._oldest, time.monotonic())
            if wait is None and self._segment.trouble is not None and not self._closing:
                wait = 0.0  # nothing to store, but rows wait to be admitted: only a sync finds out whether they may
            if wait is None:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            if wait > 0 and not self._closing:
                await asyncio.sleep(wait)
            self._oldest = None
            try:
                self._count(await self._in_thread(self._segment.sync))
            except StorageError as error:
                self._surrender(error)
                return
            trouble = self._segment.trouble
            self._make_room()
            if trouble is None:
                refused_since, backoff = None, 0.25
                continue
            self._progress.message = f"{_DISK}{trouble}; admitting nothing, trying again"
            refused_since = refused_since or time.monotonic()
            self._oldest = refused_since
            pending = self._segment.pending_bytes > 0
            if (self._closing and pending) or time.monotonic() - refused_since > PATIENCE_S:
                self._surrender(StorageError(trouble))
                return
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, 5.0)

    def _make_room(self) -> None:
        full = self._segment.trouble is not None or self._segment.pending_bytes > PENDING_MAX
        if full and not self._closing:
            self._room.clear()
        elif not full:
            if self._progress.message.startswith(_DISK):
                self._progress.message = ""
            self._room.set()

    def _count(self, rows: list[int]) -> None:
        progress = self._progress
        if rows and self._on_stored is not None:
            self._on_stored(rows)
        for row in rows:
            known = self._unsynced.pop(row, None)
            if known is None:
                continue
            ok, kind, result = known
            progress.done += 1
            if ok:
                progress.ok += 1
            else:
                progress.failed += 1
                progress.failures[kind] += 1
            if result is not None and self._on_durable is not None:
                self._on_durable(result)

    def _sync_ended(self, task: asyncio.Task[None]) -> None:
        """A bug, or a hook that raises: nothing counts any more, so nothing more is bought. `close` raises it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._stop(Stop("storage", f"{type(error).__name__}: {error}"))
            self._room.set()

    def _surrender(self, error: StorageError) -> None:
        """The journal's disk is lost: admit nothing more. What still arrives is kept in memory until `close`."""
        self._refused = error
        self._stop(Stop("storage", str(error)))
        self._room.set()

    async def _last_resort(self, error: StorageError) -> str:
        """Keep what was paid for elsewhere if we may; says what became of it."""
        count = len(self._unsynced)
        if not count:
            return str(error)
        if self._spill_dir is None:
            return f"{error}; {count} results could not be saved (--spill-dir names a place for such a case)"
        directory = self._spill_dir
        try:
            path = await asyncio.get_running_loop().run_in_executor(self._thread, self._segment.spill, directory)
        except StorageError as spill_error:
            return f"{error}; spilling {count} results failed as well: {spill_error}"
        return f"{error}; {count} unsaved results are in {path}, the next start with the same --spill-dir takes them in"


def _without(value: Any, secrets: tuple[str, ...]) -> Any:
    """`value` with the secrets taken out of every text in it."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "[key]")
        return value
    if isinstance(value, list):
        return [_without(item, secrets) for item in value]
    if isinstance(value, dict):
        return {_without(name, secrets): _without(item, secrets) for name, item in value.items()}
    return value
