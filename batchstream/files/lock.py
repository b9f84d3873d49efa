"""One run at a time for each output: an flock on OUT.journal/LOCK.

The lock is the kernel's: it goes with the last process that has the file open, however that process died,
so there is nothing stale to clean up. The file is created once and never unlinked (unlinking a lock file lets
two processes lock two different files of one name). Its text only serves to name the holder.

Shards run side by side, each with the lock of its own directory OUT.journal/shard-I-of-N, and all of them with a share
in the job's: who runs the job as a whole, or merges its shards, locks that for himself alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path

from batchstream.errors import IdentityError, LockedError, UsageError
from batchstream.files import fsio
from batchstream.policy.sharding import Shard

_SHARD_NAME = re.compile(r"shard-(\d+)-of-(\d+)")


def journal_path(out: Path, shard: Shard | None = None) -> Path:
    """Where the state of the job with output `out` lives: the directory OUT.journal beside it, a shard's within it."""
    directory = out.with_name(out.name + ".journal")
    return directory if shard is None else directory / f"shard-{shard.index}-of-{shard.of}"


def shards_in(directory: Path) -> dict[Shard, Path]:
    """The shards' directories in a job's, in order."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if match := _SHARD_NAME.fullmatch(path.name):
            found[Shard(int(match[1]), int(match[2]))] = path
    return dict(sorted(found.items(), key=lambda item: (item[0].of, item[0].index)))


def lock_path(out: Path, shard: Shard | None = None) -> Path:
    """The file whose lock is the job's, or the shard's."""
    return journal_path(out, shard) / "LOCK"


class Lock:
    """A held lock of the directory `path`. `fds` may be passed on to child processes; the lock lasts until the last of
    them is gone. `of_job`: a shard's share in its job's lock."""

    def __init__(self, path: Path, fd: int, disk: fsio.Disk, of_job: Lock | None = None) -> None:
        self.path = path
        self.fd = fd
        self._disk = disk
        self._of_job = of_job

    @property
    def fds(self) -> list[int]:
        mine = [self.fd] if self.fd >= 0 else []
        return mine + (self._of_job.fds if self._of_job is not None else [])

    def release(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):  # the kernel has let go of it, whatever a close says
                self._disk.close(self.fd)
            self.fd = -1
        if self._of_job is not None:
            self._of_job.release()


def hold(out: Path, *, started: str, shard: Shard | None = None, disk: fsio.Disk | None = None) -> Lock:
    """Create the state directory if need be and lock it, without waiting: the job's, or one `shard`'s.

    `started` is the start time (ISO 8601) that is shown to whoever comes second. Raises LockedError naming the
    holder, IdentityError for a shard beside others that are not its like, StorageError when the directory cannot be
    made, UsageError when something else has its name.
    """
    disk = disk or fsio.disk
    if shard is None:
        return _hold(out, journal_path(out), f"{out}: another run", started, disk)
    of_job = _hold(out, journal_path(out), f"{out}: another run", started, disk, shared=True)
    try:
        check_company(journal_path(out), shard)  # before there is a trace of this shard
        return _hold(
            out, journal_path(out, shard), f"{out}: another run of shard {shard}", started, disk, of_job=of_job
        )
    except BaseException:
        of_job.release()
        raise


def _hold(
    out: Path,
    directory: Path,
    who: str,
    started: str,
    disk: fsio.Disk,
    *,
    shared: bool = False,
    of_job: Lock | None = None,
) -> Lock:
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
        fd = disk.open(str(directory / "LOCK"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock_patiently(disk, fd, shared=shared)
        text = f"{'a shard, ' if shared else ''}pid {os.getpid()} on {socket.gethostname()} since {started}\n".encode()
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
                f"{who} holds this job ({by or 'it has not said who it is'}); "
                "wait for it, or use --if-locked skip or --lock-wait"
            ) from None
        raise fsio.storage_error(directory / "LOCK", error) from error
    return Lock(directory, fd, disk, of_job)


def check_company(directory: Path, shard: Shard) -> None:
    """Raises IdentityError where `shard` would do again what others in the job's `directory` have done."""
    if any(directory.glob("seg-*.bsj")):
        raise IdentityError(f"{directory}: holds answers of a run without --shard; go on without it")
    for other in shards_in(directory):
        if other.of != shard.of:
            raise IdentityError(
                f"{directory}: was begun with {other.of} shards, now there are to be {shard.of}; give --shard "
                f"{min(shard.index, other.of)}/{other.of}, or finish it without --shard: that takes in what they have"
            )


def _lock_patiently(disk: fsio.Disk, fd: int, *, shared: bool) -> None:
    """Lock, or BlockingIOError. A few tries within 70 ms: `holder` below may have it for an instant."""
    if shared:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return
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
    """Who runs the job with this state directory, or a shard of it, just now ("" when it has not said), None when
    nobody does.

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
    return next((by for path in shards_in(directory).values() if (by := holder(path)) is not None), None)
