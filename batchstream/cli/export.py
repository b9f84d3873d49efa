"""`batchstream export`: the results in another format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from batchstream.errors import UsageError

if TYPE_CHECKING:
    from batchstream.files.export import Format

EXAMPLES = """
batchstream export results.jsonl --format csv -o results.csv
batchstream export results.jsonl --format openai-batch > batch_output.jsonl
batchstream export results.jsonl --format parquet -o results.parquet
batchstream export results.parquet --format jsonl | jq -r .text
"""


_OF_A_CHOICE = ("text", "reasoning", "refusal", "tool_calls", "finish_reason", "logprobs")


@click.command(
    "export",
    help="""Write the results of OUT in another format, to a new file or to stdout.

    OUT is a results file; of a job that has not finished, the rows stored so far are written, from its journal.
    openai-batch: the output lines of the OpenAI Batch API. csv: one flat row each, nested values as JSON.
    """,
    epilog="\b\nExamples:" + EXAMPLES.rstrip().replace("\n", "\n  "),
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "style", required=True, type=click.Choice(["jsonl", "parquet", "openai-batch", "csv"]))
@click.option(
    "-o", "--output", "target", default="-", show_default=True, metavar="FILE|-", help="A new file, or stdout."
)
def command(out: Path, style: Format, target: str) -> None:
    from batchstream.cli.voice import emit, emit_lines
    from batchstream.files.export import export, export_lines
    from batchstream.files.results import read_results

    if target != "-":
        export(out, style, Path(target), response_body=response_body(out))
    elif style == "parquet":
        raise UsageError("parquet needs a file: name one with -o")
    else:
        emit_lines(export_lines(read_results(out), style, response_body(out)))
        emit(b"")  # what stdout still holds back


def response_body(out: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """How a result row of `out` becomes the body that the endpoint would have sent without streaming."""
    from batchstream.files.lock import journal_path
    from batchstream.files.manifest import any_manifest
    from batchstream.records import Api, Choice, Completion, Usage
    from batchstream.wire.body import to_response_body

    journal = out if out.is_dir() else journal_path(out)
    manifest = any_manifest(journal) if journal.is_dir() else None
    api: Api = manifest.job["api"] if manifest is not None else "chat"

    def body(row: dict[str, Any]) -> dict[str, Any]:
        extra = row.get("extra") or {}
        only = {"index": 0, **{name: row[name] for name in _OF_A_CHOICE}, "extra": extra.get("choice")}
        completion = Completion(
            choices=msgspec.convert(row["choices"] or [only], list[Choice]),
            usage=msgspec.convert(row["usage"], Usage | None),
            raw_usage=extra.get("usage"),
            model=row["model"],
            response_id=row["response_id"],
            extra=extra.get("response"),
        )
        return to_response_body(completion, api)

    return body
