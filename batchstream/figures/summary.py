"""One fold over the results of a job, and the summary it ends in (`OUT.summary.json`).

A `Tally` reads each result once, as the JSON it is stored as, through a slim view of only the fields that count, and
keeps 32 bytes a row (eight durations); `summary` turns it into figures, with what only the run knows (`Run`) beside.

Rules of counting, so that nothing looks better than it was:
- durations are of rows that were answered; failed rows stand beside them as a number, they improve no percentile;
- what the endpoint did not say is None, never 0: token sums are over the rows that had a usage, the others are counted;
- tokens of failed attempts are kept apart from those of answers: both may have been billed, only one was of use;
- throughput counts the rows of this run only: answers of an earlier run must not be divided by this run's seconds.
"""

from __future__ import annotations

import operator
from collections import Counter
from datetime import datetime
from typing import Any

import msgspec

from batchstream.figures.evidence import Evidence, Verdict, verdict
from batchstream.figures.latency import DEFINITIONS
from batchstream.figures.percentiles import Sample
from batchstream.records import Latencies, Usage

SCHEMA = "batchstream.summary/1"
"""Changes when a field changes its meaning or goes; new fields may come without notice."""

METRICS = tuple(name for name in DEFINITIONS if name != "ttfc_s")
"""The durations that are summarised; `ttfc_s` stays in the rows, TTFB and TTFT enclose it."""

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
"""Field of `Distribution` → quantile."""

_metrics_of = operator.attrgetter(*METRICS)
_GATHERED = 1024

INVALID = "invalid_row"
"""The failure kind of rows for which nothing was sent."""

# The same two ends in the words of the chat, messages and responses APIs.
_CUT_BY_LENGTH = ("length", "max_tokens", "incomplete:max_output_tokens")
_CUT_BY_FILTER = ("content_filter", "incomplete:content_filter")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What the results cannot say: the facts of one run. None = not known.

    `started_at`, `ended_at`: wall clock, ISO 8601 UTC; `elapsed_s`: seconds of the monotonic clock; `stop`: why the run
    ended before its rows did; `pending`: rows without a result; `resumed`: rows that had one before this run;
    `requests`: those that left in this run and ended, also of rows that stay pending;
    `skipped`: invalid rows left out (``--invalid skip``); `unanswered`: rows whose request went out and that have no
    stored answer: in flight now, or cut when a run ended; `asked_again`: rows of that kind that this run found, which
    may have been paid for twice; `duplicates`: second results of a row found in the journal and left out.
    """

    started_at: str | None = None
    ended_at: str | None = None
    elapsed_s: float | None = None
    exit_code: int | None = None
    stop: str | None = None
    endpoint: str | None = None
    model: str | None = None
    output: str | None = None
    journal: str | None = None
    pending: int | None = None
    requests: int | None = None
    resumed: int = 0
    skipped: int = 0
    asked_again: int = 0
    unanswered: int = 0
    duplicates: int = 0


class Rows(msgspec.Struct, frozen=True):
    """`total` = `ok` + `failed`: rows that have a result. `invalid`: the failed ones for which nothing was sent."""

    total: int
    ok: int
    failed: int
    invalid: int


class Attempts(msgspec.Struct, frozen=True):
    """`total`: requests made; `retries`: those after a row's first; `retries_by_kind`: what made them necessary."""

    total: int
    retries: int
    retries_by_kind: dict[str, int]


class Suspects(msgspec.Struct, frozen=True):
    """Answered rows worth a look. `empty`: no text, reasoning, refusal, tool call or other output; `length`: cut off by
    the token limit; `content_filter`: cut off by a filter; `no_finish_reason`: complete by marker, reason unsaid;
    `one_event`: several tokens in a single event, so something on the way buffers and TPOT says nothing."""

    empty: int
    length: int
    content_filter: int
    no_finish_reason: int
    one_event: int


class TokenSums(msgspec.Struct):
    """Sums over all usages seen; None where no usage had the field. `without_usage`: how many had no usage at all."""

    prompt: int | None = None
    completion: int | None = None
    total: int | None = None
    cached: int | None = None
    reasoning: int | None = None
    without_usage: int = 0

    def add(self, usage: Usage | None) -> None:
        if usage is None:
            self.without_usage += 1
            return
        if usage.prompt_tokens is not None:
            self.prompt = (self.prompt or 0) + usage.prompt_tokens
        if usage.completion_tokens is not None:
            self.completion = (self.completion or 0) + usage.completion_tokens
        if (total := total_tokens(usage)) is not None:
            self.total = (self.total or 0) + total
        if usage.cached_tokens is not None:
            self.cached = (self.cached or 0) + usage.cached_tokens
        if usage.reasoning_tokens is not None:
            self.reasoning = (self.reasoning or 0) + usage.reasoning_tokens


class Throughput(msgspec.Struct, frozen=True):
    """Of the `rows` that ended in this run (`ok` of them answered), over its wall seconds; None without these.

    Tokens are those of answers; tokens of failed attempts are work, not throughput.
    """

    rows: int
    ok: int
    rows_per_s: float | None
    completion_tokens_per_s: float | None
    total_tokens_per_s: float | None


class Distribution(msgspec.Struct, frozen=True):
    """Figures of one duration over the answered rows that have it, in seconds.

    `refused` names the percentiles that the sample cannot carry, and why; `intervals` the distribution-free 95 %
    confidence interval (low, high) of each percentile that has one (figures/percentiles.py).
    """

    definition: str
    n: int
    mean: float | None
    min: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p99_9: float | None
    max: float | None
    intervals: dict[str, tuple[float, float]]
    refused: dict[str, str]


class LimitFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What held the run up. `held_s`: seconds by what the next row waited for: `slots` (all in use), `rpm`, `tpm`,
    `gate` (closed by a 429), `outage`, `retry`, `held` (the budget), `input` (nobody waited); `refused`: 429s; `slots`:
    requests at once at the end, and when their number was found out (`adaptive`) its path as [second, slots]; `cost`:
    money spent by the prices given, earlier runs of the job included."""

    held_s: dict[str, float]
    refused: int
    slots: int
    adaptive: bool
    levels: list[tuple[float, int]]
    cost: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of a job. The order of fields is the order in the file; counts by name are largest first.

    `verdict` is None where the client did not watch itself: figures without evidence are neither trusted nor not.
    """

    schema: str = SCHEMA
    run: Run
    rows: Rows
    failures: dict[str, int]
    attempts: Attempts
    suspects: Suspects
    finish_reasons: dict[str, int]
    models: dict[str, int]
    tokens: TokenSums
    failed_attempt_tokens: TokenSums
    throughput: Throughput
    limits: LimitFigures | None = None
    metrics: dict[str, Distribution]
    evidence: Evidence | None
    verdict: Verdict | None
    verdict_reasons: list[str]


class _Kind(msgspec.Struct, gc=False):
    kind: str


class _Retry(msgspec.Struct):
    kind: str
    usage: Usage | None = None


class _Row(msgspec.Struct):
    """The fields of `records.Result` that are counted; the decoder passes over all others."""

    status: str
    text: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    finish_reason: str | None = None
    model: str | None = None
    usage: Usage | None = None
    timing: Latencies = Latencies()
    attempts: int = 0
    retries: list[_Retry] = []
    error: _Kind | None = None
    extra: dict[str, Any] | None = None


class Tally:
    """Counts results one by one, in any order.

    `since`: start of this run (ISO 8601 with offset or Z); rows whose request was not written after it count everywhere
    except in the throughput. None: all rows are this run's. Raises ValueError for a time without its offset.
    """

    def __init__(self, since: str | None = None) -> None:
        self.rows = self.ok = self.invalid = 0
        self.attempts = self.retries = 0
        self.failures: Counter[str] = Counter()
        self.retries_by_kind: Counter[str] = Counter()
        self.finish_reasons: Counter[str | None] = Counter()
        self.models: Counter[str | None] = Counter()
        self.empty = self.one_event = 0
        self.tokens = TokenSums()
        self.failed_attempt_tokens = TokenSums()
        self._durations = {name: Sample() for name in METRICS}
        self._waiting: list[tuple[float | None, ...]] = []  # durations of rows that are not in the samples yet
        self.new_rows = self.new_ok = self.new_completion_tokens = self.new_total_tokens = 0
        self._since = None if since is None else datetime.fromisoformat(since)
        if self._since is not None and self._since.tzinfo is None:
            raise ValueError(f"expected a time with its offset, such as 2025-03-01T10:00:00Z, got {since!r}")
        self._decode = msgspec.json.Decoder(_Row).decode

    def add(self, result: bytes) -> Usage | None:
        """Count one result, given as its JSON object; its usage. Raises msgspec.DecodeError for anything else."""
        row = self._decode(result)
        self.rows += 1
        self.attempts += row.attempts
        if row.attempts > 1:
            self.retries += row.attempts - 1
        # The last attempt of a failed row stands in the row itself; whether `retries` lists it again is left open.
        before_last = row.retries[: max(row.attempts - 1, 0)]
        for retry in before_last:
            self.retries_by_kind[retry.kind] += 1
            self.failed_attempt_tokens.add(retry.usage)
        if row.status == "ok":
            self._answered(row)
        else:
            kind = row.error.kind if row.error is not None else "unknown"
            self.failures[kind] += 1
            self.invalid += kind == INVALID
            if row.attempts:
                self.failed_attempt_tokens.add(row.usage)
        if self._since is None or self._is_new(row.timing.started_at):
            self._new(row)
        return row.usage

    @property
    def durations(self) -> dict[str, Sample]:
        """The sample of each duration, over the answered rows."""
        self._gather()
        return self._durations

    def _gather(self) -> None:
        columns = zip(*self._waiting, strict=True)
        for sample, column in zip(self._durations.values(), columns, strict=False):
            sample.add_all(column)
        self._waiting.clear()

    def _answered(self, row: _Row) -> None:
        self.ok += 1
        self.models[row.model] += 1
        self.finish_reasons[row.finish_reason] += 1
        self.tokens.add(row.usage)
        timing, usage = row.timing, row.usage
        self._waiting.append(_metrics_of(timing))
        if len(self._waiting) >= _GATHERED:
            self._gather()
        if timing.chunks == 1 and usage is not None and (usage.completion_tokens or 0) > 1:
            self.one_event += 1
        said = row.text or row.reasoning or row.refusal or row.tool_calls
        # Audio and legacy function calls are answers as well; they stand in the choice's extra fields.
        if not said and not (row.extra or {}).get("choice"):
            self.empty += 1

    def _is_new(self, started_at: str | None) -> bool:
        return started_at is not None and self._since is not None and datetime.fromisoformat(started_at) >= self._since

    def _new(self, row: _Row) -> None:
        self.new_rows += 1
        if row.status == "ok":
            self.new_ok += 1
            if row.usage is not None:
                self.new_completion_tokens += row.usage.completion_tokens or 0
                self.new_total_tokens += total_tokens(row.usage) or 0


def summary(tally: Tally, run: Run, evidence: Evidence | None = None, limits: LimitFigures | None = None) -> Summary:
    """The figures of everything counted so far; `limits` as the run knows them."""
    typical = tally.durations["ttft_s"].percentile(0.5)
    judged, reasons = verdict(evidence, typical) if evidence is not None else (None, [])
    finished = tally.finish_reasons
    # The name of a file may hold bytes that are no text (as lone surrogates); JSON cannot.
    facts = msgspec.structs.asdict(run)
    readable = {
        name: value.encode(errors="replace").decode() for name, value in facts.items() if isinstance(value, str)
    }
    return Summary(
        run=msgspec.structs.replace(run, **readable),
        rows=Rows(total=tally.rows, ok=tally.ok, failed=tally.rows - tally.ok, invalid=tally.invalid),
        failures=_largest_first(tally.failures),
        attempts=Attempts(tally.attempts, tally.retries, _largest_first(tally.retries_by_kind)),
        suspects=Suspects(
            empty=tally.empty,
            length=sum(finished[reason] for reason in _CUT_BY_LENGTH),
            content_filter=sum(finished[reason] for reason in _CUT_BY_FILTER),
            no_finish_reason=finished[None],
            one_event=tally.one_event,
        ),
        finish_reasons=_largest_first(finished),
        models=_largest_first(tally.models),
        tokens=msgspec.structs.replace(tally.tokens),
        failed_attempt_tokens=msgspec.structs.replace(tally.failed_attempt_tokens),
        throughput=_throughput(tally, run.elapsed_s),
        limits=limits,
        metrics={name: distribution(DEFINITIONS[name], sample) for name, sample in tally.durations.items()},
        evidence=evidence,
        verdict=judged,
        verdict_reasons=reasons,
    )


def total_tokens(usage: Usage) -> int | None:
    """As the endpoint said, else prompt + completion (Anthropic's API names no total), else None."""
    if usage.total_tokens is not None:
        return usage.total_tokens
    if usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    return usage.prompt_tokens + usage.completion_tokens


def _throughput(tally: Tally, elapsed_s: float | None) -> Throughput:
    def per_second(count: int) -> float | None:
        return round(count / elapsed_s, 3) if elapsed_s else None

    return Throughput(
        rows=tally.new_rows,
        ok=tally.new_ok,
        rows_per_s=per_second(tally.new_rows),
        completion_tokens_per_s=None if tally.tokens.completion is None else per_second(tally.new_completion_tokens),
        total_tokens_per_s=None if tally.tokens.total is None else per_second(tally.new_total_tokens),
    )


def distribution(definition: str, sample: Sample) -> Distribution:
    """The figures of one sample of durations."""
    refused = {label: why for label, q in PERCENTILES.items() if (why := sample.refused(q)) is not None}
    intervals = {label: found for label, q in PERCENTILES.items() if (found := sample.interval(q)) is not None}
    values = {label: sample.percentile(q) for label, q in PERCENTILES.items()}
    return Distribution(
        definition=definition,
        n=sample.n,
        mean=sample.mean,
        min=sample.min,
        max=sample.max,
        intervals=intervals,
        refused=refused,
        **values,
    )


def _largest_first(counts: Counter[str] | Counter[str | None]) -> dict[str, int]:
    """By falling count, then by name; what was not said (None) is counted elsewhere."""
    named = [(name, count) for name, count in counts.items() if name is not None]
    return dict(sorted(named, key=lambda item: (-item[1], item[0])))
