"""What the tests of this room share: sweeps as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a sweep of runsweeps.py; gives its figures, and fails with what it said.

    A process without threads, because it forks; niced, because the long ones take a while.
    """

    def run(name: str, *options: object, home: Path | None = None, timeout: float = 300) -> dict[str, Any]:
        path = os.pathsep.join(str(entry) for entry in (HERE, *sys.path) if entry)
        command = ["nice", sys.executable, str(HERE / "runsweeps.py"), name, str(home or tmp_path), *map(str, options)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout.strip())  # noqa: T201  (shown with -s: the figures of the long sweeps)
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures

    return run


@pytest.fixture
def small_disk(tmp_path: Path):
    """A directory `disk` in tmp_path that is a file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root, and not in every container")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
