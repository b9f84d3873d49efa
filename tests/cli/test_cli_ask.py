"""`ask`: the answer on stdout as it comes, everything else on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cli import BAD_KEY, batchstream, command, environment, start
from terminal import in_terminal

from batchstream.endpoints.simulate import Simulator

At = Callable[[Simulator], list[str]]


def test_the_answer_is_all_of_stdout_and_the_figures_are_on_stderr(endpoint: Simulator, at: At, tmp_path: Path) -> None:
    done = batchstream("ask", "Why?", *at(endpoint), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 5
    for part in ("sim", "prompt + 8 completion tokens", "TTFT ", "finish: "):
        assert part in done.stderr
    assert endpoint.ledger.requests == 1


def test_quiet_leaves_the_answer_alone(tmp_path: Path) -> None:
    done = batchstream("ask", "Why?", "--provider", "sim", "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr, bool(done.stdout)) == (0, "", True)


def test_the_answer_comes_piece_by_piece(tmp_path: Path) -> None:
    slow = ["--provider", "sim", "--sim", "gap=0.25", "--sim", "tokens=12"]
    with start("ask", "Why?", *slow, "-q", cwd=tmp_path) as asking:
        assert asking.stdout is not None
        first = os.read(asking.stdout.fileno(), 1 << 16)
        assert first
        assert asking.poll() is None  # eleven more to come
        rest = asking.stdout.read()
    assert rest
    assert asking.returncode == 0


def test_reasoning_is_shown_on_stderr_and_only_when_asked(tmp_path: Path) -> None:
    thinking = ["--provider", "sim", "--param", "reasoning_effort=low"]
    plain = batchstream("ask", "Why?", *thinking, cwd=tmp_path)
    verbose = batchstream("ask", "Why?", *thinking, "-v", cwd=tmp_path)
    assert plain.stdout == verbose.stdout
    assert len(plain.stderr.splitlines()) == 1
    assert len(verbose.stderr) > len(plain.stderr) + 5


def test_tool_calls_come_whole_one_a_line(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    args = ["--param", f"tools={json.dumps([tool])}", "--param", "tool_choice=required"]
    done = batchstream("ask", "Weather?", "--provider", "sim", *args, "-q", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["name"] == "weather"


def test_json_logs_hold_the_whole_result(tmp_path: Path) -> None:
    done = batchstream("ask", "Why?", "--provider", "sim", "--log-format", "json", cwd=tmp_path)
    event = json.loads(done.stderr)
    assert (event["event"], event["result"]["text"] + "\n") == ("answer", done.stdout)


def test_the_prompt_may_come_from_stdin(tmp_path: Path) -> None:
    asked = subprocess.run(
        command("ask", "-", "--provider", "sim", "-q"), input="Why?", text=True, capture_output=True,
        cwd=tmp_path, env=environment(), check=True,
    )  # fmt: skip
    assert asked.stdout == batchstream("ask", "Why?", "--provider", "sim", "-q", cwd=tmp_path).stdout


def test_a_refused_key_is_exit_4_and_named(guarded: Simulator, tmp_path: Path) -> None:
    args = ["ask", "Why?", "--provider", "shuttleai", "--base-url", guarded.base_url]
    done = batchstream(*args, cwd=tmp_path, SHUTTLEAI_API_KEY=BAD_KEY)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert "variable SHUTTLEAI_API_KEY" in done.stderr
    assert BAD_KEY not in done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "kind"), [("400=1", 3, "invalid_request"), ("truncate(k=2)=1", 3, "truncated")]
)
def test_no_answer_is_exit_3_with_the_reason(fault: str, code: int, kind: str, tmp_path: Path) -> None:
    args = ["--provider", "sim", "--sim", f"faults={fault}", "--max-attempts", "1"]
    done = batchstream("ask", "Why?", *args, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(f"batchstream: error: {kind}: ")


def test_nobody_there_is_exit_4(tmp_path: Path) -> None:
    args = ["--base-url", "http://127.0.0.1:1/v1", "--model", "sim", "--max-attempts", "2"]
    done = batchstream("ask", "Why?", *args, cwd=tmp_path)
    assert done.returncode == 4
    assert "(after 2 attempts)" in done.stderr


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    slow = ["--provider", "sim", "--sim", "gap=0.05", "--sim", "tokens=200"]
    with start("ask", "Why?", *slow, cwd=tmp_path) as asking:
        assert asking.stdout is not None
        assert asking.stderr is not None
        os.read(asking.stdout.fileno(), 100)
        asking.stdout.close()
        assert asking.stderr.read() == ""
        assert asking.wait(60) == -signal.SIGPIPE


def test_ctrl_c_ends_it_by_the_signal_in_one_line(tmp_path: Path) -> None:
    slow = ["--provider", "sim", "--sim", "gap=0.2", "--sim", "tokens=200"]
    with start("ask", "Why?", *slow, cwd=tmp_path) as asking:
        assert asking.stdout is not None
        os.read(asking.stdout.fileno(), 100)
        asking.send_signal(signal.SIGINT)
        _, said = asking.communicate(timeout=60)
    assert asking.returncode == -signal.SIGINT
    assert said.splitlines()[-1] == "batchstream: error: interrupted"
    assert "Traceback" not in said


class Steering(BaseHTTPRequestHandler):
    """Answers with an escape sequence in the text."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"index": 0, "delta": {"content": "red \x1b[31malert\tnow"}, "finish_reason": "stop"}
        body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Not on the tests' stderr."""


def test_a_terminal_is_not_steered_by_an_answer_and_a_pipe_gets_it_as_it_is(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Steering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        args = ["ask", "Why?", "--base-url", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m", "-q"]
        code, shown = in_terminal(*args, cwd=tmp_path)
        piped = batchstream(*args, cwd=tmp_path)
        server.shutdown()
    assert (code, shown) == (0, "red \N{REPLACEMENT CHARACTER}[31malert\tnow\r\n")
    assert piped.stdout == "red \x1b[31malert\tnow\n"
