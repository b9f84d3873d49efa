"""The transport against a server that does what the test says: framing, faults, limits, reuse. Both paths."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from pathlib import Path

import pytest
import yarl
from scripted import Wire, serving

from batchstream.errors import InputError
from batchstream.net.deadlines import Limits
from batchstream.net.fast import PROBATION_S
from batchstream.net.transport import Transport
from batchstream.records import Failure
from batchstream.wire.reception import Reception

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
PATIENT = Limits(connect=5, first_output=30, idle=30)


def delta(text: str, finish: str | None = None) -> bytes:
    chunk = {"id": "c1", "model": "m", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = delta("Hello, ") + delta("wörld") + delta("", "stop") + DONE


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def ask(
    base: str, path: str, limits: Limits = PATIENT, transport: Transport | None = None
) -> tuple[Reception, Failure | None]:
    """One request; the failure is the connection's, or else the reception's."""
    if transport is None:
        async with Transport(connect_timeout=limits.connect, path=path) as transport:  # type: ignore[arg-type]
            return await ask(base, path, limits, transport)
    reception = Reception("chat")
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    _, failure = await transport.exchange(
        yarl.URL(base) / "v1/chat/completions", headers, b'{"a":1}', reception, limits
    )
    return reception, failure or (reception.outcome()[1] if reception.status is not None else None)


def text_of(reception: Reception) -> str | None:
    completion, _ = reception.outcome()
    return completion.choices[0].text if completion and completion.choices else None


BODIES = {
    "one write": [CHUNKED + chunk(ANSWER) + b"0\r\n\r\n"],
    "a write for each event": [CHUNKED, *(chunk(e + b"\n\n") for e in ANSWER.split(b"\n\n")[:-1]), b"0\r\n\r\n"],
    "a chunk for each byte": [CHUNKED + b"".join(chunk(bytes([b])) for b in ANSWER) + b"0\r\n\r\n"],
    "content-length": [HEAD + b"Content-Length: %d\r\n\r\n" % len(ANSWER), ANSWER],
    "until close": [HEAD + b"\r\n", ANSWER],
    "continue first": [b"HTTP/1.1 100 Continue\r\n\r\n", CHUNKED + chunk(ANSWER) + b"0\r\n\r\n"],
    "trailers": [CHUNKED + chunk(ANSWER) + b"0\r\nX-Sum: 1\r\n\r\n"],
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_stream_is_read_whatever_its_framing(name: str, path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(*BODIES[name])

    async with serving(handler) as base:
        reception, failure = await ask(base, path)
    assert failure is None
    assert text_of(reception) == "Hello, wörld"


async def test_a_stream_that_comes_byte_by_byte_is_read(path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        data = CHUNKED + chunk(ANSWER) + b"0\r\n\r\n"
        await wire.send(*(data[i : i + 1] for i in range(len(data))))

    async with serving(handler) as base:
        reception, failure = await ask(base, path)
    assert failure is None
    assert text_of(reception) == "Hello, wörld"


async def test_the_request_is_one_well_formed_post(path: str) -> None:
    seen: list[bytes] = []

    async def handler(wire: Wire) -> None:
        seen.append(await wire.request())
        await wire.send(CHUNKED + chunk(ANSWER) + b"0\r\n\r\n")

    async with serving(handler) as base:
        await ask(base, path)
        host = base.removeprefix("http://").encode()
    head, _, body = seen[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/chat/completions HTTP/1.1"
    assert body == b'{"a":1}'
    fields = {line.split(b": ", 1)[0].lower(): line.split(b": ", 1)[1] for line in lines[1:]}
    assert fields[b"host"] == host
    assert fields[b"content-length"] == b"7"
    assert fields[b"authorization"] == b"Bearer secret"


async def test_a_connection_is_used_again_after_a_clean_end(path: str) -> None:
    connections: set[int] = set()

    async def handler(wire: Wire) -> None:
        while await wire.request():
            connections.add(wire.number)
            await wire.send(CHUNKED + chunk(ANSWER), b"0\r\n\r\n")

    async with serving(handler) as base, Transport(path=path) as transport:  # type: ignore[arg-type]
        for _ in range(5):
            assert (await ask(base, path, transport=transport))[1] is None
            await asyncio.sleep(2 * PROBATION_S)
    assert connections == {1}


async def test_a_server_that_closes_after_each_answer_without_saying_so_loses_no_request() -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(ANSWER), b"0\r\n\r\n")
        await asyncio.sleep(0.002)  # late enough for the next request to be on its way

    async with serving(handler) as base, Transport(path="fast") as transport:
        for _ in range(50):
            assert (await ask(base, "fast", transport=transport))[1] is None


async def test_a_kept_connection_that_was_closed_meanwhile_is_not_used() -> None:
    async def handler(wire: Wire) -> None:
        for _ in range(3):
            await wire.request()
            await wire.send(CHUNKED + chunk(ANSWER), b"0\r\n\r\n")
            await asyncio.sleep(3 * PROBATION_S)

    async with serving(handler) as base, Transport(path="fast") as transport:
        for _ in range(8):
            assert (await ask(base, "fast", transport=transport))[1] is None
            await asyncio.sleep(4 * PROBATION_S)


async def test_bytes_behind_the_answer_never_become_the_next_one(path: str) -> None:
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"

    async def handler(wire: Wire) -> None:
        while await wire.request():
            await wire.send(CHUNKED + chunk(ANSWER) + b"0\r\n\r\n" + smuggled)

    async with serving(handler) as base, Transport(path=path) as transport:  # type: ignore[arg-type]
        for _ in range(3):
            reception, failure = await ask(base, path, transport=transport)
            assert failure is None
            assert text_of(reception) == "Hello, wörld"


async def test_an_answer_that_is_complete_does_not_wait_for_the_end_of_the_connection(path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(ANSWER))
        await asyncio.sleep(60)

    async with serving(handler) as base:
        reception, failure = await asyncio.wait_for(ask(base, path), 10)
    assert failure is None
    assert reception.final


CUTS = {
    "between events": CHUNKED + chunk(delta("Hel")),
    "inside an event": CHUNKED + chunk(delta("Hel") + delta("lo")[:20]),
    "inside a character": CHUNKED
    + chunk(delta("Hel"))
    + b"40\r\n"
    + 'data: {"choices":[{"delta":{"content":"ö'.encode()[:-1],
    "inside a chunk": CHUNKED + chunk(delta("Hel")) + b"ff\r\ndata: ",
    "inside a chunk size": CHUNKED + chunk(delta("Hel")) + b"f",
    "short of its length": HEAD + b"Content-Length: 9999\r\n\r\n" + delta("Hel"),
    "by closing": HEAD + b"\r\n" + delta("Hel"),
}


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("name", CUTS)
async def test_a_cut_stream_is_truncated_and_keeps_its_partial_text(name: str, reset: bool, path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CUTS[name])
        if reset:
            await asyncio.sleep(0.05)  # a reset overtakes what is still unread
            wire.reset()

    async with serving(handler) as base:
        reception, failure = await ask(base, path)
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("truncated", True)
    assert text_of(reception) == "Hel"


@pytest.mark.parametrize("end", [b"", b"zz\r\ndata: {"], ids=["reset", "broken chunk"])
async def test_what_breaks_after_the_terminal_marker_does_not_matter(end: bytes, path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(ANSWER))
        await asyncio.sleep(0.02)
        await wire.send(end)
        await asyncio.sleep(0.02)
        wire.reset()

    async with serving(handler) as base:
        reception, failure = await ask(base, path)
    assert failure is None
    assert text_of(reception) == "Hello, wörld"


SILENCES = {"close": b"", "half a head": b"HTTP/1.1 200 OK\r\nContent-"}


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("name", SILENCES)
async def test_a_connection_lost_before_the_answer_is_disconnected(name: str, reset: bool, path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(SILENCES[name])
        if reset:
            wire.reset()

    async with serving(handler) as base:
        _, failure = await ask(base, path)
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("disconnected", True)


GARBAGE = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "bad status": b"HTTP/1.1 abc OK\r\n\r\n",
    "bad header": b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_what_is_not_http_fails_as_decode(name: str, path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(GARBAGE[name])
        await asyncio.sleep(5)

    async with serving(handler) as base:
        _, failure = await ask(base, path)
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("decode", True)


async def test_a_broken_chunk_size_in_mid_stream_is_a_cut(path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(delta("Hel")))
        await asyncio.sleep(0.05)  # together with the head aiohttp's own parser would refuse all of it
        await wire.send(b"zz\r\nlost\r\n")
        await asyncio.sleep(5)

    async with serving(handler) as base:
        reception, failure = await ask(base, path, Limits(connect=5, first_output=1, idle=1))
    assert failure is not None
    # aiohttp closes the connection but does not tell the reader of the body: there the limit has to.
    assert failure.kind == ("truncated" if path == "fast" else "timeout")
    assert text_of(reception) == "Hel"


@pytest.mark.parametrize("location", ["https://elsewhere.example/v1", "/other", "http://[", ""])
async def test_a_redirect_is_refused_and_not_followed(location: str, path: str) -> None:
    requests = 0

    async def handler(wire: Wire) -> None:
        nonlocal requests
        while await wire.request():
            requests += 1
            await wire.send(b"HTTP/1.1 307 Temporary\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % location.encode())

    async with serving(handler) as base:
        _, failure = await ask(base, path)
    assert failure is not None
    assert (failure.kind, failure.status, failure.retryable) == ("redirect", 307, False)
    assert requests == 1


async def test_nobody_listening_is_a_connect_failure(path: str) -> None:
    async with serving(lambda wire: asyncio.sleep(0)) as base:
        pass
    _, failure = await ask(base, path)
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("connect", True)


async def test_a_name_that_does_not_resolve_is_a_connect_failure(path: str) -> None:
    _, failure = await ask("http://no-such-host.invalid", path, Limits(connect=5))
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("connect", True)


async def stall(wire: Wire, *first: bytes) -> None:
    await wire.request()
    await wire.send(*first)
    await asyncio.sleep(60)


async def ping(wire: Wire, *first: bytes) -> None:
    await wire.request()
    await wire.send(CHUNKED, *first)
    while True:
        await wire.send(chunk(b": keep-alive\n\n"))
        await asyncio.sleep(0.02)


LATE = {
    "no head": (lambda w: stall(w), "--first-token-timeout"),
    "no output": (lambda w: stall(w, CHUNKED), "--first-token-timeout"),
    "only keep-alive comments": (lambda w: ping(w), "--first-token-timeout"),
    "a stall after output": (lambda w: stall(w, CHUNKED, chunk(delta("Hel"))), "--idle-timeout"),
    "only comments after output": (lambda w: ping(w, chunk(delta("Hel"))), "--idle-timeout"),
    "an error body that never ends": (
        lambda w: stall(w, b"HTTP/1.1 500 Oops\r\nContent-Length: 99\r\n\r\nx"), "--idle-timeout"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
async def test_each_limit_ends_what_it_limits(name: str, path: str) -> None:
    handler, flag = LATE[name]
    async with serving(handler) as base:
        limits = Limits(connect=5, first_output=0.4, idle=0.4)
        _, failure = await asyncio.wait_for(ask(base, path, limits), 20)
    assert failure is not None
    assert (failure.kind, failure.retryable) == ("timeout", True)
    assert flag in failure.message


async def test_a_stall_after_every_finish_reason_is_no_failure(path: str) -> None:
    async with serving(lambda w: stall(w, CHUNKED, chunk(delta("Hello") + delta("", "stop")))) as base:
        reception, failure = await asyncio.wait_for(ask(base, path, Limits(5, 0.4, 0.4)), 20)
    assert failure is None
    assert text_of(reception) == "Hello"


async def test_the_total_limit_ends_a_stream_that_goes_on_and_on(path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED)
        while True:
            await wire.send(chunk(delta("x")))
            await asyncio.sleep(0.02)

    async with serving(handler) as base:
        reception, failure = await asyncio.wait_for(ask(base, path, Limits(5, 30, 30, total=0.5)), 20)
    assert failure is not None
    assert failure.kind == "timeout"
    assert "--total-timeout" in failure.message
    assert text_of(reception)


async def test_stamps_are_in_order_and_sent_comes_before_the_answer(path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await asyncio.sleep(0.02)
        await wire.send(CHUNKED)
        for piece in (delta("a"), delta("b"), delta("", "stop"), DONE):
            await asyncio.sleep(0.02)
            await wire.send(chunk(piece))
        await wire.send(b"0\r\n\r\n")

    async with serving(handler) as base, Transport(path=path) as transport:  # type: ignore[arg-type]
        reception = Reception("chat")
        sent, _ = await transport.exchange(yarl.URL(base), {}, b"{}", reception, PATIENT)
    stamps = [sent, reception.headers_at, reception.first_output_at, reception.last_output_at, reception.ended_at]
    assert None not in stamps
    assert stamps == sorted(stamps)  # type: ignore[type-var]
    assert reception.chunks == 2


async def test_hundreds_of_streams_at_once_are_not_queued(path: str) -> None:
    arrived, release = asyncio.Semaphore(0), asyncio.Event()

    async def handler(wire: Wire) -> None:
        await wire.request()
        arrived.release()
        await release.wait()
        await wire.send(CHUNKED + chunk(ANSWER) + b"0\r\n\r\n")

    async with serving(handler, backlog=512) as base, Transport(path=path) as transport:  # type: ignore[arg-type]
        asking = [asyncio.create_task(ask(base, path, transport=transport)) for _ in range(300)]
        for _ in range(300):
            await asyncio.wait_for(arrived.acquire(), 20)
        release.set()
        assert all(failure is None for _, failure in await asyncio.gather(*asking))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost (not for 127.0.0.1)."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert),
               "-days", "2",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize(("host", "trusted", "kind"), [
    ("localhost", True, None), ("localhost", False, "tls"), ("127.0.0.1", True, "tls"),
], ids=["trusted", "self-signed", "wrong host"])  # fmt: skip
async def test_certificates_are_checked(
    host: str, trusted: bool, kind: str | None, path: str, certificate: tuple[Path, Path]
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(CHUNKED + chunk(ANSWER) + b"0\r\n\r\n")

    async with serving(handler, ssl=context) as base:
        base = base.replace("127.0.0.1", host)
        ca_file = str(certificate[0]) if trusted else None
        async with Transport(path=path, ca_file=ca_file) as transport:  # type: ignore[arg-type]
            reception, failure = await ask(base, path, transport=transport)
        await asyncio.sleep(0.1)  # TLS transports are closed a few turns of the loop after they are told to
    if kind is None:
        assert failure is None
        assert text_of(reception) == "Hello, wörld"
    else:
        assert failure is not None
        assert (failure.kind, failure.retryable) == (kind, False)


async def test_a_handshake_that_breaks_off_is_retryable(path: str) -> None:
    async def handler(wire: Wire) -> None:
        await wire.reader.read(10)
        wire.reset()

    async with serving(handler) as base:
        _, failure = await ask(base.replace("http:", "https:"), path)
    assert failure is not None
    assert failure.retryable
    assert failure.kind in ("tls", "connect", "disconnected")


def test_a_ca_file_that_cannot_be_read_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"--ca-file /nowhere/ca\.pem: expected a readable PEM file"):
        Transport(ca_file="/nowhere/ca.pem")
