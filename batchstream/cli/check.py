"""`batchstream check`: everything a run would refuse, found without sending a prompt.

The parts are looked at in the order in which a run would meet them; the first that would stop it gives the exit code,
the others are told all the same.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import msgspec

from batchstream.cli.options import JobCommand, job_of, job_params
from batchstream.cli.voice import Voice, emit, one_line
from batchstream.errors import BatchstreamError, InputError, LockedError, StorageError, UsageError
from batchstream.job import Job
from batchstream.policy.budget import UNKNOWN_ANSWER_TOKENS

if TYPE_CHECKING:
    from batchstream.cli.survey import Survey
    from batchstream.connect import Plan
    from batchstream.files.manifest import Manifest
    from batchstream.files.source import Source
    from batchstream.policy.estimate import Estimate

HELP = """Check SOURCE and all options as `run` would, without sending a prompt.

Counts rows, names the bad ones, looks for ids that come twice, estimates requests, tokens, cost and time, and says
whether key and output are in order. Takes the flags of `run`. The exit code is the one with which a run would end at
once; 10 for bad rows that --invalid and --max-failures do not allow for; 0 when all is well.
"""

EXAMPLES = """
batchstream check prompts.jsonl
batchstream check job.toml --ping
batchstream check articles.parquet --template 'Summarise: {text}' --rpm 30
"""

ASSUMED_ANSWER_S = 5.0
"""For an estimate where no rate is known; said whenever it is used."""

_T = TypeVar("_T")


def check(ctx: click.Context, source: str, ping: bool) -> int:
    """Look at everything, tell it on stdout; the exit code with which a run would end at once, or 0."""
    from batchstream.connect import plan

    job = job_of(ctx, source)
    card = Card(ctx.obj)
    chosen = plan(job, with_key=False)
    card.say("Endpoint", f"{chosen.model or 'the model that each row names'} at {chosen.label} ({chosen.api})")
    with_key = card.take("Key", lambda: plan(job), _key_line)
    with _input(job) as spool:
        rows = card.look("Input", lambda: _opened(job, chosen, spool))
        if rows is not None:
            card.take("Output", lambda: _output(job, chosen, rows))
            card.look("Rows", lambda: _rows(job, chosen, rows, card))
    if ping and with_key is not None:
        card.take("Ping", lambda: _ping(job, with_key))
    return card.verdict()


command = JobCommand(
    "check",
    help=HELP,
    examples=EXAMPLES,
    params=[
        click.Argument(["source"]),
        click.Option(["--ping"], is_flag=True, help="Also ask the endpoint for its models (GET /models)."),
        *job_params(),
    ],
    callback=click.pass_context(lambda ctx, source, ping, **_: check(ctx, source, ping)),
)


class Card:
    """The findings, one labelled line each, on stdout; remembers what would stop a run."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._problems: list[BatchstreamError] = []

    def say(self, label: str, text: str) -> None:
        emit(f"{label:<10}{one_line(self._voice.redact(text))}\n".encode("utf-8", "replace"))

    def problem(self, label: str, error: BatchstreamError) -> None:
        self._problems.append(error)
        self.say(label, f"PROBLEM: {error}")

    def look(self, label: str, look: Callable[[], _T]) -> _T | None:
        """What `look` finds; None when it finds a problem, which is told."""
        try:
            return look()
        except BatchstreamError as error:
            self.problem(label, error)
            return None

    def take(self, label: str, look: Callable[[], _T], told: Callable[[_T], str] = str) -> _T | None:
        """The same, and what was found is told as well."""
        found = self.look(label, look)
        if found is not None:
            self.say(label, told(found))
        return found

    def verdict(self) -> int:
        """The exit code; what it is for stands in the last line."""
        if not self._problems:
            return 0
        first = self._problems[0]
        more = f" (and {len(self._problems) - 1} more)" if len(self._problems) > 1 else ""
        self._voice.error(f"a run would stop: {first}{more}; nothing was sent", first.exit_code)
        return first.exit_code


def _key_line(plan: Plan) -> str:
    if plan.key is not None:
        return f"there, from {plan.key.origin}"
    return "none is sent; this endpoint needs none, or name one with --api-key-env or --api-key-file"


@contextmanager
def _input(job: Job) -> Iterator[str | None]:
    """A file with what stdin gives, where that is the input: rows are read more than once. Else None."""
    if job.input != "-":
        yield None
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield copy.name


def _opened(job: Job, plan: Plan, spool: str | None) -> Source:
    from batchstream.intake import open_job_source, shard_of

    return open_job_source(job, plan, spool, shard_of(job))


def _output(job: Job, plan: Plan, source: Source) -> str:
    """What a run would find where its results go. Raises what it would raise there."""
    from batchstream.files.lock import holder, journal_path
    from batchstream.files.manifest import any_manifest, load_final
    from batchstream.files.results import read_journal
    from batchstream.intake import output_of, shard_of

    out = output_of(job)
    journal = journal_path(out, shard_of(job))
    if not os.access(out.parent, os.W_OK | os.X_OK):
        why = "no permission to write there" if out.parent.is_dir() else "no such directory"
        raise StorageError(f"{out}: {why}; create it or choose another --output")
    if (by := holder(journal)) is not None:
        raise LockedError(f"{out}: another run holds this job ({by})")
    manifest = any_manifest(journal) if journal.is_dir() else None
    if manifest is None:
        if out.exists() and not job.overwrite:
            raise UsageError(f"{out}: exists and was not made by this job; choose another --output, or --overwrite")
        return f"{out} (free)"
    if job.new_job:
        return f"{out} (starts over: the answers of the earlier job are put aside)"
    if not _goes_on(job, plan, source, journal, manifest):
        return f"{out} (begins: nothing was answered under the job that was there)"
    stored, final = read_journal(journal), load_final(journal)
    counts = f"{stored.ok:,} ok and {stored.failed:,} failed rows are stored"
    if final is not None and not final.reopened and not (job.retry_failed and stored.failed):
        return f"{out} (finished before: {counts}; a run would send nothing)"
    return f"{out} (a run resumes: {counts})"


def _goes_on(job: Job, plan: Plan, source: Source, journal: Path, kept: Manifest) -> bool:
    """Whether a run goes on with the job that is there. Raises what it would raise (`files.journal.same_job`)."""
    from batchstream.files.fingerprint import input_fingerprint
    from batchstream.files.journal import same_job
    from batchstream.intake import identity

    # A copy of stdin has another name and time.
    files = kept.input if job.input == "-" else input_fingerprint(source)
    wanted = msgspec.structs.replace(kept, job=identity(job, plan), input=files)
    return same_job(journal, kept, wanted, allow_append=job.allow_append, retry_failed=job.retry_failed)


def _rows(job: Job, plan: Plan, source: Source, card: Card) -> None:
    """Tell about the rows. Raises InputError for more bad ones than a run may have, UsageError for a missing model."""
    from batchstream.cli.survey import survey
    from batchstream.connect import known_rates
    from batchstream.policy.estimate import estimate

    found = survey(source)
    card.say("Rows", f"{found.rows:,}" + (f", {found.invalid:,} of them malformed" if found.invalid else ""))
    for bad in found.bad:
        card.say("Bad row", bad.message)
    if found.invalid > len(found.bad):
        card.say("", f"… and {found.invalid - len(found.bad):,} more")
    if found.duplicates:
        examples = ", ".join(found.duplicate_ids)
        card.say("Ids", f"{found.duplicates:,} rows have the id of an earlier one: {examples}; their numbers differ")
    if found.valid:
        rates = known_rates(job, plan)
        rows = {**found.models, "": found.valid - found.models.total()}
        answers = found.answer_tokens + (found.valid - found.limited) * UNKNOWN_ANSWER_TOKENS
        expected = estimate({k: n for k, n in rows.items() if n}, found.tokens, answers, rates, plan.prices)
        card.say("Requests", _requests(found.valid, expected))
        card.say("Tokens", _tokens(found))
        if plan.prices:
            card.say("Cost", _cost(job, found, expected))
        card.say("Time", _time(job, plan, found.valid, expected))
    if found.valid and found.without_model:
        raise UsageError(f"{found.without_model:,} rows name no model; give one with --model")
    allowed = {"fail": 0, "record": job.max_failures, "skip": found.rows}[job.invalid]
    if found.invalid > allowed:
        first = f"; the first is {found.bad[0].message}"
        raise InputError(f"{found.invalid:,} of {found.rows:,} rows are malformed, {allowed} allowed{first}")


def _tokens(found: Survey) -> str:
    text = f"about {found.tokens:,} prompt tokens (characters / 4)"
    if found.limited:
        whose = "all rows" if found.limited == found.valid else f"the {found.limited:,} rows that set a limit"
        text += f"; answers of {whose}: at most {found.answer_tokens:,}"
    return text


def _requests(rows: int, expected: Estimate) -> str:
    weighted = (
        "" if expected.requests == rows else f"; they count for {expected.requests:,.4g} by their models' weights"
    )
    return f"{rows:,}, retries apart{weighted}"


def _cost(job: Job, found: Survey, expected: Estimate) -> str:
    if expected.cost is None:
        return "unknown: there is no price for some of the models"
    text = f"about {expected.cost:,.4g}, were each answer as long as it may be"
    if found.limited < found.valid:
        text += f", and of {UNKNOWN_ANSWER_TOKENS:g} tokens where no row says"
    if job.max_cost is not None and job.max_cost < expected.cost:
        text += f"; --max-cost {job.max_cost:g} stops before"
    return text


def _time(job: Job, plan: Plan, rows: int, expected: Estimate) -> str:
    from batchstream.connect import slots_of
    from batchstream.policy.concurrency import START
    from batchstream.report.text import duration

    slots = slots_of(job, plan) or START
    busy_s = rows * ASSUMED_ANSWER_S / slots
    guess = f"{duration(busy_s)} if an answer takes {ASSUMED_ANSWER_S:g} s, {slots} at a time"
    if expected.seconds is not None:
        return f"at least {duration(expected.seconds)} at {expected.narrowest}; {guess}"
    plans = ", ".join(f"{name} {duration(rows / rpm * 60)}" for name, rpm in plan.provider.limits.plans.items())
    return guess + (f"; by {plan.provider.name}'s plan (--plan): {plans}" if plans else "")


def _ping(job: Job, plan: Plan) -> str:
    from batchstream.cli.ping import ping

    return ping(job, plan)
