"""A `BenchSummary` for people: one line a stage, the objectives, the verdict. Plain text and Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

import msgspec

from batchstream.figures.stages import FROM_DUE, BenchSummary, Stage
from batchstream.figures.summary import Distribution
from batchstream.report.text import clean, rate

_DEFINITIONS = (
    ("sent", "just before the request is written"),
    ("due", "when the schedule wanted it to leave (closed loop: when a slot was free)"),
    ("ttft", "sent → first text, reasoning, refusal or tool-call fragment"),
    ("ttft due", FROM_DUE["ttft_sched_s"][1]),
    ("latency", "sent → last generated output"),
    ("tpot", "(latency − TTFT) / (completion tokens − 1)"),
)


def render_bench(figures: BenchSummary, width: int = 100) -> str:
    """The measurement as lines for a terminal, ending in a newline."""
    head, rows = _table(figures.stages)
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    lines = ["  ".join(f"{cell:>{size}}" if place else f"{cell:<{size}}" for place, (cell, size) in
                       enumerate(zip(row, widths, strict=True))).rstrip() for row in (head, *rows)]  # fmt: skip
    lines.append("durations in ms; – is too few values for that percentile, or nothing to measure it by")
    lines += [f"{name:<9} {text}" for name, text in _DEFINITIONS]
    lines += ["", *(line for text in _closing(figures) for line in textwrap.wrap(clean(text), width))]
    return "\n".join(lines) + "\n"


def render_bench_markdown(figures: BenchSummary) -> str:
    """The same as Markdown."""
    head, rows = _table(figures.stages)
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1), *(f"| {' | '.join(row)} |" for row in rows)]
    lines += ["", "Durations in ms.", "", *(f"- `{name}`: {text}" for name, text in _DEFINITIONS)]
    return "\n".join([*lines, "", *(f"- {clean(text)}" for text in _closing(figures))]) + "\n"


def bench_json(figures: BenchSummary) -> bytes:
    """`OUT.summary.json` of a measurement: UTF-8, indented, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n"


def _table(stages: list[Stage]) -> tuple[list[str], list[list[str]]]:
    slo = any(stage.goodput is not None for stage in stages)
    head = ["load", "asked", "failed", "req/s", "tok/s", "ttft p50", "p99", "ttft due p50", "p99", "tpot p50",
            "latency p50", "p99"]  # fmt: skip
    return head + (["met", "goodput/s"] if slo else []), [_cells(stage, slo) for stage in stages]


def _cells(stage: Stage, slo: bool) -> list[str]:
    figures, metrics = stage.summary, stage.summary.metrics
    due = stage.sched.get("ttft_sched_s")
    name = stage.name + (f" #{stage.repeat + 1}" if stage.repeat else "")
    cells = [
        name,
        f"{figures.rows.total:,}",
        f"{figures.rows.failed:,}",
        _number(stage.requests_per_s),
        _number(figures.throughput.completion_tokens_per_s),
        *_two(metrics.get("ttft_s")),
        *_two(due),
        _ms(metrics["tpot_s"].p50 if "tpot_s" in metrics else None),
        *_two(metrics.get("latency_s")),
    ]
    if slo:
        good = stage.goodput
        cells += ["–", "–"] if good is None else [f"{good.attainment:.1%}", _number(good.per_second)]
    return cells


def _two(figures: Distribution | None) -> tuple[str, str]:
    return (_ms(figures.p50), _ms(figures.p99)) if figures is not None else ("–", "–")


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else rate(value)


def _closing(figures: BenchSummary) -> Iterator[str]:
    yield from _failures(figures.stages)
    slo = next((stage.goodput.slo for stage in figures.stages if stage.goodput is not None), None)
    if slo:
        yield "Objectives: " + ", ".join(f"{name} ≤ {limit:g} s" for name, limit in slo.items())
    if figures.found is not None:
        yield f"The highest level that met them: {figures.found:g}"
    slips = [stage.slip_p99_s for stage in figures.stages if stage.slip_p99_s is not None]
    if slips:
        yield f"Schedule: requests left at most {max(slips) * 1e3:.2f} ms late at p99 (due → their turn)"
    if figures.verdict == "trusted":
        yield "Client: trusted, the figures are the endpoint's, not this machine's"
    elif figures.verdict is not None:
        yield "Client: degraded: " + "; ".join(figures.verdict_reasons)
    if figures.run.output and figures.run.stop is None:
        yield f"Results: {figures.run.output}"


def _failures(stages: Iterable[Stage]) -> Iterator[str]:
    for stage in stages:
        if stage.summary.failures:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in stage.summary.failures.items())
            yield f"Failed at {stage.name}: {kinds}; they are in no percentile (summary: `adjusted` counts them in)"
