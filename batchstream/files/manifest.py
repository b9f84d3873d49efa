"""The two small documents of a journal: MANIFEST.json (identity, written first) and FINAL.json (written last)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from batchstream.errors import DamagedError, IdentityError, StorageError
from batchstream.files.lock import shards_in

_T = TypeVar("_T")

FORMAT = 1


class InputFile(msgspec.Struct, frozen=True):
    """What a look at the directory says of one file of the input."""

    name: str
    size: int
    mtime_ns: int


class Manifest(msgspec.Struct, kw_only=True):
    """Identity of a job. The caller fills job, input, created and version; `acquire` the rest.

    `job`: everything that changes results, as plain data. `input`: fingerprint.input_fingerprint(source).
    `created`: ISO 8601, UTC.
    """

    job: dict[str, Any]
    input: tuple[InputFile, ...]
    created: str
    version: str
    job_id: str = ""
    salt: str = ""
    format: int = FORMAT


class Published(msgspec.Struct, frozen=True):
    """The results file as this job made it, by which a later start knows it for its own."""

    size: int
    blake2b: str


class ShardFinal(msgspec.Struct, frozen=True):
    """What a shard knows of the whole when it is done: `total` rows of the input, of which it left out `skipped`
    invalid ones of its own."""

    total: int
    skipped: int


class Final(msgspec.Struct, kw_only=True):
    """FINAL.json. `usage`: sums over the rows' usage. `reopened`: a later start (--retry-failed, a grown input) has
    begun to supersede it. `results` is None and `shard` is not where it is a shard's: it publishes nothing."""

    job_id: str
    rows: int
    ok: int
    failed: int
    duplicates: int
    exit_code: int
    usage: dict[str, int]
    results: Published | None
    finished: str
    reopened: bool = False
    shard: ShardFinal | None = None


def load_manifest(directory: Path) -> Manifest | None:
    """The manifest, None when there is none. Raises DamagedError, and IdentityError for another format."""
    manifest = _load(directory / "MANIFEST.json", Manifest)
    if manifest is not None and manifest.format != FORMAT:
        raise IdentityError(
            f"{directory}: expected journal format {FORMAT}, got {manifest.format}, of version {manifest.version}; "
            "use that version, or --new-job"
        )
    return manifest


def any_manifest(directory: Path) -> Manifest | None:
    """The manifest of a job of which perhaps only shards were run: their identity is the job's."""
    found = (load_manifest(path) for path in (directory, *shards_in(directory).values()))
    return next((manifest for manifest in found if manifest is not None), None)


def load_final(directory: Path) -> Final | None:
    """FINAL.json, None when there is none. Raises DamagedError."""
    return _load(directory / "FINAL.json", Final)


def _load(path: Path, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(
            f"{path}: expected what this program wrote, got: {error}; restore it, or use --new-job"
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}") from error
