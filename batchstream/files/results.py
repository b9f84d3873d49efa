"""Reading results: from the results file, or from the journal of a job that runs, stopped or was damaged.

Reading takes no lock and changes nothing: a record that is being written looks like a torn tail and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchstream.errors import InputError
from batchstream.files.lock import journal_path
from batchstream.files.manifest import any_manifest
from batchstream.files.recovery import Recovered, recover


def read_results(out: Path) -> Iterator[bytes]:
    """Result rows as JSON, in input order: of the results file `out` (JSONL or Parquet) if it is there, else of its
    journal as far as that has come. `out` may also be a journal directory. Raises InputError when there is neither."""
    if out.is_file():
        if out.suffix == ".parquet":
            from batchstream.files.table import read_parquet

            return _encoded(out, read_parquet(out))
        return _lines(out)
    return (line for _, line in read_journal(out).results())


def read_journal(out: Path, *, salvage: bool = False) -> Recovered:
    """What the journal of `out` (or the journal directory `out`) holds at present; counts and `results()`.

    With `salvage`, damage before the durable mark is passed over instead of raising DamagedError. Raises
    InputError when there is no journal.
    """
    directory = out if out.is_dir() else journal_path(out)
    manifest = any_manifest(directory) if directory.is_dir() else None
    if manifest is None:
        raise InputError(f"{out}: expected a results file or a journal, found neither")
    return recover(directory, manifest.salt, strict=not salvage)


def _encoded(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        if next(iter(row)) != "row":
            raise _no_results(str(path))
        yield msgspec.json.encode(row)


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                raise InputError(
                    f"{path}:{number}: the last line is cut off; this is not a results file as it was published"
                )
            if not line.startswith(b'{"row":'):
                raise _no_results(f"{path}:{number}")
            yield line[:-1]


def _no_results(where: str) -> InputError:
    return InputError(f"{where}: expected a result row; give the results file (or its journal), not the prompts")
