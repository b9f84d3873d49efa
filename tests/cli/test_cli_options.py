"""From the command line to a `Job`: flags, job files, and flags over job files."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from batchstream.cli.options import job_of, job_params
from batchstream.cli.voice import Voice
from batchstream.errors import UsageError
from batchstream.job import Job, Option, options

JOB = """
[input]
path = "prompts.jsonl"
template = "Say {text}"
[endpoint]
provider = "sim"
api_key_env = "SOME_KEY"
[request]
param = { temperature = 0.5, max_tokens = 8 }
[output]
overwrite = true
[report]
no_progress = true
"""


def job(*args: str) -> Job:
    command = import_module("batchstream.cli.run").command
    context = command.make_context("run", list(args), obj=Voice(None))
    return job_of(context, context.params["source"])


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return str(path)


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--concurrency", "7"], "concurrency", 7),
        (["--rpm", "2.5"], "rpm", 2.5),
        (["-o", "x.jsonl"], "output", "x.jsonl"),
        (["--keep", "a, b", "--keep", "c"], "keep", ("a", "b", "c")),
        (["--keep", "all"], "keep", ("all",)),
        (["--param", "temperature=0", "--param", "stop=[\"x\"]", "--param", "user=me=you"], "param",
         {"temperature": 0, "stop": ["x"], "user": "me=you"}),
        (["--header", "X-Team: blue: sky"], "header", {"X-Team": "blue: sky"}),
        (["--api", "responses"], "api", "responses"),
        (["--no-include-usage"], "include_usage", False),
        (["-q"], "quiet", True),
        (["--sim", "ttft=0.2", "--provider", "sim"], "sim", {"ttft": 0.2}),
    ],
)  # fmt: skip
def test_a_flag_sets_its_option(args: list[str], name: str, value: Any) -> None:
    assert getattr(job("prompts.jsonl", *args), name) == value


def test_without_flags_a_job_has_its_defaults() -> None:
    assert job("prompts.jsonl") == Job(input="prompts.jsonl")


def test_a_job_file_counts_where_no_flag_was_given(job_file: str) -> None:
    found = job(job_file)
    assert (found.provider, found.overwrite, found.no_progress) == ("sim", True, True)
    assert found.input == str(Path(job_file).parent / "prompts.jsonl")


def test_flags_win_over_the_job_file_and_can_take_a_switch_back(job_file: str) -> None:
    found = job(job_file, "--provider", "openai", "--no-overwrite", "--progress")
    assert (found.provider, found.overwrite, found.no_progress) == ("openai", False, False)


def test_a_parameter_is_overridden_by_its_name_the_others_stay(job_file: str) -> None:
    assert job(job_file, "--param", "temperature=0").param == {"temperature": 0, "max_tokens": 8}


def test_a_flag_puts_out_what_it_excludes_in_the_job_file(job_file: str, tmp_path: Path) -> None:
    found = job(job_file, "--prompt-column", "text", "--api-key-file", str(tmp_path / "key"))
    assert (found.template, found.prompt_column, found.api_key_env) == (None, "text", None)


def test_two_flags_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="template and prompt_column"):
        job("prompts.jsonl", "--template", "{a}", "--prompt-column", "a")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[limits]\nconcurency = 3", "did you mean 'concurrency'?"),
        ("[limit]\nrpm = 3", "did you mean 'limits'?"),
        ("[limits]\nmodel = 'x'", "belongs to [endpoint] model"),
        ("[limits]\nconcurrency = '3'", "concurrency: expected int, got str: '3'"),
        ("[limits]\nconcurrency = 0", "above 0"),
    ],
)
def test_a_wrong_line_of_a_job_file_is_told_with_the_file_and_the_right_word(
    line: str, said: str, job_file: str
) -> None:
    Path(job_file).write_text(f"[input]\npath = 'a.jsonl'\n{line}\n")
    with pytest.raises(UsageError) as error:
        job(job_file)
    assert str(error.value).startswith(job_file)
    assert said in str(error.value)


def test_every_option_can_be_made_a_flag_of_the_right_kind() -> None:
    assert len(job_params()) == len(options()) - 1
    with pytest.raises(TypeError, match="no flag can be made of odd"):
        click.Command("x", params=job_params_of(Option("odd", "input", "", "--odd", None, bytes, None)))


def job_params_of(option: Option) -> list[click.Parameter]:
    from batchstream.cli.options import JobOption

    return [JobOption(option)]
