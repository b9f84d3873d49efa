"""Bodies: of requests for four APIs, and of responses rebuilt from streams as the endpoint would have sent them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchstream.endpoints.sim.answers import answer
from batchstream.endpoints.sim.asks import understand
from batchstream.endpoints.sim.dialects import BODIES, SCRIPTS
from batchstream.endpoints.sim.settings import SimulateConfig
from batchstream.errors import UsageError
from batchstream.records import APIS, Api, Choice, Completion, FunctionCall, ToolCall, Usage
from batchstream.wire.body import MESSAGES_MAX_TOKENS, build_body, to_response_body
from batchstream.wire.reception import Reception

RECORDINGS = Path(__file__).parent.parent / "corpus" / "streams"

# Requests


def test_a_prompt_becomes_each_apis_own_question() -> None:
    common = {"prompt": "Hi", "system": "Be brief.", "model": "m", "temperature": 0, "max_tokens": 5, "seed": None}
    usual = {"model": "m", "temperature": 0, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    assert build_body("chat", common) == {
        **usual, **usage, "max_tokens": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    }  # fmt: skip
    assert build_body("completions", common) == {**usual, **usage, "max_tokens": 5, "prompt": "Be brief.\n\nHi"}
    assert build_body("responses", common) == {
        **usual,
        "max_output_tokens": 5,
        "input": "Hi",
        "instructions": "Be brief.",
    }
    assert build_body("messages", common) == {
        **usual, "max_tokens": 5, "system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}],
    }  # fmt: skip


def test_messages_are_passed_on_and_not_changed() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    common = {"messages": messages, "max_tokens": 1}
    before = json.dumps(common)
    assert build_body("chat", common)["messages"] == messages
    assert build_body("responses", common)["input"] == [
        messages[0],
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ]
    found = build_body("messages", {**common, "system": "T"})
    assert (found["system"], found["messages"]) == ("T\n\nS", messages[1:])
    assert json.dumps(common) == before


def test_what_the_user_says_about_streaming_stays() -> None:
    assert "stream_options" not in build_body("chat", {"prompt": "x"}, include_usage=False)
    assert build_body("chat", {"prompt": "x", "stream_options": {"a": 1}})["stream_options"] == {"a": 1}
    assert build_body("chat", {"prompt": "x", "stream": False}) == {
        "stream": False,
        "messages": [{"role": "user", "content": "x"}],
    }
    assert build_body("chat", {"prompt": "x", "extra_body": {"top_k": 3}})["top_k"] == 3


def test_parameters_go_by_the_names_of_the_api() -> None:
    common = {"prompt": "x", "max_completion_tokens": 9, "stop": "END", "reasoning_effort": "low"}
    assert build_body("messages", common)["stop_sequences"] == ["END"]
    assert build_body("messages", common)["max_tokens"] == 9
    responses = build_body("responses", common)
    assert (responses["max_output_tokens"], responses["reasoning"]) == (9, {"effort": "low"})


def test_only_the_messages_api_is_given_a_limit_that_nobody_set() -> None:
    assert build_body("messages", {"prompt": "x"})["max_tokens"] == MESSAGES_MAX_TOKENS == 4096
    assert build_body("messages", {"prompt": "x", "max_tokens": None})["max_tokens"] == MESSAGES_MAX_TOKENS
    assert build_body("messages", {"prompt": "x", "max_output_tokens": 7})["max_tokens"] == 7
    others: tuple[Api, ...] = ("chat", "completions", "responses")
    for api in others:
        assert not {"max_tokens", "max_output_tokens"} & set(build_body(api, {"prompt": "x"}))


@pytest.mark.parametrize(
    ("api", "common", "words"),
    [
        ("chat", {"model": "m"}, "'prompt' or 'messages'"),
        ("chat", {"messages": "Hi"}, "messages: expected a list"),
        ("completions", {"messages": []}, "--api chat"),
        ("completions", {"prompt": ["a", "b"], "system": "s"}, "list of prompts"),
        ("messages", {"messages": [{"role": "system", "content": [1]}], "system": "s", "max_tokens": 1}, "system"),
    ],
)
def test_what_an_api_cannot_take_is_said_in_one_line(api: Api, common: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build_body(api, common)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


# Responses

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
]
ASKS: dict[str, tuple[Api, dict[str, Any]]] = {
    "chat": ("chat", {}),
    "chat n=3": ("chat", {"n": 3}),
    "chat logprobs": ("chat", {"logprobs": True}),
    "chat cut": ("chat", {"max_tokens": 3}),
    "chat tools": ("chat", {"tools": TOOLS, "tool_choice": "required"}),
    "chat reasoning": ("chat", {"reasoning_effort": "low"}),
    "completions": ("completions", {"logprobs": 1}),
    "completions n=2": ("completions", {"n": 2}),
    "messages": ("messages", {"max_tokens": 30}),
    "messages thinking": ("messages", {"max_tokens": 3000, "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    "messages tools": (
        "messages",
        {
            "max_tokens": 3000,
            "tools": [{"name": "f", "input_schema": TOOLS[0]["function"]["parameters"]}],
            "tool_choice": {"type": "any"},
        },
    ),
    "responses": ("responses", {}),
    "responses cut": ("responses", {"max_output_tokens": 3}),
    "responses reasoning": ("responses", {"reasoning": {"effort": "low"}}),
    "responses tools": (
        "responses",
        {"tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": "required"},
    ),
}


def asked(api: Api, fields: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The stream and the body that the simulated endpoint gives for the same answer."""
    config = SimulateConfig()
    request = build_body(
        api,
        {
            "prompt": "Tell me something.",
            "model": "sim",
            **fields,
            **({"max_tokens": 9} if api == "messages" and "max_tokens" not in fields else {}),
        },
    )
    ask = understand(api, request, config)
    told = answer(ask, 12345, 1, (20, 30))
    script = SCRIPTS[api](ask, told)
    stream = script.opening + b"".join(script.events) + script.closing()
    return stream, msgspec.json.decode(msgspec.json.encode(BODIES[api](ask, told)))


def received(api: Api, body: bytes) -> Completion:
    reception = Reception(api)
    reception.head(200, [], 0.0)
    reception.feed(body, 1.0)
    reception.end(True, 2.0)
    completion, failure = reception.outcome()
    assert failure is None
    assert completion is not None
    return completion


def comparable(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    """Without what streams leave out, and without nulls."""
    body = {key: value for key, value in body.items() if value is not None}
    if api == "responses":
        output = []
        for item in body["output"]:
            item = {key: value for key, value in item.items() if key not in ("id", "status")}
            output.append(item)
        body["output"] = output
    if api == "completions":
        for choice in body["choices"]:
            if choice["logprobs"]:
                choice["logprobs"] = {key: value for key, value in choice["logprobs"].items() if value is not None}
    return body


@pytest.mark.parametrize("name", ASKS)
def test_a_stream_gives_back_the_body_that_the_endpoint_sends_without_streaming(name: str) -> None:
    api, fields = ASKS[name]
    stream, body = asked(api, fields)
    rebuilt = msgspec.json.decode(msgspec.json.encode(to_response_body(received(api, stream), api)))
    expected = comparable(api, body)
    rebuilt = comparable(api, rebuilt)
    for choice in rebuilt.get("choices", []):
        if choice.get("logprobs") and "refusal" in choice["logprobs"]:
            del choice["logprobs"]["refusal"]
    assert rebuilt == expected


@pytest.mark.parametrize("name", ASKS)
def test_the_whole_body_is_received_as_the_same_answer_as_the_stream(name: str) -> None:
    api, fields = ASKS[name]
    stream, body = asked(api, fields)
    streamed, whole = received(api, stream), received(api, msgspec.json.encode(body))

    def said(completion: Completion) -> Any:
        return [
            (c.index, c.text or "", c.reasoning, c.finish_reason, c.tool_calls, c.logprobs) for c in completion.choices
        ]

    assert said(streamed) == said(whole)
    assert (streamed.usage, streamed.model, streamed.response_id) == (whole.usage, whole.model, whole.response_id)


def test_a_recorded_stream_gives_the_shape_of_the_recorded_body() -> None:
    raw = (RECORDINGS / "llamacpp" / "16_nonstream.http").read_bytes().partition(b"\r\n\r\n")[2]
    body = json.loads(raw)
    stream = (RECORDINGS / "llamacpp" / "01_chat_usage.http").read_bytes().partition(b"\r\n\r\n")[2]
    rebuilt = to_response_body(received("chat", stream), "chat")
    assert rebuilt.keys() == body.keys() - {"timings"}
    assert rebuilt["choices"][0].keys() == body["choices"][0].keys()
    assert rebuilt["choices"][0]["message"].keys() == body["choices"][0]["message"].keys()
    assert to_response_body(received("chat", raw), "chat") == {key: body[key] for key in rebuilt}


def test_what_the_stream_carries_beyond_text_is_in_the_body() -> None:
    extra = {"annotations": [1], "audio": {"id": "a"}, "content_filter_results": {"x": 1}, "refusal_logprobs": [2]}
    choice = Choice(0, None, "r", "no", [ToolCall("c", "custom", FunctionCall("n", "raw"))], "stop", None, extra)
    body = to_response_body(Completion([choice], extra={"service_tier": "x", "created": 5}), "chat")
    assert body["service_tier"] == "x"
    assert body["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": {"content": None, "refusal": [2]},
            "content_filter_results": {"x": 1},
            "message": {
                "role": "assistant",
                "content": None,
                "reasoning_content": "r",
                "refusal": "no",
                "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "n", "input": "raw"}}],
                "annotations": [1],
                "audio": {"id": "a"},
            },
        }
    ]


@pytest.mark.parametrize("api", APIS)
def test_usage_comes_back_under_the_names_of_the_api(api: Api) -> None:
    usage = Usage(1, 2, 3, cached_tokens=1, reasoning_tokens=0)
    body = to_response_body(Completion([Choice(0, "x", finish_reason="stop")], usage=usage), api)
    names = ("prompt", "completion") if api in ("chat", "completions") else ("input", "output")
    assert body["usage"] == {
        f"{names[0]}_tokens": 1, f"{names[1]}_tokens": 2, "total_tokens": 3,
        f"{names[0]}_tokens_details": {"cached_tokens": 1}, f"{names[1]}_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
