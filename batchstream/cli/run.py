"""`batchstream run`: the main job."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from batchstream.cli.options import JobCommand, job_of, job_params
from batchstream.cli.voice import Voice, again, emit
from batchstream.errors import StorageError, UsageError
from batchstream.job import Job

if TYPE_CHECKING:
    from batchstream.engine.progress import Progress
    from batchstream.figures.summary import Summary
    from batchstream.launch.conclusion import Report
    from batchstream.records import Failure, Request
    from batchstream.report.progress import Display

HELP = """Ask every row of SOURCE and keep every answer.

SOURCE holds prompts (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, a folder or glob of them, - for stdin), or is a job file
(.toml) that names them; flags win over what a job file says. Every answer is stored as it ends. The results file
appears when every row has an outcome. The same command again resumes; when all is done, it sends nothing.
"""

EXAMPLES = """
batchstream run prompts.jsonl -o results.jsonl
batchstream run articles.parquet --template 'Summarise: {text}' --keep id,title
batchstream run prompts.jsonl --provider openai --model gpt-4o-mini --param temperature=0 --concurrency 32
batchstream run prompts.jsonl --plan premium --deadline 06:00
batchstream run prompts.jsonl --price in=0.15,out=0.6 --max-cost 5 --dry-run
batchstream run job.toml --rpm 30 --max-time 3600
batchstream run prompts.jsonl --provider sim --sim ttft=0.2 --sim gap=0.01
"""

NOTES_MAX = 10_000
"""Notes that may wait for a slow terminal before the newest are left out."""


def _run(ctx: click.Context, source: str, dry_run: bool) -> int:
    if dry_run:
        from batchstream.cli.check import check

        return check(ctx, source, ping=False)
    from batchstream.launch.here import run
    from batchstream.shard import Hooks

    voice: Voice = ctx.obj
    job = job_of(ctx, source)
    check_summary_path(job.summary_json)
    watch = Watch(job, voice)
    report = run(
        job, watch=watch.during, hooks=Hooks(on_failure=watch.attempt_failed, on_note=watch.say), handle_signals=True
    )
    return conclude(report, voice, job.summary_json)


command = JobCommand(
    "run",
    help=HELP,
    examples=EXAMPLES,
    params=[
        click.Argument(["source"]),
        click.Option(
            ["--dry-run"], is_flag=True, help="Send nothing: check it all, estimate requests, tokens, cost and time."
        ),
        *job_params(),
    ],
    callback=click.pass_context(lambda ctx, source, dry_run, **_: _run(ctx, source, dry_run)),
)


class Watch:
    """What is shown while requests run: the display, and with -v a note on each failed attempt.

    Notes are written from a thread: a terminal that is slow to take a line must not hold up the event loop.
    """

    def __init__(self, job: Job, voice: Voice) -> None:
        self._job = job
        self._voice = voice
        self._notes: queue.Queue[tuple[str, dict[str, object]] | None] = queue.Queue()
        self._left_out = 0

    @contextmanager
    def during(self, progress: Progress) -> Iterator[None]:
        from os import environ

        from batchstream.report.progress import display_for

        job = self._job
        display = display_for(
            progress,
            self._voice.stream,
            environ=environ,
            quiet=job.quiet,
            live=not job.no_progress,
            log_format=job.log_format,
        )
        with display:
            writer = threading.Thread(target=self._write_notes, args=(display,), name="notes", daemon=True)
            writer.start()
            try:
                yield
            finally:
                self._notes.put(None)
                writer.join()

    def attempt_failed(self, request: Request, failure: Failure, attempt: int) -> None:
        """One attempt failed (`shard.Hooks`)."""
        if not self._job.verbose or self._job.quiet:
            return
        if self._notes.qsize() >= NOTES_MAX:
            self._left_out += 1
            return
        text = f"row {request.row} (id {request.id}), attempt {attempt}: {failure.kind}: {failure.message}"
        fields = {"row": request.row, "id": request.id, "attempt": attempt, **msgspec.structs.asdict(failure)}
        self._notes.put((text, fields))

    def say(self, text: str) -> None:
        """Something that a person at the terminal should know now (`shard.Hooks`)."""
        if not self._job.quiet:
            self._notes.put((text, {}))

    def _write_notes(self, display: Display) -> None:
        while (note := self._notes.get()) is not None:
            text, fields = note
            if self._job.log_format == "json":
                self._voice.event("attempt_failed" if fields else "note", text, fields)
            else:
                display.note(self._voice.redact(text))
        if self._left_out:
            display.note(f"{self._left_out} more failed attempts were not shown: this terminal was too slow")


def conclude(report: Report, voice: Voice, summary_json: str | None, command: str = "run") -> int:
    """Say how the run ended and write its summary, also where --summary-json says. Returns the exit code."""
    for warning in report.warnings:
        voice.warning(warning)
    code, message = report.exit_code, report.message
    if report.stop is not None and report.stop.cause == "account":
        message = voice.blamed(message)
    if report.summary is not None:
        voice.summary(report.summary)
        try:
            _write_summary(report, report.summary, summary_json)
        except StorageError as error:
            message = f"{message}; but the summary could not be written: {error}"
            code = code or error.exit_code
    if code:
        voice.error(again(message, code, command), code)
    elif message != "finished":
        voice.note(message)
    return code


def _write_summary(report: Report, figures: Summary, copy: str | None) -> None:
    """The summary beside the journal (OUT.summary.json), and the copy that --summary-json asks for."""
    from batchstream.files import fsio
    from batchstream.report.text import summary_json

    data = summary_json(figures)
    beside = report.journal.with_name(report.journal.name.removesuffix(".journal") + ".summary.json")
    # A run that had nothing left to do knows less than the one before it, which knew its speed: keep that.
    if figures.throughput.rows or report.stop is not None or not beside.exists():
        fsio.replace_file(fsio.disk, beside, data, mode=0o666)
    if copy == "-":
        with suppress(BrokenPipeError):  # nobody reads it any more; the run ended as it ended
            emit(data)
    elif copy is not None:
        fsio.replace_file(fsio.disk, Path(copy), data, mode=0o666)


def summary_path(output: Path) -> Path:
    """Where a run leaves its summary: OUT.summary.json."""
    return output.with_name(output.name + ".summary.json")


def check_summary_path(path: str | None) -> None:
    """Before any money is spent."""
    if path not in (None, "-") and not Path(str(path)).parent.is_dir():
        raise UsageError(f"--summary-json {path}: expected a file in a directory that exists")
