"""Response framing, fed whole, byte by byte, and at every cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchstream.wire.http1 import MAX_HEAD, MAX_LINE, ResponseFramer

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def frame(pieces: list[bytes], *, closed: bool = False) -> tuple[ResponseFramer, bytes]:
    framer, body = ResponseFramer(), b""
    for piece in pieces:
        body += framer.feed(piece)
    if closed:
        framer.end()
    return framer, body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n" + trailer + b"\r\n"


GOOD = {
    "chunked": (CHUNKED + chunked(b"data: a\n\n", b"data: b\n\n"), b"data: a\n\ndata: b\n\n", True),
    "chunked with extension and trailer": (
        CHUNKED + b'3;x="y"\r\nabc\r\n0\r\nX-T: 1\r\n\r\n', b"abc", True),
    "upper-case hex and leading zeros": (CHUNKED + b"00A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", True),
    "chunk that holds CRLF and looks like the end": (CHUNKED + chunked(b"0\r\n\r\n"), b"0\r\n\r\n", True),
    "length": (HEAD + b"Content-Length: 5\r\n\r\nhello", b"hello", True),
    "length twice the same": (HEAD + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\nhello", b"hello", True),
    "length zero": (HEAD + b"Content-Length: 0\r\n\r\n", b"", True),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "connection close": (HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    "1.0 kept alive": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
    "continue first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nA: b\r\n\r\n" + CHUNKED + chunked(b"x"), b"x", True),
    "no reason phrase": (b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", b"x", True),
    "coding and length together": (
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 999\r\n\r\n" + chunked(b"x"), b"x", False),
}  # fmt: skip

BAD = {
    "not HTTP": b"SSH-2.0-OpenSSH_9\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "bad status": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "status with sign": b"HTTP/1.1 +20 OK\r\n\r\n",
    "header without colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "blank before colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\nhello",
    "folded header": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "underscore length": b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\nhello",
    "gzip transfer coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "switching protocols": b"HTTP/1.1 101 Switching\r\n\r\n",
    "chunk size with sign": CHUNKED + b"+5\r\nhello\r\n",
    "chunk size with underscore": CHUNKED + b"1_0\r\nhello\r\n",
    "chunk size 0x": CHUNKED + b"0x5\r\nhello\r\n",
    "chunk size empty": CHUNKED + b"\r\nhello\r\n",
    "chunk too long": CHUNKED + b"3\r\nhello\r\n",
    "chunk too short": CHUNKED + b"7\r\nhello\r\n0\r\n\r\n",
    "huge chunk size": CHUNKED + b"f" * 16 + b"\r\n",
    "NUL in header": b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n",
}


def cuts(data: bytes) -> list[list[bytes]]:
    return [[data], [data[i : i + 1] for i in range(len(data))], *([data[:i], data[i:]] for i in range(1, len(data)))]


@pytest.mark.parametrize("name", GOOD)
def test_a_message_is_framed_alike_however_it_is_cut(name: str) -> None:
    data, body, reusable = GOOD[name]
    for pieces in cuts(data):
        framer, got = frame(pieces)
        assert (got, framer.complete, framer.error, framer.reusable) == (body, True, None, reusable), pieces


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_http_is_an_error_however_it_is_cut(name: str) -> None:
    for pieces in cuts(BAD[name]):
        framer, _ = frame(pieces)
        assert framer.error is not None, pieces
        assert not framer.reusable
        assert not framer.complete


@pytest.mark.parametrize("name", GOOD)
def test_bytes_behind_the_end_are_never_read_and_forbid_reuse(name: str) -> None:
    data, body, _ = GOOD[name]
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    for pieces in cuts(data + smuggled):
        framer, got = frame(pieces)
        assert got == body
        assert not framer.reusable


@pytest.mark.parametrize("name", GOOD)
def test_a_message_cut_short_is_not_complete(name: str) -> None:
    data = GOOD[name][0]
    for end in range(len(data)):
        framer, _ = frame([data[:end]], closed=True)
        assert not framer.complete, data[:end]


def test_a_body_without_length_ends_with_the_connection() -> None:
    for pieces in cuts(HEAD + b"\r\nhello"):
        framer, body = frame(pieces, closed=True)
        assert (body, framer.complete, framer.reusable) == (b"hello", True, False)


def test_endless_heads_size_lines_and_trailers_are_cut_off() -> None:
    for start, filler, limit in ((b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", MAX_HEAD), (CHUNKED + b"5;", b"x", MAX_LINE),
                                 (CHUNKED + b"0\r\nX: ", b"y", MAX_HEAD)):  # fmt: skip
        framer = ResponseFramer()
        framer.feed(start)
        for _ in range(2 * limit // len(filler)):
            framer.feed(filler)
            if framer.error:
                break
        assert framer.error is not None


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.data())
def test_any_chunking_and_any_cut_give_the_same_body(chunks: list[bytes], data: st.DataObject) -> None:
    raw = CHUNKED + chunked(*chunks)
    at = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[a:b] for a, b in zip([0, *at], [*at, len(raw)], strict=True)]
    framer, body = frame(pieces)
    assert (body, framer.complete, framer.reusable) == (b"".join(chunks), True, True)


@given(st.binary(max_size=300))
def test_no_bytes_raise(raw: bytes) -> None:
    for start in (b"", b"HTTP/1.1 200 OK\r\n", CHUNKED):
        frame([start, raw], closed=True)
        frame([(start + raw)[i : i + 1] for i in range(len(start + raw))], closed=True)
