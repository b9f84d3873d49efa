"""The fast path: aiohttp's connections, our own framing.

Head and body leave in one write, stamped just before; what arrives is stamped in `data_received`, before
anything looks at it, and decoded there and then. No coroutine wakes up for a read, no timer is set for
one: a request costs one await. About half the CPU of the public path, and stamps that are the socket's.

A connection goes back to the pool only after a clean end of the message; bytes nobody asked for close it.
Servers close kept connections when they like, some (llama.cpp's) right after each answer without saying so, and a
request written to such a connection is lost. So a pooled one is asked for signs of its end before it is used, and
an origin is on probation until one of its connections has outlived an answer: one that does not gets a fresh
connection for each request.
When the answer is complete before its message is (`[DONE]` came, the last chunk did not), the end is
awaited until the next sweeps, then the connection is dropped instead.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import yarl

from batchstream.net import aiohttp_private
from batchstream.net.exchange import Exchange, Traffic, redirect
from batchstream.records import Failure
from batchstream.wire.http1 import ResponseFramer

_now = time.monotonic
_HANGUP = getattr(select, "POLLRDHUP", 0)

PROBATION_S = 0.05
"""A connection that is still open so long after an answer shows that its origin keeps connections."""


class StreamProtocol(aiohttp_private.ResponseHandler):
    """One connection. Idle between requests; `begin` lends it to an exchange until its future is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._exchange: Exchange | None = None
        self._framer: ResponseFramer | None = None
        self._settled: asyncio.Future[None] | None = None
        self._signs: select.poll | None = None
        self.used = False

    def begin(self, exchange: Exchange, settled: asyncio.Future[None]) -> None:
        self._exchange, self._settled, self._framer = exchange, settled, ResponseFramer()
        self.used = True

    def ending(self) -> bool:
        """Has the server closed this idle connection, or sent what nobody asked for? (One system call.)"""
        if self.transport is None or self.transport.is_closing():
            return True
        if self._signs is None:
            self._signs = select.poll()
            self._signs.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN | _HANGUP)
        return bool(self._signs.poll(0))

    @property
    def reusable(self) -> bool:
        return self._framer is not None and self._framer.reusable

    def data_received(self, data: bytes) -> None:
        now = _now()
        framer, exchange = self._framer, self._exchange
        if framer is None or exchange is None:
            if aiohttp_private.in_tunnel_setup(self):
                super().data_received(data)
            else:
                self.close()  # bytes that nobody asked for
            return
        reception = exchange.reception
        exchange.reads += 1
        body = framer.feed(data)
        if reception.status is None and framer.status is not None and not framer.unspoken:
            exchange.redirect = redirect(framer.status, framer.headers)
            reception.head(framer.status, framer.headers, now)
        if body and not reception.final:
            reception.feed(body, now)
        if framer.error is not None:
            exchange.unspoken = framer.unspoken
            if reception.status is None:
                exchange.garbage = framer.error
            elif not reception.final:
                reception.end(False, now, framer.error)
            self._settle()
        elif framer.complete:
            if not reception.final:
                reception.end(True, now)
            self._settle()
        elif exchange.redirect is not None:
            self._settle()

    def eof_received(self) -> None:
        """The server will send no more; the transport closes and `connection_lost` tells the rest."""

    def connection_lost(self, exc: BaseException | None) -> None:
        now = _now()
        framer, exchange = self._framer, self._exchange
        if framer is not None and exchange is not None:
            ended = exc is None and framer.end()
            if exchange.reception.status is None:
                exchange.broken = _lost(exc)
            elif not exchange.reception.final:
                exchange.reception.end(ended, now, "" if ended else _lost(exc))
            self._settle()
        super().connection_lost(exc)

    def _settle(self) -> None:
        self._exchange = None
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)


class _Spare:
    """Connections of one origin between two requests: the last to come is the first to go. Those that lie here longer
    than a sweep go back to the connector's pool, which knows when to close them; a trip through the pool costs
    as much as framing a response."""

    __slots__ = ("_connections", "_untouched")

    def __init__(self) -> None:
        self._connections: list[aiohttp_private.Connection] = []
        self._untouched = 0  # so many, from the bottom, have not been taken since the last sweep

    def put(self, connection: aiohttp_private.Connection) -> None:
        self._connections.append(connection)

    def take(self) -> aiohttp_private.Connection | None:
        if not self._connections:
            return None
        connection = self._connections.pop()
        self._untouched = min(self._untouched, len(self._connections))
        return connection

    def idle(self) -> list[aiohttp_private.Connection]:
        idle = self._connections[: self._untouched]
        del self._connections[: self._untouched]
        self._untouched = len(self._connections)
        return idle

    def take_all(self) -> list[aiohttp_private.Connection]:
        self._untouched = len(self._connections)
        return self.idle()


class FastPath:
    """Requests over `StreamProtocol` connections of one aiohttp connector; made on a running loop."""

    def __init__(self, tls: Any, timeout: aiohttp.ClientTimeout, traffic: Traffic) -> None:
        self._traffic = traffic
        # Keep-alive of 15 s is aiohttp's default and shorter than what servers commonly allow.
        self._connector = aiohttp_private.connector_for(StreamProtocol, limit=0, ttl_dns_cache=300, ssl=tls)
        self._tls = tls
        self._timeout = timeout
        self._routes: dict[yarl.URL, aiohttp.ClientRequest] = {}
        self._keeps: dict[aiohttp.ClientRequest, bool] = {}  # does the origin keep connections? absent: not known yet
        self._probation: dict[aiohttp_private.Connection, asyncio.TimerHandle] = {}
        self._heads: dict[yarl.URL, tuple[Mapping[str, str], bytes]] = {}
        self._spare: dict[aiohttp.ClientRequest, _Spare] = {}

    async def close(self) -> None:
        for spare in self._spare.values():
            for connection in spare.take_all():
                connection.release()
        for connection, handle in self._probation.items():
            handle.cancel()
            connection.close()
        self._probation.clear()
        await self._connector.close()

    async def stream(
        self, exchange: Exchange, url: yarl.URL, headers: Mapping[str, str], body: bytes
    ) -> Failure | None:
        """Send the request and see the response through. Raises aiohttp's errors and cancellation."""
        where = self._routes.get(url)
        if where is None:
            where = self._routes[url] = aiohttp_private.route(url, self._tls)
        connection = await self._connected(where)
        protocol = connection.protocol
        assert isinstance(protocol, StreamProtocol) and protocol.transport is not None  # noqa: S101, PT018  (see _connected)
        clean = False
        try:
            settled = asyncio.get_running_loop().create_future()
            exchange.settled = settled
            protocol.begin(exchange, settled)
            if exchange.depart is not None:
                exchange.depart()
            exchange.sent = _now()
            protocol.transport.write(b"%b%d\r\n\r\n%b" % (self._head(url, headers), len(body), body))
            await settled
            clean = protocol.reusable
        finally:
            if clean:
                self._give_back(where, connection)
            else:
                connection.close()
        if exchange.redirect is not None:
            return exchange.redirect
        if exchange.garbage is not None:
            raise ValueError(exchange.garbage)
        if exchange.broken is not None:
            raise aiohttp.ServerDisconnectedError(exchange.broken)
        return None

    async def _connected(self, where: aiohttp.ClientRequest) -> aiohttp_private.Connection:
        """A connection that is alive as far as can be told. Raises aiohttp's errors."""
        spare = self._spare.get(where)
        while spare is not None and (kept := spare.take()) is not None:
            if isinstance(kept.protocol, StreamProtocol) and not kept.protocol.ending():
                return kept
            kept.close()
        while True:
            asked = _now()
            connection = await aiohttp_private.connect(self._connector, where, self._timeout)
            protocol = connection.protocol
            if isinstance(protocol, StreamProtocol) and not (protocol.used and protocol.ending()):
                if not protocol.used:
                    self._traffic.opened(_now() - asked)
                return connection
            connection.close()

    def sweep(self) -> None:
        """Give back to the connector's pool what no request has needed since the last sweep."""
        for spare in self._spare.values():
            for connection in spare.idle():
                connection.release()

    def _give_back(self, where: aiohttp.ClientRequest, connection: aiohttp_private.Connection) -> None:
        keeps = self._keeps.get(where)
        if keeps is None:
            loop = asyncio.get_running_loop()
            self._probation[connection] = loop.call_later(PROBATION_S, self._judge, where, connection)
        elif keeps:
            self._spare.setdefault(where, _Spare()).put(connection)
        else:
            connection.close()

    def _judge(self, where: aiohttp.ClientRequest, connection: aiohttp_private.Connection) -> None:
        del self._probation[connection]
        self._keeps.setdefault(where, not connection.closed)
        connection.release()

    def _head(self, url: yarl.URL, headers: Mapping[str, str]) -> bytes:
        """Request line and headers up to the value of Content-Length, rendered once for each route."""
        cached = self._heads.get(url)
        if cached is not None and cached[0] is headers:
            return cached[1]
        lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {_authority(url)}"]
        ours = ("host", "content-length", "connection", "transfer-encoding")
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in ours]
        lines += ["Connection: keep-alive", "Content-Length: "]
        head = "\r\n".join(lines).encode("utf-8")
        self._heads[url] = (headers, head)
        return head


def _authority(url: yarl.URL) -> str:
    host = f"[{url.raw_host}]" if url.raw_host and ":" in url.raw_host else url.raw_host
    return f"{host}" if url.is_default_port() else f"{host}:{url.port}"


def _lost(exc: BaseException | None) -> str:
    return "connection closed" if exc is None else f"connection lost: {type(exc).__name__}: {exc}"
