"""`batchstream report`: the figures of a job, made from its journal, whether it finished, stopped or still runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from batchstream.cli.voice import Voice, columns, emit
from batchstream.errors import UsageError

if TYPE_CHECKING:
    from batchstream.figures.stages import BenchSummary
    from batchstream.figures.summary import Summary

HELP = """Show the figures of the jobs with the results files OUT…, made from their journals.

The jobs may have finished, have been stopped, or run at this moment: nothing is locked or changed. Where a run has left
its OUT.summary.json, times and the client's own evidence are taken from there. What `bench` left is shown by stages.
"""

EXAMPLES = """
batchstream report results.jsonl
batchstream report results.jsonl --format json
batchstream report monday.jsonl tuesday.jsonl --format markdown
batchstream report results.jsonl --format html -o report.html
batchstream report a.jsonl b.jsonl --compare --fail-if 'ttft.p95>+10%'
batchstream report results.jsonl --salvage
"""


@click.command(
    "report",
    help=HELP,
    epilog="\b\nExamples:" + EXAMPLES.rstrip().replace("\n", "\n  "),
)
@click.argument("out", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "markdown", "html"]),
    default="text",
    show_default=True,
    help="json: one object for each OUT; html: one page for one OUT (extra `report`).",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write there and not to stdout.")
@click.option("--include-text", is_flag=True, help="html: show the answers of the slowest requests.")
@click.option("--compare", is_flag=True, help="Compare two OUTs: B against A, with confidence intervals.")
@click.option(
    "--fail-if",
    "conditions",
    multiple=True,
    metavar="CONDITION",
    help="Exit 3 when it holds: 'ttft.p95 > +10%' (B against A), 'latency.p99 > 2s', 'failed > 1%' (the last OUT).",
)
@click.option("--salvage", is_flag=True, help="Pass over damage in a journal and count what is left.")
@click.pass_obj
def command(
    voice: Voice,
    out: tuple[Path, ...],
    style: str,
    output: Path | None,
    include_text: bool,
    compare: bool,
    conditions: tuple[str, ...],
    salvage: bool,
) -> int:
    if style == "html" and len(out) != 1:
        raise UsageError(f"--format html makes one page of one OUT, got {len(out)}")
    if include_text and style != "html":
        raise UsageError("--include-text is of --format html")
    if compare or conditions:
        if compare and len(out) != 2:
            raise UsageError(f"--compare sets two OUTs side by side, got {len(out)}")
        if style not in ("text", "json") or output is not None:
            raise UsageError("--compare and --fail-if give text or json, on stdout")
        return _compared(out, style, voice, conditions, show=compare, salvage=salvage)
    pieces = [_rendered(path, style, voice, salvage=salvage, include_text=include_text) for path in out]
    data = b"" if style == "json" else b"\n"  # text of several is told apart by a blank line
    if output is None:
        emit(data.join(pieces))
    else:
        from batchstream.files import fsio

        fsio.replace_file(fsio.disk, output, data.join(pieces), mode=0o666)
    return 0


def _compared(
    out: tuple[Path, ...], style: str, voice: Voice, conditions: tuple[str, ...], *, show: bool, salvage: bool
) -> int:
    """Show the comparison if that is wanted; 3 when one of `conditions` holds for the last of `out`."""
    from batchstream.figures.compare import broken, compare, parse_condition, side
    from batchstream.report.comparison import render_comparison

    try:
        wanted = [parse_condition(text) for text in conditions]
        sides = [side(str(path), (data for _, data in _rows(path, salvage=salvage))) for path in out[-2:]]
        last, first = sides[-1], sides[0] if len(sides) == 2 else None
        hit = [told for condition in wanted if (told := broken(condition, first, last)) is not None]
    except ValueError as error:
        raise UsageError(f"--fail-if: {error}") from None
    if show and first is not None:
        found = compare(first, last)
        text = render_comparison(first, last, found).encode()
        emit(text if style == "text" else msgspec.json.encode(found) + b"\n")
    for told in hit:
        voice.error(told, 3)
    return 3 if hit else 0


def _rendered(path: Path, style: str, voice: Voice, *, salvage: bool, include_text: bool) -> bytes:
    from batchstream.report.stages import bench_json, render_bench, render_bench_markdown
    from batchstream.report.text import render_markdown, render_summary, summary_json

    measured = _measured(path)
    if style == "html":
        from batchstream.report.html import render_html

        shown = measured or figures_of(path, voice, salvage=salvage)
        page = render_html(shown, list(_rows(path, salvage=salvage)), path.name, include_text=include_text)
        return voice.redact(page).encode()
    if measured is not None:
        if style == "json":
            return bench_json(measured)
        return (render_bench_markdown if style == "markdown" else render_bench)(measured).encode()
    figures = figures_of(path, voice, salvage=salvage)
    if style == "json":
        return summary_json(figures)
    if style == "markdown":
        return render_markdown(figures).encode()
    return render_summary(figures, columns(sys.stdout), voice.colour and sys.stdout.isatty()).encode()


def _rows(out: Path, *, salvage: bool) -> Iterator[tuple[int, bytes]]:
    """Ordinal and result of every row, from the journal or else from the results file."""
    from batchstream.files.lock import journal_path
    from batchstream.files.results import read_journal, read_results

    directory = out if out.is_dir() else journal_path(out)
    if directory.is_dir():
        yield from read_journal(directory, salvage=salvage).results()
    else:
        for line in read_results(out):
            yield msgspec.json.decode(line, type=_Ordinal).row, line


class _Ordinal(msgspec.Struct):
    row: int


def figures_of(out: Path, voice: Voice, *, salvage: bool = False) -> Summary:
    """Count what the journal of `out` holds (without one: the results file itself).

    Raises InputError when there is neither, DamagedError unless `salvage`.
    """
    from batchstream.figures.summary import Run, Tally, summary
    from batchstream.files.lock import journal_path
    from batchstream.files.results import read_journal, read_results

    directory = out if out.is_dir() else journal_path(out)
    left = _left_by_a_run(directory)
    tally = Tally(since=left.run.started_at if left is not None else None)
    facts = Run(output=str(out) if out.is_file() else None)
    rows: Iterable[bytes]
    if directory.is_dir():
        stored = read_journal(directory, salvage=salvage)
        rows = (line for _, line in stored.results())
        facts = msgspec.structs.replace(
            facts, journal=str(directory), unanswered=stored.asked_again, duplicates=stored.duplicates
        )
        _tell_state(directory, stored.skipped_records, voice)
    else:
        rows = read_results(out)
    for row in rows:
        tally.add(row)
    if left is None or (left.rows.ok, left.rows.failed) != (tally.ok, tally.rows - tally.ok):
        return summary(tally, facts)
    # The run that knew the clock has counted the same rows.
    there = {name: value for name in ("output", "journal") if (value := getattr(facts, name)) is not None}
    return summary(tally, msgspec.structs.replace(left.run, **there), left.evidence, left.limits)


def _measured(out: Path) -> BenchSummary | None:
    """The figures that `bench` left beside its results; None for the results of a run."""
    from batchstream.figures.stages import SCHEMA, BenchSummary

    name = out.name.removesuffix(".journal")
    try:
        data = out.with_name(f"{name}.summary.json").read_bytes()
        if SCHEMA.encode() not in data[:200]:
            return None
        return msgspec.json.decode(data, type=BenchSummary)
    except (OSError, msgspec.DecodeError):
        return None


def _left_by_a_run(directory: Path) -> Summary | None:
    """OUT.summary.json beside a journal OUT.journal; None where there is none of this version."""
    from batchstream.figures.summary import SCHEMA, Summary

    path = directory.with_name(directory.name.removesuffix(".journal") + ".summary.json")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Summary)
    except (OSError, msgspec.DecodeError):
        return None  # it only adds to what the journal says
    return found if found.schema == SCHEMA else None


def _tell_state(directory: Path, skipped: int, voice: Voice) -> None:
    from batchstream.files.lock import holder
    from batchstream.files.manifest import load_final

    if (by := holder(directory)) is not None:
        voice.note(f"{directory}: still running ({by}); these are the figures so far")
    elif load_final(directory) is None:
        voice.note(f"{directory}: {_unfinished(directory)}")
    if skipped:
        voice.warning(f"{directory}: {skipped:,} damaged records were passed over")


def _unfinished(directory: Path) -> str:
    from batchstream.files.lock import shards_in
    from batchstream.files.manifest import load_final

    shards = shards_in(directory)
    if not shards:
        return "not finished; the same command resumes it"
    done = sum(load_final(path) is not None for path in shards.values())
    return (
        f"{done} of {max(shard.of for shard in shards)} shards are done; `batchstream merge` makes the results of all"
    )
