"""The only door to the disk for everything that must survive a crash.

Each call that changes a disk goes through a `Disk`; reading does not, because reading cannot lose
anything. So the tests can put another disk behind the same door: one that fails or kills the process at
the Nth call, one that records the calls and replays the states a power loss may leave.

`disk` is the disk used by whoever was not given one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from batchstream.errors import StorageError


class Disk(Protocol):
    """Calls that change a disk, one system call each. All raise OSError as the system does."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int: ...
    def write(self, fd: int, data: bytes) -> int: ...
    def sync(self, fd: int) -> None: ...
    def sync_data(self, fd: int) -> None: ...
    def sync_dir(self, path: str) -> None: ...
    def truncate(self, fd: int, length: int) -> None: ...
    def replace(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def mkdir(self, path: str, mode: int = 0o700) -> None: ...
    def lock(self, fd: int) -> None: ...
    def close(self, fd: int) -> None: ...


class RealDisk:
    """The machine's own disk."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        # macOS has no fdatasync.
        getattr(os, "fdatasync", os.fsync)(fd)

    def sync_dir(self, path: str) -> None:
        """Make the names in a directory durable. Some network file systems cannot: said once, not fatal."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            warnings.warn(
                f"{path}: this file system cannot sync directories; a power loss may lose the newest file names",
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            os.close(fd)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        os.mkdir(path, mode)

    def lock(self, fd: int) -> None:
        """An exclusive flock, at once or BlockingIOError. The kernel drops it with the last copy of the fd."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self, fd: int) -> None:
        os.close(fd)


disk: Disk = RealDisk()


def write_all(on: Disk, fd: int, data: bytes) -> None:
    """Write every byte or raise OSError. A short write is followed by a second one, which names the reason."""
    written = on.write(fd, data) if data else 0
    while written < len(data):
        written += on.write(fd, data[written:])


def replace_file(on: Disk, path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` under `path` so that a reader, and a crash, sees the old file or the new one whole."""
    tmp = f"{path}.tmp"
    with storage_errors(path):
        fd = on.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            write_all(on, fd, data)
            on.sync(fd)
        finally:
            on.close(fd)
        on.replace(tmp, str(path))
        on.sync_dir(str(path.parent))


_ADVICE = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "the quota is used up: free some space, then run the same command again",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.EACCES: "no permission: choose another --output or change the permissions",
    errno.EPERM: "not permitted: choose another --output",
    errno.EIO: "the disk reports I/O errors: check the hardware, then run the same command again",
    errno.EMFILE: "too many open files: raise `ulimit -n`, then run the same command again",
    errno.ENFILE: "the system has too many open files",
    errno.ENOENT: "the directory does not exist: create it or choose another --output",
    errno.ENOTDIR: "a part of the path is a file: choose another --output",
    errno.ENAMETOOLONG: "choose a shorter --output",
    errno.EFBIG: "the file would pass the size limit (`ulimit -f`)",
}


def storage_error(path: object, error: OSError) -> StorageError:
    """One line for a person: which file, what the system said, what to do."""
    advice = _ADVICE.get(error.errno or 0, "run the same command again when the disk is well")
    return StorageError(f"{path}: cannot write: {error.strerror or error}; {advice}")


@contextlib.contextmanager
def storage_errors(path: object) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error
