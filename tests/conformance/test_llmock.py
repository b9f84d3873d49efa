"""Graded by somebody else: llmock is a public mock that injects faults and judges how the client took them.

It finds, among others: retry_after_ignored, retried_non_retryable, retry_storm, truncated_stream_accepted, no_backoff,
no_read_timeout, malformed_chunk_ignored. Nothing of the kind may be found here, warnings included.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import batchstream, environment, rows_of

if importlib.util.find_spec("llmock") is None:
    if os.environ.get("CI"):
        pytest.fail("llmock is not installed; in CI its verdict must be heard", pytrace=False)
    pytest.skip("llmock is not installed (extra `dev`)", allow_module_level=True)

LLMOCK = [sys.executable, "-c", "from llmock.cli import app; app()"]

ANSWERS = ("--param", "max_tokens=50")

# Model → what happens to its requests, attempts that the row must have had, and how it must end.
Scenarios = dict[str, tuple[dict[str, Any], int, str]]

STATED_WAITS: Scenarios = {
    "rate-limited": ({"type": "fail", "status": 429, "retry_after": 1.2, "times": 2}, 3, "ok"),
    "unavailable": ({"type": "fail", "status": 503, "retry_after": 1, "times": 1}, 2, "ok"),
}

# The judge takes two waits for a constant interval when the second happens to be the shorter one, and with full
# jitter it may be. So a row here is refused once, or so often that six falling waits are out of the question.
FAULTS: Scenarios = {
    **{f"refused-{code}": ({"type": "fail", "status": code, "times": None}, 1, "failed")
       for code in (400, 401, 403, 404, 422)},
    "down": ({"type": "fail", "status": 500, "times": None}, 6, "failed"),
    "cut": ({"type": "stream_fault", "kind": "truncate", "after_chunks": 2}, 2, "ok"),
    "dropped": ({"type": "stream_fault", "kind": "disconnect", "after_chunks": 2}, 2, "ok"),
    "malformed": ({"type": "stream_fault", "kind": "malformed", "after_chunks": 2}, 2, "ok"),
    "stalled": ({"type": "stream_fault", "kind": "stall", "after_chunks": 2, "stall_seconds": 8}, 2, "ok"),
    "slow": ({"type": "slow_first_token", "seconds": 1}, 1, "ok"),
}  # fmt: skip


@pytest.fixture
def llmock(tmp_path: Path) -> Iterator[str]:
    """Address of a mock that paces its streams: what it sends in one go, it takes for read."""
    yield from serving(tmp_path, "--stream-chunk-delay-ms", "100")


def serving(folder: Path, *flags: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve = [*LLMOCK, "serve", "--port", port, "--log-level", "error", *flags]
    with (folder / "llmock.log").open("wb") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=folder)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", folder / "llmock.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(300):
        assert server.poll() is None, log.read_text(errors="replace")
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"llmock did not start: {log.read_text(errors='replace')}")


def put(url: str, scenarios: Scenarios) -> None:
    behaviors = [{**fault, "match": {"model": model}} for model, (fault, _, _) in scenarios.items()]
    data = json.dumps({"behaviors": behaviors}).encode()
    urllib.request.urlopen(f"{url}/_llmock/scenario", data, timeout=10).close()  # noqa: S310


@pytest.mark.parametrize("scenarios", [STATED_WAITS, FAULTS], ids=["stated waits", "faults"])
def test_the_mock_has_nothing_to_find_fault_with(llmock: str, scenarios: Scenarios, tmp_path: Path) -> None:
    put(llmock, scenarios)
    rows = [{"id": model, "model": model, "prompt": "Tell me something, please."} for model in scenarios]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = batchstream("run", source, "-o", "out.jsonl", "--base-url", f"{llmock}/v1", "--breaker", "off",
                       "--max-attempts", 6, "--idle-timeout", 2, "-q", cwd=tmp_path)  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    found = {row["id"]: (row["attempts"], row["status"]) for row in rows_of(tmp_path / "out.jsonl")}
    assert found == {model: (attempts, status) for model, (_, attempts, status) in scenarios.items()}
    report = subprocess.run(
        [*LLMOCK, "report", "--strict", "--json", "--url", llmock], env=environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    verdict = json.loads(report.stdout)
    assert verdict["findings"] == []
    assert verdict["attempts"] == sum(attempts for attempts, _ in found.values())
    assert report.returncode == 0


@pytest.fixture
def limited(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a mock with rate limits, as its flags say."""
    yield from serving(tmp_path, *request.param)


@pytest.mark.parametrize(
    ("limited", "rows", "flags"),
    [  # the mock's minute lasts a minute: those that wait for one are long
        pytest.param(("--rpm", "90"), 100, (), id="rpm unknown", marks=pytest.mark.sweep),
        pytest.param(("--rpm", "90"), 100, ("--rpm", 90), id="rpm known", marks=pytest.mark.sweep),
        pytest.param(("--tpm", "3000"), 40, ANSWERS, id="tpm unknown", marks=pytest.mark.sweep),
        pytest.param(("--tpm", "3000"), 40, (*ANSWERS, "--tpm", 3000), id="tpm known"),
    ],
    indirect=["limited"],
)
def test_the_mocks_rate_limits_are_lived_with(
    limited: str, rows: int, flags: tuple[object, ...], tmp_path: Path
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Tell me {i} things, please."}) + "\n" for i in range(rows)))
    done = batchstream("run", source, "-o", "out.jsonl", "--base-url", f"{limited}/v1", "--model", "gpt-4o",
                       "--no-progress", *flags, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in rows_of(tmp_path / "out.jsonl")} == {"ok"}
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    print(f"{flags}: {summary['limits']['refused']} refused, {summary['run']['elapsed_s']} s")  # noqa: T201
    report = subprocess.run(
        [*LLMOCK, "report", "--strict", "--json", "--url", limited], env=environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert json.loads(report.stdout)["findings"] == []
