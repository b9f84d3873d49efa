"""HTTP requests out of bytes, however they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchstream.endpoints.sim.http1 import MAX_BODY, MAX_HEAD, BadRequest, HttpRequest, RequestReader

# How fast a machine is must not decide a test: on a fresh checkout the first text drawn takes seconds.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PLAIN = b"POST /v1/x?a=1 HTTP/1.1\r\nHost: sim\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /y HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0A\r\n0123456789\r\n0\r\n\r\n"
BARE = b"GET /z HTTP/1.0\r\n\r\n"


def read_all(pieces: list[bytes]) -> list[HttpRequest]:
    reader, found = RequestReader(), []
    for piece in pieces:
        reader.feed(piece)
        while (request := reader.next_request()) is not None:
            found.append(request)
    return found


@CALM
@given(st.lists(st.integers(0, len(PLAIN + CHUNKED + BARE)), max_size=12))
def test_pipelined_requests_are_the_same_at_every_cut(cuts: list[int]) -> None:
    data = PLAIN + CHUNKED + BARE
    places = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(places)]
    plain, chunked, bare = read_all(pieces)
    assert (plain.method, plain.target, plain.query, plain.body) == ("POST", "/v1/x", "a=1", b"hello")
    assert plain.headers == {"host": "sim", "content-length": "5"}
    assert (chunked.target, chunked.body) == ("/y", b"abc0123456789")
    assert (bare.target, bare.body) == ("/z", b"")


def test_byte_by_byte_is_the_same_as_whole() -> None:
    data = PLAIN + CHUNKED + BARE
    assert read_all([bytes([byte]) for byte in data]) == read_all([data])


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_the_connection_is_kept_as_version_and_header_say(head: bytes, keeps: bool) -> None:
    assert read_all([head])[0].keep_alive is keeps


def test_a_client_that_waits_for_100_continue_is_noticed_until_its_body_came() -> None:
    reader = RequestReader()
    reader.feed(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert reader.next_request() is None
    assert reader.expects_continue
    reader.feed(b"ok")
    request = reader.next_request()
    assert request is not None
    assert request.body == b"ok"
    assert not reader.expects_continue


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nname : value\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BODY + 1), 413),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD, 431),
    ],
)
def test_what_breaks_the_rules_is_refused_with_its_status(data: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        read_all([data])
    assert refused.value.status == status
