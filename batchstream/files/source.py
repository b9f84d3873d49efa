"""Rows in: prompt files read as a stream of requests.

Strategy. A source is a list of files whose row ordinals run on; each file gives raw rows
(`(place, object)`), and `rows.RowReader` turns a raw row into a `Request` or an `InvalidRow`. Nothing is kept:
memory is one batch of at most 32 rows, whatever the size of the input. Batches never cross a
65,536-row block, so that a reader can hash blocks as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from batchstream.records import Api, InvalidRow, Request

BATCH_ROWS = 32

Row = Request | InvalidRow
Build = Callable[[Api, dict[str, Any]], dict[str, Any]]
"""`build(api, common) -> body`: `common` holds `prompt` or `messages`, optional `system`, and request parameters."""


class SourceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows, and how a request is made of each.

    `paths`: files, directories, globs, pyarrow file-system URIs, or "-" for stdin (then `spool` names the file
    it was spooled to, see `spool.spool_stdin`). `defaults` are the job's request parameters; the row wins, and a
    null in a row counts as "not given". `keep` names columns copied through, "all" the whole row.
    `limit` cuts the input first, then `sample` rows are drawn from it with `seed`.
    """

    paths: tuple[str, ...]
    api: Api = "chat"
    defaults: dict[str, Any] = {}
    system: str | None = None
    template: str | None = None
    prompt_column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] | Literal["all"] | None = None
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    max_line_bytes: int = 64 << 20
    spool: str | None = None


class Source:
    """An opened input. May be read any number of times; every reading gives the same rows."""

    files: tuple[str, ...]
    """The files in reading order (the spool file for stdin)."""

    def batches(self, start_row: int = 0) -> Iterator[list[Row]]:
        """Batches of 1..32 rows in input order, from the first row whose ordinal is >= `start_row`.

        Blocking: pull it from a helper thread. Raises InputError when a file as a whole cannot be read
        (missing, truncated compression, not rows at all); a bad row is an `InvalidRow`, never an exception.
        """
        raise NotImplementedError


def open_source(spec: SourceSpec, build: Build) -> Source:
    """Find the files and check what can be checked before the first row.

    Raises InputError (missing, unreadable, unknown format, a named column that is not there) and
    UsageError (template or option that cannot work).
    """
    raise NotImplementedError
