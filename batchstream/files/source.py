"""Rows in: prompt files read as a stream of requests.

Strategy. A source is a list of files whose row ordinals run on. Each format gives raw rows, `(line or row number,
object)`, one after the other; `rows.RowReader` makes a `Request` or an `InvalidRow` of each. Nothing is kept: memory is
one batch of at most 32 rows, whatever the size of the input. Batches never cross a 65,536-row block, so that
a reader can hash blocks as it goes.

What a file is, its first bytes say (Parquet, gzip, zstd, else text), not its name.
"""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from batchstream.errors import InputError, UsageError
from batchstream.files.formats import InputPlace, RawRow, open_format
from batchstream.files.rows import REQUEST_COLUMNS, Build, Row, RowReader
from batchstream.policy.sharding import Shard
from batchstream.records import Api

__all__ = ["BATCH_ROWS", "BLOCK_ROWS", "Build", "Row", "Source", "SourceSpec", "open_source"]

BATCH_ROWS = 32
BLOCK_ROWS = 65_536
_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst", ".parquet")


class SourceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows, and how a request is made of each.

    `paths`: files, directories, globs, pyarrow file-system URIs, or "-" for stdin (then `spool` names the file
    it was spooled to, see spool.py). `defaults` are the job's request parameters; the row wins, and a null
    in a row counts as "not given". `include_usage` is asked of Batch lines that do not say. `system` is the system
    prompt of rows without one. `keep` names columns that are copied through, "all" the whole row. `limit` cuts the
    input first, then `sample` rows are drawn with `seed`; of these only the `shard`'s are given.
    """

    paths: tuple[str, ...]
    api: Api = "chat"
    defaults: dict[str, Any] = {}
    system: str | None = None
    include_usage: bool = True
    template: str | None = None
    prompt_column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] | Literal["all"] | None = None
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    max_line_bytes: int = 64 << 20
    spool: str | None = None
    shard: Shard | None = None


class Source:
    """An opened input. It may be read any number of times, and gives the same rows each time.

    `total`: rows of the input, `limit` applied, once it has been read to its end."""

    def __init__(self, spec: SourceSpec, build: Build) -> None:
        self.spec = spec
        self.files: tuple[InputPlace, ...] = find_files(spec)
        self._build = build
        self._chosen: frozenset[int] | None = None
        self.total: int | None = None

    def batches(self, start_row: int = 0) -> Iterator[list[Row]]:
        """Batches of 1 to 32 rows in input order, from the first row whose ordinal is at least `start_row`.

        Blocking: pull it from a helper thread. Raises InputError when a file as a whole cannot be read
        (missing, cut compression, no request in its rows); a bad row is an `InvalidRow`, never an exception.
        """
        chosen, shard = self._sampled(), self.spec.shard
        batch: list[Row] = []
        row = 0
        for place in self.files:
            reader = RowReader(self.spec, self._build)
            for raw in self._raw_rows(place, reader):
                if self.spec.limit is not None and row >= self.spec.limit:
                    break
                mine = (chosen is None or row in chosen) and (shard is None or shard.has(row))
                if mine and row >= start_row:
                    batch.append(reader.read(row, place.name, raw))
                row += 1
                if batch and (len(batch) == BATCH_ROWS or row % BLOCK_ROWS == 0):
                    reader.check_shape(place.name)
                    yield batch
                    batch = []
            reader.check_shape(place.name)
        self.total = row
        if batch:
            yield batch

    def count(self) -> int:
        """How many rows `batches` gives, read as fast as the format allows: without making requests."""
        chosen, shard = self._sampled(), self.spec.shard
        if chosen is not None:
            return len(chosen) if shard is None else sum(map(shard.has, chosen))
        total = self._count_all()
        return total if shard is None else shard.count(total)

    def _count_all(self) -> int:
        total = 0
        for place in self.files:
            with open_format(place, self.spec.max_line_bytes) as file:
                total += file.count()
        return total if self.spec.limit is None else min(total, self.spec.limit)

    def _raw_rows(self, place: InputPlace, reader: RowReader) -> Iterator[RawRow]:
        with open_format(place, self.spec.max_line_bytes) as file:
            yield from file.rows(reader.used())

    def _sampled(self) -> frozenset[int] | None:
        if self.spec.sample is not None and self._chosen is None:
            total = self._count_all()
            # S311: which rows are drawn is to be repeatable, not secret.
            self._chosen = frozenset(random.Random(self.spec.seed).sample(range(total), min(self.spec.sample, total)))  # noqa: S311
        return self._chosen


def open_source(spec: SourceSpec, build: Build) -> Source:
    """Find the files and check what can be checked before the first row.

    Raises InputError (missing, unreadable, nothing found) and UsageError (a template or option that cannot work).
    """
    source = Source(spec, build)
    needed = RowReader(spec, build).needed()
    one_of = REQUEST_COLUMNS if spec.template is None and spec.prompt_column is None else ()
    for place in source.files:
        with open_format(place, spec.max_line_bytes) as file:
            file.require(needed, one_of)
    return source


def find_files(spec: SourceSpec) -> tuple[InputPlace, ...]:
    """The files in reading order: paths as given, a directory's or glob's sorted. Raises InputError, UsageError."""
    places: list[InputPlace] = []
    for path in spec.paths:
        if path == "-":
            if spec.spool is None:
                raise UsageError("'-' (stdin) can only be read by a command that spools it; give a file")
            places.append(InputPlace(spec.spool, "stdin"))
        elif "://" in path:
            places += [InputPlace(uri, uri) for uri in _uri_files(path)]
        else:
            places += [InputPlace(name, name) for name in _local_files(path)]
    if not places:
        raise UsageError("expected at least one input file, got none")
    return tuple(places)


def _local_files(path: str) -> list[str]:
    if os.path.isdir(path):
        found = [os.path.join(directory, name) for directory, _, names in os.walk(path) for name in names]
        found = [name for name in found if _is_input(os.path.relpath(name, path))]
        if not found:
            raise InputError(f"{path}: expected files ending in {', '.join(_SUFFIXES)}, found none in this directory")
        return sorted(found)
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not found:
        raise InputError(f"{path}: no file matches this pattern")
    return found


def _is_input(name: str) -> bool:
    """Which files of a directory count, by the path below it: not the hidden ones, nor what runs leave behind."""
    parts = name.split("/")
    return (
        name.endswith(_SUFFIXES)
        and not name.endswith((".results.jsonl", ".results.parquet"))
        and not any(part.startswith((".", "_")) for part in parts)
        and not any(part.endswith(".journal") for part in parts[:-1])
    )


def _uri_files(uri: str) -> list[str]:
    """The files at a URI of one of pyarrow's file systems (file, s3, gs, hdfs, ...)."""
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(uri)
        info = system.get_file_info(path)
        if info.type == fs.FileType.Directory:
            entries = system.get_file_info(fs.FileSelector(path, recursive=True))
            prefix = uri.rstrip("/")
            names = (entry.path[len(path.rstrip("/")) :] for entry in entries if entry.is_file)
            return sorted(prefix + name for name in names if _is_input(name.lstrip("/")))
    except (OSError, ValueError) as error:
        raise InputError(f"{uri}: cannot open: {error}") from error
    if info.type == fs.FileType.NotFound:
        raise InputError(f"{uri}: no such file")
    return [uri]
