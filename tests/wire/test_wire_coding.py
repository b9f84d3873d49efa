"""Content codings: whatever compressed a body, however it is cut, the bytes come back, in bounded pieces."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_corpus import Case, replay

from batchstream.wire.coding import PIECE, CodingError, ContentDecoder
from batchstream.wire.reception import Reception

STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


PACKERS = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "upper case": (" GZip ", gzip.compress),
    "gzip twice": ("gzip, gzip", lambda data: gzip.compress(gzip.compress(data))),
    "identity": ("identity", bytes),
}


def undone(header: str, segments: list[bytes]) -> bytes:
    decoder = ContentDecoder(header)
    pieces = [piece for segment in segments for piece in decoder.feed(segment)]
    pieces += decoder.end()
    assert all(len(piece) <= PIECE for piece in pieces)
    return b"".join(pieces)


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(PACKERS)), st.binary(max_size=300), st.integers(1, 50))
def test_what_was_packed_comes_back_at_any_cut(name: str, data: bytes, size: int) -> None:
    header, pack = PACKERS[name]
    assert undone(header, pieces_of(pack(data), size)) == data


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["gzip", "zlib"]), st.lists(st.binary(max_size=60), min_size=1, max_size=5), st.integers(1, 50))
def test_several_members_are_one_body(name: str, parts: list[bytes], size: int) -> None:
    header, pack = PACKERS[name]
    packed = b"".join(pack(part) for part in parts)
    assert undone(header, pieces_of(packed, size)) == b"".join(parts)
    assert undone(header, pieces_of(packed + b"\0\0\0padding", size)) == b"".join(parts)


PLAIN = (STREAM, b": ping\n\n" + STREAM, b"{}", b"[", b"", b"d", b"<html>")


@pytest.mark.parametrize(
    ("header", "body"),
    [
        *((header, body) for header in ("gzip", "deflate") for body in PLAIN),
        ("gzip", b"\xef\xbb\xbf" + STREAM),  # raw deflate might begin so
    ],
)
def test_a_label_on_a_plain_body_is_seen_through(header: str, body: bytes) -> None:
    for size in (1, 2, 3, len(body) or 1):
        assert undone(header, pieces_of(body, size)) == body


def receive(body: bytes, coding: str, status: int = 200, size: int = 7) -> Reception:
    return replay(
        Case("", "chat", None, status, [("Content-Encoding", coding)], [], "close", {}), pieces_of(body, size)
    )


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, br", "made-up"])
def test_an_unknown_coding_fails_loudly(coding: str) -> None:
    completion, failure = receive(b"\x0b\x02\x80", coding).outcome()
    assert completion is None
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("decode", True)
    assert coding.split(", ")[-1] in failure.message


def test_an_unknown_coding_of_an_error_body_leaves_what_the_status_says() -> None:
    _, failure = receive(b"\x0b\x02\x80", "br", status=429).outcome()
    assert failure is not None
    assert (failure.kind, failure.status) == ("rate_limit", 429)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_damage_keeps_what_was_decoded_before_it(size: int) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    whole = packer.compress(STREAM[:60]) + packer.flush(zlib.Z_SYNC_FLUSH)
    completion, failure = receive(whole + b"\xff" * 40, "gzip", size=size).outcome()
    assert failure is not None
    assert failure.kind == "decode"
    assert completion is not None
    assert completion.choices[0].text == "a"


def test_a_cut_compressed_stream_is_truncated() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    part = packer.compress(STREAM[:60]) + packer.flush(zlib.Z_SYNC_FLUSH)
    completion, failure = receive(part + gzip.compress(STREAM[60:])[10:14], "gzip").outcome()
    assert failure is not None
    assert failure.kind in ("truncated", "decode")
    assert completion is not None


def test_a_bomb_is_given_out_in_bounded_pieces_and_stopped_at_the_cap() -> None:
    bomb = gzip.compress(b"\n" * (64 << 20))
    assert max(len(piece) for piece in ContentDecoder("gzip").feed(bomb)) <= PIECE
    reception = Reception("chat", max_body_bytes=8 << 20)
    reception.head(200, [("content-encoding", "gzip")], 0.0)
    assert reception.feed(bomb, 1.0)
    _, failure = reception.outcome()
    assert failure is not None
    assert failure.kind == "decode"


def test_iterating_is_what_raises() -> None:
    with pytest.raises(CodingError, match="'br'"):
        list(ContentDecoder("br").feed(b"x"))
