"""The whole CLI against a real model: llama.cpp's server on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import batchstream, rows_of

from batchstream.endpoints.local import LocalServer

pytestmark = pytest.mark.real_model

if importlib.util.find_spec("xllamacpp") is None:
    if os.environ.get("CI"):
        pytest.fail("xllamacpp is not installed; in CI the real model must be met", pytrace=False)
    pytest.skip("xllamacpp is not installed (extra `local`)", allow_module_level=True)

PROMPTS = [
    "Name the capital of France.",
    "Count from one to five.",
    "Was ist ein Hund? 🐶",
    "Write one line of Python.",
]
PARAMS = {"temperature": 0, "seed": 1, "max_tokens": 24}
API_OF = {"chat": "chat/completions", "completions": "completions", "responses": "responses", "messages": "messages"}


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with LocalServer(parallel=1) as server:
        yield server.base_url


def post(base_url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps({**body, "stream": False}).encode()
    request = urllib.request.Request(f"{base_url}/{path}", data, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
        return answer


def whole(api: str, base_url: str, prompt: str) -> tuple[str, int, int]:
    """Text, prompt tokens and completion tokens of the server's own non-streamed answer."""
    messages = [{"role": "user", "content": prompt}]
    body: dict[str, Any] = {"model": "m", **PARAMS}
    if api == "chat":
        answer = post(base_url, API_OF[api], {**body, "messages": messages})
        return (answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"],
                answer["usage"]["completion_tokens"])  # fmt: skip
    if api == "completions":
        answer = post(base_url, API_OF[api], {**body, "prompt": prompt})
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    if api == "responses":
        body["max_output_tokens"] = body.pop("max_tokens")
        answer = post(base_url, API_OF[api], {**body, "input": prompt})
        text = "".join(
            part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"]
        )
        return text, answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]
    answer = post(base_url, API_OF[api], {**body, "messages": messages})
    text = "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    return text, answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]


@pytest.mark.parametrize("api", API_OF)
def test_streamed_text_and_usage_equal_the_servers_own_answer(api: str, base_url: str, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt, **PARAMS}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    # One request at a time: batching on the server changes low bits.
    done = batchstream("run", source, "-o", "out.jsonl", "--base-url", base_url, "--model", "m", "--api", api,
                       "--concurrency", 1, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for prompt, row in zip(PROMPTS, rows_of(tmp_path / "out.jsonl"), strict=True):
        text, prompt_tokens, completion_tokens = whole(api, base_url, prompt)
        assert row["text"] == text
        assert row["usage"]["completion_tokens"] == completion_tokens
        assert row["usage"]["prompt_tokens"] == prompt_tokens
        assert row["timing"]["ttft_s"] > 0
        assert row["timing"]["latency_s"] >= row["timing"]["ttft_s"]


def of_the_answer(value: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from request to request (ids, clocks), and without nulls that one side spells out."""
    passing = ("id", "created", "timings")
    return {key: item for key, item in value.items() if key not in passing} | {
        "choices": [without_nulls(choice) for choice in value["choices"]]
    }


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def test_exported_batch_lines_hold_the_bodies_that_the_server_gives_without_streaming(
    base_url: str, tmp_path: Path
) -> None:
    source = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, **PARAMS} for prompt in PROMPTS]
    rows[1] |= {"logprobs": True, "top_logprobs": 2}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = batchstream("run", source, "-o", "out.jsonl", "--base-url", base_url, "--model", "m", "--concurrency", 1,
                       cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = batchstream("export", "out.jsonl", "--format", "openai-batch", "-o", "batch.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row, line in zip(rows, rows_of(tmp_path / "batch.jsonl"), strict=True):
        messages = [{"role": "user", "content": row["prompt"]}]
        asked = {"model": "m", "messages": messages} | {key: row[key] for key in row if key != "prompt"}
        body = line["response"]["body"]
        assert (line["error"], line["response"]["status_code"], body["object"]) == (None, 200, "chat.completion")
        assert of_the_answer(body) == of_the_answer(post(base_url, API_OF["chat"], asked))


def test_a_prompt_longer_than_the_context_fails_that_row_alone(base_url: str, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "word " * 5000, **PARAMS}, {"prompt": PROMPTS[0], **PARAMS}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = batchstream("run", source, "-o", "out.jsonl", "--base-url", base_url, "--model", "m", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    long, short = rows_of(tmp_path / "out.jsonl")
    assert (long["status"], long["error"]["kind"], long["attempts"]) == ("failed", "context_length", 1)
    assert short["status"] == "ok"


def test_a_context_that_overflows_in_mid_stream_is_a_failure_or_says_so(base_url: str, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Count upwards, never stop: " + "1 2 3 " * 300, "temperature": 0, "max_tokens": 4000}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batchstream("run", source, "-o", "out.jsonl", "--base-url", base_url, "--model", "m", cwd=tmp_path)
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert row["status"] == "failed" or row["finish_reason"] == "length"


def test_the_quickstart_job_runs_and_prints_its_figures(tmp_path: Path) -> None:
    jobs = Path(__file__).parents[2] / "jobs"
    done = batchstream("run", jobs / "quickstart.toml", "-o", tmp_path / "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in rows_of(tmp_path / "out.jsonl")} == {"ok"}
    assert "ttft" in done.stderr
    assert "completion tokens/s" in done.stderr


def test_ask_streams_text_to_stdout_and_figures_to_stderr(base_url: str, tmp_path: Path) -> None:
    done = batchstream("ask", PROMPTS[0], "--base-url", base_url, "--model", "m", "--param", "temperature=0",
                       "--param", "max_tokens=24", "--param", "seed=1", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == whole("chat", base_url, PROMPTS[0])[0].rstrip("\n")
    assert "TTFT" in done.stderr
