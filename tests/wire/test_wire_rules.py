"""The rules of the wire, one small stream each, beyond what the corpus holds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchstream.records import Completion, Failure, Usage
from batchstream.wire.reception import Reception
from batchstream.wire.usage import normalise_usage

DONE = "data: [DONE]\n\n"


def data(*payloads: Any) -> str:
    return "".join(f"data: {p if isinstance(p, str) else json.dumps(p)}\n\n" for p in payloads)


def delta(finish: str | None = None, index: Any = 0, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": fields, "finish_reason": finish}]}


def fragment(**fields: Any) -> dict[str, Any]:
    return delta(tool_calls=[fields])


def receive(body: str | bytes, api: Any = "chat", n: int | None = None, end: str = "close") -> Reception:
    """Each lane, whole and byte by byte, comes to the same end; returns one of them."""
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    seen = []
    for lane in ("auto", "full"):
        for segments in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
            reception = Reception(api, n=n, lane=lane)  # type: ignore[arg-type]
            reception.head(200, [], 0.0)
            for number, segment in enumerate(segments):
                if reception.feed(segment, float(number)):
                    break
            if end != "open":
                reception.end(end == "close", 1e6)
            seen.append(reception)
    first, *others = seen
    for other in others:
        assert (other.outcome(), other.ttft_event, other.ttfo_event) == (
            first.outcome(),
            first.ttft_event,
            first.ttfo_event,
        )
    assert first.final
    return first


def completion(body: str | bytes, **options: Any) -> Completion:
    found, failure = receive(body, **options).outcome()
    assert failure is None
    assert found is not None
    return found


def failure(body: str | bytes, **options: Any) -> Failure:
    _, found = receive(body, **options).outcome()
    assert found is not None
    return found


def text(body: str | bytes, **options: Any) -> str | None:
    return completion(body, **options).choices[0].text


A, STOP = delta(content="a"), delta("stop")


# Payloads


@pytest.mark.parametrize(
    "body",
    [
        data(A, "data: " + json.dumps(STOP), "[DONE]"),
        data("data:data:  data: " + json.dumps(A), STOP) + 'data: "[DONE]"\n\n',
        f"data: {json.dumps(A)}\ndata: {json.dumps(STOP)}\ndata: [DONE]\n\n",
        f"data: ping\ndata: {json.dumps(A)}\n\n" + data(STOP, "[DONE]"),
        json.dumps(A) + "\n" + json.dumps(STOP) + "\n",
        json.dumps(A, indent=2) + "\n\n" + json.dumps(STOP, indent=2) + "\n",
        data([A, STOP], "[DONE]"),
        "[note] a line that begins with a bracket\n" + data(A, STOP, "[DONE]"),
        data(A, "null", "7", "text", "{}", "[]", STOP) + DONE,
        "event: message\n" + data(A) + "event: delta\nid: 5\n" + data(STOP, "[DONE]"),
        data(A, STOP, "[DONE]", {"error": {"message": "too late"}}),
    ],
)
def test_however_payloads_are_wrapped_the_text_is_read(body: str) -> None:
    assert text(body) == "a"


def test_each_document_of_a_block_is_an_event_of_its_own() -> None:
    body = f"data: {json.dumps(delta(content=''))}\ndata: {json.dumps(A)}\n\n" + DONE
    assert receive(body).ttft_event == 2


def test_a_delta_without_data_counts_as_an_event_and_a_whole_answer_does_not() -> None:
    assert receive(data({}) + json.dumps(A) + "\n" + DONE).ttft_event == 2
    whole = {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}
    assert receive(data({}) + json.dumps(whole) + "\n" + DONE).ttft_event is None


@pytest.mark.parametrize("cut", ['{"choices":[{"delta":{"content":"lo', '{"a":1} tail', "[1,", '{"a":1}{"b":2}'])
def test_a_payload_that_begins_like_json_and_is_none_is_lost_text(cut: str) -> None:
    found = failure(data(A, cut, STOP, "[DONE]"))
    assert (found.kind, found.retryable) == ("decode", True)


def test_an_error_behind_a_cut_payload_explains_it() -> None:
    error = json.dumps({"error": {"message": "upstream", "code": 502}})
    assert failure(data(A) + f'data: {{"choices":[{{"del\ndata: {error}\n\n').kind == "server"
    assert failure(data(A) + f'data: {{"choices":[{{"del\n{error}\n\n').kind == "server"
    assert failure(data(A) + f'data: {{"choices":[{{"del\n{json.dumps(STOP)}\n\n').kind == "decode"


def test_unusual_numbers_controls_and_nesting_are_taken() -> None:
    for odd in ("1e999", "-Infinity", "9" * 5000, "[" * 400 + "]" * 400, '"\x01\t"'):
        assert text('data: {"x":' + odd + "," + json.dumps(A)[1:] + "\n\n" + DONE) == "a"
    assert (
        failure('data: {"x":' + "[" * 200_000 + "]" * 200_000 + "," + json.dumps(A)[1:] + "\n\n" + DONE).kind
        == "decode"
    )


def test_surrogate_halves_join_across_deltas_and_lonely_ones_are_replaced() -> None:
    halves = ['{"choices":[{"delta":{"content":"' + half + '"}}]}' for half in ("a\\ud83d", "\\ude80b\\udc00c")]
    assert text(data(*halves, "[DONE]")) == "a\N{ROCKET}b\ufffdc"


def test_whole_completions_are_accepted_final_without_an_end() -> None:
    whole = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"content": "w"}, "finish_reason": "stop"}],
    }
    for body in (json.dumps(whole), json.dumps(whole, indent=4), "\n  " + json.dumps(whole)):
        reception = receive(body, end="open")
        found, _ = reception.outcome()
        assert found is not None
        assert found.choices[0].text == "w"
        assert (reception.ttft_event, reception.first_output_at) == (None, None)


def test_a_final_message_does_not_double_the_deltas() -> None:
    assert (
        text(data(A, {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}, "[DONE]"))
        == "a"
    )


# Ends


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (data(A), "truncated"),
        (data(A) + 'data: {"choices":[{"del', "truncated"),
        (data(A) + 'event: error\ndata: {"error":', "truncated"),
        (data(A, delta("")), "truncated"),
        (data(A, delta("null")), "truncated"),
        ("", "empty_stream"),
        (": ping\n\n", "empty_stream"),
        (DONE, "empty_stream"),
        (data({"choices": []}), "empty_stream"),
        ('{"id":"1","choices":[{"index":0,"message":{"content":"cut', "empty_stream"),
        ("<html><body>hello</body></html>", "not_sse"),
        ("Internal error", "not_sse"),
        ('{"detail":"no such thing"}', "not_sse"),
        ("{malformed: <<<", "decode"),
    ],
)
def test_what_is_not_complete_says_why(body: str, kind: str) -> None:
    for end in ("close", "reset"):
        assert failure(body, end=end).kind == kind


def test_finish_reasons_of_all_choices_make_it_complete_whatever_follows() -> None:
    assert text(data(A, STOP) + 'data: {"usage":{"pro', end="reset") == "a"
    assert failure(data(A, STOP), n=2).kind == "truncated"
    assert failure(data(A, STOP, delta(index=1, content="b"))).kind == "truncated"


def test_with_one_choice_asked_every_index_is_that_choice() -> None:
    found = completion(data(delta(index=5, content="a"), delta("stop", index=None, content="b"), "[DONE]"), n=1)
    assert [(choice.index, choice.text) for choice in found.choices] == [(0, "ab")]
    for odd in ("0", None, 0.0, -3, 10**30, True, "x", [1]):
        assert text(data(delta(index=odd, content="a"), "[DONE]")) == "a"


def test_errors_end_the_response_and_keep_the_partial_text() -> None:
    for body, kind, retryable in (
        (data(A, {"error": {"code": "429", "message": "slow"}}), "rate_limit", True),
        (data(A, {"object": "error", "code": 400, "message": "bad"}), "invalid_request", False),
        (data(A, {"choices": [{"index": 0, "delta": {}, "error": {"code": 503}}]}), "overloaded", True),
        (data(A, delta("error")), "stream_error", True),
        (data(A, delta("abort")), "abort", True),
        (data(A) + "event: error\ndata: it broke\n\n", "stream_error", True),
        (data(A) + "event: error\ndata: {broken\n\n", "stream_error", True),
        (data(A) + '{"error":{"message":"x","code":500}}', "server", True),
        (data(A) + json.dumps({"error": {"message": "x", "type": "overloaded_error"}}, indent=2), "overloaded", True),
        (data(A) + 'error: {"message":"x","code":500}\n', "server", True),
        (data(A) + 'error: "overloaded"\n', "overloaded", True),
        (data(A, {"type": "error", "message": "x"}), "stream_error", True),
    ):
        reception = receive(body, end="open")
        found, wrong = reception.outcome()
        assert found is not None
        assert wrong is not None
        assert (found.choices[0].text, wrong.kind, wrong.retryable) == ("a", kind, retryable), body


@pytest.mark.parametrize("nothing", [None, False, "", {}, [], 0])
def test_a_falsy_error_is_none(nothing: Any) -> None:
    assert text(data({**A, "error": nothing}, {**STOP, "error": nothing}, "[DONE]")) == "a"


# Content


def test_reasoning_in_two_fields_counts_once_and_in_turn_counts_twice() -> None:
    def reasoning(*deltas: dict[str, Any]) -> str | None:
        return completion(data(*(delta(**fields) for fields in deltas), "[DONE]")).choices[0].reasoning

    assert reasoning({"reasoning": "a", "reasoning_content": "a"}, {"reasoning": "b", "reasoning_content": "b"}) == "ab"
    assert reasoning({"reasoning": "ab"}, {"reasoning_content": "ab"}) == "ab"
    assert reasoning({"reasoning": "a"}, {"reasoning_content": "b"}, {"reasoning": "c"}) == "abc"
    assert (
        reasoning({"reasoning": "a", "reasoning_details": [{"text": "a"}]}, {"reasoning_details": [{"summary": "b"}]})
        == "ab"
    )
    assert (
        reasoning(
            {"reasoning": "abd", "reasoning_details": [{"summary": "x"}]},
            {"reasoning": "c", "reasoning_details": [{"summary": "yy"}]},
        )
        == "abdc"
    )
    assert reasoning({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}]}) == "t"
    assert reasoning({"reasoning": "ha"}, {"reasoning": "ha"}) == "haha"


def test_parts_of_content_go_where_they_belong_and_none_is_lost() -> None:
    parts = [
        {"type": "text", "text": "a"},
        "b",
        {"type": "thinking", "thinking": "t"},
        {"type": "reference", "ids": [1]},
    ]
    parts.append({"type": "refusal", "refusal": "no"})
    (choice,) = completion(data(delta(content=parts), "[DONE]")).choices
    assert (choice.text, choice.reasoning, choice.refusal) == ("ab", "t", "no")
    assert choice.extra == {"content_parts": [{"type": "reference", "ids": [1]}]}


def test_fields_nobody_named_are_kept_and_padding_is_not() -> None:
    body = data(
        {
            **delta(content="a", citations=[1], mood="x", obfuscation="zz"),
            "provider": "P",
            "timings": {"a": 1},
            "created": 7,
        },
        {**delta("stop", citations=[2], mood="y", annotations=[]), "provider": None, "system_fingerprint": "fp"},
        "[DONE]",
    )
    found = completion(body)
    assert found.choices[0].extra == {"citations": [1, 2], "mood": "y"}
    assert found.extra == {"provider": "P", "created": 7, "system_fingerprint": "fp"}


def test_the_first_id_and_model_that_are_not_empty_count() -> None:
    found = completion(
        data({**A, "id": "", "model": ""}, {**A, "id": "1", "model": "m"}, {**A, "id": "2", "model": "k"}, "[DONE]")
    )
    assert (found.response_id, found.model) == ("1", "m")


def test_usage_is_the_last_snapshot_that_says_something() -> None:
    real = {"prompt_tokens": 3, "completion_tokens": 4}
    zero = {"prompt_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    for chunks in (
        [{**A, "usage": real}, {**STOP, "usage": zero}],
        [{**A, "usage": zero}, {**STOP, "usage": real}, {"choices": [], "usage": None}],
        [A, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": real}]}],
        [A, {**STOP, "x_groq": {"usage": real}}],
        [{**A, "usage": {"prompt_tokens": 1}}, {**STOP, "usage": real}, {"choices": [], "usage": "none"}],
    ):
        found = completion(data(*chunks, "[DONE]"))
        assert found.raw_usage == real
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 4, 7)
    assert completion(data({**A, "usage": zero}, "[DONE]")).usage is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4, 7)),
        ({"input_tokens": 3, "output_tokens": 4, "total_tokens": 9}, Usage(3, 4, 9)),
        ({"input_tokens": 4, "output_tokens": 9, "cache_read_input_tokens": 100}, Usage(4, 9, 13, cached_tokens=100)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4.9, "cost": 0.1}, Usage(3, 4, 7)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, Usage(3, None, None)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}, Usage(3, cached_tokens=2)),
        ({"input_tokens_details": {"cached_tokens": 2}, "output_tokens_details": {"reasoning_tokens": 1}},
         Usage(cached_tokens=2, reasoning_tokens=1)),
        ({"completion_tokens_details": {"reasoning_tokens": 25}, "completion_tokens": 30},
         Usage(None, 30, reasoning_tokens=25)),
        ({"prompt_tokens": -1, "completion_tokens": 10**30, "total_tokens": True}, Usage()),
        ({"prompt_tokens": float("nan"), "completion_tokens": float("inf"), "total_tokens": "7"}, Usage()),
        ({}, Usage()),
    ],
)  # fmt: skip
def test_usage_comes_under_one_set_of_names_and_nonsense_is_none(raw: dict[str, Any], expected: Usage) -> None:
    assert normalise_usage(raw) == expected


# Tool calls


def calls(*fragments: dict[str, Any]) -> list[tuple[str | None, str, str]]:
    (choice,) = completion(data(*fragments, delta("tool_calls"), "[DONE]")).choices
    return [(call.id, call.function.name, call.function.arguments) for call in choice.tool_calls or []]


def call(
    index: Any = None, identity: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    fields = {"id": identity, "function": {"name": name, "arguments": arguments}}
    return fragment(**fields) if index is None else fragment(index=index, **fields)


def test_fragments_of_one_index_are_one_call() -> None:
    assert calls(call(0, "a", "f", ""), call(0, "a", "f", '{"x"'), call(0, None, None, ":1}")) == [
        ("a", "f", '{"x":1}')
    ]
    assert calls(call(0, None, "f", ""), call(0, "late", None, "{}")) == [("late", "f", "{}")]
    assert calls(call(0, "a", "f", '{"x'), call(0, "b", "f", '":1}')) == [("b", "f", '{"x":1}')]
    assert calls(call("0", "a", "f", '{"x"'), call(0.0, None, None, ":1}")) == [("a", "f", '{"x":1}')]


def test_another_id_with_a_name_behind_whole_arguments_is_another_call() -> None:
    assert calls(call(0, "a", "f", "{}"), call(0, "b", "g", "{}")) == [("a", "f", "{}"), ("b", "g", "{}")]
    assert calls(call(0, "a", "f", ""), call(0, "b", "g", "{}")) == [("a", "f", ""), ("b", "g", "{}")]
    assert calls(call(0, "a", "f", '{"a":1'), call(0, None, None, "}"), call(0, "b", "g", "{}")) == [
        ("a", "f", '{"a":1}'),
        ("b", "g", "{}"),
    ]
    assert calls(call(0, "a", "f", "{a}"), call(0, "b", "g", "{}")) == [("b", "g", "{a}{}")]
    assert calls(call(0, None, "f", "{}"), call(0, "b", "g", "{}")) == [(None, "f", "{}"), ("b", "g", "{}")]
    assert calls(call(0, None, "f", "{}"), call(0, "b", "f", "")) == [("b", "f", "{}")]
    assert calls(call(0, "a", "f", "{}"), call(0, "b", None, " ")) == [("b", "f", "{} ")]


def test_without_an_index_the_id_tells_the_call() -> None:
    assert calls(call(None, "a", "f", '{"x"'), call(None, "b", "g", "{}"), call(None, "a", None, ":1}")) == [
        ("a", "f", '{"x":1}'),
        ("b", "g", "{}"),
    ]
    assert calls(call(None, "a", "f", '{"x"'), call(None, None, None, ":1}")) == [("a", "f", '{"x":1}')]
    assert calls(call(None, None, "f", '{"x"'), call(None, None, "f", ":1}")) == [(None, "f", '{"x":1}')]
    assert calls(call(None, None, "f", "{}"), call(None, None, "g", "{}")) == [(None, "f", "{}"), (None, "g", "{}")]


def test_calls_come_in_order_of_index_and_objects_are_serialised() -> None:
    assert calls(call(2, "b", "g", {"n": [1, None]}), call(1, "a", "f", "{}")) == [
        ("a", "f", "{}"),
        ("b", "g", '{"n":[1,null]}'),
    ]


def test_custom_tool_calls_keep_their_type() -> None:
    body = data(
        fragment(index=0, id="c", type="custom", custom={"name": "n", "input": "raw"}), delta("tool_calls"), "[DONE]"
    )
    (found,) = completion(body).choices[0].tool_calls or []
    assert (found.type, found.function.name, found.function.arguments) == ("custom", "n", "raw")


def test_only_fragments_that_say_something_are_output() -> None:
    assert receive(data(fragment(index=0), call(0, None, None, ""), call(0, "a"), "[DONE]")).ttft_event == 3
    assert (
        receive(data(delta(audio={"id": "x", "expires_at": 3}), delta(audio={"data": "AA"}), "[DONE]")).ttfo_event == 2
    )
    assert receive(data(delta(reasoning="r"), delta(refusal="no"), "[DONE]")).ttfo_event == 2


def test_a_listener_hears_surrogate_halves_joined_and_each_kind_of_text() -> None:
    heard: list[tuple[int, str, str]] = []
    reception = Reception("chat", on_delta=lambda piece: heard.append((piece.index, piece.kind, piece.text)))
    reception.head(200, [], 0.0)
    halves = ['{"choices":[{"delta":{"content":"' + half + '"}}]}' for half in ("a\\ud83d", "\\ude80")]
    body = data(
        delta(reasoning="r"), *halves, call(0, "i", "f"), call(0, None, None, "{}"), delta(refusal="no", index=1)
    )
    reception.feed(body.encode(), 1.0)
    assert heard == [
        (0, "reasoning", "r"),
        (0, "content", "a"),
        (0, "content", "\N{ROCKET}"),
        (0, "tool_call", "f"),
        (0, "tool_call", "{}"),
        (1, "refusal", "no"),
    ]


# The other APIs


def test_completions_zip_their_logprobs() -> None:
    choice = {
        "index": 0,
        "text": "ab",
        "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1, -2], "text_offset": [0, 1]},
    }
    (found,) = completion(data({"choices": [choice]}, "[DONE]"), api="completions").choices
    assert found.logprobs == [
        {"token": "a", "logprob": -1, "text_offset": 0},
        {"token": "b", "logprob": -2, "text_offset": 1},
    ]


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def test_responses_text_that_only_the_snapshot_holds_is_taken() -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "plan"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "Hi"}, {"type": "refusal", "refusal": "no"}]},
        {"type": "function_call", "id": "fc", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "web_search_call", "id": "ws"},
    ]
    reception = receive(
        data(event("response.completed", response={"status": "completed", "output": output})),
        api="responses",
        end="open",
    )
    found, _ = reception.outcome()
    assert found is not None
    (choice,) = found.choices
    assert (choice.text, choice.reasoning, choice.refusal, choice.finish_reason) == ("Hi", "plan", "no", "completed")
    assert [(c.id, c.function.name, c.function.arguments) for c in choice.tool_calls or []] == [("c", "f", "{}")]
    assert choice.extra == {"output_items": [{"type": "web_search_call", "id": "ws"}]}
    assert (reception.ttft_event, reception.ttfo_event) == (1, 1)


def test_responses_done_events_and_the_snapshot_do_not_double_the_deltas() -> None:
    place = {"output_index": 1, "content_index": 0, "item_id": "m"}
    item = {"type": "function_call", "id": "fc", "call_id": "c", "name": "f", "arguments": "{}"}
    body = data(
        event("response.output_text.delta", delta="Hi", **place),
        event("response.output_text.done", text="Hi", **place),
        event("response.output_text.done", text="!", output_index=2, content_index=0, item_id="m2"),
        event("response.output_item.added", output_index=3, item={**item, "arguments": ""}),
        event("response.function_call_arguments.delta", output_index=3, item_id="fc", delta="{}"),
        event("response.function_call_arguments.done", output_index=3, item_id="fc", arguments="{}"),
        event("response.output_item.done", output_index=3, item=item),
        event("response.completed", response={"status": "completed", "output": [
            {"type": "message", "content": [{"type": "output_text", "text": "Hi!"}]}, item]}),
    )  # fmt: skip
    (choice,) = completion(body, api="responses").choices
    assert choice.text == "Hi!"
    assert [call.function.arguments for call in choice.tool_calls or []] == ["{}"]


def test_responses_event_names_stand_in_for_missing_types() -> None:
    body = (
        'event: response.output_text.delta\ndata: {"delta":"x"}\n\nevent: response.completed\ndata: {"response":{}}\n\n'
    )
    assert text(body, api="responses") == "x"


def test_responses_ends() -> None:
    hi = event("response.output_text.delta", delta="x")
    incomplete = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    for kind in ("response.incomplete", "response.completed"):
        (choice,) = completion(data(hi, event(kind, response=incomplete)), api="responses", end="open").choices
        assert choice.finish_reason == "incomplete:max_output_tokens"
    assert failure(data(hi, "[DONE]"), api="responses").kind == "truncated"
    assert failure(data(hi, event("error", code="rate_limit_exceeded")), api="responses").kind == "rate_limit"
    failed = event("response.failed", response={"status": "failed", "error": {"code": "server_error", "message": "m"}})
    assert failure(data(hi, failed), api="responses").kind == "server"
    assert failure(data(event("response.created", response={"id": "r"})), api="responses").kind == "empty_stream"


def test_messages_blocks_usage_and_ends() -> None:
    start = event("message_start", message={"id": "m", "model": "c", "usage": {"input_tokens": 5, "output_tokens": 1}})
    text_start = event("content_block_start", index=0, content_block={"type": "text", "text": "He"})
    more = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "y"})
    unknown = event("content_block_delta", index=0, delta={"type": "novelty_delta", "x": 1})
    stop = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"input_tokens": 0, "output_tokens": 9})
    found = completion(data(start, text_start, event("ping"), unknown, more, event("surprise"), stop), api="messages")
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("Hey", "end_turn")
    assert found.raw_usage == {"input_tokens": 5, "output_tokens": 9}
    assert (
        completion(data(start, text_start, event("message_stop")), api="messages", end="open").choices[0].text == "He"
    )
    assert failure(data(start, text_start), api="messages").kind == "truncated"
    assert failure(data(start), api="messages").kind == "empty_stream"


def test_messages_tool_input_is_what_came_in_pieces_or_with_the_block() -> None:
    def opened(given: Any, *pieces: str) -> str:
        head = event(
            "content_block_start", index=1, content_block={"type": "tool_use", "id": "t", "name": "n", "input": given}
        )
        deltas = [
            event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": p}) for p in pieces
        ]
        body = data(
            head,
            *deltas,
            event("content_block_stop", index=1),
            event("message_delta", delta={"stop_reason": "tool_use"}),
        )
        (call,) = completion(body, api="messages").choices[0].tool_calls or []
        return call.function.arguments

    assert opened({}, "", '{"a":', "1}") == '{"a":1}'
    assert opened({"a": 1}) == '{"a":1}'
    assert opened({}) == "{}"


def test_messages_keep_the_blocks_that_are_more_than_text() -> None:
    body = data(
        event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}),
        event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}),
        event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "S"}),
        event("content_block_start", index=1, content_block={"type": "redacted_thinking", "data": "x"}),
        event("content_block_start", index=2, content_block={"type": "text", "text": ""}),
        event("content_block_delta", index=2, delta={"type": "text_delta", "text": "4"}),
        event("message_delta", delta={"stop_reason": "end_turn"}),
    )
    (choice,) = completion(body, api="messages").choices
    assert (choice.text, choice.reasoning) == ("4", "hm")
    assert choice.extra == {"content": [
        {"type": "thinking", "thinking": "hm", "signature": "S"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "4"},
    ]}  # fmt: skip


# Stamps and limits


def test_stamps_are_those_of_the_reads() -> None:
    reception = Reception("chat")
    reception.head(200, [("X-Request-Id", "r1")], 1.0)
    for now, body in ((2.0, ": ping\n\n"), (3.0, data(delta(content=""))), (4.0, data(delta(reasoning="r"))),
                      (6.5, data(A, A)), (7.0, data(A)), (8.0, DONE)):  # fmt: skip
        reception.feed(body.encode(), now)
    assert reception.request_id == "r1"
    stamps = (reception.headers_at, reception.first_event_at, reception.first_output_at, reception.first_visible_at,
              reception.last_output_at, reception.ended_at)  # fmt: skip
    assert stamps == (1.0, 3.0, 4.0, 6.5, 7.0, 8.0)
    assert (reception.chunks, reception.gap_max) == (4, 2.5)
    assert reception.feed(data(A).encode(), 9.0)
    assert reception.last_output_at == 7.0


def test_bodies_and_events_beyond_the_caps_fail_loudly() -> None:
    for options, piece in (
        ({"max_event_bytes": 1000}, b"x" * 600),
        ({"max_body_bytes": 2000}, b": " + b"x" * 600 + b"\n\n"),
    ):
        reception = Reception("chat", **options)
        reception.head(200, [], 0.0)
        assert any(reception.feed(piece, 1.0) for _ in range(5))
        _, wrong = reception.outcome()
        assert wrong is not None
        assert wrong.kind == "decode"
        assert "larger than" in wrong.message


def test_asked_before_the_end_the_outcome_is_what_has_come() -> None:
    reception = Reception("chat")
    reception.head(200, [], 0.0)
    assert reception.outcome()[0] is None
    reception.feed(data(A).encode(), 1.0)
    found, wrong = reception.outcome()
    assert found is not None
    assert wrong is not None
    assert (found.choices[0].text, wrong.kind) == ("a", "truncated")
