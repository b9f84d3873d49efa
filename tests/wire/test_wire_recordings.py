"""What real servers sent (tests/corpus/streams) comes out right in both lanes and at any cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from wire_corpus import RECORDINGS, Case, replay, seen

from batchstream.wire.reception import Reception

# name, API, complete or kind of failure, finish reasons, tool calls, total tokens, ordinal of first output, chunks
EXPECTED: list[tuple[str, str, str, list[str | None], int, int | None, int | None, int]] = [
    ("llamacpp/01_chat_usage", "chat", "complete", ["length"], 0, 74, 2, 40),
    ("llamacpp/04_completions", "completions", "complete", ["length"], 0, 25, 1, 20),
    ("llamacpp/05_chat_n2", "chat", "complete", ["length", "stop"], 0, 46, 2, 15),
    ("llamacpp/09_context_overflow", "chat", "context_length", [], 0, None, None, 0),
    ("llamacpp/13_logprobs", "chat", "complete", ["length"], 0, 36, 2, 5),
    ("llamacpp/15_utf8_emoji", "chat", "complete", ["length"], 0, 83, 1, 13),
    ("llamacpp/16_nonstream", "chat", "complete", ["length"], 0, 36, None, 0),
    ("llamacpp/19_max_tokens_1", "chat", "complete", ["length"], 0, 32, 2, 1),
    ("llamacpp/21_responses", "responses", "complete", ["completed"], 0, 39, 5, 8),
    ("llamacpp/22_anthropic", "anthropic", "complete", ["max_tokens"], 0, 9, 3, 8),
    ("llamacpp/32_kv_overflow_1", "chat", "server", [None], 0, None, 2, 92),
    ("llamacpp/34_ping_first", "chat", "truncated", [None], 0, None, 2, 82),
    ("llamacpp/33_no_key_401", "chat", "auth", [], 0, None, None, 0),
    ("vllm/03_continuous_usage", "chat", "complete", ["length"], 0, 38, 2, 6),
    ("vllm/04_tools_required", "chat", "complete", ["tool_calls"], 1, 88, 2, 9),
    ("vllm/06_n2", "chat", "complete", ["length", "length"], 0, 50, 3, 16),
    ("vllm/07_completions", "completions", "complete", ["length"], 0, 13, 1, 8),
    ("vllm/11_ctx_overflow", "chat", "context_length", [], 0, None, None, 0),
    ("vllm/13_logprobs", "chat", "complete", ["length"], 0, None, 2, 4),
    ("vllm/19_engine_killed", "chat", "server", [None], 0, None, 2, 83),
    ("vllm/21_stream_interval4", "chat", "complete", ["stop"], 0, 42, 2, 4),
    ("aimock/both", "chat", "complete", ["tool_calls"], 1, 8, 2, 5),
    ("aimock/disc", "chat", "truncated", [None], 0, None, 2, 4),
    ("aimock/emoji", "chat", "complete", ["stop"], 0, 14, 2, 6),
    ("aimock/garble", "chat", "decode", [], 0, None, None, 0),
    ("aimock/openrouter", "chat", "complete", ["stop"], 0, 10, 2, 4),
    ("aimock/r429", "chat", "rate_limit", [], 0, None, None, 0),
    ("aimock/think", "chat", "complete", ["stop"], 0, 7, 1, 7),
    ("aimock/weather", "chat", "complete", ["tool_calls"], 2, 20, 2, 9),
    ("aimock/filter", "chat", "complete", ["content_filter"], 0, 4, 2, 1),
    ("litellm/n2", "chat", "complete", ["stop", None], 0, None, 1, 22),
    ("litellm/up_disc", "chat", "server", [None], 0, None, 2, 4),
    ("litellm/up_garble", "chat", "complete", ["stop"], 0, None, None, 0),
    ("litellm/ctx", "chat", "context_length", [], 0, None, None, 0),
    ("litellm/rpm4", "chat", "rate_limit", [], 0, None, None, 0),
    ("llmock_pypi/f_malformed", "chat", "decode", [None], 0, None, 2, 2),
    ("llmock_pypi/f_truncate", "chat", "truncated", [None], 0, None, 2, 2),
    ("llmock_pypi/n2", "chat", "complete", ["stop", "stop"], 0, 9, 2, 8),
    ("llmock_pypi/f_503", "chat", "overloaded", [], 0, None, None, 0),
    ("guidellm/compl", "completions", "complete", [None, None, None, None, None, "stop"], 0, 9, 1, 6),
    ("guidellm/chat_tools", "chat", "complete", ["tool_calls"], 1, 23, 1, 3),
    ("haproxy/server_timeout", "chat", "timeout", [], 0, None, None, 0),
    ("nginx/read_timeout_slow", "chat", "timeout", [], 0, None, None, 0),
    ("nginx/gzip_hello", "chat", "complete", ["stop"], 0, 10, 2, 4),
    ("llm_katan/chat1", "chat", "complete", ["stop"], 0, 12, 2, 31),
]
CUT_OFF = {"aimock/disc", "llamacpp/34_ping_first"}


def recording(name: str, api: str) -> Case:
    raw = (RECORDINGS / f"{name}.http").read_bytes()
    blank = b"\r\n\r\n" if b"\r\n\r\n" in raw else b"\n\n"
    head, _, body = raw.partition(blank)
    first, *fields = head.decode().splitlines()
    headers = [(key.strip(), value.strip()) for key, _, value in (field.partition(":") for field in fields)]
    return Case(name, api, None, int(first.split()[1]), headers, [body], "reset" if name in CUT_OFF else "close", {})


def naive_texts(body: bytes) -> dict[int, str]:
    """The texts of a stream whose events are plain lines: json.loads of each, nothing else."""
    texts: dict[int, str] = {}
    for line in body.decode().split("\n"):
        if not line.startswith("data: {"):
            continue
        try:
            document: dict[str, Any] = json.loads(line[6:])
        except ValueError:
            break
        for choice in document.get("choices", []):
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
        if document.get("type", "").endswith("delta"):
            delta = document.get("delta")
            texts[0] = texts.get(0, "") + (delta.get("text", "") if isinstance(delta, dict) else delta)
    return texts


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: expected[0])
def test_a_recording_comes_out_right(expected: Any) -> None:
    name, api, end, finish, calls, tokens, first, chunks = expected
    case = recording(name, api)
    for lane in ("auto", "full"):
        reception = replay(case, case.segments, lane)
        completion, failure = reception.outcome()
        choices = completion.choices if completion else []
        assert (failure.kind if failure else reception.state) == end
        assert [choice.finish_reason for choice in choices] == finish
        assert sum(len(choice.tool_calls or []) for choice in choices) == calls
        assert (completion.usage.total_tokens if completion and completion.usage else None) == tokens
        assert (reception.ttft_event, reception.chunks) == (first, chunks)
        if case.status == 200 and name != "llamacpp/16_nonstream":
            assert {choice.index: choice.text or "" for choice in choices} == naive_texts(case.body)


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: expected[0])
def test_the_cuts_of_a_recording_do_not_matter(expected: Any) -> None:
    case = recording(expected[0], expected[1])
    whole = seen(replay(case, [case.body]))
    for size in (1, 2, 3, 7, 100, 1460):
        segments = [case.body[i : i + size] for i in range(0, len(case.body), size)]
        assert seen(replay(case, segments)) == whole


def test_a_queue_of_keep_alives_is_neither_event_nor_output() -> None:
    reception = Reception("chat")
    reception.head(200, [("Content-Type", "text/event-stream")], 0.0)
    assert not any(reception.feed(b":\n\n", now) for now in range(30))
    assert (reception.first_event_at, reception.first_output_at) == (None, None)


def test_the_tool_calls_of_two_servers_have_names_and_whole_arguments() -> None:
    def calls(name: str) -> list[tuple[str, Any]]:
        completion, _ = replay(recording(name, "chat"), recording(name, "chat").segments).outcome()
        assert completion is not None
        return [
            (call.function.name, json.loads(call.function.arguments)) for call in completion.choices[0].tool_calls or []
        ]

    assert [name for name, _ in calls("aimock/weather")] == ["get_weather", "get_weather"]
    assert [name for name, _ in calls("vllm/04_tools_required")] == ["get_weather"]
