"""The journal of a job: the directory OUT.journal/ beside the output.

    LOCK              flock, see lock.py
    MANIFEST.json     identity of the job, its salt
    seg-<w>-<n>.bsj   what happened, see record.py; one more for each start of a worker; old ones are only read
    FINAL.json        written last, after the results are in place
    before-<job>/     the journal of an earlier job, put aside by --new-job; never deleted by us
    shard-<i>-of-<n>/ such a directory again, of one shard of the job; `files.merge` makes one of them
    input.jsonl       what came through stdin, see spool.py

Order of a start: lock, manifest (compare or write), recover, sync what a killed run left unsynced, new segment with
its header and name on stable storage. Only then may a request leave: the journal is proven writable before money is
spent.
A new job begins with the rename of its MANIFEST: its salt makes every older record invalid, whatever is moved when.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from batchstream.errors import DamagedError, IdentityError, StorageError, UsageError
from batchstream.files import fsio, record
from batchstream.files.fingerprint import ProvenRows, input_differences, job_differences
from batchstream.files.lock import Lock, check_company, hold, journal_path, shards_in
from batchstream.files.manifest import (
    FORMAT,
    Final,
    InputFile,
    Manifest,
    Published,
    ShardFinal,
    any_manifest,
    load_final,
    load_manifest,
)
from batchstream.files.publish import describe, publish
from batchstream.files.recovery import Recovered, recover, segment_files
from batchstream.files.segment import Durability, GroupSync, Segment
from batchstream.files.source import Source
from batchstream.policy.sharding import Shard
from batchstream.records import Usage

__all__ = [
    "Durability",
    "Final",
    "GroupSync",
    "InputFile",
    "JournalDir",
    "Manifest",
    "Published",
    "Segment",
    "journal_path",
    "load_final",
    "load_manifest",
]


class JournalDir:
    """The locked, recovered journal of one job. Made by `acquire` or, in worker processes, `join`.

    `final` is not None when the job was finished before and nothing has changed since: there is nothing to do.
    `lock_fds` are for worker processes to inherit, so that the lock lasts as long as any of them. `warnings` hold one
    line each for the user. `shard`: it is the journal of that shard of the job only.
    """

    def __init__(self, out: Path, manifest: Manifest, recovered: Recovered, lock: Lock | None,
                 durability: Durability, disk: fsio.Disk, shard: Shard | None = None) -> None:  # fmt: skip
        self.out = out
        self.shard = shard
        self.path = journal_path(out, shard)
        self.manifest = manifest
        self.recovered = recovered
        self.final: Final | None = None
        self.warnings: list[str] = []
        self.overwrite = False
        self.disk = disk
        self._lock = lock
        self._durability = durability

    @property
    def lock_fds(self) -> list[int]:
        return self._lock.fds if self._lock else []

    @classmethod
    def acquire(
        cls,
        out: Path,
        manifest: Manifest,
        *,
        new_job: bool = False,
        overwrite: bool = False,
        allow_append: bool = False,
        retry_failed: bool = False,
        durability: Durability = "batch",
        spill_dir: Path | None = None,
        lock: Lock | None = None,
        shard: Shard | None = None,
        disk: fsio.Disk | None = None,
    ) -> JournalDir:
        """Lock (unless `lock` comes from `lock.hold`), compare or write the manifest, recover.

        On error the lock is released. Raises LockedError, IdentityError (each difference named), DamagedError,
        StorageError, and UsageError when OUT exists and is not this job's.
        """
        disk = disk or fsio.disk
        _check_output(out)
        lock = lock or hold(out, started=manifest.created, shard=shard, disk=disk)
        try:
            return cls._open(
                out, manifest, new_job, overwrite, allow_append, retry_failed, durability, spill_dir, lock, shard, disk
            )
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _open(cls, out: Path, wanted: Manifest, new_job: bool, overwrite: bool, allow_append: bool, retry_failed: bool,
              durability: Durability, spill_dir: Path | None, lock: Lock, shard: Shard | None,
              disk: fsio.Disk) -> JournalDir:  # fmt: skip
        directory = journal_path(out, shard)
        if shard is not None:
            check_company(journal_path(out), shard)
        kept = _load_any(directory) if new_job else load_manifest(directory)
        if kept is None and not new_job and segment_files(directory):
            raise DamagedError(
                f"{directory}: holds answers but no MANIFEST.json; restore it, or start over with --new-job"
            )
        ways = {"allow_append": allow_append, "retry_failed": retry_failed}
        for path in shards_in(directory).values():
            if new_job:
                _put_shard_aside(directory, path, kept, disk)
            elif (theirs := load_manifest(path)) is not None:
                same_job(path, theirs, wanted, **ways)
        if kept is not None and not new_job and same_job(directory, kept, wanted, **ways):
            manifest = msgspec.structs.replace(kept, input=wanted.input)
        else:
            manifest = _begin_job(out, directory, wanted, kept, overwrite, disk)
        _put_aside(directory, manifest.job_id, disk)
        if spill_dir is not None:
            _take_in_spills(directory, spill_dir, disk)
        recovered = recover(directory, manifest.salt, retry_failed=retry_failed)
        if durability != "os":
            _sync_leftovers(recovered, disk)
        journal = cls(out, manifest, recovered, lock, durability, disk, shard)
        journal.overwrite = overwrite
        journal._consider_final(same_input=kept is not None and kept.input == wanted.input)
        if recovered.skipped_records:
            journal.warnings.append(
                f"{directory}: {recovered.skipped_records} damaged records past the last durable mark were ignored; "
                "their rows are asked again"
            )
        return journal

    @classmethod
    def join(
        cls, out: Path, *, durability: Durability = "batch", shard: Shard | None = None, disk: fsio.Disk | None = None
    ) -> JournalDir:
        """In a worker process of the holder (which has inherited `lock_fds`): the journal, only to open segments."""
        manifest = load_manifest(journal_path(out, shard))
        if manifest is None:
            raise StorageError(f"{journal_path(out, shard)}: the job's MANIFEST.json has disappeared")
        return cls(out, manifest, Recovered(manifest.salt), None, durability, disk or fsio.disk, shard)

    def segment(self, worker: int = 0) -> Segment:
        """Open a new segment, its header and name on stable storage. Raises StorageError."""
        numbers = [int(record.SEGMENT_NAME.fullmatch(path.name)[2]) for path in segment_files(self.path)]  # type: ignore[index]
        return Segment(
            self.path,
            job_id=self.manifest.job_id,
            salt=self.manifest.salt,
            worker=worker,
            number=max(numbers, default=-1) + 1,
            after={state.path.name: state.valid for state in self.recovered.segments if state.valid},
            durability=self._durability,
            disk=self.disk,
        )

    def left_behind(self, rows: Iterable[int]) -> tuple[dict[int, bytes], set[int]]:
        """Of these rows of a worker that was killed: the results it had stored (durable from now on), and the rows
        whose request was under way. Blocking; safe beside the other workers."""
        found = recover(self.path, self.manifest.salt)
        if self._durability != "os":
            _sync_leftovers(found, self.disk)
        rows = list(rows)
        stored = {row: found.result(row) for row in rows if found.has_outcome(row)}
        return stored, {row for row in rows if row not in stored and found.admitted(row)}

    def proven(self, source: Source) -> ProvenRows:
        """The rows that remain to be done, the input's identity proven as they are read."""
        return ProvenRows(source, self.recovered)

    def publish(
        self, *, rows: int, exit_code: int, finished: str, observe: Callable[[bytes], Usage | None] | None = None
    ) -> Final:
        """Build OUT from the journal, put it in place, write FINAL.json. `rows`: how many must have an outcome;
        `observe` is shown each result as it passes and gives back its usage (none need be read a second time).

        Close the segments first. Blocking; repeatable: a second call gives a byte-identical file.
        Raises DamagedError (a row is missing), StorageError, and UsageError when OUT is not this job's to replace.
        """
        return publish(
            self.out, self.path, self.manifest, self.disk,
            overwrite=self.overwrite, rows=rows, exit_code=exit_code, finished=finished, observe=observe,
        )  # fmt: skip

    def finish_shard(self, *, rows: int, total: int, skipped: int, exit_code: int, finished: str) -> Final:
        """Instead of `publish`, for a shard: FINAL.json, by which `merge` knows that it is done. Its `rows` must have
        an outcome each; `total` rows are in the whole input. Blocking. Raises DamagedError, StorageError."""
        found = recover(self.path, self.manifest.salt)
        if found.ok + found.failed != rows:
            raise DamagedError(
                f"{self.path}: expected {rows} rows, got {found.ok + found.failed}. Run the same command again"
            )
        final = Final(
            job_id=self.manifest.job_id,
            rows=rows,
            ok=found.ok,
            failed=found.failed,
            duplicates=found.duplicates,
            exit_code=exit_code,
            usage={},
            results=None,
            finished=finished,
            shard=ShardFinal(total, skipped),
        )
        fsio.replace_file(self.disk, self.path / "MANIFEST.json", msgspec.json.encode(self.manifest))
        fsio.replace_file(self.disk, self.path / "FINAL.json", msgspec.json.encode(final))
        return final

    def close(self) -> None:
        """Release the lock (the LOCK file stays)."""
        if self._lock:
            self._lock.release()

    def _consider_final(self, *, same_input: bool) -> None:
        final = load_final(self.path)
        if final is None or final.job_id != self.manifest.job_id or final.reopened:
            return
        if same_input and not (self.recovered.retry_failed and self.recovered.failed):
            # A results file that was deleted is built again, from the journal, without a request.
            self.final = final if self.shard is not None or self.out.exists() else None
            return
        reopened = msgspec.structs.replace(final, reopened=True)
        fsio.replace_file(self.disk, self.path / "FINAL.json", msgspec.json.encode(reopened))


def _check_output(out: Path) -> None:
    if out.exists() and not out.is_file():
        raise UsageError(f"{out}: expected a regular file for the results, got something else; choose another --output")


def _load_any(directory: Path) -> Manifest | None:
    """For --new-job, to which a damaged manifest is no obstacle."""
    try:
        return load_manifest(directory)
    except (DamagedError, IdentityError):
        return None


def _begin_job(
    out: Path, directory: Path, wanted: Manifest, kept: Manifest | None, overwrite: bool, disk: fsio.Disk
) -> Manifest:
    if out.exists() and not overwrite:
        final = load_final(journal_path(out))
        if final is None or final.results is None or not _is_published(out, final.results):
            raise UsageError(
                f"{out}: exists and was not made by this job; choose another --output, or give --overwrite"
            )
    if kept is not None:
        with fsio.storage_errors(directory):
            aside = directory / f"before-{kept.job_id}"
            if not aside.is_dir():
                disk.mkdir(str(aside))
        fsio.replace_file(disk, aside / "MANIFEST.json", msgspec.json.encode(kept))
    manifest = msgspec.structs.replace(wanted, job_id=secrets.token_hex(8), salt=secrets.token_hex(16), format=FORMAT)
    fsio.replace_file(disk, directory / "MANIFEST.json", msgspec.json.encode(manifest))
    return manifest


def same_job(
    directory: Path, kept: Manifest, wanted: Manifest, *, allow_append: bool = False, retry_failed: bool = False
) -> bool:
    """Whether a start with the manifest `wanted` goes on with the job `kept` in `directory`.

    False: it is another one, but nothing was ever answered or may have been billed under the old manifest, so that
    there is nothing to protect (a first start with a wrong URL must not make the second one, with the right URL, ask
    for --new-job). Otherwise another job is an IdentityError that names each difference.
    """
    lines = job_differences(kept.job, wanted.job)
    lines += input_differences(kept.input, wanted.input, allow_append=allow_append, mended=retry_failed)
    if not lines:
        return True
    found = recover(directory, kept.salt, strict=False)
    if not (found.ok or found.failed or found.asked_again or found.skipped_records):
        return False
    ways = "restore them, choose another --output, or start over with --new-job"
    if any(line.startswith("input") for line in lines):
        ways = f"{ways} (--allow-append accepts an input that has only grown at its end)"
    raise IdentityError(f"{directory} belongs to another job or input: {'; '.join(lines)}; {ways}")


def _put_shard_aside(directory: Path, shard: Path, kept: Manifest | None, disk: fsio.Disk) -> None:
    """--new-job, of a job that has shards: theirs go before it begins, for they count by a salt of their own."""
    whole = kept or any_manifest(directory)
    with fsio.storage_errors(shard):
        aside = directory / f"before-{whole.job_id if whole is not None else 'shards'}"
        if not aside.is_dir():
            disk.mkdir(str(aside))
        disk.replace(str(shard), str(aside / shard.name))
        disk.sync_dir(str(aside))
        disk.sync_dir(str(directory))


def _put_aside(directory: Path, job_id: str, disk: fsio.Disk) -> None:
    """Move what an earlier job left (see --new-job) to its own directory. The next start finishes what a crash left."""
    for aside in directory.glob("before-*"):
        segments = [
            path for path in segment_files(directory) if _header_job(path) == aside.name.removeprefix("before-")
        ]
        final = _load_final_quietly(directory)
        if final is not None and aside.name == f"before-{final.job_id}":
            segments.append(directory / "FINAL.json")
        if segments:
            with fsio.storage_errors(aside):
                for path in segments:
                    disk.replace(str(path), str(aside / path.name))
                disk.sync_dir(str(aside))
                disk.sync_dir(str(directory))


def _load_final_quietly(directory: Path) -> Final | None:
    try:
        return load_final(directory)
    except DamagedError:
        return None


def _header_job(path: Path) -> str | None:
    """The job id in a segment's first line, unchecked: it only decides where a foreign file is kept."""
    with open(path, "rb") as file:
        line = file.readline(1 << 20)
    try:
        job = msgspec.json.decode(line[record.OVERHEAD :])["job"]
    except (msgspec.MsgspecError, KeyError, TypeError, UnicodeDecodeError):
        return None
    return job if isinstance(job, str) else None


def _take_in_spills(directory: Path, spill_dir: Path, disk: fsio.Disk) -> None:
    """Copy what an earlier run of this job spilled into the journal, then remove it there."""
    manifest = load_manifest(directory)
    for path in sorted(spill_dir.glob("spill-*.bsj")) if manifest else []:
        if record.SEGMENT_NAME.fullmatch(path.name) and _header_job(path) == manifest.job_id:  # type: ignore[union-attr]
            target = directory / path.name
            with fsio.storage_errors(target):
                if not target.exists() or target.stat().st_size != path.stat().st_size:
                    fsio.replace_file(disk, target, path.read_bytes())
                disk.unlink(str(path))


def _sync_leftovers(recovered: Recovered, disk: fsio.Disk) -> None:
    """A killed process leaves records that the system has and the disk may not. They count from now on: sync them."""
    for state in recovered.segments:
        if not state.ended:
            with fsio.storage_errors(state.path):
                fd = disk.open(str(state.path), os.O_RDONLY)
                try:
                    disk.sync_data(fd)
                finally:
                    disk.close(fd)


def _is_published(out: Path, published: Published) -> bool:
    """True when the file `out` is byte for byte the one that `published` describes."""
    return out.stat().st_size == published.size and describe(out) == published
