"""Two runs compared: differences with confidence intervals, and conditions that a monitor or a CI fails by.

A difference of two percentiles lies, with 95 % confidence, between the differences of the far ends of their own
intervals, each taken at the square root of 95 % (the runs are independent): distribution-free, and rather too wide than
too narrow. Where the rows of both runs are the same ones, the median of the differences row by row says more: its
interval is the sign test's. A share of failures has Newcombe's interval (Newcombe 1998, method 10). What holds zero
is "no difference shown"; that is not "equal".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from batchstream.figures.percentiles import CONFIDENCE, Sample, interval_ranks, quantile
from batchstream.figures.summary import METRICS, PERCENTILES
from batchstream.records import Latencies

PAIRED_FROM = 0.9
"""So large a share of the rows must be in both runs, answered, for a comparison row by row."""

PAIRED = ("ttft_s", "tpot_s", "latency_s")

PAIRS_MAX = 200_000
"""Rows beyond which pairs are not looked for: they are kept by row, some 200 bytes each."""

_EACH = math.sqrt(CONFIDENCE)
_Z = 1.959964  # the normal distribution's 97.5 %

Verdict = Literal["lower", "higher", "no difference shown"]


class Side(msgspec.Struct):
    """One of the two runs: durations of the answered rows by metric, and by row for pairs; rows asked and failed."""

    name: str
    samples: dict[str, Sample]
    by_row: dict[str, dict[tuple[int, str], float]]
    rows: int = 0
    failed: int = 0

    def share_failed(self) -> float:
        return self.failed / self.rows if self.rows else 0.0


class Difference(msgspec.Struct, frozen=True):
    """`stat` of `metric` in both runs, in seconds (`failed`: shares); `difference` is b − a, `low` and `high` its 95 %
    interval (None where the samples are too small for one), `relative` the difference by a."""

    metric: str
    stat: str
    a: float | None
    b: float | None
    difference: float | None
    relative: float | None
    low: float | None
    high: float | None
    verdict: Verdict | None


class _Row(msgspec.Struct):
    row: int
    id: str
    status: str
    timing: Latencies = Latencies()


def side(name: str, results: Iterable[bytes]) -> Side:
    """Gather one run from its results (JSON)."""
    found = Side(name, {metric: Sample() for metric in METRICS}, {metric: {} for metric in METRICS})
    decode = msgspec.json.Decoder(_Row).decode
    for data in results:
        row = decode(data)
        found.rows += 1
        if row.status != "ok":
            found.failed += 1
            continue
        for metric in METRICS:
            value = getattr(row.timing, metric)
            if value is not None:
                found.samples[metric].add(value)
                if metric in PAIRED and found.rows <= PAIRS_MAX:
                    found.by_row[metric][row.row, row.id] = value
    return found


def compare(a: Side, b: Side) -> list[Difference]:
    """Every metric and percentile that both runs have values for, then the share of failures."""
    found = []
    for metric in METRICS:
        if not (a.samples[metric].n and b.samples[metric].n):
            continue
        found += [
            _percentile(metric, label, q, a.samples[metric], b.samples[metric]) for label, q in PERCENTILES.items()
        ]
        pairs = metric in PAIRED and max(a.rows, b.rows) <= PAIRS_MAX
        if pairs and (paired := _paired(metric, a.by_row[metric], b.by_row[metric])) is not None:
            found.append(paired)
    return [difference for difference in found if difference.a is not None or difference.stat == "paired"] + [
        _failed(a, b)
    ]


def _percentile(metric: str, label: str, q: float, a: Sample, b: Sample) -> Difference:
    first, second = a.percentile(q), b.percentile(q)
    if first is None or second is None:
        return Difference(metric, label, None, None, None, None, None, None, None)
    ends_a, ends_b = a.interval(q, _EACH), b.interval(q, _EACH)
    low = high = None
    if ends_a is not None and ends_b is not None:
        low, high = ends_b[0] - ends_a[1], ends_b[1] - ends_a[0]
    return _difference(metric, label, first, second, low, high)


def _paired(metric: str, a: Mapping[tuple[int, str], float], b: Mapping[tuple[int, str], float]) -> Difference | None:
    """The median of the differences row by row; None where the runs do not have the same rows."""
    both = a.keys() & b.keys()
    if len(both) < PAIRED_FROM * max(len(a), len(b)):
        return None
    differences = sorted(b[key] - a[key] for key in both)
    ranks = interval_ranks(len(differences), 0.5)
    if ranks is None:
        return None
    middle = quantile(differences, 0.5)
    low, high = differences[ranks[0] - 1], differences[ranks[1] - 1]
    typical = quantile(sorted(a[key] for key in both), 0.5)
    verdict = _verdict(low, high)
    return Difference(metric, "paired", None, None, middle, middle / typical if typical else None, low, high, verdict)


def _failed(a: Side, b: Side) -> Difference:
    first, second = a.share_failed(), b.share_failed()
    (low_a, high_a), (low_b, high_b) = _wilson(a.failed, a.rows), _wilson(b.failed, b.rows)
    difference = second - first
    low = difference - math.hypot(second - low_b, high_a - first)
    high = difference + math.hypot(high_b - second, first - low_a)
    return _difference("failed", "share", first, second, low, high)


def _wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not n:
        return 0.0, 1.0
    share, square = count / n, _Z * _Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _difference(metric: str, stat: str, a: float, b: float, low: float | None, high: float | None) -> Difference:
    return Difference(metric, stat, a, b, b - a, (b - a) / a if a else None, low, high, _verdict(low, high))


def _verdict(low: float | None, high: float | None) -> Verdict | None:
    if low is None or high is None:
        return None
    return "higher" if low > 0.0 else "lower" if high < 0.0 else "no difference shown"


# Conditions


class Condition(msgspec.Struct, frozen=True):
    """``ttft.p95 > +10%``: B against A (`relative`); ``ttft.p99 > 800ms``, ``failed > 1%``: B alone. `limit` is in
    seconds, or a share."""

    text: str
    metric: str
    stat: str
    above: bool
    limit: float
    relative: bool


_CONDITION = re.compile(
    r"\s*(?P<metric>[a-z_]+)(?:\.(?P<stat>[a-z0-9_.]+))?\s*(?P<op>[<>])\s*(?P<sign>[+-]?)(?P<number>[0-9.]+)\s*(?P<unit>%|ms|s)\s*"
)
_STATS = (*PERCENTILES, "max", "mean")


def parse_condition(text: str) -> Condition:
    """Raises ValueError with what was expected and what came."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"expected METRIC.STAT > LIMIT, as 'ttft.p95 > +10%', 'latency.p99 > 2s' or 'failed > 1%', got {text!r}"
        )
    metric, stat = match["metric"], (match["stat"] or "").replace(".", "_")
    metrics = [name.removesuffix("_s") for name in METRICS]
    number, unit, signed = float(match["number"]), match["unit"], match["sign"] != ""
    if metric == "failed":
        if stat or unit != "%" or signed:
            raise ValueError(f"expected a share of the rows, as 'failed > 1%', got {text!r}")
        return Condition(text, metric, "share", match["op"] == ">", number / 100, relative=False)
    if metric not in metrics or stat not in _STATS:
        raise ValueError(f"expected one of {', '.join(metrics)} with .{', .'.join(_STATS)}, got {text!r}")
    if signed != (unit == "%"):
        raise ValueError(f"expected a change as +10% or a limit as 800ms, got {text!r}")
    limit = number / 100 if unit == "%" else number * (1e-3 if unit == "ms" else 1.0)
    return Condition(
        text, metric + "_s", stat, match["op"] == ">", -limit if match["sign"] == "-" else limit, relative=signed
    )


def broken(condition: Condition, a: Side | None, b: Side) -> str | None:
    """How B breaks a condition, or None. Raises ValueError where it cannot be told: too few values, or no A."""
    seen = _stat(condition, b)
    if condition.relative:
        if a is None:
            raise ValueError(f"{condition.text!r} compares two runs, got one")
        base = _stat(condition, a)
        if not base:
            raise ValueError(f"{condition.text!r}: nothing to compare with in {a.name}")
        change = seen / base - 1.0
        hit = change > condition.limit if condition.above else change < condition.limit
        return f"{condition.text}: {seen * 1e3:.1f} ms against {base * 1e3:.1f} ms ({change:+.1%})" if hit else None
    hit = seen > condition.limit if condition.above else seen < condition.limit
    told = f"{seen:.2%}" if condition.metric == "failed" else f"{seen * 1e3:.1f} ms"
    return f"{condition.text}: {told}" if hit else None


def _stat(condition: Condition, of: Side) -> float:
    if condition.metric == "failed":
        return of.share_failed()
    sample = of.samples[condition.metric]
    if condition.stat in PERCENTILES:
        q = PERCENTILES[condition.stat]
        value, why = sample.percentile(q), sample.refused(q)
    else:
        value, why = getattr(sample, condition.stat), "no values"
    if value is None:
        raise ValueError(f"{condition.text!r} cannot be told of {of.name}: {why}")
    return float(value)
