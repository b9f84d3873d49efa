"""One line of a journal segment: `<crc32, 8 hex digits> <json>\\n`.

The checksum runs over the job's salt, the segment's name and the JSON, so that a block of another job, or
of another segment, that a file system gives back never validates. JSON has no raw newline, so a newline always ends
a record, and a reader finds the next record after any damage.

Records, by their member "t":

    h  header: job, worker, n, after {earlier segment: its length}   first line of each segment
    a  rows [..] are about to be sent                  u  rows [..] are not sent after all
    c  rows [..] were cut off; they may be billed
    o  outcome: row, d (request digest, 16 hex digits), ok (0 or 1), r (the result row, verbatim)
    w  an outcome written once more because the first file is in doubt; never counted as a second purchase
    b  input block: i (index), n (rows hashed), h (hash, hex)
    m  durable mark: the first o bytes of this segment are known to be on stable storage
    z  end: clean (nothing was in flight)

Outcomes have a fixed beginning and the result row as their last member: a reader finds row, digest and
status with one regular expression, and publishing slices the result out of the line without decoding it.
"""

from __future__ import annotations

import re
import zlib

SEGMENT_NAME = re.compile(r"(?:seg|spill)-(\d+)-(\d+)\.bsj")
OUTCOME = re.compile(rb'\{"t":"([ow])","row":(\d+),"d":"([0-9a-f]{16})","ok":([01]),"r":')
OVERHEAD = 9
"""Bytes before the JSON: the checksum and a blank."""


def segment_seed(salt: str, name: str) -> int:
    """The checksum's start value for a segment."""
    return zlib.crc32(f"{salt}/{name}/".encode())


def encode_line(seed: int, body: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(body, seed), body)


def valid_line(seed: int, line: bytes) -> bool:
    """True for a whole record of this segment, newline included."""
    return line[:OVERHEAD] == b"%08x " % zlib.crc32(line[OVERHEAD:-1], seed) and line[-1:] == b"\n"


def encode_outcome(row: int, digest: int, ok: bool, result_json: bytes, *, again: bool = False) -> bytes:
    """The JSON of an outcome. `result_json` is one JSON value without raw newlines."""
    return b'{"t":"%b","row":%d,"d":"%016x","ok":%d,"r":%b}' % (b"w" if again else b"o", row, digest, ok, result_json)


def result_of(line: bytes) -> tuple[int, bytes] | None:
    """Row and result JSON of a valid outcome line, None for other records."""
    match = OUTCOME.match(line, OVERHEAD)
    return (int(match[2]), line[match.end() : -2]) if match else None
