"""A comparison of two runs for people."""

from __future__ import annotations

from batchstream.figures.compare import Difference, Side
from batchstream.report.text import clean


def render_comparison(a: Side, b: Side, differences: list[Difference]) -> str:
    """Lines for a terminal, ending in a newline: each figure in A and B, the difference with its 95 % interval."""
    lines = [
        f"A  {clean(a.name)}: {a.rows:,} rows, {a.failed:,} failed",
        f"B  {clean(b.name)}: {b.rows:,} rows, {b.failed:,} failed",
        "",
    ]
    head = ["", "", "A", "B", "B − A", "95 % interval", "", ""]
    rows = [head, *(_cells(difference) for difference in differences)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    for row in rows:
        cells = [f"{cell:<{size}}" if place in (0, 1, 7) else f"{cell:>{size}}" for place, (cell, size) in
                 enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    shown = [d for d in differences if d.verdict in ("higher", "lower")]
    lines += ["", "durations in ms; paired: the median of the differences row by row"]
    if not shown:
        lines.append("No difference shown: every interval holds zero. (That is not the same as equal.)")
    return "\n".join(lines) + "\n"


def _cells(d: Difference) -> list[str]:
    show = _share if d.metric == "failed" else _ms
    interval = "–" if d.low is None or d.high is None else f"{show(d.low, sign=True)} … {show(d.high, sign=True)}"
    change = "" if d.relative is None or d.metric == "failed" else f"{d.relative:+.1%}"
    name, stat = d.metric.removesuffix("_s"), d.stat.replace("_", ".")
    told = d.verdict or "too few values"
    return [name, stat, show(d.a), show(d.b), show(d.difference, sign=True), interval, change, told]


def _ms(seconds: float | None, *, sign: bool = False) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:{'+' if sign else ''},.1f}"


def _share(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.2%}"
