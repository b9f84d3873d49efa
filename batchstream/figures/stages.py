"""The figures of a measurement (`batchstream bench`): one `Stage` for each load, folded from the rows it asked.

Rules: every latency is given from `sent` and from `due` (`*_sched_s`), so that a stalled endpoint cannot hide behind
requests that left late; failed requests improve no percentile: `adjusted` counts them as infinitely slow; warm-up rows
are asked and stored, and are in no figure. Throughput is over the seconds from the first measured request to the end
of the last answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import msgspec

from batchstream.figures.evidence import Evidence, Verdict
from batchstream.figures.percentiles import Sample
from batchstream.figures.summary import PERCENTILES, Distribution, Run, Summary, Tally, distribution, summary
from batchstream.policy.arrivals import Load
from batchstream.records import Latencies, Usage

SCHEMA = "batchstream.bench/1"
"""Changes when a field changes its meaning or goes; new fields may come without notice."""

FROM_DUE = {
    "ttft_sched_s": ("ttft_s", "due → first text, reasoning, refusal or tool-call fragment"),
    "latency_sched_s": ("latency_s", "due → last generated output"),
    "total_sched_s": ("total_s", "due → end of the stream"),
}
"""Field → the duration from `sent` that it lengthens by `queue_s`, and its definition."""

SLO_METRICS = ("ttft", "ttfo", "tpot", "latency", "total", "gap_max")

POINTS = 120
"""Points of a timeline at most."""


class Goodput(msgspec.Struct, frozen=True):
    """`met` of `asked` requests met every objective of `slo` (seconds by metric; a failed one meets none): a share of
    `attainment`, `per_second` over the stage. In an open loop objectives are held against the durations from `due`."""

    slo: dict[str, float]
    asked: int
    met: int
    attainment: float
    per_second: float | None


class Point(msgspec.Struct, frozen=True):
    """A slice of the stage, `at` seconds after its begin: requests sent, ended and failed in it, those in flight at its
    end, the median TTFT of those sent in it, completion tokens of those that ended in it a second."""

    at: float
    sent: int
    ended: int
    failed: int
    in_flight: int
    ttft_p50_s: float | None
    tokens_per_s: float


class Stage(msgspec.Struct, kw_only=True):
    """One load, measured once. `rows`: ordinals of the results [first, end), the first `warmup` of them in no figure;
    `scheduled`: requests that were due (None in a closed loop); `slip_p99_s`: how late they left, due → their turn;
    `seconds`: first measured request sent → last answer ended."""

    name: str
    load: Load
    repeat: int = 0
    endpoint: str | None = None
    model: str | None = None
    rows: tuple[int, int] = (0, 0)
    warmup: int = 0
    started_at: str | None = None
    seconds: float | None = None
    scheduled: int | None = None
    slip_p99_s: float | None = None
    requests_per_s: float | None = None
    tokens_per_s_per_user: Distribution | None = None
    summary: Summary
    sched: dict[str, Distribution] = {}
    adjusted: dict[str, dict[str, float | None]] = {}
    goodput: Goodput | None = None
    timeline: list[Point] = []


class BenchSummary(msgspec.Struct, kw_only=True):
    """All stages of a measurement in the order they were run; `verdict` is the worst of theirs. `found`: the highest
    level that met the objectives, where that was looked for."""

    schema: str = SCHEMA
    run: Run
    stages: list[Stage]
    verdict: Verdict | None = None
    verdict_reasons: list[str] = []
    found: float | None = None
    environment: dict[str, str] = {}


class _Error(msgspec.Struct):
    kind: str


class _Row(msgspec.Struct):
    row: int
    status: str
    timing: Latencies = Latencies()
    usage: Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Row).decode


class _Span(msgspec.Struct):
    """One request on the time line: seconds since the first, None for what was never sent."""

    sent: float
    ended: float
    ok: bool
    ttft: float | None
    tokens: int


def fold(stage: Stage, results: Iterable[tuple[int, bytes]], slo: dict[str, float], evidence: Evidence | None) -> Stage:
    """`stage` with its figures, from the results of its rows (others are passed over). `summary` is replaced."""
    tally = Tally()
    spans: list[_Span] = []
    sched = {name: Sample() for name in FROM_DUE}
    speeds = Sample()
    met = asked = failed = 0
    first = stage.rows[0] + stage.warmup
    origin: datetime | None = None
    open_loop = stage.load.arrival != "closed"
    for number, data in results:
        if not first <= number < stage.rows[1]:
            continue
        tally.add(data)
        row = _decode(data)
        asked += 1
        failed += row.status != "ok"
        met += bool(slo) and _meets(row, slo, open_loop)
        if row.status == "ok":
            _add_sched(sched, row.timing)
            if row.timing.tpot_s:
                speeds.add(1.0 / row.timing.tpot_s)
        if row.timing.started_at is not None:
            at = datetime.fromisoformat(row.timing.started_at)
            origin = origin or at
            spans.append(_span(row, (at - origin).total_seconds()))
    begin = min((span.sent for span in spans), default=0.0)
    seconds = max((span.ended for span in spans), default=0.0) - begin
    elapsed = round(seconds, 6) if spans else None
    facts = msgspec.structs.replace(stage.summary.run, elapsed_s=elapsed)
    figures = summary(tally, facts, evidence)
    per_second = round(tally.ok / seconds, 3) if seconds > 0 else None
    return msgspec.structs.replace(
        stage,
        seconds=elapsed,
        requests_per_s=per_second,
        summary=figures,
        sched={name: distribution(FROM_DUE[name][1], sample) for name, sample in sched.items()},
        adjusted={
            name: _adjusted(sample, failed)
            for name, sample in (("ttft_sched_s", sched["ttft_sched_s"]), ("latency_sched_s", sched["latency_sched_s"]))
        },
        tokens_per_s_per_user=distribution("1 / TPOT, tokens a second for one user", speeds) if speeds.n else None,
        goodput=Goodput(
            slo, asked, met, met / asked if asked else 0.0, round(met / seconds, 3) if seconds > 0 else None
        )
        if slo
        else None,
        timeline=_timeline(spans, begin, seconds),
    )


def _meets(row: _Row, slo: dict[str, float], open_loop: bool) -> bool:
    if row.status != "ok":
        return False
    for name, limit in slo.items():
        value = getattr(row.timing, f"{name}_s")
        if value is None:
            return False
        if open_loop and name in ("ttft", "ttfo", "latency", "total"):
            value += row.timing.queue_s or 0.0
        if value > limit:
            return False
    return True


def _add_sched(sched: dict[str, Sample], timing: Latencies) -> None:
    for name, (base, _) in FROM_DUE.items():
        value = getattr(timing, base)
        if value is not None:
            sched[name].add(value + (timing.queue_s or 0.0))


def _span(row: _Row, at: float) -> _Span:
    tokens = row.usage.completion_tokens if row.usage is not None else None
    ttft = row.timing.ttft_s if row.status == "ok" else None
    return _Span(at, at + (row.timing.total_s or 0.0), row.status == "ok", ttft, tokens or 0)


def _adjusted(sample: Sample, failed: int) -> dict[str, float | None]:
    """Percentiles of a sample in which each failed request took for ever; None where that is the answer, or where the
    sample is too small."""
    n = sample.n + failed
    found: dict[str, float | None] = {}
    for label, q in PERCENTILES.items():
        place = (n - 1) * q if n else 0.0
        within = n > 0 and place <= sample.n - 1
        # The same order statistics among fewer: the q-quantile of all is a smaller one's of those that answered.
        found[label] = sample.percentile(place / (sample.n - 1)) if within and sample.n > 1 else None
    return found


def _timeline(spans: list[_Span], begin: float, seconds: float) -> list[Point]:
    if not spans or seconds <= 0:
        return []
    width = max(seconds / POINTS, 0.1)
    count = int(seconds / width) + 1
    sent, ended, failed, tokens = [0] * count, [0] * count, [0] * count, [0] * count
    ttft: list[Sample] = [Sample() for _ in range(count)]
    for span in spans:
        start = min(int((span.sent - begin) / width), count - 1)
        end = min(int((span.ended - begin) / width), count - 1)
        sent[start] += 1
        ended[end] += 1
        failed[end] += not span.ok
        tokens[end] += span.tokens
        ttft[start].add(span.ttft)
    points, in_flight = [], 0
    for slot in range(count):
        in_flight += sent[slot] - ended[slot]
        points.append(
            Point(
                round((slot + 1) * width, 3),
                sent[slot],
                ended[slot],
                failed[slot],
                in_flight,
                ttft[slot].percentile(0.5) if ttft[slot].n else None,
                round(tokens[slot] / width, 3),
            )
        )
    return points
