"""Whole runs of the command line, each in a process of its own, forked from one that has imported everything.

A fork costs milliseconds where a fresh interpreter costs a second of two shared cores: a sweep can kill hundreds of
runs. The parent must have no threads and no event loop, so these modules are for scripts (`runsweeps.py`), not for
the process of pytest. The endpoint is `batchstream simulate` in yet another one; its ledger is the truth of what was
asked, and each start of a run marks its requests with a header, so that nothing is counted for the wrong one.
"""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop  # noqa: F401  (the rest is imported here so that no child has to)

import batchstream.cli.run
import batchstream.launch.here
import batchstream.report.progress  # noqa: F401
from batchstream.cli.main import main as command_line
from batchstream.files import fsio

ROWS = 64
STREAMS = 8
MARK = "x-client-request-id"


class Endpoint:
    """A simulated endpoint in a process of its own."""

    def __init__(self, *settings: str) -> None:
        command = [sys.executable, "-m", "batchstream", "simulate", "--port", "0", *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.base_url = self.process.stdout.readline().strip()
        self.netloc = urlsplit(self.base_url).netloc

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(self.netloc)
        connection.request("GET", path)
        body = connection.getresponse().read()
        connection.close()
        return body

    def entries(self) -> list[dict[str, Any]]:
        """Every request so far, once no client is connected any more: what a killed one had sent has been read."""
        deadline = time.monotonic() + 20
        while json.loads(self._get("/sim/stats"))["connections"] > 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.ledger()

    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._get("/sim/ledger").splitlines()]

    def asked(self, mark: str) -> list[str]:
        """The rows (as digests) that runs marked `mark...` asked, in order."""
        return [entry["digest"] for entry in self.entries() if (entry["mark"] or "").startswith(mark)]

    def forget(self) -> None:
        connection = http.client.HTTPConnection(self.netloc)
        connection.request("POST", "/sim/reset")
        connection.getresponse().read()
        connection.close()


class Ended:
    """How a child ended: `code` as in `subprocess` (minus the signal that killed it)."""

    def __init__(self, code: int, directory: Path, name: str) -> None:
        self.code = code
        # A child that was killed at once has not opened its streams yet.
        self.out, self.err = (
            path.read_text() if path.exists() else ""
            for path in (directory / f"{name}.stdout", directory / f"{name}.stderr")
        )

    def __repr__(self) -> str:
        return f"exit {self.code}: {self.err[-600:]}"


class Child:
    """A forked command line with its streams in files, in a directory of its own."""

    def __init__(
        self, args: list[object], directory: Path, name: str = "run", *, before: Callable[[], object] | None = None
    ) -> None:
        """`before` is called in the child first: to put another disk in, or a bug."""
        self.directory, self.name = directory, name
        streams = [os.open(directory / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                   for stream in ("stdout", "stderr")]  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                # Whoever started us in the background may have had these ignored, and a run keeps to that.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                os.chdir(directory)
                for number, stream in enumerate(streams, start=1):
                    os.dup2(stream, number)
                    os.close(stream)
                sys.argv = ["batchstream", *map(str, args)]
                if before is not None:
                    before()
                command_line()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 98
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        for stream in streams:
            os.close(stream)

    def poll(self) -> bool:
        """Has it ended? (It stays to be waited for.)"""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        return Ended(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.directory, self.name)


def put_disk(disk: fsio.Disk) -> Callable[[], object]:
    """For `Child(before=...)`: every disk call of the run goes through `disk`."""
    return lambda: setattr(fsio, "disk", disk)


def write_prompts(path: Path, rows: int = ROWS) -> Path:
    lines = (json.dumps({"id": f"p{row}", "prompt": f"Question {row}: why?", "max_tokens": 6}) for row in range(rows))
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run_args(endpoint: Endpoint, source: Path, mark: str, *more: object) -> list[object]:
    return [
        "run", source, "-o", "out.jsonl", "--base-url", endpoint.base_url, "--model", "sim", "--concurrency", STREAMS,
        "--header", f"{MARK}: {mark}", "--summary-json", f"{mark}.json", "--no-progress", *more,
    ]  # fmt: skip


def results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, without what may differ between two runs: their clocks."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def notes(journal: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal, in the order of its segments."""
    found = []
    segments = sorted(journal.glob("*.bsj"), key=lambda path: int(path.stem.rpartition("-")[2]))
    for segment in segments:
        for line in segment.read_bytes().splitlines(keepends=True):
            if line.endswith(b"}\n"):
                try:
                    found.append(json.loads(line[9:]))
                except json.JSONDecodeError:
                    continue  # half a record glued to a whole one: recovery's business
    return found


def admitted_again(journal: Path) -> int:
    """How often a row was sent that may already have been sent before, by the journal's own account."""
    under_way: set[int] = set()
    again = 0
    for note in notes(journal):
        if note["t"] == "a":
            again += sum(row in under_way for row in note["rows"])
            under_way.update(note["rows"])
        elif note["t"] in "ow":
            under_way.discard(note["row"])
        elif note["t"] == "u":
            under_way.difference_update(note["rows"])
    return again
