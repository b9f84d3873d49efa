"""Is this the same job on the same input?

The job is compared by what changes results (the caller passes exactly that, as plain data). The input is compared in
two steps. Quick: names and sizes, and whether the time of change moved. Proof: every row with a stored outcome is
compared by its request digest as it is read again, and a block of 65,536 rows that was read whole before is hashed
again before one of its unfinished rows is given out. Blocks without unfinished rows need no hash of their own: each
of their rows has been compared. So nothing is buffered, and only blocks with gaps are read twice.

A block's hash is a BLAKE2b over the request digests of its rows, in order: the identity of a row is what would be sent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from batchstream.errors import IdentityError
from batchstream.files.manifest import InputFile
from batchstream.files.recovery import Recovered
from batchstream.files.source import BLOCK_ROWS, Row, Source


def input_fingerprint(source: Source) -> tuple[InputFile, ...]:
    """Name (without directories: an input may be moved), size in bytes and time of change of each file."""
    return tuple(InputFile(os.path.basename(file.path), *file.stat()) for file in source.files)


def job_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each difference, members of nested objects by dotted name: ``model: was 'a', is 'b'``."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            lines += job_differences(was, now, f"{prefix}{name}.")
        elif was != now:
            before, after = ("absent" if value is None else repr(value) for value in (was, now))
            lines.append(f"{prefix}{name}: was {before}, is {after}")
    return lines


def input_differences(
    old: tuple[InputFile, ...], new: tuple[InputFile, ...], *, allow_append: bool, mended: bool = False
) -> list[str]:
    """What names and sizes alone prove to be different. With `allow_append` the last file may have grown and files
    may have come after it; `mended` (failed rows are asked again) leaves sizes to the proof row by row."""
    lines = []
    if len(old) != len(new) and not (allow_append and len(new) > len(old)):
        lines.append(f"input: was {len(old)} files, is {len(new)}")
    for index, (was, now) in enumerate(zip(old, new, strict=False)):
        grown = allow_append and now.size > was.size and index == len(old) - 1
        if was.size != now.size and not grown and not mended:
            lines.append(f"input {now.name}: was {was.size} bytes, is {now.size}")
    return lines


class BlockHash:
    """The running hash of one block."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.rows = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, digest: int) -> None:
        self.rows += 1
        self._hash.update(digest.to_bytes(8, "little"))

    def value(self) -> bytes:
        return self._hash.digest()


class ProvenRows:
    """The rows of `source` that are not done yet, in batches, their identity proven (see the module).

    `rows` counts the rows read so far, done ones included. `take_blocks()` gives what Segment.block is to be told.
    Iterating raises IdentityError as soon as the input is found to be another.
    """

    def __init__(self, source: Source, recovered: Recovered) -> None:
        self.rows = 0
        self._source = source
        self._recovered = recovered
        self._fresh: list[tuple[int, int, bytes]] = []

    def take_blocks(self) -> list[tuple[int, int, bytes]]:
        """(index, rows, hash) of each block completed since the last call and not recorded in the journal."""
        blocks, self._fresh = self._fresh, []
        return blocks

    def __iter__(self) -> Iterator[list[Row]]:
        self.rows = 0
        found = self._recovered
        scout = _Scout(self._source)
        block = BlockHash(-1)
        last = -1
        for batch in self._source.batches():
            index = batch[0].row // BLOCK_ROWS
            if index != block.index:
                self._end_block(block)
                block = BlockHash(index)
                known = found.blocks.get(index)
                # The count ignores gaps of `limit` and `sample`: at worst a block is read twice for nothing.
                if known and found.outcomes_in(index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS) < known[0]:
                    scout.prove(index, *known)
            for row in batch:
                block.add(row.digest)
            self.rows += len(batch)
            last = batch[-1].row
            todo = [row for row in batch if not found.check(row)]
            if todo:
                yield todo
        self._end_block(block)
        if found.highest > last:
            raise IdentityError(
                f"the input ends after row {last}, the journal has an answer to row {found.highest}; "
                "restore the input, or start over with --new-job"
            )

    def _end_block(self, block: BlockHash) -> None:
        known = self._recovered.blocks.get(block.index)
        mended = known is not None and self._recovered.retry_failed and known != (block.rows, block.value())
        if block.rows and (known is None or known[0] < block.rows or mended):
            self._fresh.append((block.index, block.rows, block.value()))


class _Scout:
    """A second reading of the input, ahead of the first, that only hashes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._batches: Iterator[list[Row]] | None = None

    def prove(self, index: int, rows: int, expected: bytes) -> None:
        if self._batches is None:
            self._batches = self._source.batches(index * BLOCK_ROWS)
        block = BlockHash(index)
        for batch in self._batches:
            if batch[0].row // BLOCK_ROWS < index:
                continue
            for row in batch:
                if block.rows < rows:
                    block.add(row.digest)
            if batch[-1].row == (index + 1) * BLOCK_ROWS - 1 or block.rows >= rows:
                break
        if block.rows != rows or block.value() != expected:
            raise IdentityError(
                f"the input differs from what the journal was begun with, between row {index * BLOCK_ROWS} "
                f"and row {(index + 1) * BLOCK_ROWS - 1}; restore it, or start over with --new-job"
            )
