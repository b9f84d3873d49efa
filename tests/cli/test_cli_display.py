"""What a person sees: the live display on a terminal, plain lines elsewhere, the summary at the end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli import batchstream
from terminal import in_terminal

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SOME_SECONDS = [
    "--provider",
    "sim",
    "--sim",
    "ttft=0.3",
    "--sim",
    "gap=0.02",
    "--sim",
    "tokens=16",
    "--concurrency",
    "2",
]


def plain(shown: str) -> list[str]:
    return [ESCAPES.sub("", line).rstrip("\r") for line in re.split(r"[\r\n]+", shown)]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_run_live_and_then_its_summary(columns: int, prompts: Path, tmp_path: Path) -> None:
    code, shown = in_terminal("run", prompts, *SOME_SECONDS, cwd=tmp_path, columns=columns)
    assert code == 0
    assert "\x1b[" in shown
    lines = plain(shown)
    assert any(re.search(r"\d+/12 rows \(\d+ %\)", line) for line in lines)
    assert any("in flight" in line for line in lines)
    assert any(line.startswith("Rows ") and "12 ok" in line for line in lines)
    paths = [line for line in lines if len(line) > columns]
    assert all(str(tmp_path) in line for line in paths)  # only what has no blank may be longer


def test_no_color_leaves_no_colour(prompts: Path, tmp_path: Path) -> None:
    code, shown = in_terminal("run", prompts, *SOME_SECONDS, cwd=tmp_path, NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)
    code, shown = in_terminal("run", prompts, *SOME_SECONDS, "--new-job", cwd=tmp_path)
    assert re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)


def test_no_progress_draws_nothing(prompts: Path, tmp_path: Path) -> None:
    code, shown = in_terminal("run", prompts, *SOME_SECONDS, "--no-progress", cwd=tmp_path, NO_COLOR="1")
    assert code == 0
    assert "\x1b" not in shown


def test_notes_of_failed_attempts_stand_above_the_display(prompts: Path, tmp_path: Path) -> None:
    faulty = ["--sim", "faults=500(times=1)=1", "-v"]
    code, shown = in_terminal("run", prompts, *SOME_SECONDS, *faulty, cwd=tmp_path, columns=120)
    assert code == 0
    notes = [line for line in plain(shown) if "attempt 1: server: HTTP 500" in line]
    assert len(notes) == 12


def test_a_log_file_gets_no_escape_sequences(prompts: Path, tmp_path: Path) -> None:
    done = batchstream("run", prompts, *SOME_SECONDS, cwd=tmp_path, TERM="xterm-256color")
    assert done.returncode == 0
    assert "\x1b" not in done.stderr
    assert max(map(len, done.stderr.splitlines()[:8])) <= 80
