"""What the simulated endpoint answers: in four APIs, streamed as well as whole, always the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchstream.endpoints.sim.answers import VOCABULARY, answer
from batchstream.endpoints.sim.asks import PATHS, Refusal, understand
from batchstream.endpoints.simulate import SimulateConfig

# How fast a machine is must not decide a test: on a fresh checkout the first text drawn takes seconds.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MESSAGES = [{"role": "user", "content": "Name three colours, please."}]
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "exact": {"type": "boolean"},
            "at": {"type": "array", "items": {"type": "number"}},
        },
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "null"}}}}
CHAT_TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]


def chat_from_stream(payloads: list[Any]) -> dict[int, dict[str, Any]]:
    """An assembler of this test's own: by choice, what the deltas add up to."""
    found: dict[int, dict[str, Any]] = {}
    for payload in payloads:
        for choice in payload["choices"] if payload != "[DONE]" else []:
            into = found.setdefault(
                choice["index"], {"content": "", "reasoning": "", "calls": {}, "finish": None, "logprobs": []}
            )
            delta = choice["delta"]
            into["content"] += delta.get("content") or ""
            into["reasoning"] += delta.get("reasoning_content") or ""
            for part in delta.get("tool_calls", ()):
                call = into["calls"].setdefault(
                    part["index"], {"id": part.get("id"), "name": part["function"].get("name"), "arguments": ""}
                )
                call["arguments"] += part["function"]["arguments"]
            into["logprobs"] += (choice.get("logprobs") or {}).get("content", [])
            into["finish"] = choice["finish_reason"] or into["finish"]
    return found


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 3},
        {"max_tokens": 5},
        {"max_completion_tokens": 1},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "low", "max_tokens": 4},
        {"logprobs": True},
        {"tools": CHAT_TOOLS, "tool_choice": "required"},
        {"tools": CHAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": True},
        {"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "clock"}}},
        {"tools": CHAT_TOOLS, "tool_choice": "auto"},
        {"stop": " the"},
    ],
    ids=json.dumps,
)
def test_a_streamed_chat_is_the_whole_answer_in_pieces(simulated, extra: dict[str, Any]) -> None:
    sim = simulated(tokens="70..90")
    body = {"model": "sim", "messages": MESSAGES, **extra}
    whole = sim.request("POST", "/v1/chat/completions", body).json
    streamed = sim.request(
        "POST", "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.payloads[-1] == "[DONE]"
    assert streamed.payloads[-2]["choices"] == []
    assert streamed.payloads[-2]["usage"] == whole["usage"]
    pieces = chat_from_stream(streamed.payloads)
    assert sorted(pieces) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        message, piece = choice["message"], pieces[choice["index"]]
        assert piece["content"] == (message["content"] or "")
        assert piece["reasoning"] == message.get("reasoning_content", "")
        assert piece["finish"] == choice["finish_reason"]
        assert piece["logprobs"] == choice.get("logprobs", {}).get("content", [])
        assert [{"id": call["id"], **call["function"]} for call in message.get("tool_calls", [])] == [
            {"id": call["id"], "name": call["name"], "arguments": call["arguments"]} for call in piece["calls"].values()
        ]
    assert {payload["id"] for payload in streamed.payloads[:-1]} == {whole["id"]}


def test_max_tokens_cuts_with_length_and_usage_counts_what_was_generated(simulated) -> None:
    sim = simulated(tokens=20)
    body = {"model": "sim", "messages": MESSAGES}
    full = sim.request("POST", "/v1/chat/completions", body).json
    cut = sim.request("POST", "/v1/chat/completions", {**body, "max_tokens": 5}).json
    assert (full["choices"][0]["finish_reason"], full["usage"]["completion_tokens"]) == ("stop", 20)
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 5)
    exact = sim.request("POST", "/v1/chat/completions", {**body, "max_tokens": 99, "ignore_eos": True}).json
    assert (exact["choices"][0]["finish_reason"], exact["usage"]["completion_tokens"]) == ("length", 99)


def test_prompt_tokens_follow_the_stated_rule_of_thumb(simulated) -> None:
    usage = simulated().request("POST", "/v1/chat/completions", {"model": "sim", "messages": MESSAGES}).json["usage"]
    assert usage["prompt_tokens"] == 3 + 7  # a message, and 27 bytes by four
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_tool_arguments_are_json_that_fits_the_schema(simulated) -> None:
    sim = simulated()
    body = {
        "model": "sim",
        "messages": MESSAGES,
        "tools": CHAT_TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": True,
    }
    choice = sim.request("POST", "/v1/chat/completions", body).json["choices"][0]
    weather, clock = (call["function"] for call in choice["message"]["tool_calls"])
    assert choice["finish_reason"] == "tool_calls"
    assert (weather["name"], clock["name"]) == ("weather", "clock")
    given = json.loads(weather["arguments"])
    assert list(given) == ["city", "days", "unit", "exact", "at"]
    assert isinstance(given["city"], str)
    assert isinstance(given["days"], int)
    assert given["unit"] in ("C", "F")
    assert isinstance(given["exact"], bool)
    assert isinstance(given["at"][0], float)
    assert json.loads(clock["arguments"]) == {"zone": None}


def test_usage_is_streamed_only_when_asked_for(simulated) -> None:
    assert not any("usage" in payload for payload in simulated().chat().payloads[:-1])


@pytest.mark.parametrize(
    "extra",
    [{}, {"n": 2}, {"prompt": ["one", "two"]}, {"prompt": [1, 2, 3]}, {"logprobs": 1}, {"max_tokens": 3}],
    ids=json.dumps,
)
def test_a_streamed_completion_is_the_whole_one_in_pieces(simulated, extra: dict[str, Any]) -> None:
    sim = simulated(tokens="10..20")
    body = {"model": "sim", "prompt": "Once upon", **extra}
    whole = sim.request("POST", "/v1/completions", body).json
    streamed = sim.request(
        "POST", "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    ).payloads
    assert streamed[-1] == "[DONE]"
    assert streamed[-2]["usage"] == whole["usage"]
    assert len(whole["choices"]) == (2 if extra.get("n") == 2 or extra.get("prompt") == ["one", "two"] else 1)
    for choice in whole["choices"]:
        own = [each for payload in streamed[:-1] for each in payload["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"] != ""
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if choice["logprobs"]:
            given = [each["logprobs"] for each in own if each["logprobs"]]
            for field in ("tokens", "token_logprobs", "text_offset"):
                assert [value for each in given for value in each[field]] == choice["logprobs"][field]


RESPONSES_TOOLS = [{"type": "function", **tool} for tool in (WEATHER, CLOCK)]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"reasoning": {"effort": "minimal"}},
        {"max_output_tokens": 3},
        {"reasoning": {"effort": "minimal"}, "max_output_tokens": 2},
        {"tools": RESPONSES_TOOLS, "tool_choice": "required", "parallel_tool_calls": True},
    ],
    ids=json.dumps,
)
def test_the_responses_api_numbers_its_events_and_ends_with_the_whole_response(
    simulated, extra: dict[str, Any]
) -> None:
    sim = simulated(tokens=12)
    body = {"model": "sim", "input": "Hello", **extra}
    whole = sim.request("POST", "/v1/responses", body).json
    events = sim.request("POST", "/v1/responses", {**body, "stream": True}).payloads
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1] == {"type": f"response.{whole['status']}", "sequence_number": len(events) - 1, "response": whole}
    assert whole["status"] == ("incomplete" if "max_output_tokens" in extra else "completed")
    for index, item in enumerate(whole["output"]):
        own = [event for event in events if event.get("output_index") == index]
        text = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        parts = item.get("content", item.get("summary"))
        assert text == (item["arguments"] if item["type"] == "function_call" else parts[0]["text"])
        assert own[-1] == {**own[-1], "type": "response.output_item.done", "item": item}


MESSAGES_TOOLS = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in (WEATHER, CLOCK)]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({}, "end_turn"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "end_turn"),
        ({"tools": MESSAGES_TOOLS, "tool_choice": {"type": "any"}}, "tool_use"),
    ],
    ids=json.dumps,
)
def test_the_messages_api_streams_the_blocks_of_the_whole_message(
    simulated, extra: dict[str, Any], reason: str
) -> None:
    sim = simulated(tokens=12)
    body = {"model": "sim", "messages": MESSAGES, "max_tokens": 500, **extra}
    whole = sim.request("POST", "/v1/messages", body).json
    events = sim.request("POST", "/v1/messages", {**body, "stream": True}).payloads
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == reason
    for index, block in enumerate(whole["content"]):
        own = [event for event in events if event.get("index") == index]
        assert (own[0]["type"], own[-1]["type"]) == ("content_block_start", "content_block_stop")
        deltas = [event["delta"] for event in own[1:-1]]
        if block["type"] == "tool_use":
            assert json.loads("".join(delta["partial_json"] for delta in deltas)) == block["input"]
            assert own[0]["content_block"]["name"] == block["name"]
        elif block["type"] == "text":
            assert "".join(delta["text"] for delta in deltas) == block["text"]
        else:
            assert "".join(delta.get("thinking", "") for delta in deltas) == block["thinking"]


def test_the_same_body_gets_the_same_answer_whatever_came_before_and_another_seed_another(simulated) -> None:
    first, second, other = simulated(seed=1), simulated(seed=1), simulated(seed=2)
    second.chat("something else")
    second.chat("hi")
    assert first.chat("hi").body == second.chat("hi").body
    assert first.chat("hi").headers["x-request-id"] == second.chat("hi").headers["x-request-id"]
    assert first.chat("hi").body != other.chat("hi").body


def test_different_bodies_never_share_an_answer(simulated) -> None:
    sim = simulated(tokens=4)
    texts = {chat_from_stream(sim.chat(f"row {row}").payloads)[0]["content"] for row in range(50)}
    assert len(texts) == 50


def test_the_vocabulary_has_what_breaks_careless_clients() -> None:
    words = "".join(VOCABULARY)
    assert len(set(VOCABULARY)) == 64
    assert all(character in words for character in '"\\\n\t\u2028\u0085é日🙂{')


def test_models_are_listed_with_what_shuttleai_says_about_them(simulated) -> None:
    sim = simulated(models={"a": 1.0, "b/c": 1.5}, context_length=4096)
    assert [model["id"] for model in sim.request("GET", "/v1/models").json["data"]] == ["a", "b/c"]
    assert sim.request("GET", "/v1/models/b/c").json["id"] == "b/c"
    assert sim.request("GET", "/v1/models/x").status == 404
    verbose = sim.request("GET", "/v1/models/verbose").json["data"][1]
    assert (verbose["id"], verbose["request_multiplier"], verbose["plan"]) == ("b/c", 1.5, "free")
    assert verbose["permission"]["context_length"] == 4096


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", b"{", 400, "not JSON"),
        ("/v1/chat/completions", b"[1]", 400, "must be an object"),
        ("/v1/chat/completions", {"messages": MESSAGES}, 400, "model"),
        ("/v1/chat/completions", {"model": "sim"}, 400, "messages"),
        ("/v1/chat/completions", {"model": "sim", "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"model": "sim", "messages": MESSAGES, "n": 0.5}, 400, "'n'"),
        ("/v1/chat/completions", {"model": "sim", "messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/chat/completions", {"model": "sim", "messages": MESSAGES, "max_tokens": 200_000}, 400, "maximum context"),
        (
            "/v1/chat/completions",
            {"model": "sim", "messages": MESSAGES, "reasoning_effort": "huge"},
            400,
            "reasoning_effort",
        ),
        ("/v1/chat/completions", {"model": "nope", "messages": MESSAGES}, 404, "does not exist"),
        ("/v1/messages", {"model": "sim", "messages": MESSAGES}, 400, "max_tokens"),
        ("/v1/responses", {"model": "sim", "messages": MESSAGES}, 400, "input"),
        ("/v1/embeddings", {"model": "sim", "input": "x"}, 404, "/v1/embeddings"),
    ],
)
def test_a_careful_endpoint_refuses_what_is_wrong(simulated, path: str, body: Any, status: int, words: str) -> None:
    refused = simulated(only_known=True).request("POST", path, body)
    assert refused.status == status
    assert words in refused.json["error"]["message"]


def test_an_api_that_is_not_served_is_not_found(simulated) -> None:
    sim = simulated(apis="chat")
    assert sim.chat().status == 200
    assert sim.request("POST", "/v1/completions", {"model": "sim", "prompt": "x"}).status == 404


def test_a_method_that_makes_no_sense_is_refused_and_the_connection_lives_on(simulated) -> None:
    client = simulated().client()
    client.send("DELETE", "/v1/models")
    assert client.read().status == 405
    client.send("GET", "/v1/models")
    assert client.read().status == 200


NAMES = ("role", "content", "name", "type", "function", "parameters", "properties", "enum", "effort", "text")
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.text(max_size=8) | st.floats(-9, 9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = (
    "model", "messages", "prompt", "input", "n", "max_tokens", "stop", "tools", "tool_choice", "reasoning",
    "reasoning_effort", "thinking", "stream_options", "logprobs", "ignore_eos", "system",
)  # fmt: skip


@settings(CALM, max_examples=300)
@given(st.sampled_from(sorted(PATHS.values())), st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=8))
def test_any_body_is_answered_or_refused_and_never_a_crash(api: Any, body: dict[str, Any]) -> None:
    body = {"model": "sim", "messages": MESSAGES, "prompt": "x", "input": "x", "max_tokens": 9, **body}
    try:
        ask = understand(api, body, SimulateConfig())
    except Refusal:
        return
    found = answer(ask, 1, 0, (4, 8))
    assert len(found.choices) == ask.choices
