"""The event decoder: the standard's rules at any cut, documents outside fields, linear work, a bounded memory."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchstream.wire.sse import Event, SSEDecoder


def reference(body: bytes) -> tuple[list[list[str]], str | None]:
    """The standard's algorithm, word for word, on the whole text: slow, and independent of the decoder."""
    text = body.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = re.split("\r\n|\n|\r", text)
    rest = lines.pop()
    events: list[list[str]] = []
    buffer, kind, last_id = "", "", ""
    for line in [*lines]:
        if line == "":
            if buffer:
                events.append([kind or "message", buffer.removesuffix("\n"), last_id])
            buffer, kind = "", ""
            continue
        name, colon, value = line.partition(":")
        if colon and name == "":
            continue
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            buffer += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
    if rest.startswith("data"):
        name, _, value = rest.partition(":")
        if name == "data":
            buffer += value.removeprefix(" ") + "\n"
    return events, buffer.removesuffix("\n") if buffer else None


def decoded(segments: list[bytes], **options: bool) -> tuple[list[Event], list[Event], SSEDecoder]:
    decoder = SSEDecoder(**options)
    events = [event for segment in segments for event in decoder.feed(segment)]
    return events, decoder.end(), decoder


def plain(events: list[Event]) -> list[list[str]]:
    return [[event.type, event.data.decode("utf-8", "replace"), event.id] for event in events]


LINE = st.sampled_from([
    b"data: x", b"data:", b"data", b"data:  two", b"data: {\"a\":1}", b"data: \xc3\xa9\xe2\x80\xa8", b"data: \xff\xc3",
    b"event: e", b"event:", b"id: 7", b"id: a\0b", b"id", b"retry: 5", b"retry: x", b": c", b":", b"junk", b" data: no",
    b"DATA: no", b"", b"", b"", b"{", b"error: x",
])  # fmt: skip
END = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"])
BODY = st.tuples(
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xef", b"\xef\xbb"]),
    st.lists(st.tuples(LINE, END).map(b"".join), max_size=12).map(b"".join),
    st.sampled_from([b"", b"data: last", b"data", b"da", b"id: 9"]),
).map(b"".join)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    bounds = sorted({0, len(body), *(place % (len(body) + 1) for place in places)})
    return [body[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=1500, deadline=None)
@given(BODY, st.lists(st.integers(0, 400), max_size=8))
def test_any_body_in_any_cuts_gives_the_events_of_the_standard(body: bytes, places: list[int]) -> None:
    events, pending, _ = decoded(cut(body, places))
    expected, left = reference(body)
    assert plain(events) == expected
    assert [event.data.decode("utf-8", "replace") for event in pending] == ([] if left is None else [left])


@settings(max_examples=1000, deadline=None)
@given(BODY, st.lists(st.integers(0, 400), max_size=8))
def test_documents_outside_fields_do_not_depend_on_cuts_either(body: bytes, places: list[int]) -> None:
    body += b'\n{"error":\n {"a": "}\\"\\\\"}}\n[1] {"b":2}\ndata: y\n\n'
    whole = decoded([body], documents=True)
    pieces = decoded(cut(body, places), documents=True)
    assert (whole[0], whole[1]) == (pieces[0], pieces[1])
    assert decoded([body[i : i + 1] for i in range(len(body))], documents=True)[0] == whole[0]


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from([b"data: {}\n\n", b'data: {"a":1}\n\n', b"data: \n\n", b": c\n\n", b"data: a\r\n\r\n",
                              b"data: 1\ndata: 2\n\n", b"event: x\ndata: y\n\n", b"data:t\n\n", b"{}\n"]), max_size=9),
    st.lists(st.integers(0, 200), max_size=6),
)  # fmt: skip
def test_the_ordinary_way_gives_what_feed_gives(blocks: list[bytes], places: list[int]) -> None:
    body = b"".join(blocks)
    ordinary, general = SSEDecoder(documents=True), SSEDecoder(documents=True)
    for segment in cut(body, places):
        payloads = ordinary.ordinary(segment)
        events = ordinary.feed(segment) if payloads is None else [Event("message", data) for data in payloads]
        assert events == general.feed(segment)
    assert ordinary.end() == general.end()


def test_whole_plain_blocks_take_the_ordinary_way() -> None:
    decoder = SSEDecoder(documents=True)
    decoder.feed(b"data: first\n\n")
    assert decoder.ordinary(b"data: a\n\ndata: b\n\ndata: c") == [b"a", b"b"]
    assert decoder.ordinary(b"d\n\n") == [b"cd"]


@pytest.mark.parametrize("segment", [
    b"data: a\r\n\r\n", b"event: x\ndata: a\n\n", b"data: a\ndata: b\n\n", b"data:a\n\n", b"{}\n",
    b"data: a\n\n\n", b"data: a\n",
])  # fmt: skip
def test_the_ordinary_way_declines_what_is_not_ordinary(segment: bytes) -> None:
    decoder = SSEDecoder(documents=True)
    decoder.feed(b": start\n\n")
    assert decoder.ordinary(segment) is None


def test_a_document_is_reported_at_its_last_bracket() -> None:
    decoder = SSEDecoder(documents=True)
    assert decoder.feed(b'{"error": {"message": "a}b"') == []
    (event,) = decoder.feed(b"}}")
    assert (event.origin, event.data) == ("document", b'{"error": {"message": "a}b"}}')


def test_a_document_that_is_never_closed_ends_where_the_stream_goes_on() -> None:
    events, pending, _ = decoded([b'{"a":"lo\n\ndata: x\n\n'], documents=True)
    assert [(event.origin, event.data) for event in events] == [("document", b'{"a":"lo'), ("data", b"x")]
    assert pending == []


def test_a_document_closes_the_block_it_stands_in() -> None:
    events, _, _ = decoded([b'data: x\n{"e":1}\n\n'], documents=True)
    assert [(event.origin, event.cut) for event in events] == [("data", True), ("document", False)]


def test_without_documents_json_outside_fields_is_nothing() -> None:
    events, pending, decoder = decoded([b'{"a":1}\nerror: {"b":2}\ndata: x\n\n'])
    assert plain(events) == [["message", "x", ""]]
    assert pending == []
    assert decoder.junk


@pytest.mark.parametrize("piece", [b"x" * 1000, b"data: " + b"x" * 500 + b"\n", b'{"a' + b"x" * 500 + b"\n"])
def test_a_pending_event_beyond_the_cap_is_an_overflow(piece: bytes) -> None:
    decoder = SSEDecoder(documents=True, max_event_bytes=10_000)
    decoder.feed(b"data: " + b"y" * 9000 + b"\n\n")
    assert not decoder.overflow
    for _ in range(30):
        decoder.feed(piece)
    assert decoder.overflow
    assert decoder.feed(b"\n\ndata: later\n\n") == []


@pytest.mark.parametrize("unit", [b"x", b"[", b'"', b"\\", b"{"])
def test_a_huge_event_in_tiny_pieces_is_kept_in_pieces(unit: bytes) -> None:
    """Quadratic buffering would touch 10^10 bytes here and not end within the test session."""
    decoder = SSEDecoder(documents=True)
    decoder.feed(b'data: ["')
    for _ in range(100_000):
        decoder.feed(unit)
    (event,) = decoder.feed(b"\n\n")
    assert len(event.data) == 100_000 + 2


def test_a_huge_document_in_tiny_pieces_is_scanned_once() -> None:
    decoder = SSEDecoder(documents=True)
    decoder.feed(b"{")
    for _ in range(50_000):
        decoder.feed(b'"a"')
    (event,) = decoder.feed(b"}")
    assert len(event.data) == 150_000 + 2
