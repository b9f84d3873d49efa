"""`simulate`: an endpoint in a process of its own, set up by flags."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from cli import batchstream, start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_its_url_first_serves_and_ends_when_told(number: signal.Signals, prompts: Path, tmp_path: Path) -> None:
    flags = ["--port", "0", "--tokens", "3..5", "--fault", "500@1", "--models", "tiny=2", "--apis", "chat"]
    server = start("simulate", *flags, cwd=tmp_path)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        done = batchstream("run", prompts, "--base-url", url, "--model", "tiny", "-q", cwd=tmp_path)
        assert done.returncode == 0
        with urllib.request.urlopen(url.removesuffix("/v1") + "/sim/stats", timeout=30) as answer:  # noqa: S310
            stats = json.load(answer)
    finally:
        server.send_signal(number)
        server.communicate(timeout=30)
    assert stats["requests"] == 13
    assert stats["faults"] == {"500": 1}
    assert server.returncode == 0


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = batchstream("simulate", "--port", port, cwd=tmp_path)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr.splitlines()[-1]
