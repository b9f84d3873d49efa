"""Events read by what surrounds their text come out as if each had been decoded, whatever stands in them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchstream.wire.reception import Reception
from batchstream.wire.stencil import learn

END = [b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n', b"data: [DONE]\n\n"]


def event(text: Any, *, compact: bool = True, key: str = "content", raw: bool = True, **top: Any) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **top}
    choice = {"index": 0, "delta": {key: text}, "finish_reason": None}
    if key == "text":
        chunk["object"], choice = "text_completion", {"index": 0, "text": text, "finish_reason": None}
    chunk["choices"] = [choice]
    separators = (",", ":") if compact else (", ", ": ")
    return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=not raw, separators=separators).encode()


def seen(body: bytes, cuts: list[int], lane: Any) -> Any:
    reception = Reception("chat", lane=lane)
    reception.head(200, [], 0.0)
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for number, (start, end) in enumerate(pairwise(places)):
        if reception.feed(body[start:end], float(number)):
            break
    reception.end(True, 1e6)
    marks = (reception.chunks, reception.events, reception.gap_max, reception.last_output_at, reception.ttft_event)
    return reception.outcome(), marks


texts = st.text(max_size=6) | st.sampled_from(
    ["", " the", "caf\u00e9", "\n\n", '"so"', "\\", '"},"finish_reason":null}]}', '","', '\\"', "\x7f", "\u2028", "\0"]
)
pieces = st.one_of(
    st.builds(event, texts),
    st.builds(event, texts),
    st.builds(event, texts, raw=st.booleans()),
    st.builds(event, texts, compact=st.booleans(), key=st.sampled_from(["content", "text", "reasoning"])),
    st.builds(event, texts, system_fingerprint=st.sampled_from(["a", "b"]), provider=st.sampled_from(["p", None])),
    st.builds(event, texts, obfuscation=st.sampled_from(["", "x", {"content": "no"}])),
    st.builds(event, texts, usage=st.sampled_from([None, {"prompt_tokens": 1, "completion_tokens": 0}])),
    st.builds(event, texts, id=st.sampled_from(["c", "d"]), service_tier=st.sampled_from(["", "default", None])),
    st.sampled_from([
        b": ping\n\n", b"\n", b"event: x\ndata: 1\n\n", b'data: {"choices":[]}\n\n', b"data: {\ndata: }\n\n",
        event("a").replace(b"\n\n", b"\r\n\r\n"), event("ab").replace(b'"ab"', b'"a\xff"'),
        event("ab").replace(b'"ab"', b'"a" '), event("ab").replace(b'"ab"', b'"a\tb"'),
        event("ab").replace(b'"ab"', b'"a\\ud83d"'), event("ab").replace(b'"ab"', b'7'),
        event("ab").replace(b'"content"', b'"content":"z","content"'), b'data: {"error":{"code":503}}\n\n',
    ]),
)  # fmt: skip


@given(st.lists(pieces, max_size=24), st.lists(st.integers(0, 10**6), max_size=8))
def test_a_stream_gives_the_same_with_and_without_stencils(events: list[bytes], cuts: list[int]) -> None:
    body = b"".join([*events, *END])
    assert seen(body, cuts, "auto") == seen(body, cuts, "full")


@pytest.mark.parametrize("events", [
    [event("x", system_fingerprint="a"), event("y", system_fingerprint="b"), event("z", system_fingerprint="a")],
    [event("x", system_fingerprint="a"), event("y", system_fingerprint="b", o=1), event("z", system_fingerprint="a")],
    [event("x", provider="p"), event("y", provider="q"), event("z", provider="p"), event("z")],
    [event("x", obfuscation={"content": "x"}), event("x", obfuscation={"content": "no"})],
    [event("x"), event("y", id="d"), event(""), event("z"), event("x", usage={"total_tokens": 3}), event("x")],
], ids=["another fingerprint", "… in full", "another provider", "the key twice", "the rest"])  # fmt: skip
def test_what_an_event_says_beside_its_text_is_not_passed_over(events: list[bytes]) -> None:
    body = b"".join([*events, *END])
    alone = [len(b"".join(events[: place + 1])) for place in range(len(events))]
    for cuts in ([], alone):
        assert seen(body, cuts, "auto") == seen(body, cuts, "full")


@given(st.lists(st.builds(event, texts), min_size=2, max_size=24), st.lists(st.integers(0, 10**6), max_size=8))
def test_cuts_do_not_change_the_answer(events: list[bytes], cuts: list[int]) -> None:
    body = b"".join([*events, *END])
    assert seen(body, cuts, "auto")[0] == seen(body, [], "auto")[0]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("key", ["content", "text"])
def test_ordinary_events_are_read_by_their_stencil(key: str, compact: bool) -> None:
    """It must not fall out of use unseen: a chunk that fits is not decoded."""
    reception = Reception("chat")
    reception.head(200, [], 0.0)
    reception.feed(event("a", key=key, compact=compact), 0.0)
    reception._assembler.quick = reception._assembler.add = None  # type: ignore[assignment, method-assign]
    reception.feed(event("b", key=key, compact=compact), 1.0)
    reception.feed(event(" c", key=key, compact=compact) + event('"', key=key, compact=compact), 2.0)
    completion, _ = reception.outcome()
    assert completion is not None
    assert completion.choices[0].text == 'ab c"'
    assert reception.chunks == 4


@pytest.mark.parametrize("payload", [
    b'{"p":{"content":"x"},"content":"a"}', b'{"cont\\u0065nt":"a"}', b'{"q":"\\"","content":"a"}',
    b'{"content":\n"a"}', b'{"content":"b"}', b'{"content":  "a"}', b"{}",
])  # fmt: skip
def test_what_is_not_plain_teaches_no_stencil(payload: bytes) -> None:
    assert learn(payload, b'"content"', "a", [].append) is None
