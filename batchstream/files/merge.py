"""The shards of a job become its results: every row is proven to be there once, then published.

What is proven, from the journals alone: all N shards are there and done, are of one job and one input, and have counted
as many rows in it; each holds its own rows and no others, as many as it said it did; together that is every row of
the input. Then the results are built as those of any job, from all segments, each record checked.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchstream.errors import DamagedError, IdentityError, InputError
from batchstream.files import fsio
from batchstream.files.fingerprint import input_differences, job_differences
from batchstream.files.lock import hold, journal_path, shards_in
from batchstream.files.manifest import Final, Manifest, ShardFinal, load_final, load_manifest
from batchstream.files.publish import publish
from batchstream.files.recovery import Recovered, take_in
from batchstream.policy.sharding import Shard
from batchstream.records import Usage


class Part(NamedTuple):
    """A shard that is done."""

    shard: Shard
    path: Path
    manifest: Manifest
    final: Final
    of_whole: ShardFinal


class Merge:
    """The shards of the job with output `out`, locked. Close it.

    Raises InputError where shards are missing or not done, LockedError where one still runs, IdentityError where they
    are not of one job, DamagedError, StorageError.
    """

    def __init__(self, out: Path, *, started: str, disk: fsio.Disk | None = None) -> None:
        self.out = out
        self.path = journal_path(out)
        self._disk = disk or fsio.disk
        if not shards_in(self.path):
            raise InputError(f"{self.path}: expected the journals of shards (run --shard I/N), found none")
        self._lock = hold(out, started=started, disk=disk)
        try:
            self.parts = _parts(self.path)
        except BaseException:
            self.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """The job's identity."""
        return self.parts[0].manifest

    @property
    def skipped(self) -> int:
        """Invalid rows that were left out (--invalid skip)."""
        return sum(part.of_whole.skipped for part in self.parts)

    @property
    def failed(self) -> int:
        return sum(part.final.failed for part in self.parts)

    @property
    def duplicates(self) -> int:
        return sum(part.final.duplicates for part in self.parts)

    def publish(
        self, *, overwrite: bool, exit_code: int, finished: str, observe: Callable[[bytes], Usage | None] | None = None
    ) -> Final:
        """Prove, build the results, put them in place. As `JournalDir.publish`, which says what `observe` is for."""
        rows = _proven(self.parts)
        kept = load_manifest(self.path)
        fresh = {"job_id": secrets.token_hex(8), "salt": secrets.token_hex(16)}
        ours = fresh if kept is None else {"job_id": kept.job_id, "salt": kept.salt}
        manifest = msgspec.structs.replace(self.manifest, **ours)
        if kept is None:  # known by it as a job of its own, before its results appear
            fsio.replace_file(self._disk, self.path / "MANIFEST.json", msgspec.json.encode(manifest))
        return publish(
            self.out, self.path, manifest, self._disk,
            overwrite=overwrite, rows=rows, exit_code=exit_code, finished=finished, observe=observe,
        )  # fmt: skip

    def close(self) -> None:
        self._lock.release()


def _parts(directory: Path) -> list[Part]:
    """All N shards, each done, of one job and input."""
    found = shards_in(directory)
    number = max(shard.of for shard in found)
    others = [path.name for shard, path in found.items() if shard.of != number]
    if others:
        raise IdentityError(
            f"{directory}: expected shards of one number, got {number} and {', '.join(others)}; put those aside that "
            "do not belong to the job"
        )
    parts = []
    undone = []
    for index in range(1, number + 1):
        shard = Shard(index, number)
        path = found.get(shard)
        manifest = load_manifest(path) if path is not None else None
        final = load_final(path) if path is not None else None
        done = manifest is not None and final is not None and final.job_id == manifest.job_id and not final.reopened
        if path is None or manifest is None or final is None or final.shard is None or not done:
            undone.append(str(shard))
        else:
            parts.append(Part(shard, path, manifest, final, final.shard))
    if undone:
        raise InputError(
            f"{directory}: {len(undone)} of {number} shards are missing or not done: --shard {', '.join(undone[:20])}"
            f"{' …' if len(undone) > 20 else ''}; run these, then merge again"
        )
    first = parts[0]
    for part in parts[1:]:
        lines = job_differences(first.manifest.job, part.manifest.job)
        lines += input_differences(first.manifest.input, part.manifest.input, allow_append=False)
        if part.of_whole.total != first.of_whole.total:
            lines.append(f"rows of the input: {first.of_whole.total} and {part.of_whole.total}")
        if lines:
            raise IdentityError(
                f"{directory}: shards {first.shard} and {part.shard} are not of one job and input: {'; '.join(lines)}; "
                "run the one that is wrong again with --new-job"
            )
    return parts


def _proven(parts: list[Part]) -> int:
    """How many rows have a result: each row of the input, but for those left out. Raises DamagedError."""
    found = Recovered("")
    for part in parts:
        before = found.ok + found.failed
        take_in(found, part.path, part.manifest.salt, part.shard)
        rows = found.ok + found.failed - before
        if rows != part.final.rows:
            raise DamagedError(
                f"{part.path}: expected the {part.final.rows} rows that it was done with, got {rows}; restore its files"
            )
    rows = found.ok + found.failed
    skipped = sum(part.of_whole.skipped for part in parts)
    total, sample = parts[0].of_whole.total, parts[0].manifest.job.get("sample")
    expected = min(total, sample[0]) if sample else total
    if rows + skipped != expected:
        raise DamagedError(
            f"expected {expected} rows of the input, got {rows} with a result and {skipped} left out; nothing was "
            "published"
        )
    return rows
