"""The writing side of the journal: one segment at a time, and what happens when the disk refuses.

Rules.
1. An outcome is written at once, with one write to an O_APPEND file, and kept in memory until a sync covers it.
2. A row counts only when `sync` has returned it.
3. Disk full (or a short write): the file is cut back to its last whole record; outcomes wait in memory, in order,
   and every later `sync` tries again. `trouble` says so: admit nothing meanwhile.
4. A sync that failed is never repeated on that file (the kernel may have dropped the pages and say "fine" the
   second time): what it did not cover is written again, as "w" records, to a fresh file. The second time is the last.
5. At 1 GiB a fresh file is begun. For the moment of the change outcomes wait in memory as in 3.

Two threads: the caller's (admit, append, ...: short writes, never a sync) and a helper thread in `sync`.
`_state` guards the fields for short moments; `_syncing` lets one sync run at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from batchstream.errors import StorageError
from batchstream.files import fsio, record

Durability = Literal["row", "batch", "os"]

SEGMENT_BYTES = 1 << 30
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Outcome(NamedTuple):
    row: int
    digest: int
    ok: bool
    result: bytes
    again: bool
    end: int  # offset of the record's end in the current file; 0 while it is held in memory


class Segment:
    """Where one worker of a job appends. Thread-safe.

    `trouble`: why the disk refuses at present, or None.
    """

    def __init__(
        self,
        directory: Path,
        *,
        job_id: str,
        salt: str,
        worker: int,
        number: int,
        after: dict[str, int],
        durability: Durability = "batch",
        disk: fsio.Disk | None = None,
        max_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Creates the file and returns when its name and header are on stable storage. Raises StorageError."""
        self.trouble: str | None = None
        self._directory = directory
        self._job_id = job_id
        self._salt = salt
        self._worker = worker
        self._number = number
        self._after = after
        self._durability = durability
        self._disk = disk or fsio.disk
        self._max_bytes = max_bytes
        self._state = threading.Lock()
        self._syncing = threading.Lock()
        self._written: deque[_Outcome] = deque()  # in the file, not covered by a sync
        self._held: deque[_Outcome] = deque()  # in memory only
        self._held_bytes = 0
        self._blocks: deque[bytes] = deque()  # notes of input blocks that wait for a willing disk
        self._safe: list[int] = []  # rows that became durable and were not returned yet
        self._unsynced_bytes = 0
        self._replace = False  # the file must not be used any more
        self._failed_syncs = 0
        self._fd = -1
        with fsio.storage_errors(directory):
            self._begin_file()

    @property
    def pending_bytes(self) -> int:
        """Bytes that no sync has covered yet."""
        return self._unsynced_bytes + self._held_bytes

    def admit(self, rows: Iterable[int]) -> bool:
        """Note that these rows are about to be sent. False: the disk refuses; do not send, sync and try again."""
        return self._note({"t": "a", "rows": list(rows)})

    def gave_up(self, rows: Iterable[int], *, maybe_billed: bool) -> bool:
        """Admitted rows that stay without an outcome in this run: cut off on the wire, or not sent after all."""
        return self._note({"t": "c" if maybe_billed else "u", "rows": list(rows)})

    def block(self, index: int, rows: int, digest: bytes) -> None:
        """The hash of a block of the input that has been read. Written when the disk is willing."""
        with self._state:
            self._blocks.append(msgspec.json.encode({"t": "b", "i": index, "n": rows, "h": digest.hex()}))
            if not (self._held or self._replace or self.trouble):
                self._write_blocks()

    def append(self, row: int, digest: int, ok: bool, result_json: bytes) -> bool:
        """Write an outcome, now. Never raises for the disk: False means that it is held in memory (see `trouble`)."""
        outcome = _Outcome(row, digest, ok, result_json, False, 0)
        with self._state:
            if not (self._held or self._replace or self.trouble) and self._write_outcome(outcome):
                return True
            self._hold([outcome])
            return False

    def sync(self) -> list[int]:
        """Make everything appended so far durable; the rows that became so (none while the disk refuses).

        Blocking: call it from a helper thread; `append` may go on meanwhile. Also writes what had to wait in memory,
        and begins a fresh file where rules 4 and 5 want one. Raises StorageError when a second sync has failed:
        then `spill`.
        """
        with self._syncing:
            while self._failed_syncs < 2:
                if not self._catch_up():
                    break
                try:
                    self._sync_file()
                    break
                except OSError as error:
                    self._distrust(error)
            else:
                raise StorageError(self.trouble or f"{self._path()}: closed")
            safe, self._safe = self._safe, []
            return safe

    def spill(self, directory: Path) -> Path:
        """Last resort: write every outcome that is not durable to `directory`, synced. Returns the file.

        The next `JournalDir.acquire` with this `spill_dir` takes it in. Raises StorageError.
        """
        with self._syncing, self._state:
            path = directory / f"spill-{self._worker}-{self._number}.bsj"
            seed = record.segment_seed(self._salt, path.name)
            bodies = [self._header({})]
            bodies += [
                record.encode_outcome(o.row, o.digest, o.ok, o.result, again=True)
                for o in (*self._written, *self._held)
            ]
            data = b"".join(record.encode_line(seed, body) for body in bodies)
            with fsio.storage_errors(path):
                if not directory.is_dir():
                    self._disk.mkdir(str(directory))
                fsio.replace_file(self._disk, path, data)
            self._written.clear()
            self._held.clear()
            self._held_bytes = self._unsynced_bytes = 0
            self.trouble = f"{self._path()}: given up; its last results were spilled to {path}"
            self._release()
            return path

    def close(self, *, clean: bool) -> list[int]:
        """Sync a last time and close; `clean` says that nothing was in flight. Returns like `sync`.

        Raises StorageError when outcomes remain that are not durable: then `spill`.
        """
        rows = self.sync()
        self._note({"t": "z", "clean": clean})
        rows += self.sync()
        if self.pending_bytes:
            raise StorageError(self.trouble or f"{self._path()}: not everything could be stored")
        self._release()
        return rows

    def abandon(self) -> None:
        """Close the file as it is, after an error, without another try to store anything."""
        with self._syncing:
            self._release()

    # Everything below is called with `_state` or `_syncing` held, as said.

    def _release(self) -> None:
        """[_syncing] Close the file; nothing more goes into it."""
        self._replace = True
        self._failed_syncs = 2
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # what counts has been synced; an error here says nothing about it
                self._disk.close(fd)

    def _path(self) -> Path:
        return self._directory / f"seg-{self._worker}-{self._number}.bsj"

    def _header(self, after: dict[str, int]) -> bytes:
        return msgspec.json.encode(
            {"t": "h", "job": self._job_id, "worker": self._worker, "n": self._number, "after": after}
        )

    def _begin_file(self) -> None:
        """Open the next free file, write and sync its header and its name."""
        while True:
            path = self._path()
            try:
                fd = self._disk.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                break
            except FileExistsError:
                self._number += 1
        try:
            self._seed = record.segment_seed(self._salt, path.name)
            header = record.encode_line(self._seed, self._header(self._after))
            fsio.write_all(self._disk, fd, header)
            self._disk.sync(fd)
            self._disk.sync_dir(str(self._directory))
        except OSError:
            # Nothing but a header is in it; a later try takes the next number.
            with contextlib.suppress(OSError):
                self._disk.close(fd)
                self._disk.unlink(str(path))
            raise
        self._fd = fd
        self._length = self._synced = len(header)

    def _note(self, note: dict[str, object]) -> bool:
        with self._state:
            if self._replace or self.trouble or self._held:
                return False
            return self._write(msgspec.json.encode(note))

    def _write(self, body: bytes, *, counts: bool = True) -> bool:
        """[_state] Append one record; on refusal cut the file back to its last whole record."""
        line = record.encode_line(self._seed, body)
        try:
            fsio.write_all(self._disk, self._fd, line)
        except OSError as refused:
            error = refused
        else:
            self._length += len(line)
            self._unsynced_bytes += len(line) if counts else 0
            return True
        self.trouble = str(fsio.storage_error(self._path(), error))
        self._replace = error.errno not in _FULL
        try:
            self._disk.truncate(self._fd, self._length)
        except OSError:
            self._replace = True  # part of a record may stand at its end: nothing may be appended to it
        return False

    def _write_outcome(self, outcome: _Outcome) -> bool:
        """[_state]"""
        row, digest, ok, result, again, _ = outcome
        if not self._write(record.encode_outcome(row, digest, ok, result, again=again)):
            return False
        self._written.append(_Outcome(row, digest, ok, result, again, self._length))
        return True

    def _hold(self, outcomes: Iterable[_Outcome]) -> None:
        """[_state]"""
        for outcome in outcomes:
            self._held.append(outcome)
            self._held_bytes += len(outcome.result)

    def _catch_up(self) -> bool:
        """[_syncing] Get what is held in memory into a file, a fresh one if need be. False while the disk refuses."""
        if self._replace:
            with self._state:
                self._reclaim()
            old = self._fd
            self._number += 1
            try:
                self._begin_file()
            except OSError as error:
                self.trouble = str(fsio.storage_error(self._path(), error))
                return False
            with contextlib.suppress(OSError):  # whatever it says, that file is not relied on any more
                self._disk.close(old)
            with self._state:
                self._replace = False
        # One at a time: the other thread must not wait for a long list.
        while True:
            with self._state:
                if not self._held:
                    # The mark is the probe: a disk that was full a moment ago takes it or refuses again.
                    if self.trouble and not self._write(self._mark(), counts=False):
                        return False
                    self.trouble = None
                    return self._write_blocks()
                if not self._write_outcome(self._held[0]):
                    return False
                self._held_bytes -= len(self._held.popleft().result)

    def _mark(self) -> bytes:
        return b'{"t":"m","o":%d}' % self._synced

    def _write_blocks(self) -> bool:
        """[_state]"""
        while self._blocks and self._write(self._blocks[0]):
            self._blocks.popleft()
        return not self._blocks

    def _sync_file(self) -> None:
        """[_syncing] Sync the file and take note of what that covers. Raises OSError."""
        with self._state:
            target, covered = self._length, self._unsynced_bytes
        if not covered:
            return
        if self._durability != "os":
            self._disk.sync_data(self._fd)
        with self._state:
            while self._written and self._written[0].end <= target:
                self._safe.append(self._written.popleft().row)
            self._unsynced_bytes -= covered
            self._synced = target
            if self._replace or self.trouble:
                return
            if self._durability != "os":
                self._write(self._mark(), counts=False)
            if self._length <= self._max_bytes or self.trouble:
                return
            self._replace = True  # from here on outcomes are held, for the moments the change takes
        self._sync_file()
        self._catch_up()

    def _reclaim(self) -> None:
        """[_state] Take back what the file holds and no sync covered: it is to be written again, first of all."""
        self._held.extendleft(outcome._replace(again=True, end=0) for outcome in reversed(self._written))
        self._held_bytes = sum(len(outcome.result) for outcome in self._held)
        self._written.clear()
        self._unsynced_bytes = 0

    def _distrust(self, error: OSError) -> None:
        """[_syncing] A sync failed: nothing that it was to cover may be taken as stored."""
        with self._state:
            self._reclaim()
            self._replace = True
            self._failed_syncs += 1
            self.trouble = str(fsio.storage_error(self._path(), error))


class GroupSync:
    """When the next sync is due: a pure decision, the caller sleeps.

    "row": as soon as something is pending. "batch" and "os": when the oldest pending byte is `max_wait` seconds old
    or `max_bytes` are pending. (A sync costs milliseconds whether it covers 4 KB or 400 KB.)
    """

    def __init__(self, durability: Durability = "batch", *, max_wait: float = 0.1, max_bytes: int = 1 << 20) -> None:
        self._max_wait = 0.0 if durability == "row" else max_wait
        self._max_bytes = max_bytes

    def wait(self, pending_bytes: int, oldest: float | None, now: float) -> float | None:
        """Seconds until a sync is due: 0 = now, None = nothing is pending. `oldest`: when the first of it came."""
        if not pending_bytes or oldest is None:
            return None
        if pending_bytes >= self._max_bytes:
            return 0.0
        return max(0.0, oldest + self._max_wait - now)
