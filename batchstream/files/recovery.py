"""What a journal holds: read-only, one pass, at most 24 bytes a row.

For each row two numbers are kept in flat arrays: where its outcome is (segment, offset, ok) and the digest of
its request; a third array of bytes says which rows were admitted and have no outcome since.

Damage. A line that does not validate is skipped; the segment is read on to its end. Nothing valid after it: a torn
tail, the ordinary trace of a crash. Valid records after it, but it lies past the last durable mark: those rows are
asked again. Before the durable mark: what was promised to be safe is gone, DamagedError (salvage reads on).

Which outcome counts: the earliest success, else the latest failure. Every further success was bought twice.

A job's journal holds those of its shards, each with a salt of its own; a shard may hold no row but its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from batchstream.errors import DamagedError, IdentityError
from batchstream.files import record
from batchstream.files.lock import shards_in
from batchstream.files.manifest import load_manifest
from batchstream.policy.sharding import Shard
from batchstream.records import InvalidRow, Request

_OFFSET_BITS = 41


def segment_files(directory: Path) -> list[Path]:
    """The segments in the order they were begun."""
    found = []
    for path in directory.iterdir():
        match = record.SEGMENT_NAME.fullmatch(path.name)
        if match:
            found.append((int(match[2]), int(match[1]), path.name, path))
    return [entry[-1] for entry in sorted(found)]


class SegmentState:
    """What was learnt of one segment: `valid` is the end of its last valid record, in bytes; `seed` that of its
    checksums."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.seed = seed
        self.valid = 0
        self.mark = 0
        self.ended = False
        self.damage: list[int] = []  # offsets of lines that do not validate and have valid ones after them
        self.torn = False


class Recovered:
    """What the journal holds. `strict=False` (salvage, foreign readers) accepts damage and only counts it.

    `ok` and `failed` count rows by the outcome that counts; `duplicates` successes beyond the first of their row;
    `asked_again` rows that were admitted (and maybe billed) without an outcome; `skipped_records` damaged lines that
    were ignored; `blocks` maps a block of the input to (rows hashed, hash).
    """

    def __init__(self, salt: str, *, retry_failed: bool = False) -> None:
        self.salt = salt
        self.retry_failed = retry_failed
        self.ok = 0
        self.failed = 0
        self.duplicates = 0
        self.asked_again = 0
        self.skipped_records = 0
        self.blocks: dict[int, tuple[int, bytes]] = {}
        self.segments: list[SegmentState] = []
        self.highest = -1
        self._where = array("Q")  # (segment index + 1) << 42 | offset << 1 | ok; 0 = no outcome
        self._digest = array("Q")
        self._open = bytearray()

    @property
    def rows_done(self) -> int:
        """How many rows must not be sent (see `done`)."""
        return self.ok if self.retry_failed else self.ok + self.failed

    def done(self, row: int) -> bool:
        """True when the row has a stored outcome and must not be sent (with retry_failed: a stored success)."""
        where = self._where[row] if row < len(self._where) else 0
        return bool(where & 1 if self.retry_failed else where)

    def has_outcome(self, row: int) -> bool:
        return row < len(self._where) and self._where[row] != 0

    def digest(self, row: int) -> int | None:
        """Request digest of the row's stored outcome, None without one."""
        return self._digest[row] if self.has_outcome(row) else None

    def check(self, row: Request | InvalidRow) -> bool:
        """`done(row.row)`; raises IdentityError when the request is not the one whose outcome is stored.

        With retry_failed a failed row may have been mended: nothing was bought that could be lost.
        """
        stored = self.digest(row.row)
        if stored is not None and stored != row.digest and not (self.retry_failed and not self.done(row.row)):
            raise IdentityError(
                f"row {row.row} (id {row.id!r}): its request differs from the one the journal has an answer to; "
                "restore the input and options, or start over with --new-job"
            )
        return self.done(row.row)

    def outcomes_in(self, first: int, last: int) -> int:
        """How many rows of first..last-1 have an outcome."""
        where = self._where[first:last]
        return len(where) - where.count(0)

    def admitted(self, row: int) -> bool:
        """Whether a request of the row left and no outcome came since."""
        return row < len(self._open) and self._open[row] == 1

    def result(self, row: int) -> bytes:
        """The result JSON of one row that has an outcome. Raises DamagedError when it has changed since."""
        where = self._where[row]
        state = self.segments[(where >> (_OFFSET_BITS + 1)) - 1]
        with open(state.path, "rb") as file:
            return self._read(file, state, row)

    def _read(self, file: BinaryIO, state: SegmentState, row: int) -> bytes:
        file.seek((self._where[row] >> 1) & ((1 << _OFFSET_BITS) - 1))
        line = file.readline()
        found = record.result_of(line) if record.valid_line(state.seed, line) else None
        if found is None or found[0] != row:
            raise DamagedError(
                f"{state.path}: the record of row {row} changed while it was being read; "
                "check the disk, then see `report --salvage`"
            )
        return found[1]

    def results(self) -> Iterator[tuple[int, bytes]]:
        """(row, result JSON) of every row with an outcome, in row order, each checked once more."""
        files: list[BinaryIO] = [open(state.path, "rb", buffering=1 << 18) for state in self.segments]  # noqa: SIM115
        try:
            for row, where in enumerate(self._where):
                if where:
                    index = (where >> (_OFFSET_BITS + 1)) - 1
                    yield row, self._read(files[index], self.segments[index], row)
        finally:
            for file in files:
                file.close()

    def _outcome(self, index: int, offset: int, again: bool, row: int, digest: int, ok: int) -> None:
        where = self._where[row] if row < len(self._where) else self._grow(row)
        self._open[row] = 0
        if where & 1:
            if ok and not again:
                self.duplicates += 1
            return
        if ok:
            self.ok += 1
            if where:
                self.failed -= 1
        elif not where:
            self.failed += 1
        self._where[row] = (index + 1) << (_OFFSET_BITS + 1) | offset << 1 | ok
        self._digest[row] = digest
        self.highest = max(self.highest, row)

    def _grow(self, row: int) -> int:
        size = max(row + 1, len(self._where) * 9 // 8) - len(self._where)
        self._where.frombytes(bytes(8 * size))
        self._digest.frombytes(bytes(8 * size))
        self._open.extend(bytes(size))
        return 0

    def _note(self, state: SegmentState, note: dict[str, Any], shard: Shard | None) -> None:
        match note["t"]:
            case "a" | "u":
                for row in note["rows"]:
                    if row >= len(self._open):
                        self._grow(row)
                    self._open[row] = note["t"] == "a"
            case "b" if shard is None:  # a shard's are of its own rows only
                self.blocks[note["i"]] = (note["n"], bytes.fromhex(note["h"]))
            case "m":
                state.mark = max(state.mark, note["o"])
            case "z":
                state.ended = True
            case _:
                pass  # "h" is read by check_lengths; "c" changes nothing: the row stays admitted without an outcome

    def read_segment(self, path: Path, salt: str, shard: Shard | None = None) -> dict[str, Any] | None:
        """Take in one segment; its header, or None when that does not validate. Of a `shard` within a job: raises
        DamagedError for a row that is not its own."""
        seed = record.segment_seed(salt, path.name)
        state = SegmentState(path, seed)
        index = len(self.segments)
        self.segments.append(state)
        header: dict[str, Any] | None = None
        pending_damage: list[int] = []
        valid_line, outcome = record.valid_line, record.OUTCOME
        offset = 0
        with open(path, "rb", buffering=1 << 20) as file:
            for line in file:
                if valid_line(seed, line):
                    if pending_damage:
                        state.damage += pending_damage
                        pending_damage = []
                    match = outcome.match(line, record.OVERHEAD)
                    if match:
                        kind, row, digest, ok = match.groups()
                        if shard is not None and not shard.has(int(row)):
                            raise DamagedError(
                                f"{path}: holds row {int(row)}, which is not one of shard {shard}; "
                                "restore the directory's own files"
                            )
                        self._outcome(index, offset, kind == b"w", int(row), int(digest, 16), ok == b"1")
                    else:
                        note = msgspec.json.decode(line[record.OVERHEAD : -1])
                        if note["t"] == "h":
                            header = note
                        self._note(state, note, shard)
                    state.valid = offset + len(line)
                else:
                    pending_damage.append(offset)
                offset += len(line)
        state.torn = bool(pending_damage)
        return header

    def settle(self) -> None:
        """Count what can only be counted at the end."""
        self.asked_again = self._open.count(1)
        self.skipped_records = sum(len(state.damage) for state in self.segments)


def recover(directory: Path, salt: str, *, strict: bool = True, retry_failed: bool = False) -> Recovered:
    """Read every segment of `directory`, and of the shards in it. With `strict`, raises DamagedError where a durable
    mark was broken.

    Safe beside a running job: it only reads, and a record that is being written looks like a torn tail.
    """
    found = Recovered(salt, retry_failed=retry_failed)
    take_in(found, directory, salt, strict=strict)
    for shard, path in shards_in(directory).items():
        if (manifest := load_manifest(path)) is not None:
            take_in(found, path, manifest.salt, shard, strict=strict)
    found.settle()
    return found


def take_in(found: Recovered, directory: Path, salt: str, shard: Shard | None = None, *, strict: bool = True) -> None:
    """Read the segments that lie in `directory` itself into `found`; `settle` comes last."""
    lengths: dict[str, int] = {}
    for path in segment_files(directory):
        header = found.read_segment(path, salt, shard)
        state = found.segments[-1]
        broken = next((offset for offset in state.damage if offset < state.mark), None)
        if strict and broken is not None:
            raise DamagedError(
                f"{path}: byte {broken} is damaged, although the first {state.mark} bytes were safely stored; "
                "check the disk. `report --salvage` lists what is left; --new-job starts over"
            )
        lengths.update(header["after"] if header else {})
    if strict:
        _check_lengths(directory, lengths)


def _check_lengths(directory: Path, lengths: dict[str, int]) -> None:
    """Each segment says how long the earlier ones were when it was begun: a lost or cut one is found by that."""
    for name, length in lengths.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise DamagedError(
                f"{path}: expected at least {length} bytes of stored answers, got {size}; restore the file. "
                "`report --salvage` lists what is left; --new-job starts over"
            )
