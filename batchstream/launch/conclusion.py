"""How a run ends: published or not, with which exit code, figures and last words.

`Serving` is what the serving of rows leaves behind; `Conclusion` makes the `Report` of it and of the journal.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchstream.connect import Plan, secrets
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Stop
from batchstream.figures.evidence import Evidence
from batchstream.figures.summary import LimitFigures, Run, Summary, Tally, summary
from batchstream.files.journal import JournalDir
from batchstream.files.lock import journal_path
from batchstream.files.manifest import Final
from batchstream.files.recovery import recover
from batchstream.job import Job
from batchstream.launch.opening import Interrupted
from batchstream.policy.sharding import Shard
from batchstream.shard import Control

EXIT_OF = {"account": 4, "endpoint": 4, "budget": 5, "storage": 14}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. `message`: one line, why it was not exit 0 and whether the same command resumes."""

    exit_code: int
    message: str
    output: Path
    journal: Path
    summary: Summary | None
    stop: Stop | None = None
    published: bool = False
    warnings: tuple[str, ...] = ()


class Serving:
    """What the serving of one run's rows came to.

    `taken`: rows of the input, `skipped`: invalid ones left out, `exhausted` once the input was read to its end, when
    its `input_rows` are known, those of other shards included; `over`
    when no request is under way any more; `seconds` of the monotonic clock; the client's `evidence` about itself;
    `requests` that left, None where none could; `taken_over`: rows that were in flight when a worker died and were
    asked again by another.
    """

    __slots__ = ("evidence", "exhausted", "input_rows", "over", "requests", "seconds", "skipped", "taken", "taken_over")

    def __init__(self) -> None:
        self.taken = 0
        self.skipped = 0
        self.exhausted = False
        self.input_rows: int | None = None
        self.requests: int | None = None
        self.over = False
        self.taken_over = 0
        self.seconds = 0.0
        self.evidence: Evidence | None = None


class _Stored(NamedTuple):
    """What the journal holds, counted; answers bought twice; requests that went out and have no answer."""

    tally: Tally
    duplicates: int
    unanswered: int = 0


class Conclusion:
    """Makes the `Report` of a run that began at `started_at` (ISO 8601, UTC). Blocking: call it in a thread."""

    def __init__(
        self, job: Job, plan: Plan, out: Path, started_at: str, control: Control, shard: Shard | None = None
    ) -> None:
        self._shard = shard
        self._job = job
        self._control = control
        self._plan = plan
        self._out = out
        self._started_at = started_at
        self._publishing = False

    def skipped(self) -> Report:
        """Another run holds the job, and the user wants that passed over."""
        message = "another run holds the job; skipped (--if-locked skip)"
        journal = journal_path(self._out, self._shard)
        return Report(exit_code=0, message=message, output=self._out, journal=journal, summary=None)

    def interrupted(self, stop: Stop) -> Report:
        """Stopped before any request left, or once all had ended and only the results file was still to be made."""
        what = "the results were not published yet" if self._publishing else "nothing was sent"
        return Report(
            exit_code=128 + stop.signal,
            message=f"stopped: {stop.message}; {what}",
            output=self._out,
            journal=journal_path(self._out, self._shard),
            summary=None,
            stop=stop,
        )

    def finished_before(self, journal: JournalDir, final: Final) -> Report:
        """A finished job: nothing was sent; the exit code is what the rows say."""
        exit_code = 3 if final.failed > self._job.max_failures else 0
        figures = self._summary(journal, Serving(), self._stored(journal), None, exit_code)
        message = f"finished before ({final.rows} rows); nothing was sent"
        if exit_code:
            message = f"{message}; {too_many(figures, self._job.max_failures)}"
        if self._shard is not None:
            message = f"{_done(self._shard, final.rows, self._out)}: {message}"
        return self._report(journal, exit_code, message, figures, published=self._shard is None)

    def after(self, journal: JournalDir, progress: Progress, serving: Serving, stop: Stop | None) -> Report:
        """After the last request: publish, or say why not. Raises Interrupted when that was cut short."""
        job = self._job
        before = journal.recovered.rows_done
        complete = serving.exhausted and progress.done == serving.taken
        if not complete or (stop is not None and stop.cause == "signal"):
            stop = self._clean(stop or Stop("endpoint", "some rows have no result although each was taken in"))
            exit_code = 128 + stop.signal if stop.cause == "signal" else EXIT_OF[stop.cause]
            figures = self._summary(journal, serving, self._stored(journal), stop, exit_code, progress)
            return self._report(journal, exit_code, _stopped(stop, figures), figures, stop=stop)
        total = before + serving.taken
        if total == 0 and self._shard is None:
            journal.warnings.append(f"{job.input}: no rows; the results are empty")
        failed = progress.failed + (before - journal.recovered.ok)
        exit_code = 3 if failed > job.max_failures else 0
        if self._shard is not None:
            return self._after_shard(journal, progress, serving, total, exit_code)
        tally = Tally(since=self._started_at)

        def observe(result: bytes) -> None:
            if self._control.aborted:
                raise Interrupted
            tally.add(result)

        self._publishing = True
        final = journal.publish(rows=total, exit_code=exit_code, finished=now_iso(), observe=observe)
        figures = self._summary(journal, serving, _Stored(tally, final.duplicates), None, exit_code, progress)
        message = too_many(figures, job.max_failures) if exit_code else "finished"
        return self._report(journal, exit_code, message, figures, published=True)

    def _after_shard(
        self, journal: JournalDir, progress: Progress, serving: Serving, total: int, exit_code: int
    ) -> Report:
        assert self._shard is not None  # noqa: S101  (whoever calls)
        assert serving.input_rows is not None  # noqa: S101  (read to its end)
        journal.finish_shard(
            rows=total,
            total=serving.input_rows,
            skipped=serving.skipped,
            exit_code=exit_code,
            finished=now_iso(),
        )
        figures = self._summary(journal, serving, self._stored(journal), None, exit_code, progress)
        message = _done(self._shard, total, self._out)
        if exit_code:
            message = f"{message}; {too_many(figures, self._job.max_failures)}"
        return self._report(journal, exit_code, message, figures)

    def _clean(self, stop: Stop) -> Stop:
        """Endpoints like to repeat the key in the message that refuses it."""
        message = stop.message
        for secret in secrets(self._job, self._plan):
            message = message.replace(secret, "[key]")
        return msgspec.structs.replace(stop, message=message)

    def _stored(self, journal: JournalDir) -> _Stored:
        tally = Tally(since=self._started_at)
        stored = recover(journal.path, journal.manifest.salt)
        for _, result in stored.results():
            tally.add(result)
        return _Stored(tally, stored.duplicates, stored.asked_again)

    def _summary(
        self,
        journal: JournalDir,
        serving: Serving,
        stored: _Stored,
        stop: Stop | None,
        exit_code: int,
        progress: Progress | None = None,
    ) -> Summary:
        tally = stored.tally
        known = journal.recovered
        before = known.rows_done
        pending = None
        if stop is None:
            pending = 0
        elif serving.exhausted:
            pending = before + serving.taken - tally.rows
        elif progress is not None and progress.total is not None:
            pending = progress.total - tally.rows - serving.skipped
        facts = Run(
            started_at=self._started_at,
            ended_at=now_iso(),
            elapsed_s=round(serving.seconds, 3),
            exit_code=exit_code,
            stop=None if stop is None else stop.message,
            endpoint=self._plan.label,
            model=self._plan.model,
            output=str(self._out) if self._shard is None else None,
            journal=str(journal.path),
            pending=pending,
            requests=serving.requests,
            resumed=before,
            skipped=serving.skipped,
            asked_again=known.asked_again + serving.taken_over,
            unanswered=stored.unanswered,
            duplicates=stored.duplicates,
        )
        limits = limit_figures(progress) if progress is not None else None
        return summary(tally, facts, serving.evidence if tally.new_rows else None, limits)

    def _report(
        self,
        journal: JournalDir,
        exit_code: int,
        message: str,
        figures: Summary,
        *,
        stop: Stop | None = None,
        published: bool = False,
    ) -> Report:
        return Report(
            exit_code=exit_code,
            message=message,
            output=self._out,
            journal=journal.path,
            summary=figures,
            stop=stop,
            published=published,
            warnings=tuple(journal.warnings),
        )


LEVELS_TOLD = 50
"""Points of the path of an adaptive concurrency in a summary."""


def limit_figures(progress: Progress) -> LimitFigures:
    """What a run's counters say about its limits, when it has ended."""
    levels = progress.levels
    told = levels[:: max(1, -(-len(levels) // LEVELS_TOLD))]
    return LimitFigures(
        held_s={name: round(seconds, 3) for name, seconds in progress.held.items()},
        refused=progress.limited,
        slots=progress.slots,
        adaptive=progress.adaptive,
        levels=[(round(max(0.0, at - progress.started), 3), level) for at, level in told],
        cost=progress.cost,
    )


def now_iso() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _done(shard: Shard, rows: int, out: Path) -> str:
    return f"shard {shard} is done ({rows} rows); once all are, `batchstream merge {out}` makes the results of them"


def too_many(figures: Summary, allowed: int) -> str:
    """Why a finished run is no success, and what helps."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures.failures.items())
    said = f"{figures.rows.failed} rows failed ({kinds}), {allowed} allowed (--max-failures)"
    if figures.rows.invalid:
        said += "; `batchstream check` names the malformed lines, nothing was sent for them"
    return f"{said}; --retry-failed asks the failed rows again, with what was mended in them"


def _stopped(stop: Stop, figures: Summary) -> str:
    """Why a run stopped, and what of it the same command will not do by itself."""
    said = f"stopped: {stop.message}"
    if figures.run.unanswered:
        said += f"; {figures.run.unanswered} requests were cut, may be billed and will be asked again"
    if figures.rows.failed:
        said += f"; {figures.rows.failed} rows have failed so far (--retry-failed asks them again)"
    return said
