"""The canary: a key that an endpoint repeats in every way it can, searched for in every byte that comes out of us.

Searched are stdout, stderr, each file of the job (journal, results, summaries, exports; Parquet decoded) and the
command lines of our processes; looked for is the key as it is, as JSON spells it, and in base64.
"""

from __future__ import annotations

import base64
import http.server
import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli import batchstream, environment, start
from hypothesis import given
from hypothesis import strategies as st

from batchstream.cli.voice import Veil

KEYS = {"plain": "sk-canary-0a1b2c3d4e5f6071", "awkward": 'sk-"can\\ary/+=-0a1b2c3d4e5f'}


class Parrot(http.server.BaseHTTPRequestHandler):
    """Repeats the key of each request, in the way that the first part of the path names."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def key(self) -> str:
        return self.headers["Authorization"].removeprefix("Bearer ")

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(401, json.dumps({"error": {"message": f"Incorrect API key provided: {self.key()}"}}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        way, key = self.path.split("/")[1], self.key()
        said = f"You sent {key}, thank you"
        if way.isdigit():
            error = {"message": said, "type": said, "code": said, "param": {key: [key]}}
            self.answer(int(way), json.dumps({"error": error, key: key}).encode(), x_request_id=key)
        elif way == "page":
            self.answer(200, f"<html>{said}</html>".encode(), "text/html")
        elif way == "redirect":
            self.answer(307, b"", Location=f"http://{key[:9]}.invalid/{key}")
        else:
            self.answer(200, self.stream(way, key, said), "text/event-stream", x_request_id=key)

    def stream(self, way: str, key: str, said: str) -> bytes:
        call = {
            "index": 0,
            "id": key,
            "type": "function",
            "function": {"name": key, "arguments": json.dumps({key: key})},
        }
        deltas: dict[str, list[dict[str, object]]] = {
            "text": [{"content": said}],
            "pieces": [{"content": piece} for piece in said],
            "reasoning": [{"reasoning_content": said}, {"content": "x"}],
            "refusal": [{"refusal": said}],
            "tools": [{"tool_calls": [call]}],
            "cut": [{"content": said}],
            "error": [{"content": said}],
            "junk": [{"content": said}],
        }
        top = {"id": key, "model": key, "system_fingerprint": key, key: {key: key}}
        events: list[object] = [{**top, "choices": [{"index": 0, "delta": delta}]} for delta in deltas[way]]
        if way == "error":
            events.append({"error": {"message": said, "code": key}})
        elif way != "cut":
            events.append({**top, "choices": [{"index": 0, "delta": {}, "finish_reason": key}]})
            events.append(
                {**top, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, key: 1}}
            )
        sent = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        if way == "junk":
            return sent + f'data: {{"choices": {said}\n\n'.encode()
        return sent if way in ("cut", "error") else sent + b"data: [DONE]\n\n"


STATUSES = ("400", "401", "402", "403", "404", "422", "423", "429", "500", "503")
STREAMS = ("text", "pieces", "reasoning", "refusal", "tools", "cut", "error", "junk", "page", "redirect")


@contextmanager
def parrot() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Parrot) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def spellings(key: str) -> list[bytes]:
    inner = json.dumps(key)[1:-1]
    encoded = base64.b64encode(key.encode()).rstrip(b"=")
    return [key.encode(), inner.encode(), json.dumps(inner)[1:-1].encode(), encoded]


def search(key: str, what: str, data: bytes) -> None:
    for spelling in spellings(key):
        assert spelling not in data, f"{what} holds the key: ...{data[max(0, data.index(spelling) - 200) :][:400]!r}"


def search_files(key: str, folder: Path) -> int:
    import pyarrow.parquet as pq

    searched = 0
    for path in folder.rglob("*"):
        if path.is_file():
            search(key, str(path), path.read_bytes())
            if path.suffix == ".parquet":
                search(key, str(path), str(pq.read_table(path).to_pylist()).replace("\\\\", "\\").encode())
            searched += 1
    return searched


@pytest.fixture(params=KEYS)
def key(request: pytest.FixtureRequest) -> str:
    return KEYS[request.param]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "job"
    place.mkdir()
    (place / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return place


FORMATS = {"text": ("-v",), "json": ("-v", "--log-format", "json", "--summary-json", "-")}


@pytest.mark.parametrize("style", FORMATS)
def test_an_endpoint_that_repeats_the_key_in_its_answers_does_not_get_it_written_down(
    folder: Path, key: str, style: str
) -> None:
    ways = (*STREAMS, *STATUSES) if style == "json" and key == KEYS["plain"] else ("pieces", "error", "tools", "401")
    with parrot() as base:
        common = ["--api-key-env", "CANARY", "--model", "m", "--max-attempts", "2", "--max-wait", "1", *FORMATS[style]]
        jobs = []
        for way in ways:
            out = f"{way}.parquet" if way in ("tools", "error") else f"{way}.jsonl"
            # 429s would be waited out: with one attempt each row is asked once.
            once = ["--max-attempts", "1"] if way in ("429", "500", "503") else []
            args = ["run", "p.jsonl", "-o", out, "--base-url", f"{base}/{way}/v1", "--breaker", "off", *common, *once]
            jobs.append((out, start(*args, cwd=folder, CANARY=key)))
            if len(jobs) % 2 == 0:  # two cores
                finish(jobs[-2:], key)
        finish(jobs, key)
        for args in (
            ["ask", "hi", "--base-url", f"{base}/401/v1", *common],
            ["run", "p.jsonl", "-o", "stopped.jsonl", "--base-url", f"{base}/401/v1", *common],
            ["check", "p.jsonl", "--ping", "--base-url", f"{base}/x/v1", "--model", "m", "--api-key-env", "CANARY"],
        ):
            done = batchstream(*(arg for arg in args if arg not in ("--summary-json", "-")), cwd=folder, CANARY=key)
            assert done.returncode == 4, done.stderr
            search(key, f"{args[0]}'s stdout", done.stdout.encode())
            search(key, f"{args[0]}'s stderr", done.stderr.encode())
            assert "[key]" in done.stderr, f"{args[0]} did not repeat what the endpoint said: the test proves nothing"
        for way in ("pieces.jsonl", "tools.parquet") if style == "json" else ("pieces.jsonl",):
            for command in (["report", way], ["report", way, "--format", "markdown"], *exports(way)):
                done = batchstream(*command, cwd=folder)
                assert done.returncode == 0, done.stderr
                search(key, str(command), done.stdout.encode() + done.stderr.encode())
    assert search_files(key, folder) > 20
    redacted = b"".join(path.read_bytes() for path in folder.rglob("*.bsj"))
    assert b"[key]" in redacted, "nothing of what the endpoint repeated was stored: the test proves nothing"


def test_a_key_in_a_header_of_a_job_file_is_kept_like_any_other(folder: Path, key: str) -> None:
    with parrot() as base:
        for way in ("pieces", "error", "401"):
            header = json.dumps(f"Bearer {key}")
            (folder / "job.toml").write_text(
                f'[input]\npath = "p.jsonl"\n[endpoint]\nbase_url = "{base}/{way}/v1"\nmodel = "m"\n'
                f'header = {{ Authorization = {header} }}\n[output]\npath = "{way}.jsonl"\n'
            )
            done = batchstream("run", "job.toml", "-v", "--max-attempts", "1", cwd=folder)
            assert done.returncode in (0, 3, 4), done.stderr
            search(key, f"{way}: stdout and stderr", (done.stdout + done.stderr).encode())
            (folder / "job.toml").unlink()
    assert search_files(key, folder) > 8
    assert b"[key]" in b"".join(path.read_bytes() for path in folder.rglob("*.bsj"))


def exports(out: str) -> list[list[str]]:
    kinds = {"jsonl": "jsonl", "csv": "csv", "openai-batch": "jsonl", "parquet": "parquet"}
    return [["export", out, "--format", kind, "-o", f"{kind}-of-{out}.{suffix}"] for kind, suffix in kinds.items()]


def finish(jobs: list[tuple[str, subprocess.Popen[str]]], key: str) -> None:
    for out, run in jobs:
        if run.returncode is None:
            stdout, stderr = run.communicate(timeout=120)
            assert run.returncode in (0, 3, 4, 5), f"{out}: {stderr}"
            search(key, f"{out}: stdout", stdout.encode())
            search(key, f"{out}: stderr", stderr.encode())


@pytest.mark.parametrize("way", ["pieces", "reasoning", "refusal", "tools", "cut", "error"])
def test_ask_shows_an_answer_as_it_comes_but_never_the_key(folder: Path, key: str, way: str) -> None:
    with parrot() as base:
        args = ["ask", "hi", "-v", "--base-url", f"{base}/{way}/v1", "--model", "m", "--api-key-env", "CANARY"]
        done = batchstream(*args, "--max-attempts", 1, cwd=folder, CANARY=key)
    search(key, "stdout", done.stdout.encode())
    search(key, "stderr", done.stderr.encode())
    assert "[key]" in done.stdout + done.stderr


@given(
    st.lists(st.sampled_from(["x", "sk-", "sk-s", "sk-sk-se", "cret", "secret", "-secret", "sk-secret"])),
    st.data(),
)
def test_a_key_in_running_text_is_found_however_it_is_cut(words: list[str], data: st.DataObject) -> None:
    text, secret = "".join(words), "sk-secret"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    veil = Veil([secret])
    shown = "".join(veil.over(text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(text)])) + veil.rest()
    assert shown == text.replace(secret, "[key]")


def test_the_key_is_in_no_command_line_and_no_traceback(folder: Path, key: str) -> None:
    """A bug in the middle of a run that has the key in its hands, at the most talkative."""
    program = (
        "import sys\n"
        "from batchstream.engine import client\n"
        "def broken(self, request, due, on_delta=None, depart=None):\n"
        "    key = self._routes['chat'][1]['Authorization']\n"
        "    raise RuntimeError(f'no luck with {key}')\n"
        "client.Client.attempt = broken\n"
        "from batchstream.cli.main import main\n"
        "sys.argv[0] = 'batchstream'\n"
        "main()\n"
    )
    key_file = folder.parent / "key"
    key_file.write_text(key + "\n")
    key_file.chmod(0o600)
    args = ["run", "p.jsonl", "-o", "o.jsonl", "--provider", "sim", "-v", "--log-format", "json"]
    for named in (["--api-key-env", "CANARY"], ["--api-key-file", str(key_file)]):
        done = subprocess.run(
            [sys.executable, "-c", program, *args, *named],
            cwd=folder, env=environment(CANARY=key), capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "Traceback" in done.stderr
        assert "no luck with Bearer [key]" in done.stderr
        search(key, "the traceback", done.stderr.encode() + done.stdout.encode())
    search_files(key, folder)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_key_is_not_in_the_process_list(folder: Path, key: str) -> None:
    run = start("run", "p.jsonl", "-o", "o.jsonl", "--provider", "sim", "--sim", "ttft=30", "--api-key-env", "CANARY",
                cwd=folder, CANARY=key)  # fmt: skip
    try:
        while not (folder / "o.jsonl.journal" / "MANIFEST.json").exists():
            assert run.poll() is None, run.communicate()
        search(key, "the command line", Path(f"/proc/{run.pid}/cmdline").read_bytes())
    finally:
        run.kill()
        run.communicate()
    search_files(key, folder)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_file_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    path = folder / "key"
    path.write_text(KEYS["plain"])
    path.chmod(mode)
    done = batchstream("run", "p.jsonl", "--provider", "sim", "--api-key-file", path, cwd=folder)
    assert done.returncode == 2
    assert f"mode {mode:04o}" in done.stderr
    assert "chmod 600" in done.stderr
    search(KEYS["plain"], "stderr", done.stderr.encode())


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_the_state_is_its_owners_alone_whatever_the_umask(folder: Path, mask: int) -> None:
    program = (
        f"import os, sys; os.umask({mask}); sys.argv[0] = 'batchstream'; from batchstream.cli.main import main; main()"
    )
    args = ["run", "-", "-o", "o.jsonl", "--provider", "sim", "--model", "sim"]
    done = subprocess.run([sys.executable, "-c", program, *args], cwd=folder, env=environment(), text=True, check=False,
                          input='{"prompt": "one"}\n', capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    journal = folder / "o.jsonl.journal"
    assert stat.S_IMODE(journal.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in journal.rglob("*")}
    assert set(modes.values()) == {0o600}, modes
    assert len(modes) >= 4
    # The results are the user's: as the umask says.
    assert stat.S_IMODE((folder / "o.jsonl").stat().st_mode) == 0o666 & ~mask


def test_rows_choose_neither_host_nor_header_nor_file(folder: Path) -> None:
    rows = [
        {
            "custom_id": "../../../../etc/cron.d/x",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": []},
        },
        {"custom_id": "h", "method": "POST", "url": "http://127.0.0.1:1/v1/chat/completions", "body": {"messages": []}},
        {
            "custom_id": "t",
            "method": "POST",
            "url": "//elsewhere.invalid/v1/chat/completions",
            "body": {"messages": []},
        },
        {"custom_id": "d", "method": "POST", "url": "/v1/../../admin", "body": {"messages": []}},
        {"custom_id": "m", "method": "DELETE", "url": "/v1/chat/completions", "body": {"messages": []}},
        {"id": "a\r\nX-Evil: 1", "prompt": "x", "headers": {"X-Evil": "1"}, "base_url": "http://evil.invalid"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[tuple[str, dict[str, str], bytes]] = []

    class Witness(Parrot):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), body))
            self.answer(200, self.stream("text", "k", "ok"), "text/event-stream")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Witness) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}/v1"
        before = set(os.listdir(folder))
        done = batchstream("run", "rows.jsonl", "-o", "o.jsonl", "--base-url", base, "--model", "m", cwd=folder)
        server.shutdown()
    assert done.returncode in (0, 3), done.stderr
    assert {path for path, _, _ in seen} <= {"/v1/chat/completions"}
    assert not any("evil" in name.lower() for _, headers, _ in seen for name in headers)
    assert set(os.listdir(folder)) - before == {"o.jsonl", "o.jsonl.journal", "o.jsonl.summary.json"}
    results = [json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines()]
    refused = {row["id"] for row in results if row["error"] and row["error"]["kind"] == "invalid_row"}
    assert {"h", "t", "d", "m"} <= refused
    assert len(seen) == len(rows) - len(refused)
