"""The README's words are true: commands parse, flags exist, tables agree with the code, the example runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from cli import environment, rows_of

from batchstream import errors
from batchstream.cli.main import COMMANDS, group
from batchstream.cli.voice import AGAIN, Voice
from batchstream.endpoints.providers import DEFAULT, PROVIDERS
from batchstream.figures.latency import DEFINITIONS
from batchstream.figures.percentiles import needed_for
from batchstream.files.rows import PARAMETERS
from batchstream.job import SECTIONS, Option, choices, load_job, options
from batchstream.records import FunctionCall, Latencies, Result, Retry, RowError, ToolCall, Usage
from batchstream.wire.faults import RETRYABLE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

OF_OTHERS = {"--lowest", "--array", "--time", "--signal"}
"""Flags in the README that are not batchstream's: of `.ci/run` and Slurm."""

OPERATORS = {"|", "||", "&&", ";", ">", ">>", "<", "&"}


def fenced(*languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in languages]


def section(title: str) -> str:
    """The text below a heading, to the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """The body rows of the Markdown tables in `text`, as cells; `\\|` is a bar in a cell."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    heads = {index - 1 for index, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", cell) for cell in row)}
    return [row for index, row in enumerate(cells) if index not in heads and index - 1 not in heads]


def first_column(text: str) -> list[str]:
    return [row[0].strip("`") for row in table(text)]


def command_lines() -> Iterator[list[str]]:
    """The arguments of each `batchstream …` in the blocks of commands."""
    for block in fenced("sh", "crontab", "text"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$\([^)]*\)", "now", line.removeprefix("$ "))
            if not re.search(r"(^|[\s/])batchstream [a-z-]", line):
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in OPERATORS:
                    words.append(word)
                    continue
                starts = [at for at, part in enumerate(words) if part.rpartition("/")[2] == "batchstream"]
                if starts:
                    yield words[starts[0] + 1 :]
                words = []


COMMAND_LINES = list(command_lines())


def parse(args: list[str]) -> click.Context:
    """Parse without running: what click does before it calls a command."""
    outer = click.Context(group, info_name="batchstream", obj=Voice(None))
    command = group.get_command(outer, args[0])
    assert command is not None, args
    return command.make_context(args[0], list(args[1:]), parent=outer)


def all_flags() -> set[str]:
    commands = [group.get_command(click.Context(group), name) for name in COMMANDS]
    params = [param for command in commands if command is not None for param in command.params]
    known = {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
    return known | {flag for param in group.params for flag in param.opts} | {"--help"}


def test_the_test_line_is_the_one_that_ci_runs():
    (line,) = [line for block in fenced("sh") for line in block.splitlines() if "pytest" in line]
    assert line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_first_command_runs_the_quickstart_from_a_virtual_environment():
    (line,) = [line for block in fenced("sh") for line in block.splitlines() if "quickstart" in line]
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q '.[local]' && ")
    assert load_job(ROOT / "jobs/quickstart.toml").provider == "local"


def test_there_are_commands_to_check():
    assert {args[0] for args in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize("args", COMMAND_LINES, ids=" ".join)
def test_the_command_parses(args):
    context = parse(args)
    source = context.params.get("source")
    if source is not None and source.startswith("jobs/"):
        assert (ROOT / source).is_file()
        if source.endswith(".toml"):
            load_job(ROOT / source)


def test_a_command_that_does_not_parse_would_be_noticed():
    with pytest.raises(click.ClickException):
        parse(["run", "prompts.jsonl", "--no-such-flag"])


def test_every_flag_that_is_named_exists():
    prose = TEXT
    for line in fenced("sh"):
        if "pip install" in line:
            prose = prose.replace(line, "")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]\b(?!\*)", prose))
    assert named - OF_OTHERS - all_flags() == set()


def option_row(option: Option) -> str:
    """One option as a row of the README's table."""
    key = "path" if option.name in ("input", "output") else option.name
    flag = "SOURCE" if option.name == "input" else option.flag
    words = option.metavar or "|".join(choices(option) or ())
    usage = f"{flag} {words}".strip().replace("|", "\\|")
    default = ""
    if isinstance(option.default, str):
        default = f" {option.default}"
    elif isinstance(option.default, bool):
        default = " on" if option.default else ""
    elif isinstance(option.default, int | float):
        default = f" {option.default:g}"
    return f"| `{option.section}.{key}` | `{usage}` |{default} | {option.help} |"


def test_the_options_are_those_of_a_job():
    known = sorted(options().values(), key=lambda option: SECTIONS.index(option.section))
    expected = "\n".join(["| key | flag | default | |", "|---|---|---|---|", *map(option_row, known)])
    assert expected in TEXT, f"put this into the README:\n{expected}"


@pytest.mark.parametrize("block", fenced("toml"))
def test_the_job_file_is_one(block, tmp_path):
    (tmp_path / "job.toml").write_text(block)
    assert load_job(tmp_path / "job.toml").input == str(tmp_path / "prompts.jsonl")


def test_the_exit_codes_are_those_of_the_errors():
    rows = table(section("Exit codes"))
    raised = {row[1].strip("`"): int(row[0]) for row in rows if row[1]}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert raised == {kind.__name__: kind.exit_code for kind in classes}
    assert {row[0] for row in rows} == {"0", "128+N", *map(str, AGAIN)}


def test_the_result_row_is_described_field_by_field():
    rows = {row[0].strip("`"): row[2] + row[1] for row in table(section("Results"))}
    assert list(rows) == list(Result.__struct_fields__)
    nested: dict[str, type[msgspec.Struct]] = {
        "usage": Usage, "timing": Latencies, "retries": Retry, "error": RowError,
    }  # fmt: skip
    for field, kind in nested.items():
        assert f"{{{', '.join(kind.__struct_fields__)}}}" in rows[field]
    call = ", ".join(ToolCall.__struct_fields__) + f": {{{', '.join(FunctionCall.__struct_fields__)}}}"
    assert f"{{{call}}}" in rows["tool_calls"]


def test_the_metrics_have_the_definitions_of_the_code():
    rows = {row[0].strip("`"): row[1] for row in table(section("Metrics"))}
    assert rows == DEFINITIONS


def test_the_percentiles_are_refused_where_the_readme_says():
    text = " ".join(section("Metrics").split())
    n90, n95, n99, n999 = (needed_for(q) for q in (0.9, 0.95, 0.99, 0.999))
    assert f"p90 below {n90} values, p95 below {n95}, p99 below {n99}, p99.9 below {n999:,}." in text


def test_the_failure_kinds_are_those_of_the_code():
    rows = {row[0].strip("`"): row[1] for row in table(section("Failures"))}
    of_the_way = {"connect": "yes", "disconnected": "yes", "tls": "yes", "invalid_row": "no"}
    assert set(rows) == set(RETRYABLE) | set(of_the_way)
    for kind, again in rows.items():
        expected = of_the_way.get(kind) or ("yes" if RETRYABLE[kind] else "no")
        assert re.split(r"[ ,;]", again)[0] == expected, kind
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "batchstream/net").glob("*.py"))
    assert set(re.findall(r'Failure\("(\w+)"', sources)) <= set(rows)


def test_the_providers_are_those_of_the_code():
    rows = table(section("Endpoints"))
    found = {re.findall(r"`(\w+)`", row[0])[0]: [cell.strip("`") for cell in row[1:]] for row in rows}
    assert found == {
        provider.name: [
            provider.base_url or "started by the run", provider.key_env or "none", provider.default_model,
        ]
        for provider in PROVIDERS.values()
    }  # fmt: skip
    assert f"| `{DEFAULT}` (default) |" in TEXT


def test_the_request_parameters_named_are_parameters():
    found = re.search(r"Request parameters \((.*?), …\)", section("Input"), re.DOTALL)
    assert found
    assert set(re.findall(r"`(\w+)`", found[1])) <= set(PARAMETERS)


def test_the_example_rows_are_rows(tmp_path):
    lines = "".join(fenced("jsonl"))
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "table.jsonl").write_text(json.dumps(rows[3]) + "\n")
    for name, *flags in (["rows.jsonl"], ["table.jsonl", "--template", "{title}: {text}", "--keep", "source"]):
        done = cli("check", name, "--provider", "sim", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def cli(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "batchstream", *args, cwd=cwd)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # From the clone even where the package is not installed.
    env = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("example", fenced("python"))
def test_the_python_example_runs(example: str, tmp_path: Path):
    (tmp_path / "example.py").write_text(example)
    done = run(sys.executable, "-W", "error", "example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("0 2 ")
    assert [line.split()[:2] for line in others[:2]] == [["0", "ok"], ["1", "ok"]]
    assert [row["usage"]["completion_tokens"] for row in rows_of(tmp_path / "answers.jsonl")] == [20, 20]


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings
        elif "://" not in link:
            assert (ROOT / link).exists(), link


def test_no_path_of_somebodys_machine_is_named():
    paths = re.findall(r"(?<![\w.:~`/])/(?:home|root|tmp|work|opt|mnt|var|usr|Users|etc)/", TEXT)
    assert paths == []
    assert "index-url" not in TEXT
