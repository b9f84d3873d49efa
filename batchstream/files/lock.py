"""One run at a time for each output: an flock on OUT.journal/LOCK.

The lock is the kernel's: it goes with the last process that has the file open, however that process died,
so there is nothing stale to clean up. The file is created once and never unlinked (unlinking a lock file lets
two processes lock two different files of one name). Its text only serves to name the holder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from batchstream.errors import LockedError, UsageError
from batchstream.files import fsio


def journal_path(out: Path) -> Path:
    """Where the state of the job with output `out` lives: the directory OUT.journal beside it."""
    return out.with_name(out.name + ".journal")


def lock_path(out: Path) -> Path:
    """The file whose lock is the job's."""
    return journal_path(out) / "LOCK"


class Lock:
    """A held lock. `fd` may be passed on to child processes; the lock lasts until the last of them is gone."""

    def __init__(self, path: Path, fd: int, disk: fsio.Disk) -> None:
        self.path = path
        self.fd = fd
        self._disk = disk

    def release(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # the kernel has let go of it, whatever a close says
                self._disk.close(self.fd)
            self.fd = -1


def hold(out: Path, *, started: str, disk: fsio.Disk | None = None) -> Lock:
    """Create the state directory if need be and lock it, without waiting.

    `started` is the start time (ISO 8601) that is shown to whoever comes second. Raises LockedError naming the
    holder, StorageError when the directory cannot be made, UsageError when something else has its name.
    """
    disk = disk or fsio.disk
    directory = journal_path(out)
    with fsio.storage_errors(directory):
        try:
            disk.mkdir(str(directory), 0o700)
        except FileExistsError:
            if not directory.is_dir():
                raise UsageError(
                    f"{directory}: expected a directory for the job's state, got a file; move it"
                ) from None
        # Always, not only by the one who made it: that one may have died before its sync.
        disk.sync_dir(str(directory.parent))
        fd = disk.open(str(lock_path(out)), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock_patiently(disk, fd)
        text = f"pid {os.getpid()} on {socket.gethostname()} since {started}\n".encode()
        disk.truncate(fd, 0)
        fsio.write_all(disk, fd, text)
    except BaseException as error:
        locked = isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.EACCES)
        by = _said(fd) if locked else ""
        disk.close(fd)
        if not isinstance(error, OSError):
            raise
        if locked:
            raise LockedError(
                f"{out}: another run holds this job ({by or 'it has not said who it is'}); "
                "wait for it, or use --if-locked skip or --lock-wait"
            ) from None
        raise fsio.storage_error(lock_path(out), error) from error
    return Lock(directory, fd, disk)


def _lock_patiently(disk: fsio.Disk, fd: int) -> None:
    """Lock, or BlockingIOError. A few tries within 70 ms: `holder` below may have it for an instant."""
    for pause in (0.01, 0.02, 0.04):
        try:
            disk.lock(fd)
        except BlockingIOError:
            time.sleep(pause)
        else:
            return
    disk.lock(fd)


def _said(fd: int) -> str:
    """Who holds the lock. A holder says so just after it has locked: on a busy machine that takes a moment."""
    for _ in range(25):
        text = os.pread(fd, 500, 0).decode("utf-8", "replace").strip()
        if text:
            return text
        time.sleep(0.02)
    return ""


def holder(directory: Path) -> str | None:
    """Who runs the job with this state directory just now ("" when it has not said), None when nobody does.

    Looks by taking a shared lock for an instant: nothing is created or changed, and a run that starts within that
    instant tries again.
    """
    try:
        fd = os.open(directory / "LOCK", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # nothing was ever run here, or it is not ours to see
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 500, 0).decode("utf-8", "replace").strip()
    finally:
        os.close(fd)
    return None
