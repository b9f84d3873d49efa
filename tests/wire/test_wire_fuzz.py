"""Nothing a server sends raises, whatever it is; lanes and cuts agree; the work grows with the bytes, not faster.

The million: BATCHSTREAM_FUZZ_STREAMS=1000000 pytest -m sweep tests/wire/test_wire_fuzz.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_corpus import API, Case, replay, seen
from wire_fuzz import streams

from batchstream.records import APIS, Completion, Delta
from batchstream.wire.body import to_response_body
from batchstream.wire.reception import Reception


def check(case: Case, segments: list[bytes], *, twice: bool) -> None:
    """A stream ends in an outcome that can be stored; with `twice`, the same in the other lane, uncut."""
    try:
        reception = replay(case, segments)
        completion, failure = reception.outcome()
        assert reception.final
        assert (failure is None) == (reception.state == "complete")
        assert failure is None or "\n" not in failure.message
        if completion is not None:
            stored = msgspec.json.encode(completion)
            msgspec.json.decode(stored, type=Completion)
            msgspec.json.encode(to_response_body(completion, API[case.api]))
        msgspec.json.encode(failure)
        if twice:
            # Compared as text, since NaN does not equal itself.
            assert repr(seen(replay(case, [b"".join(segments)], "full"))) == repr(seen(reception))
    except Exception as error:
        error.add_note(f"{case.id} as {case.api}, n={case.n}, {case.status}, {case.headers}, {case.end}: {segments!r}")
        raise


@pytest.mark.parametrize("seed", range(8))
def test_mutated_streams_end_in_an_outcome(seed: int) -> None:
    for case, segments in islice(streams(seed), 1500):
        check(case, segments, twice=True)


@pytest.mark.sweep
def test_a_million_streams_end_in_an_outcome() -> None:
    count = int(os.environ.get("BATCHSTREAM_FUZZ_STREAMS", "1000000"))
    first = int(os.environ.get("BATCHSTREAM_FUZZ_SEED", "1000"))
    for number, (case, segments) in enumerate(islice(streams(first), count)):
        check(case, segments, twice=number % 8 == 0)


KEYS = st.sampled_from(
    [
        "choices",
        "delta",
        "message",
        "content",
        "text",
        "index",
        "finish_reason",
        "usage",
        "error",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "id",
        "type",
        "logprobs",
        "reasoning",
        "reasoning_details",
        "audio",
        "response",
        "output",
        "item",
        "content_block",
        "status",
        "object",
        "role",
        "x_groq",
        "refusal",
        "thinking",
        "code",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TYPES = st.sampled_from(
    [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "message_delta",
        "response.completed",
        "response.created",
        "response.output_text.delta",
        "response.output_text.done",
        "response.output_item.added",
        "response.failed",
        "response.function_call_arguments.delta",
        "message",
        "error",
        "text_delta",
        "input_json_delta",
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(APIS), st.lists(st.tuples(JSON, TYPES | st.none(), KEYS), max_size=4), st.booleans())
def test_json_of_any_shape_under_the_known_names_is_taken(api: Any, payloads: list[Any], wrapped: bool) -> None:
    documents = []
    for value, kind, key in payloads:
        document: Any = (
            {"choices": [{"delta": value, key: value}]} if wrapped else {key: value, "delta": value, "response": value}
        )
        documents.append({**document, "type": kind} if kind else document)
    body = b"".join(b"data: " + msgspec.json.encode(document) + b"\n\n" for document in documents)
    name = {"messages": "anthropic"}.get(api, api)
    check(Case("json", name, None, 200, [], [], "close", {}), [body], twice=True)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(APIS), st.sampled_from([200, 429, 500]), st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_are_taken(api: Any, status: int, segments: list[bytes]) -> None:
    name = {"messages": "anthropic"}.get(api, api)
    check(Case("bytes", name, None, status, [], [], "reset", {}), segments, twice=True)


def chunk(text: str, **fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": text}, **fields}]}) + b"\n\n"


GROWING: dict[str, Callable[[int], list[bytes]]] = {
    "plain deltas": lambda n: [chunk("ab")] * n,
    "deltas in one read": lambda n: [chunk("ab") * n],
    "one event byte by byte": lambda n: [b'data: {"choices":[{"delta":{"content":"', *[b"a"] * n, b'"}}]}\n\n'],
    "data lines of one event": lambda n: [b"data: a\n"] * n,
    "a document byte by byte": lambda n: [b'{"a":"', *[b"["] * n, b'"}'],
    "prefixes": lambda n: [b"data: " * n + b"x\n\n"],
    "documents of one block": lambda n: [b"data: {}\n" * n + b"\n"],
    "json lines": lambda n: [b'{"choices":[]}\n' * n],
    "calls at one index": lambda n: [
        chunk("", delta={"tool_calls": [{"index": 0, "id": f"c{i}", "function": {"name": "f", "arguments": '{"a'}}]})
        for i in range(n)
    ],
    "calls behind spoiled arguments": lambda n: [
        chunk("", delta={"tool_calls": [{"index": 0, "id": f"c{i}", "function": {"name": "f", "arguments": "{a}"}}]})
        for i in range(n)
    ],
    "annotations": lambda n: [chunk("", delta={"annotations": [{"a": 1}]})] * n,
    "logprobs": lambda n: [chunk("a", logprobs={"content": [{"token": "a", "logprob": -1}]})] * n,
    "reasoning in two fields": lambda n: [chunk("", delta={"reasoning": "a", "reasoning_content": "a"})] * n,
    "carriage returns": lambda n: [b"\r"] * n,
    "noise": lambda n: [b"data: ping\n\n"] * n,
}


@pytest.mark.parametrize("shape", GROWING)
def test_ten_times_the_stream_is_about_ten_times_the_work(shape: str) -> None:
    """A quadratic step costs a hundred times; thirty leaves room for a busy machine."""

    def work(n: int) -> float:
        segments = GROWING[shape](n)
        best = float("inf")
        for _ in range(3):
            reception = Reception("chat")
            reception.head(200, [], 0.0)
            start = time.process_time()
            for segment in segments:
                reception.feed(segment, 0.0)
            reception.end(True, 0.0)
            reception.outcome()
            best = min(best, time.process_time() - start)
        return best

    work(200)
    assert work(20_000) < 30 * max(work(2_000), 0.002)


def test_a_listener_hears_the_whole_text_whatever_the_lane() -> None:
    for case, segments in islice(streams(77), 1500):
        heard: dict[tuple[int, str], list[str]] = {}

        def listen(delta: Delta, heard: dict[tuple[int, str], list[str]] = heard) -> None:
            delta.text.encode()
            heard.setdefault((delta.index, delta.kind), []).append(delta.text)

        reception = Reception(API[case.api], n=case.n, on_delta=listen)
        reception.head(200, [], 0.0)
        for segment in segments:
            reception.feed(segment, 0.0)
        reception.end(True, 0.0)
        completion, _ = reception.outcome()
        for choice in completion.choices if completion else []:
            said = "".join(heard.get((choice.index, "content"), []))
            text = choice.text or ""
            assert said == text or text.startswith(said), (said, text)
