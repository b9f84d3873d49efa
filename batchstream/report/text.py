"""A `Summary` for people (terminal, Markdown) and for programs (JSON).

Plain string formatting: the same lines with and without colour, nothing to import. What both texts say is written once,
as labelled sentences (`_facts`) and a table of durations (`_Table`); the two renderers only lay them out.

Names of models, finish reasons and endpoints come from the other side of the wire, so control characters are taken out
of them: a model called "\\x1b[2J" must not clear the screen.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from batchstream.figures.evidence import Evidence
from batchstream.figures.percentiles import needed_for
from batchstream.figures.summary import PERCENTILES, Distribution, Summary, TokenSums

_LABEL = 10  # columns of the label at the left of the terminal's lines
_CELL = 8
_BOLD, _DIM, _RED, _GREEN, _YELLOW = "1", "2", "31", "32", "33"
_COLOURS = {"Failures": _RED, "Stopped": _RED, "Suspects": _YELLOW, "degraded": _YELLOW, "trusted": _GREEN}

# What goes first when the terminal is too narrow for all of it.
_DISPENSABLE = ("p99.9", "mean", "p95", "p90", "n")

_HOLD = "\N{NO-BREAK SPACE}"  # between words of one item, until lines are broken

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render_summary(summary: Summary, width: int = 80, color: bool = False) -> str:
    """The summary as lines for a terminal of `width` columns, ending in a newline; ANSI colours only with `color`."""
    lines: list[str] = []
    for label, sentences in _facts(summary):
        lines += _fact_lines(label, sentences, width, color)
    table = _Table(summary)
    if table.rows:
        lines += ["", *_table_lines(table, summary, width, color), ""]
    for label, sentences in _closing(summary):
        lines += _fact_lines(label, sentences, width, color)
    return "\n".join(lines) + "\n"


def render_markdown(summary: Summary) -> str:
    """The summary as Markdown: a list of facts, a table of durations and their definitions."""
    lines = [_md_item(label, sentences) for label, sentences in _facts(summary)]
    table = _Table(summary)
    if table.rows:
        names = table.columns
        lines += ["", _heading(summary), ""]
        lines += [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
        lines += [f"| {label} ({unit}) | {' | '.join(cells.values())} |" for label, unit, cells in table.rows]
        lines += ["", *(f"- `{name}`: {_md(text)}" for name, text in table.definitions)]
        if (note := _refusals(table)) is not None:
            lines += ["", note]
    closing = [_md_item(label, sentences) for label, sentences in _closing(summary)]
    return "\n".join([*lines, "", *closing]) + "\n"


def summary_json(summary: Summary) -> bytes:
    """`OUT.summary.json`: UTF-8, indented, fields in the order of `Summary`, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"


def clean(text: str) -> str:
    """Foreign text without the characters that could steer a terminal or turn the direction of a line."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(counts: Mapping[str, int]) -> str:
    """``{"timeout": 6, "server": 4}`` as "6 timeout · 4 server"."""
    return _listed(f"{count:,} {clean(name)}" for name, count in counts.items()).replace(_HOLD, " ")


def _facts(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    """Label and sentences of everything but durations and closing lines, in the order of showing."""
    run, rows, suspects = summary.run, summary.rows, summary.suspects
    failed = f"{rows.failed:,} failed" + (f" ({_percent(rows.failed, rows.total)})" if rows.failed else "")
    more = _nonzero(
        (run.pending or 0, "still to do"),
        (rows.invalid, "of the failed invalid, not sent"),
        (run.skipped, "invalid rows skipped"),
        (run.resumed, "done by earlier runs"),
        (run.unanswered, "asked, no answer yet (in flight or cut)"),
        (run.asked_again, "asked again (in flight when a run ended)"),
        (run.duplicates, "second results of a row left out"),
    )
    yield "Rows", [_listed([f"{rows.total:,} done", f"{rows.ok:,} ok", failed]), *([more] if more else [])]
    if run.stop:
        yield "Stopped", [clean(run.stop)]
    if summary.failures:
        yield "Failures", [_nonzero(*_pairs(summary.failures))]
    attempts = summary.attempts
    requests = f"{attempts.total:,}, of them {attempts.retries:,} retries"
    if attempts.retries:
        requests += f" after {_nonzero(*_pairs(attempts.retries_by_kind))}"
    if run.stop and run.requests is not None:  # also those of rows that stay pending
        requests += f"; {run.requests:,} sent in this run"
    yield "Requests", [requests]
    doubtful = _nonzero(
        (suspects.empty, "empty"),
        (suspects.length, "cut by the token limit"),
        (suspects.content_filter, "cut by a filter"),
        (suspects.no_finish_reason, "without finish reason"),
        (suspects.one_event, "in a single event (buffered on the way: no true TPOT)"),
    )
    if doubtful:
        yield "Suspects", [f"among the answers: {doubtful}"]
    if summary.finish_reasons:
        yield "Finish", [_nonzero(*_pairs(summary.finish_reasons))]
    if rows.ok:
        yield "Tokens", list(_tokens(summary.tokens, summary.failed_attempt_tokens))
    if (speed := _speed(summary)) is not None:
        yield "Speed", [speed]
    if (limits := _limits(summary)) is not None:
        yield "Limits", limits
    where = [clean(part) for part in (", ".join(summary.models) or run.model, run.endpoint) if part]
    if where:
        yield "Model", [" at ".join(where)]


def _tokens(answers: TokenSums, failed: TokenSums) -> Iterator[str]:
    sums = _sums(answers)
    if sums:
        yield sums
    if answers.without_usage:
        yield f"answers without usage, not in these sums: {answers.without_usage:,}"
    if lost := _sums(failed):
        yield f"failed attempts, as far as known: {lost}"


def _sums(tokens: TokenSums) -> str:
    """Sums that were said; of the last two only what there is, for most endpoints always say 0."""
    told = {"prompt": tokens.prompt, "completion": tokens.completion, "total": tokens.total}
    known = [f"{count:,} {name}" for name, count in told.items() if count is not None]
    shares = {"cached": tokens.cached, "reasoning": tokens.reasoning}
    return _listed([*known, *(f"{count:,} {name}" for name, count in shares.items() if count)])


def _speed(summary: Summary) -> str | None:
    speed, elapsed_s = summary.throughput, summary.run.elapsed_s
    if speed.rows_per_s is None or elapsed_s is None or not speed.rows:
        return None
    rates = [f"{rate(speed.rows_per_s)} rows/s"]
    if speed.completion_tokens_per_s is not None:
        rates.append(f"{rate(speed.completion_tokens_per_s)} completion tokens/s")
    if speed.total_tokens_per_s is not None:
        rates.append(f"{rate(speed.total_tokens_per_s)} tokens/s")
    return _listed([*rates, f"{speed.rows:,} rows in {duration(elapsed_s)}"])


_HELD_BY = {
    "slots": "slots", "rpm": "requests a minute", "tpm": "tokens a minute", "gate": "429s", "outage": "an outage",
    "retry": "retries", "held": "the budget",
}  # fmt: skip


def _limits(summary: Summary) -> list[str] | None:
    """What the rows waited for, the refusals, the path of the concurrency, the cost."""
    limits = summary.limits
    if limits is None:
        return None
    whole = sum(limits.held_s.values())
    shares = [
        f"{_HELD_BY[name]} {_percent(round(seconds * 1000), round(whole * 1000))}"
        for name, seconds in sorted(limits.held_s.items(), key=lambda item: -item[1])
        if name in _HELD_BY and seconds >= 0.001 * whole > 0
    ]
    parts = [f"share of the time held up by {_listed(shares)}"] if shares else []
    if limits.refused:
        parts.append(f"{limits.refused:,} refused (429)")
    if limits.adaptive and limits.levels:
        highest = max(level for _, level in limits.levels)
        parts.append(f"concurrency: began at {limits.levels[0][1]}, adaptive at {limits.slots}, highest {highest}")
    if limits.cost is not None:
        parts.append(f"cost {limits.cost:.6g}, all runs of this job together")
    return parts or None


def _closing(summary: Summary) -> Iterator[tuple[str, list[str]]]:
    seen = _seen(summary.evidence) if summary.evidence is not None else []
    if summary.verdict == "trusted":
        yield "Client", ["trusted: the figures are the endpoint's, not this machine's", *seen]
    elif summary.verdict is not None:
        yield "Client", [f"degraded: {summary.verdict_reasons[0]}", *summary.verdict_reasons[1:], *seen]
    if summary.run.output and not summary.run.pending and summary.run.stop is None:
        yield "Results", [clean(summary.run.output).replace(" ", _HOLD)]
    if summary.run.journal:
        yield "Journal", [clean(summary.run.journal).replace(" ", _HOLD)]


def _seen(evidence: Evidence) -> list[str]:
    """What the client saw of itself, on one line."""
    told = []
    if evidence.loop_lag_p99_s is not None:
        told.append(f"loop {evidence.loop_lag_p99_s * 1e3:.1f} ms late at p99")
    if evidence.cpu_share is not None:
        told.append(f"{evidence.cpu_share:.0%} of a core")
    if evidence.gc_pause_max_s:
        told.append(f"longest garbage collection {evidence.gc_pause_max_s * 1e3:.1f} ms")
    if evidence.reads and evidence.events is not None:
        told.append(f"{evidence.events / evidence.reads:.1f} events a read")
    if evidence.connections and evidence.connection_wait_max_s is not None:
        told.append(
            f"{evidence.connections:,} connections (longest wait {evidence.connection_wait_max_s * 1e3:.1f} ms)"
        )
    return [_listed(told)] if told else []


class _Table:
    """The durations that have values: rows of (name, unit, cells by column), every cell as text."""

    def __init__(self, summary: Summary) -> None:
        shown = {name: figures for name, figures in summary.metrics.items() if figures.n}
        self.columns = ("n", "p50", "p90", "p95", "p99", "p99.9", "max", "mean")
        self.rows = [(name.removesuffix("_s"), *_cells(figures)) for name, figures in shown.items()]
        self.definitions = [(name.removesuffix("_s"), figures.definition) for name, figures in shown.items()]
        self.refused = [label for label in PERCENTILES if any(label in figures.refused for figures in shown.values())]


def _cells(figures: Distribution) -> tuple[str, dict[str, str]]:
    """The unit that suits the median, and the cells in it with three significant digits of the median."""
    typical = figures.p50 or 0.0
    unit, scale = ("s", 1.0) if typical >= 1.0 else ("ms", 1e3)
    typical *= scale
    digits = 0 if typical >= 100 else 1 if typical >= 10 else 2 if typical >= 0.1 or not typical else 3

    def cell(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds * scale:,.{digits}f}"

    values = {"p50": figures.p50, "p90": figures.p90, "p95": figures.p95, "p99": figures.p99, "p99.9": figures.p99_9}
    cells = {label: cell(value) for label, value in values.items()}
    return unit, {"n": f"{figures.n:,}", **cells, "max": cell(figures.max), "mean": cell(figures.mean)}


def _table_lines(table: _Table, summary: Summary, width: int, color: bool) -> Iterator[str]:
    columns = {
        name: max(_CELL, 2 + max(len(cells[name]) for _, _, cells in table.rows)) for name in table.columns
    }  # column → its width
    for name in _DISPENSABLE:
        if _LABEL + sum(columns.values()) > width:
            del columns[name]
    heads = "".join(f"{name:>{cell}}" for name, cell in columns.items())
    yield from textwrap.wrap(_heading(summary), width)
    yield _paint(_DIM, " " * _LABEL + heads, color)
    for label, unit, cells in table.rows:
        yield f"{label:<{_LABEL - 3}}{unit:>3}" + "".join(f"{cells[name]:>{cell}}" for name, cell in columns.items())
    if (note := _refusals(table)) is not None:
        yield from (_paint(_DIM, line, color) for line in textwrap.wrap(note, width))
    indent = " " * _LABEL
    for name, definition in [("sent", "just before the request is written"), *table.definitions]:
        label = f"{name:<{_LABEL}}"
        for line in textwrap.wrap(definition, max(width, 40), initial_indent=label, subsequent_indent=indent):
            yield _paint(_DIM, line, color)


def _heading(summary: Summary) -> str:
    failed = f"; the {summary.rows.failed:,} failed are not among them" if summary.rows.failed else ""
    return f"Durations of the {summary.rows.ok:,} answered rows{failed}"


def _refusals(table: _Table) -> str | None:
    if not table.refused:
        return None
    asked = [f"{label.replace('_', '.')} needs {needed_for(PERCENTILES[label]):,}" for label in table.refused]
    return f"– too few values: {', '.join(asked)}"


def _nonzero(*counts: tuple[int, str]) -> str:
    return _listed(f"{count:,} {name}" for count, name in counts if count)


def _pairs(counts: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    return ((count, clean(name)) for name, count in counts.items())


def _listed(items: Iterable[str]) -> str:
    """Items with dots between; lines break between items only, and after the dot."""
    return f"{_HOLD}· ".join(item.replace(" ", _HOLD) for item in items)


def _percent(part: int, whole: int) -> str:
    """Never "0 %" for something and never "100 %" for less than all."""
    if part == whole:
        return "100 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def rate(per_second: float) -> str:
    """ "0.031", "46.9", "2,770": three digits, or all before the point."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def duration(seconds: float) -> str:
    """ "8.2 s", "4 min 05 s", "3 h 20 min", "2 d 03 h"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, part_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part:02d} {part_name}"
    return f"{whole} s"


def _fact_lines(label: str, sentences: list[str], width: int, color: bool) -> Iterator[str]:
    """The label bold at the left, each sentence from a line of its own, in the colour of its news if it has one.

    What has no blank is not broken, so that a path can be copied.
    """
    head = _paint(_BOLD, f"{label:<{_LABEL}}", color)
    code = _COLOURS.get(label) or _COLOURS.get(sentences[0].partition(":")[0])
    for sentence in sentences:
        room = max(width - _LABEL, 20)
        for line in textwrap.wrap(sentence, room, break_on_hyphens=False, break_long_words=False):
            line = line.replace(_HOLD, " ")
            yield head + (_paint(code, line, color) if code else line)
            head = " " * _LABEL


def _md_item(label: str, sentences: list[str]) -> str:
    return f"- **{label}**: {_md('; '.join(sentences).replace(_HOLD, ' '))}"


def _md(text: str) -> str:
    """Keep names from the other side from being markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def _paint(code: str, text: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
