"""`batchstream merge`: the shards of a job, wherever they ran, become its results file, and its figures.

Nothing is asked of any endpoint. A shard is done when its own run said so; what is proven then, `files.merge` says.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from batchstream.figures.evidence import Evidence, together
from batchstream.figures.summary import Run, Summary, Tally, summary
from batchstream.files.merge import Merge
from batchstream.launch.conclusion import Report, now_iso, too_many


def merge(out: Path, *, overwrite: bool = False, max_failures: int = 0) -> Report:
    """Publish `out` from its shards. Blocking; a second time it gives the same bytes.

    Raises InputError (shards missing or not done), LockedError (one runs), IdentityError (of different jobs),
    DamagedError (a row is not there once), UsageError (OUT is another's), StorageError.
    """
    started_at = now_iso()
    merging = Merge(out, started=started_at)
    try:
        exit_code = 3 if merging.failed > max_failures else 0
        tally = Tally()
        final = merging.publish(overwrite=overwrite, exit_code=exit_code, finished=now_iso(), observe=tally.add)
        facts = Run(
            ended_at=now_iso(),
            exit_code=exit_code,
            endpoint=merging.manifest.job.get("endpoint"),
            model=merging.manifest.job.get("model"),
            output=str(out),
            journal=str(merging.path),
            pending=0,
            skipped=merging.skipped,
            duplicates=final.duplicates,
        )
        figures = summary(tally, facts, _evidence([part.path for part in merging.parts]))
        message = f"{len(merging.parts)} shards merged: {final.rows} rows, each there once"
        if exit_code:
            message = f"{message}; {too_many(figures, max_failures)}"
        return Report(
            exit_code=exit_code,
            message=message,
            output=out,
            journal=merging.path,
            summary=figures,
            published=True,
        )
    finally:
        merging.close()


def _evidence(shards: list[Path]) -> Evidence | None:
    """What the shards' clients measured of themselves, when each has left it."""
    found = []
    for path in shards:
        try:
            left = msgspec.json.decode(path.with_name(f"{path.name}.summary.json").read_bytes(), type=Summary)
        except (OSError, msgspec.DecodeError):
            return None  # a part says nothing of the whole
        if left.evidence is not None:  # None: it had no row to ask
            found.append(left.evidence)
    if not found:
        return None
    workers = sum(each.workers for each in found)
    return msgspec.structs.replace(together(found), workers=workers)
