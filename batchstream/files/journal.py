"""The journal of a job: OUT.journal/ beside the output. (Interface settled; bodies follow.)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from batchstream.files.source import Row, Source

Durability = Literal["row", "batch", "os"]


class InputFile(msgspec.Struct, frozen=True):
    name: str
    size: int
    mtime_ns: int


class Manifest(msgspec.Struct, kw_only=True):
    """Identity of a job. The caller fills job, input, created, version; `acquire` fills job_id and salt."""

    job: dict[str, Any]            # everything that changes results: fingerprint.job_fingerprint(...)
    input: tuple[InputFile, ...]   # fingerprint.input_fingerprint(source)
    created: str                   # ISO 8601 UTC
    version: str
    job_id: str = ""
    salt: str = ""
    format: int = 1


class Published(msgspec.Struct, frozen=True):
    """The results file as this job made it: how a later start knows the file is its own."""

    size: int
    blake2b: str


class Final(msgspec.Struct, kw_only=True):
    """FINAL.json: written last, after the results are in place. `reopened` = superseded by a later start
    (--retry-failed, --allow-append) that has not finished yet."""

    job_id: str
    rows: int
    ok: int
    failed: int
    duplicates: int
    exit_code: int
    usage: dict[str, int]
    results: Published | None
    finished: str
    reopened: bool = False


class Recovered:
    """What the journal holds, at most 24 bytes a row."""

    ok: int                 # rows with a stored success
    failed: int             # rows whose best outcome is a failure
    duplicates: int         # successes beyond the first of their row: bought twice
    asked_again: int        # rows admitted (maybe billed) without a stored outcome: they will be asked again
    skipped_records: int    # damaged records past the last durable mark, ignored
    blocks: dict[int, tuple[int, bytes]]  # block index -> (rows hashed, hash)

    def done(self, row: int) -> bool:
        """True when the row has a stored outcome and must not be sent (with retry_failed: a stored success)."""
        raise NotImplementedError

    def digest(self, row: int) -> int | None:
        """Request digest of the row's stored outcome, None without one."""
        raise NotImplementedError

    def check(self, row: Row) -> bool:
        """`done(row.row)`, and raise IdentityError when the row's digest differs from the stored one."""
        raise NotImplementedError


class Segment:
    """One append-only file of the journal, and whatever replaces it after an error. Thread-safe."""

    trouble: str | None     # why the disk refuses right now; while set: admit nothing, keep calling sync() with back-off
    pending_bytes: int      # bytes written or held that no sync has covered yet
    durable_rows: int       # outcomes on stable storage, of this process

    def admit(self, rows: Iterable[int]) -> None:
        """Note that these rows are about to be sent (one small record; written, not synced)."""
        raise NotImplementedError

    def append(self, row: int, digest: int, ok: bool, result_json: bytes) -> bool:
        """Write an outcome at once. Never raises for the disk: False = held in memory, see `trouble`."""
        raise NotImplementedError

    def cancel(self, rows: Iterable[int]) -> None:
        """Rows given up by a second signal or a drain time-out: they may be billed and will be asked again."""
        raise NotImplementedError

    def block(self, index: int, rows: int, digest: bytes) -> None:
        raise NotImplementedError

    def sync(self) -> list[int]:
        """Make everything appended so far durable; returns the rows that became so (empty while in trouble).

        Blocking (fdatasync): call it from a helper thread; append may go on meanwhile. Also retries what the disk
        refused, and starts a fresh file after EIO or at 1 GiB. Raises StorageError when that fails for good
        (EIO twice): then `spill` or give up.
        """
        raise NotImplementedError

    def spill(self, directory: Path) -> Path:
        """Last resort: write every outcome that is not durable to `directory`, synced. The next `acquire` with the
        same spill_dir takes it in. Raises StorageError."""
        raise NotImplementedError

    def close(self, *, clean: bool) -> list[int]:
        """Final sync; `clean` writes the end mark (nothing was in flight). Returns like `sync`."""
        raise NotImplementedError


class GroupSync:
    """When the next sync is due (pure). durability "row": at once; "batch": 100 ms or 1 MiB; "os": as batch, no fdatasync."""

    def __init__(self, durability: Durability = "batch", *, max_wait: float = 0.1, max_bytes: int = 1 << 20) -> None: ...

    def wait(self, pending_bytes: int, oldest: float | None, now: float) -> float | None:
        """Seconds until a sync is due: 0 = now, None = nothing is pending. `oldest`: when the first pending byte came."""
        raise NotImplementedError


class JournalDir:
    """The locked, recovered journal of one job."""

    path: Path
    manifest: Manifest
    recovered: Recovered
    final: Final | None     # finished before, and neither input nor outcome set changed since: nothing to do
    lock_fd: int            # hand to worker processes (pass_fds), so that the lock lives as long as any of them
    warnings: list[str]     # one line each, for stderr

    @classmethod
    def acquire(
        cls, out: Path, manifest: Manifest, *, new_job: bool = False, overwrite: bool = False,
        allow_append: bool = False, retry_failed: bool = False, durability: Durability = "batch",
        spill_dir: Path | None = None, lock: Any = None, disk: Any = None,
    ) -> JournalDir:
        """Lock, compare or write the manifest, recover. Raises LockedError, IdentityError, DamagedError, StorageError,
        UsageError (OUT exists and is not this job's). `lock`: from lock.hold(out), when it was taken earlier."""
        raise NotImplementedError

    @classmethod
    def join(cls, out: Path, lock_fd: int, *, durability: Durability = "batch", disk: Any = None) -> JournalDir:
        """In a worker process of the holder: the same journal, not recovered, only to open segments."""
        raise NotImplementedError

    def segment(self, worker: int = 0) -> Segment:
        """Open a new segment: created, header written, file and directory synced. Only now may a request leave."""
        raise NotImplementedError

    def proven(self, source: Source) -> Iterator[list[Row]]:
        """`source.batches()`, with the input's identity proven: done rows against their stored digest, and every recorded
        block with unfinished rows hashed before a row of it is given. Done rows are left out. Raises IdentityError.
        After each call `blocks_read` holds block hashes newly complete, for Segment.block."""
        raise NotImplementedError

    def publish(self, *, rows: int, exit_code: int, finished: str, overwrite: bool = False) -> Final:
        """Build OUT from the journal (format by suffix), in input order, put it in place atomically, write FINAL.json.
        `rows`: how many rows must have an outcome. Blocking. Repeatable. Raises StorageError, DamagedError."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the lock (the LOCK file stays)."""
        raise NotImplementedError
