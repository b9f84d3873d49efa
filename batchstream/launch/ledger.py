"""One account for all workers of a job: a line of numbers for each process, in memory that all of them see.

Each writes its own line only; who dies leaves a line that says what it had spent. A file lock sees to it that only one
at a time lets a request leave; the kernel takes it back from a process that is killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from batchstream.policy.budget import Spent

_FIELDS = len(Spent.__struct_fields__)
_LINE = 8 * _FIELDS


def create(lines: int) -> int:
    """The descriptor of a fresh account, for worker processes to inherit."""
    fd = os.memfd_create("batchstream-ledger", os.MFD_CLOEXEC)
    os.ftruncate(fd, lines * _LINE)
    return fd


class SharedLedger:
    """A `policy.budget.Ledger` for the process whose line is number `place`."""

    def __init__(self, fd: int, place: int) -> None:
        self._fd = fd
        self._memory = memoryview(mmap.mmap(fd, 0)).cast("d")
        self._mine = slice(place * _FIELDS, (place + 1) * _FIELDS)

    @contextmanager
    def alone(self) -> Iterator[None]:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def others(self) -> Spent:
        every, mine = self._memory, self._memory[self._mine]
        return Spent(*(sum(every[field::_FIELDS]) - mine[field] for field in range(_FIELDS)))

    def write(self, spent: Spent) -> None:
        for field, value in enumerate(msgspec.structs.astuple(spent)):
            self._memory[self._mine.start + field] = value

    def died(self) -> None:
        """The process with this line is gone: nothing of it is on the wire any more. For its parent."""
        with self.alone():
            spent = Spent(*self._memory[self._mine])
            self.write(msgspec.structs.replace(spent, expected_tokens=0.0, expected_cost=0.0, on_wire=0))
