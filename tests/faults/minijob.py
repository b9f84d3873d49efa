"""The smallest job that uses the journal the way the engine does, with answers made up on the spot.

Each "request" is one line in a ledger outside the disk under test, as the endpoint would count it.
"""

from __future__ import annotations

import os
from pathlib import Path

from batchstream.errors import BatchstreamError, StorageError
from batchstream.files.fingerprint import input_fingerprint
from batchstream.files.fsio import Disk
from batchstream.files.journal import JournalDir, Manifest
from batchstream.files.source import Row, SourceSpec, open_source

ROWS = 24
IN_FLIGHT = 4


def build(_api, common):
    return {"messages": [{"role": "user", "content": common["prompt"]}]}


def write_input(path: Path, rows: int = ROWS) -> Path:
    path.write_text("".join(f'{{"prompt": "row {row}", "id": "r{row}"}}\n' for row in range(rows)))
    return path


def source_of(path: Path):
    return open_source(SourceSpec(paths=(str(path),)), build)


def manifest_of(source, **job) -> Manifest:
    return Manifest(
        job={"model": "m", **job}, input=input_fingerprint(source), created="2026-01-01T00:00:00Z", version="test"
    )


def answer(row: Row) -> bytes:
    """The result of a row, always the same. Row 3 fails."""
    if row.row == 3:
        return b'{"row":3,"id":"r3","status":"failed","error":{"kind":"rate_limit"}}'
    text = "x" * (row.row * 37 % 200)
    return b'{"row":%d,"id":"%s","status":"ok","text":"%s","usage":{"prompt_tokens":2,"completion_tokens":%d}}' % (
        row.row, row.id.encode(), text.encode(), row.row,
    )  # fmt: skip


def expected(rows: int = ROWS) -> bytes:
    from batchstream.records import Request

    made = (Request(row=row, id=f"r{row}", api="chat", body={}, digest=0) for row in range(rows))
    return b"".join(answer(row) + b"\n" for row in made)


class Outcome:
    """What a run told its user."""

    def __init__(self) -> None:
        self.code = -1
        self.asked_again = 0
        self.done_before = 0
        self.spilled: Path | None = None
        self.message = ""


def run(
    source, out: Path, disk: Disk, ledger: Path, *, promise=lambda what: None, spill_dir: Path | None = None, tries=3
) -> Outcome:
    """One start of the job: to its end, or to the error that stops it (its exit code is in the outcome)."""
    told = Outcome()
    segment = None
    try:
        journal = JournalDir.acquire(out, manifest_of(source), disk=disk, spill_dir=spill_dir)
    except BatchstreamError as error:
        told.code, told.message = error.exit_code, str(error)
        return told
    told.asked_again = journal.recovered.asked_again
    told.done_before = journal.recovered.ok + journal.recovered.failed
    try:
        if journal.final is None:
            segment = journal.segment()
            rows = journal.proven(source)
            for batch in rows:
                for first in range(0, len(batch), IN_FLIGHT):
                    serve(segment, batch[first : first + IN_FLIGHT], ledger, promise, tries)
                for block in rows.take_blocks():
                    segment.block(*block)
            for block in rows.take_blocks():
                segment.block(*block)
            for row in segment.close(clean=True):
                promise(("row", row))
            segment = None
            journal.publish(rows=rows.rows, exit_code=0, finished="2026-01-01T00:01:00Z")
            promise(("published", None))
        told.code = 0
    except BatchstreamError as error:
        told.code, told.message = error.exit_code, str(error)
        if segment is not None and spill_dir is not None and segment.pending_bytes:
            told.spilled = segment.spill(spill_dir)
        elif segment is not None:
            segment.abandon()
    finally:
        journal.close()
    return told


def serve(segment, rows: list[Row], ledger: Path, promise, tries: int) -> None:
    patient(segment, lambda: segment.admit([row.row for row in rows]), promise, tries)
    for row in rows:
        with open(ledger, "ab") as file:
            file.write(b"%d\n" % row.row)
    for row in rows:
        result = answer(row)
        segment.append(row.row, row.digest, row.row != 3, result)
    for row in segment.sync():
        promise(("row", row))
    patient(segment, lambda: segment.trouble is None, promise, tries)


def patient(segment, ready, promise, tries: int) -> None:
    """Sync until the disk is willing, a few times; then as the engine: give up with StorageError."""
    for _ in range(tries):
        if ready():
            return
        for row in segment.sync():
            promise(("row", row))
    if not ready():
        raise StorageError(segment.trouble or "the disk refuses")


def asked(ledger: Path) -> list[int]:
    return [int(line) for line in ledger.read_bytes().split()] if ledger.exists() else []


def asked_twice(ledger: Path) -> int:
    rows = asked(ledger)
    return len(rows) - len(set(rows))


def finish_and_check(source, out: Path, ledger: Path, disk: Disk, *, spill_dir: Path | None = None) -> Outcome:
    """The same command again, on a disk that is well: complete, right, and no more asked twice than was said."""
    before = asked(ledger)
    told = run(source, out, disk, ledger, spill_dir=spill_dir)
    assert told.code == 0, told.message
    assert out.read_bytes() == expected(), "the results differ from an uninterrupted run's"
    again = [row for row in asked(ledger)[len(before) :] if row in set(before)]
    assert len(again) <= IN_FLIGHT, f"asked twice: {again}"
    assert len(again) == told.asked_again, f"asked twice {again}, said {told.asked_again}"
    leftovers = [name for name in os.listdir(out.parent) if ".tmp-" in name]
    assert not leftovers, leftovers
    return told
