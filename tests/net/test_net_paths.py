"""Which way a request takes, and that neither is the weaker one."""

from __future__ import annotations

import asyncio
import base64

import pytest
import yarl
from scripted import Wire, serving

from batchstream.net import aiohttp_private
from batchstream.net.deadlines import Limits
from batchstream.net.transport import Transport
from batchstream.records import Failure
from batchstream.wire.http1 import MAX_HEAD
from batchstream.wire.reception import Reception

LIMITS = Limits(connect=5, first_output=5, idle=5)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
ANSWER = (
    b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)


async def ask(transport: Transport, base: str) -> tuple[str | None, Failure | None]:
    reception = Reception("chat")
    url = yarl.URL(f"{base}/v1/chat/completions")
    _, failure = await transport.exchange(url, {"Content-Type": "application/json"}, b"{}", reception, LIMITS)
    completion, cut = reception.outcome() if reception.status is not None else (None, None)
    return completion.choices[0].text if completion and completion.choices else None, failure or cut


def ways(transport: Transport) -> tuple[bool, bool]:
    return transport._fast is not None, transport._session is not None


async def test_a_direct_request_takes_the_fast_path() -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(WHOLE)

    async with serving(handler) as base, Transport() as transport:
        assert await ask(transport, base) == ("Hi", None)
        assert ways(transport) == (True, False)
        assert (transport.traffic.reads > 0, transport.traffic.events, transport.traffic.connections) == (True, 2, 1)


async def test_a_proxy_with_a_password_takes_the_public_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def proxy(wire: Wire) -> None:
        seen.append(await wire.request())
        await wire.send(WHOLE)

    async with serving(proxy) as base:
        monkeypatch.setenv("http_proxy", base.replace("//", "//someone:secret@"))
        async with Transport(trust_env=True) as transport:
            assert await ask(transport, "http://endpoint.invalid") == ("Hi", None)
            assert ways(transport) == (False, True)
            assert (transport.traffic.events, transport.traffic.connections) == (2, 1)
    assert seen[0].startswith(b"POST http://endpoint.invalid/v1/chat/completions HTTP/1.1\r\n")
    assert b"Basic " + base64.b64encode(b"someone:secret") in seen[0]


async def test_a_proxy_of_the_environment_is_not_used_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(WHOLE)

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with serving(handler) as base, Transport() as transport:
        assert await ask(transport, base) == ("Hi", None)


async def test_a_release_of_aiohttp_that_is_not_known_takes_the_public_path(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(WHOLE)

    monkeypatch.setattr(aiohttp_private, "supported", lambda: False)
    async with serving(handler) as base, Transport() as transport:
        assert await ask(transport, base) == ("Hi", None)
        assert ways(transport) == (False, True)


async def test_an_odd_transfer_coding_takes_the_public_path_from_the_next_request_on() -> None:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(HEAD + b"Transfer-Encoding: identity\r\nConnection: close\r\n\r\n" + ANSWER)

    async with serving(handler) as base, Transport() as transport:
        text, failure = await ask(transport, base)
        assert text is None
        assert failure is not None
        assert (failure.kind, failure.retryable) == ("decode", True)
        assert "identity" in failure.message
        assert await ask(transport, base) == ("Hi", None)


HOSTILE = {
    "a head without end": HEAD + b"X: y\r\n" * (2 * MAX_HEAD // 6),
    "a header line without end": HEAD + b"X: " + b"y" * (2 * MAX_HEAD),
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a NUL in a header": HEAD + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + WHOLE,
}


LENIENT = {
    "a folded header": HEAD + b"X: y\r\n z\r\nContent-Length: 0\r\n\r\n",
    "a blank before a colon": HEAD + b"Content-Length : 5\r\n\r\nhello",
}
"""aiohttp's own parser lets these pass; the fast path does not."""

CASES = [(name, way) for name in HOSTILE for way in ("fast", "public")] + [(name, "fast") for name in LENIENT]


@pytest.mark.parametrize(("name", "path"), CASES)
async def test_a_hostile_head_gives_no_answer_and_no_second_request_its_connection(name: str, path: str) -> None:
    connections: set[int] = set()

    async def handler(wire: Wire) -> None:
        connections.add(wire.number)
        await wire.request()
        await wire.send({**HOSTILE, **LENIENT}[name])
        if await wire.request():
            connections.add(-1)  # a second request on the same connection
        await asyncio.sleep(0.2)

    async with serving(handler) as base, Transport(path=path) as transport:  # type: ignore[arg-type]
        for _ in range(2):
            text, failure = await asyncio.wait_for(ask(transport, base), 10)
            assert text is None
            assert failure is not None
    assert connections == {1, 2}


async def test_a_connection_that_lay_idle_for_a_while_is_used_again(path: str) -> None:
    connections: set[int] = set()

    async def handler(wire: Wire) -> None:
        while await wire.request():
            connections.add(wire.number)
            await wire.send(WHOLE)

    async with serving(handler) as base, Transport(path=path) as transport:  # type: ignore[arg-type]
        for pause in (0.1, 0.0, 0.0, 0.5, 0.0):  # within the time of the next requests, and beyond a sweep or two
            assert await ask(transport, base) == ("Hi", None)
            await asyncio.sleep(pause)
    assert connections == {1}
