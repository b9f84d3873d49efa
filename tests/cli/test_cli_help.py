"""The help: light, complete, with examples that parse; wrong words get the nearest right one."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import msgspec
import pytest
from cli import batchstream, environment

from batchstream.cli.main import COMMANDS, group
from batchstream.cli.simulate import TEXTS
from batchstream.cli.voice import Voice
from batchstream.endpoints.simulate import SimulateConfig
from batchstream.job import options

HEAVY = ("aiohttp", "pyarrow", "rich", "uvloop", "tenacity", "asyncio", "msgspec")


def command(name: str) -> click.Command:
    found: click.Command = import_module(f"batchstream.cli.{name}").command
    return found


def examples(text: str) -> list[list[str]]:
    """The command lines of a help text, each without the programme's name."""
    lines = [line.strip() for line in text.splitlines()]
    calls = [part.strip() for line in lines for part in line.partition(" > ")[0].split("|")]
    return [shlex.split(call)[1:] for call in calls if call.startswith("batchstream ")]


def help_of(name: str | None) -> str:
    context = click.Context(group, info_name="batchstream", obj=Voice(None), max_content_width=200, terminal_width=200)
    if name is None:
        return group.get_help(context)
    inner = click.Context(command(name), parent=context, info_name=name, terminal_width=200, max_content_width=200)
    return command(name).get_help(inner)


def test_the_help_of_the_group_imports_nothing_but_click(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from batchstream.cli.main import main\n"
        "sys.argv = ['batchstream', '--help']\n"
        "try: main()\n"
        f"finally: sys.stderr.write(' '.join(name for name in {HEAVY} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stderr == ""


def test_the_help_takes_little_cpu(tmp_path: Path) -> None:
    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def cost(*args: str) -> float:
        before = cpu()
        subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, check=True, env=environment())
        return cpu() - before

    cost("-m", "batchstream", "--help")  # compiles what was never compiled
    least = min(cost("-m", "batchstream", "--help") for _ in range(5))
    bare = min(cost("-c", "pass") for _ in range(5))
    assert least < 0.150 * max(1.0, bare / 0.020), f"{least:.3f} s, where an empty program takes {bare:.3f} s"


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_help_has_examples_and_they_parse(name: str | None) -> None:
    calls = examples(help_of(name))
    assert calls
    for called, *args in calls:
        command(called).make_context(called, args, obj=Voice(None))


def test_an_example_that_does_not_parse_would_be_noticed() -> None:
    ((called, *args),) = examples("  batchstream run prompts.jsonl --concurrencey 3")
    with pytest.raises(click.UsageError):
        command(called).make_context(called, args)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_called_what_the_group_says(name: str) -> None:
    assert command(name).name == name
    assert f"batchstream {name} " in help_of(name)


@pytest.mark.parametrize("name", ["run", "check"])
def test_every_option_of_a_job_is_a_flag_with_its_help(name: str) -> None:
    text = help_of(name)
    flags = {flag for param in command(name).params for flag in (*param.opts, *param.secondary_opts)}
    for option in options().values():
        if option.name != "input":
            assert set(option.flag.split("/")) <= flags, option.name
            assert option.help.partition(":")[0] in " ".join(text.split()), option.name


def test_every_setting_of_the_simulation_is_a_flag() -> None:
    assert set(TEXTS) == {field.name for field in msgspec.structs.fields(SimulateConfig)}
    assert set(TEXTS) <= {param.name for param in command("simulate").params}


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["rum", "x"], "'run'"),
        (["run", "--concurency", "3", "x"], "--concurrency"),
        (["run", "--api-key", "secret-0123456789", "x"], "--api-key-env"),
        (["run", "--invalid", "drop", "x"], "'skip'"),
        (["run", "--concurrency", "many", "x"], "'many' is not a valid integer"),
        (["run", "x", "--provider", "shuttelai"], "'shuttleai'"),
        (["run", "x", "--param", "temperature"], "NAME=VALUE"),
        (["run"], "SOURCE"),
        (["export", "x"], "--format"),
        (["simulate", "--fault", "oops=1"], "oops"),
    ],
)
def test_a_wrong_word_is_one_line_that_helps(args: list[str], hint: str, tmp_path: Path) -> None:
    done = batchstream(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert hint in done.stderr
    assert "secret-0123456789" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_value_of_a_bad_header_is_not_repeated(tmp_path: Path) -> None:
    done = batchstream("run", "x", "--header", "Authorization Bearer abcdef0123456789", cwd=tmp_path)
    assert done.returncode == 2
    assert "abcdef0123456789" not in done.stderr


def test_version_and_bare_call(tmp_path: Path) -> None:
    assert batchstream("--version", cwd=tmp_path).stdout.startswith("batchstream ")
    assert batchstream(cwd=tmp_path).stdout == batchstream("--help", cwd=tmp_path).stdout


def test_the_shell_can_complete(tmp_path: Path) -> None:
    done = batchstream(cwd=tmp_path, _BATCHSTREAM_COMPLETE="bash_complete", COMP_WORDS="batchstream ex", COMP_CWORD="1")
    assert "export" in done.stdout


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "Cookie"])
def test_a_header_that_carries_a_secret_is_refused_on_the_command_line(name: str, tmp_path: Path) -> None:
    done = batchstream("run", "x", "--header", f"{name}: Bearer abcdef0123456789", cwd=tmp_path)
    assert done.returncode == 2
    assert "abcdef0123456789" not in done.stderr
    assert "--api-key-env" in done.stderr
