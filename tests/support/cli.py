"""The command line as users start it: a process, its exit code, its two streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

GOOD_KEY = "shuttle-good-0123456789"
BAD_KEY = "shuttle-wrong-9876543210"

TIMING = ("timing", "retries", "attempts")
"""What may differ between two runs that give the same answers."""


def environment(**extra: str) -> dict[str, str]:
    """A bare environment without anybody's keys."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "XDG_CACHE_HOME") if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "batchstream", *map(str, args)]


def start(*args: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args), cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def batchstream(*args: object, cwd: Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]
