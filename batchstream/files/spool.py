"""stdin as an input that can be read again: a resumed job must see the same rows.

The stream is copied to a file in the journal's directory, synced and renamed before the first request. When
that file is already there (a resumed job) the stream is compared with it instead; a stream that gives nothing
(a closed or empty stdin) leaves it as it is. The job's lock must be held.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from batchstream.errors import IdentityError
from batchstream.files import fsio

_CHUNK = 1 << 20


class Readable(Protocol):
    """What is asked of stdin."""

    def read(self, size: int, /) -> bytes: ...


def spool_stdin(
    stream: Readable,
    directory: Path,
    *,
    new_job: bool = False,
    allow_append: bool = False,
    disk: fsio.Disk | None = None,
) -> Path:
    """Make `directory`/input.jsonl hold what `stream` gives; returns its path. Blocking.

    Raises IdentityError when the stream differs from what was spooled before (unless `new_job`; with `allow_append` it
    may go on where that ended), StorageError.
    """
    disk = disk or fsio.disk
    target = directory / "input.jsonl"
    tmp = directory / "input.jsonl.tmp"
    old_size = target.stat().st_size if target.exists() and not new_job else None
    with fsio.storage_errors(target):
        fd = disk.open(str(tmp), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            size, same = _copy(stream, target if old_size is not None else None, fd, disk)
            disk.sync(fd)
        finally:
            disk.close(fd)
        if old_size is not None and size and (not same or size < old_size or (size > old_size and not allow_append)):
            disk.unlink(str(tmp))
            raise IdentityError(
                f"stdin differs from the input this job was begun with ({target}, {old_size} bytes); give the same "
                "input or none, --allow-append if it only goes on, or start over with --new-job"
            )
        if old_size is not None and size in (0, old_size):
            disk.unlink(str(tmp))
            return target
        disk.replace(str(tmp), str(target))
        disk.sync_dir(str(directory))
    return target


def _copy(stream: Readable, old: Path | None, fd: int, disk: fsio.Disk) -> tuple[int, bool]:
    """Copy to `fd`; (bytes, whether they equal the old file as far as that goes)."""
    size, same = 0, True
    earlier = open(old, "rb") if old is not None else None  # noqa: SIM115  (closed below, and often None)
    try:
        while chunk := stream.read(_CHUNK):
            if earlier is not None:
                before = earlier.read(len(chunk))
                same = same and chunk[: len(before)] == before
            fsio.write_all(disk, fd, chunk)
            size += len(chunk)
    finally:
        if earlier is not None:
            earlier.close()
    return size, same
