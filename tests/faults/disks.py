"""Disks behind the same door as the real one (batchstream.files.fsio.Disk), for proving the journal.

`CountingDisk` numbers the calls and, at one of them, fails with an errno, writes short, or kills its own process.
`RecordingDisk` does everything for real and keeps a log, from which `power_loss` builds what a disk may
hold after the current failed at any moment: only what was synced is sure; of the rest any part may be there.
`LazyDisk` does not wait for syncs (for the second half of such tests, where nothing fails any more).
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from batchstream.files.fsio import RealDisk

CALLS = ("open", "write", "sync", "sync_data", "sync_dir", "truncate", "replace", "unlink", "mkdir", "lock", "close")
ERRORS = {
    "open": (errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EACCES),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG),
    "sync": (errno.EIO, errno.ENOSPC),
    "sync_data": (errno.EIO, errno.ENOSPC),
    "sync_dir": (errno.EIO,),
    "truncate": (errno.EIO,),
    "replace": (errno.EXDEV, errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "mkdir": (errno.EACCES, errno.ENOSPC),
    "lock": (errno.ENOLCK,),
    "close": (errno.EIO,),
}


class LazyDisk(RealDisk):
    """Real, except that no sync is waited for."""

    def sync(self, fd: int) -> None: ...
    def sync_data(self, fd: int) -> None: ...
    def sync_dir(self, path: str) -> None: ...


class CountingDisk:
    """Asks `act`, one of the functions below, at call number `at` (from 0). `log` holds the names of all calls."""

    def __init__(
        self, at: int = -1, act: Callable[[str], object] | None = None, *, lazy: bool = True, lasting: str = ""
    ) -> None:
        """`lasting` names a call that goes on failing once number `at` has (a disk that stays full)."""
        self.log: list[str] = []
        self.numbers = itertools.count()  # two threads may call at once: each gets a number of its own
        self.at = at
        self.act = act
        self.lasting = lasting
        self.real = LazyDisk() if lazy else RealDisk()

    def __getattr__(self, name: str):
        if name not in CALLS:
            raise AttributeError(name)
        real = getattr(self.real, name)

        def call(*args):
            number = next(self.numbers)
            self.log.append(name)
            hit = number == self.at or (0 <= self.at < number and name == self.lasting)
            if hit and self.act is not None and name == "close":
                real(*args)  # lets go of the file, whatever it says (Linux)
                if self.act(name) == "torn":
                    kill(name)
                return None
            if hit and self.act is not None:
                how = self.act(name)
                if how in ("short", "torn", "half") and name == "write":
                    args = (args[0], args[1][: len(args[1]) // 2])
                if how == "torn":
                    real(*args)
                    kill(name)
                if how == "half":
                    real(*args)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call


def kill(_name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn(_name: str) -> object:
    """Half of a write, or the whole of another call, then death."""
    return "torn"


def fail(code: int) -> Callable[[str], object]:
    def act(_name: str) -> object:
        raise OSError(code, os.strerror(code))

    return act


def short(_name: str) -> object:
    return "short"


def half(_name: str) -> object:
    """Half of a write, and no room for the rest."""
    return "half"


class RecordingDisk(LazyDisk):
    """Logs every change. `promise(x)` notes at the present place of the log that `x` was told to be safe."""

    def __init__(self, ignore: Iterable[str] = ()) -> None:
        self.log: list[tuple] = []
        self.files: dict[int, int] = {}  # fd -> inode
        self.inodes: dict[str, int] = {}  # path -> inode
        self.ignore = set(ignore)  # calls that are "forgotten": the bugs that the tests must catch
        self.next_inode = 1

    def promise(self, what: object) -> None:
        self.log.append(("promise", what))

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        new = not os.path.exists(path)
        fd = super().open(path, flags, mode)
        if new:
            self.inodes[path] = self.next_inode
            self.next_inode += 1
            self.log.append(("name", ((path, self.inodes[path]),), (os.path.dirname(path),)))
        elif flags & os.O_TRUNC:
            self.log.append(("truncate", self.inodes[path], 0))
        self.files[fd] = self.inodes[path]
        return fd

    def write(self, fd: int, data: bytes) -> int:
        self.log.append(("write", self.files[fd], bytes(data)))
        return super().write(fd, data)

    def truncate(self, fd: int, length: int) -> None:
        self.log.append(("truncate", self.files[fd], length))
        super().truncate(fd, length)

    def sync(self, fd: int) -> None:
        self._synced("sync", fd)

    def sync_data(self, fd: int) -> None:
        self._synced("sync_data", fd)

    def _synced(self, call: str, fd: int) -> None:
        if call not in self.ignore:
            self.log.append(("sync", self.files[fd]))

    def sync_dir(self, path: str) -> None:
        if "sync_dir" not in self.ignore:
            self.log.append(("sync_dir", path))

    def replace(self, source: str, target: str) -> None:
        super().replace(source, target)
        inode = self.inodes[target] = self.inodes.pop(source)
        places = tuple({os.path.dirname(source), os.path.dirname(target)})
        self.log.append(("name", ((source, None), (target, inode)), places))

    def unlink(self, path: str) -> None:
        super().unlink(path)
        del self.inodes[path]
        self.log.append(("name", ((path, None),), (os.path.dirname(path),)))

    def mkdir(self, path: str, mode: int = 0o700) -> None:
        super().mkdir(path, mode)
        self.log.append(("name", ((path, "dir"),), (os.path.dirname(path),)))


def power_loss(log: list[tuple], at: int, chance: random.Random, origin: Path, target: Path) -> list[object]:
    """Build in `target` one state that the disk of `origin` may legally be in after a power loss before log[at].

    Returns what had been promised by then. `chance` picks among the legal states; how much survives is itself picked:
    nothing that was not synced, everything, or each piece by its own coin.
    """
    names: dict[str, object] = {}  # durable directory entries
    pending_names: list[tuple] = []
    durable: dict[int, bytes] = {}
    pending: dict[int, list[tuple]] = {}
    promised: list[object] = []
    for entry in log[:at]:
        kind = entry[0]
        if kind == "promise":
            promised.append(entry[1])
        elif kind == "name":
            pending_names.append(entry)
        elif kind in ("write", "truncate"):
            pending.setdefault(entry[1], []).append(entry)
        elif kind == "sync":
            durable[entry[1]] = _apply(durable.get(entry[1], b""), pending.pop(entry[1], []))
        else:
            done = [change for change in pending_names if entry[1] in change[2]]
            pending_names = [change for change in pending_names if entry[1] not in change[2]]
            for change in done:
                names.update(change[1])
    mood = chance.choice(("nothing", "everything", "some", "some", "some"))
    for change in pending_names:
        if mood == "everything" or (mood == "some" and chance.random() < 0.5):
            names.update(change[1])
    for inode, changes in pending.items():
        base = durable.get(inode, b"")
        durable[inode] = {
            "nothing": lambda base=base, _=None: base,
            "everything": lambda base=base, changes=changes: _apply(base, changes),
            "some": lambda base=base, changes=changes: _torn(base, _apply(base, changes), chance),
        }[mood]()
    _materialise(names, durable, origin, target)
    return promised


def _apply(content: bytes, changes: list[tuple]) -> bytes:
    for change in changes:
        content = content + change[2] if change[0] == "write" else content[: change[2]].ljust(change[2], b"\0")
    return content


def _torn(old: bytes, new: bytes, chance: random.Random) -> bytes:
    """Any prefix may be there, cut anywhere or at a sector; or the full size with sectors or pages of it missing."""
    way = chance.randrange(4)
    if len(new) <= len(old):
        return chance.choice((old, new))
    if way == 0:
        return new[: chance.randint(len(old), len(new))]
    size = chance.choice((512, 4096))
    if way == 1:
        return new[: max(len(old), len(new) // size * size)]
    content = bytearray(new)
    for start in range(len(old), len(new), size if way == 2 else 64):
        if chance.random() < 0.5:
            end = min(start + size, len(new)) if way == 2 else min(start + 64, len(new))
            content[start:end] = bytes(end - start)
    return bytes(content)


def _materialise(names: dict[str, object], contents: dict[int, bytes], origin: Path, target: Path) -> None:
    for path, inode in sorted(names.items(), key=lambda item: item[0].count("/")):
        relative = os.path.relpath(path, origin)
        place = target / relative
        if inode == "dir":
            place.mkdir(mode=0o700, exist_ok=True)
        elif inode is not None and place.parent.is_dir():  # a file in a directory that was lost is lost
            place.write_bytes(contents.get(inode, b""))
