"""`batchstream merge`: shards become one results file."""

from __future__ import annotations

from pathlib import Path

import click

from batchstream.cli.run import check_summary_path, conclude
from batchstream.cli.voice import Voice

HELP = """Make the results file OUT of the shards that `run -o OUT --shard I/N` has done, on this machine or on others
that share the directory.

Before anything is published it is proven that each row of the input is there exactly once: all N shards are done, of
one job and one input, and hold their own rows and no others. Nothing is sent. Exit code 10: shards are missing or not
done (they are named); 11: one still runs; 12: they are of different jobs; 3: more rows failed than are allowed.
"""

EXAMPLES = """
seq 4 | xargs -P 4 -I{} batchstream run prompts.jsonl -o results.jsonl --shard {}/4
batchstream merge results.jsonl
"""


@click.command("merge", help=HELP, epilog="\b\nExamples:" + EXAMPLES.rstrip().replace("\n", "\n  "))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a results file that this job did not make.")
@click.option(
    "--max-failures",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="So many failed rows are still a success (exit 0 instead of 3).",
)
@click.option("--summary-json", metavar="PATH|-", help="Write the summary here as well, or to - (stdout).")
@click.pass_obj
def command(voice: Voice, out: Path, overwrite: bool, max_failures: int, summary_json: str | None) -> int:
    from batchstream.launch.merging import merge

    check_summary_path(summary_json)
    return conclude(merge(out, overwrite=overwrite, max_failures=max_failures), voice, summary_json, "merge")
