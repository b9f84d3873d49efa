"""Bugs put into whole runs on purpose: the sweeps of runsweeps.py catch every one, for the reason they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runbugs import BUGS

HERE = Path(__file__).parent


@pytest.mark.parametrize("bug", [name for name in BUGS if BUGS[name][1][0] != "disk_full"])
def test_the_sweep_catches_the_bug(bug, tmp_path):
    caught(bug, tmp_path)


def test_a_real_full_disk_catches_the_bug(tmp_path, small_disk):
    caught("loses_what_it_could_not_write", tmp_path)


def caught(bug: str, home: Path) -> None:
    _, (sweep, *options), because = BUGS[bug]
    path = os.pathsep.join(str(entry) for entry in (HERE, *sys.path) if entry)
    command = [
        "nice",
        sys.executable,
        str(HERE / "runsweeps.py"),
        str(sweep),
        str(home),
        *map(str, options),
        "--bug",
        bug,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode != 0, f"{sweep} did not notice that a run {bug}: {done.stdout}"
    assert because in done.stderr, done.stderr
