"""File formats of the input: text lines (plain, gzip, zstd) and Parquet, each as a stream of raw rows.

Limits that keep one hostile line from taking the machine: a line is read up to a cap and skipped beyond it; nesting
deeper than 100 is refused (every later encoder would have to recurse as deep).
"""

from __future__ import annotations

import gzip
import io
import itertools
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import msgspec

from batchstream.errors import InputError

MAX_DEPTH = 100
_BUFFER = 1 << 18
_PARQUET_ROWS = 256


class InputPlace(NamedTuple):
    """A file of the input: how to open it, and how to name it to a person."""

    path: str
    name: str

    def stat(self) -> tuple[int, int]:
        """Size in bytes and time of the last change in ns."""
        with _input_errors(self):
            if "://" in self.path:
                from pyarrow import fs

                system, path = fs.FileSystem.from_uri(self.path)
                info = system.get_file_info(path)
                return info.size or 0, info.mtime_ns or 0
            found = os.stat(self.path)
            return found.st_size, found.st_mtime_ns


class RawRow(NamedTuple):
    """One row before it is understood: `number` is the physical line (from 1) or the Parquet row (from 0);
    exactly one of `value` (a JSON object) and `problem` is set; `raw` the bytes it is made of (b"" for Parquet)."""

    number: int
    value: dict[str, Any] | None
    problem: str | None
    raw: bytes
    columnar: bool = False

    def where(self, name: str) -> str:
        return f"{name}:row {self.number}" if self.columnar else f"{name}:{self.number}"


class Format(Protocol):
    """An open file. `rows` may leave out columns that are not in `columns` (None: all are wanted)."""

    def rows(self, columns: Collection[str] | None) -> Iterator[RawRow]: ...
    def count(self) -> int: ...
    def require(self, columns: Sequence[str], one_of: Sequence[str]) -> None: ...
    def __enter__(self) -> Format: ...
    def __exit__(self, *exc: object) -> None: ...


class _input_errors(AbstractContextManager["_input_errors"]):  # noqa: N801  (reads as a statement)
    """What opening and decompressing raise, as InputError with the file's name."""

    def __init__(self, place: InputPlace) -> None:
        self._place = place
        self.line: int | None = None

    def __enter__(self) -> _input_errors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        at = f"{self._place.name}:{self.line}" if self.line else self._place.name
        if isinstance(error, EOFError) or (isinstance(error, OSError) and "runcated" in str(error)):
            raise InputError(f"{at}: the compressed file is cut off; get a complete copy") from error
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{at}: no such file") from error
        if isinstance(error, (OSError, zlib.error)):
            raise InputError(f"{at}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def open_format(place: InputPlace, max_line_bytes: int) -> Format:
    """Open a file and see what it is by its first bytes. Raises InputError."""
    with _input_errors(place):
        file = _open_bytes(place.path)
        magic = file.peek(4)[:4]
        if not magic and place.name.endswith((".parquet", ".gz", ".zst")):
            # Even without a row such a file has bytes: this one is what an interrupted copy leaves.
            file.close()
            kind = place.name.rpartition(".")[2]
            raise InputError(f"{place.name}: expected a {kind} file, got an empty one; get a complete copy")
        if magic == b"PAR1":
            file.close()
            return ParquetRows(place)
        if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
            file.close()
            raise InputError(f"{place.name}: expected UTF-8, got UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")
        stream: Any = file
        if magic[:2] == b"\x1f\x8b":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)
        elif magic == b"\x28\xb5\x2f\xfd":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"), _BUFFER)
        return JsonLines(place, stream, file, max_line_bytes)


def _open_bytes(path: str) -> io.BufferedReader[Any]:
    if "://" not in path:
        if os.path.isdir(path):
            raise IsADirectoryError(0, "it is a directory")
        return io.BufferedReader(io.FileIO(path), _BUFFER)
    from pyarrow import fs

    system, inner = fs.FileSystem.from_uri(path)
    return io.BufferedReader(system.open_input_file(inner), _BUFFER)


class JsonLines:
    """One JSON object a line. Blank lines are not rows. A byte order mark and CRLF are accepted."""

    def __init__(
        self, place: InputPlace, stream: io.BufferedReader, base: io.BufferedReader, max_line_bytes: int
    ) -> None:
        self._place = place
        self._stream = stream
        self._base = base  # the file below a decompressor, which does not close it
        self._cap = max_line_bytes

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()
        self._base.close()

    def require(self, columns: Sequence[str], one_of: Sequence[str]) -> None:
        """Lines have no schema: a column that is missing shows row by row."""

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def rows(self, columns: Collection[str] | None) -> Iterator[RawRow]:
        decode = msgspec.json.Decoder().decode
        for number, line, too_long in self._lines():
            if too_long:
                problem = f"expected a line of at most {self._cap:,} bytes, got a longer one"
                yield RawRow(number, None, problem, line[:4096])
                continue
            problem = ""
            try:
                if too_deep(line):
                    problem = f"expected at most {MAX_DEPTH} levels of nesting, got more"
                else:
                    value = decode(line)
                    if type(value) is dict:
                        yield RawRow(number, value, None, line)
                        continue
                    problem = f"expected a JSON object, got {_json_type(value)}"
                    if number == 1 and type(value) is list:
                        problem += " (a JSON array is not JSON Lines: convert it with `jq -c '.[]'`)"
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                problem = f"expected a JSON object, got text that is not JSON: {_first_words(error)}"
            yield RawRow(number, None, problem, line)

    def _lines(self) -> Iterator[tuple[int, bytes, bool]]:
        """(physical line from 1, the line, whether it passed the cap), blank lines left out."""
        readline, cap = self._stream.readline, self._cap
        number = 0
        with _input_errors(self._place) as errors:
            while line := readline(cap + 1):
                number += 1
                errors.line = number + 1  # the one that cannot be read, if any
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line = line[3:]
                too_long = len(line) > cap and not line.endswith(b"\n")
                if too_long:
                    while (rest := readline(_BUFFER)) and not rest.endswith(b"\n"):
                        pass
                if not line.isspace() and line:
                    yield number, line, too_long


class ParquetRows:
    """Rows of a Parquet file, row group by row group, only one small batch of them as Python objects."""

    def __init__(self, place: InputPlace) -> None:
        import pyarrow
        from pyarrow import fs, parquet

        self._place = place
        try:
            if "://" in place.path:
                system, path = fs.FileSystem.from_uri(place.path)
                self._parquet = parquet.ParquetFile(path, filesystem=system)
            else:
                self._parquet = parquet.ParquetFile(place.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{place.name}: not a readable Parquet file (cut off?): {_first_words(error)}") from error

    def __enter__(self) -> ParquetRows:
        return self

    def __exit__(self, *exc: object) -> None:
        self._parquet.close()

    def require(self, columns: Sequence[str], one_of: Sequence[str]) -> None:
        """Raises InputError unless all of `columns` are there, and one of `one_of` if that is not empty."""
        names = self._parquet.schema_arrow.names
        for column in columns:
            if column not in names:
                raise InputError(f"{self._place.name}: expected a column {column!r}, got {', '.join(names)}")
        if one_of and not any(column in names for column in one_of):
            raise InputError(
                f"{self._place.name}: expected a column {', '.join(map(repr, one_of))}, "
                f"or --template or --prompt-column; got {', '.join(names)}"
            )

    def count(self) -> int:
        return int(self._parquet.metadata.num_rows)

    def rows(self, columns: Collection[str] | None) -> Iterator[RawRow]:
        import pyarrow

        names = [name for name in self._parquet.schema_arrow.names if columns is None or name in columns]

        number = 0
        try:
            # One thread: a pool of decoders would take the cores from the requests that are being measured.
            for batch in self._parquet.iter_batches(_PARQUET_ROWS, columns=names, use_threads=False):
                for value in batch.to_pylist():
                    yield RawRow(number, value, None, b"", columnar=True)
                    number += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{self._place.name}:row {number}: cannot read on (damaged?): {_first_words(error)}"
            ) from error


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_BRACKET = re.compile(rb"[\[{\]}]")


def too_deep(line: bytes) -> bool:
    """True when JSON text nests deeper than MAX_DEPTH."""
    if line.count(b"{") + line.count(b"[") <= MAX_DEPTH:
        return False
    steps = (1 if bracket in (b"[", b"{") else -1 for bracket in _BRACKET.findall(_STRING.sub(b"", line)))
    return max(itertools.accumulate(steps), default=0) > MAX_DEPTH


def _json_type(value: object) -> str:
    names = {
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _first_words(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
