"""The only HTTP client; its errors become ours at this border.

A call of `Transport.exchange` writes one request and pours the response, stamped with the monotonic clock
on arrival, into a `wire.reception.Reception`, which says when enough has been read. What goes wrong on
the way ends in a `Failure` value; nothing is raised but cancellation.

Two paths, one behaviour: the fast one (`net.fast`) for everything direct, aiohttp's public `ClientSession` for
proxies, for releases of aiohttp that the fast one does not know, and for an address whose answers come in a transfer
coding that the fast one does not speak (the request that found out is retried like any other). For both: no limit
on connections (the engine bounds concurrency; aiohttp's default of 100 would queue requests unseen, inside somebody's
TTFT); no redirects; proxies from the environment only when asked; `Accept-Encoding: identity` (a compressor that does
not flush holds tokens back), but what comes compressed is decoded by the reception; no cookies.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Literal

import aiohttp
import yarl

from batchstream.errors import InputError
from batchstream.net import aiohttp_private
from batchstream.net.deadlines import SWEEP_S, Limits
from batchstream.net.exchange import GRACE_S, Exchange, Traffic, redirect
from batchstream.net.fast import FastPath
from batchstream.records import Failure
from batchstream.wire.http1 import MAX_HEAD
from batchstream.wire.reception import Reception


class Transport:
    """An HTTP client for streamed responses; use as an async context manager, on one event loop.

    `ca_file` names a PEM file of authorities to trust instead of the system's; `path` forces one of the two ways.
    `traffic` counts what goes over the wire.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 10.0,
        ca_file: str | None = None,
        trust_env: bool = False,
        path: Literal["auto", "fast", "public"] = "auto",
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = traffic or Traffic()
        self._tls: ssl.SSLContext | bool = _tls_context(ca_file) if ca_file else True
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout, sock_connect=connect_timeout)
        self._trust_env = trust_env
        proxied = trust_env and bool(urllib.request.getproxies())
        self._use_fast = path == "fast" or (path == "auto" and not proxied and aiohttp_private.supported())
        self._live: set[Exchange] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._fast: FastPath | None = None
        self._session: aiohttp.ClientSession | None = None
        self._foreign: set[yarl.URL] = set()  # where answers came that the fast path does not speak

    async def __aenter__(self) -> Transport:
        if self._use_fast:
            self._fast = FastPath(self._tls, self._timeout, self.traffic)
        self._sweep()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._fast is not None:
            await self._fast.close()
        if self._session is not None:
            await self._session.close()

    async def exchange(
        self,
        url: yarl.URL,
        headers: Mapping[str, str],
        body: bytes,
        reception: Reception,
        limits: Limits,
        depart: Callable[[], object] | None = None,
    ) -> tuple[float | None, Failure | None]:
        """POST `body` and feed the response to `reception`.

        `depart` is called just before the request is written, on a connection that is ready (on the public path: before
        there is one); what it raises is raised here, and nothing has left.
        Returns the instant at which writing began (None: it never did, so nothing can have been billed)
        and a failure of the connection, or None where the reception itself tells how it ended.
        """
        exchange = Exchange(reception, limits, depart)
        self._live.add(exchange)
        try:
            if self._fast is not None and url not in self._foreign:
                failure = await self._fast.stream(exchange, url, headers, body)
            else:
                failure = await self._public(exchange, url, headers, body)
        except asyncio.CancelledError:
            if exchange.expired is None or exchange.task is None:
                raise
            exchange.task.uncancel()
            failure = None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = self._broken(exchange, error)
        finally:
            if exchange.unspoken:
                self._foreign.add(url)
            self._live.discard(exchange)
            self.traffic.reads += exchange.reads
            self.traffic.events += reception.events
        if exchange.expired is not None:
            reception.end(False, time.monotonic(), exchange.expired)
            if reception.state != "complete":  # an answer that was whole is one, however long its end took
                return exchange.sent, Failure("timeout", exchange.expired, retryable=True, status=reception.status)
            return exchange.sent, None
        return exchange.sent, failure

    async def _public(
        self, exchange: Exchange, url: yarl.URL, headers: Mapping[str, str], body: bytes
    ) -> Failure | None:
        """The same over aiohttp's public interface. Stamps are those of the reading coroutine."""
        if self._session is None:
            self._session = self._public_session()
        reception = exchange.reception
        exchange.task = asyncio.current_task()
        if exchange.depart is not None:
            exchange.depart()
        payload = _StampedBody(body, exchange)
        async with self._session.post(url, data=payload, headers=headers, allow_redirects=False) as response:
            answer = list(response.headers.items())
            if (refused := redirect(response.status, answer)) is not None:
                return refused
            reception.head(response.status, answer, time.monotonic())
            read = response.content.readany
            while data := await read():
                exchange.reads += 1
                if reception.feed(data, time.monotonic()):
                    await _rest_of(response)
                    return None
            reception.end(True, time.monotonic())
        return None

    def _public_session(self) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(self._opening)
        trace.on_connection_create_end.append(self._opened)
        return aiohttp.ClientSession(
            trace_configs=[trace],
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, ssl=self._tls),
            timeout=self._timeout,
            trust_env=self._trust_env,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent",),
            read_bufsize=1 << 18,
            max_line_size=MAX_HEAD,
            max_field_size=MAX_HEAD,
        )

    async def _opening(self, session: aiohttp.ClientSession, context: Any, params: Any) -> None:
        context.began = time.monotonic()

    async def _opened(self, session: aiohttp.ClientSession, context: Any, params: Any) -> None:
        self.traffic.opened(time.monotonic() - context.began)

    def _broken(self, exchange: Exchange, error: Exception) -> Failure | None:
        """A connection that failed: the reception's own matter once a response has begun."""
        if exchange.reception.status is None:
            return connection_failure(error, sent=exchange.sent is not None)
        if not exchange.reception.final:
            exchange.reception.end(False, time.monotonic(), reason(error))
        return None

    def _sweep(self) -> None:
        now = time.monotonic()
        for exchange in tuple(self._live):
            exchange.sweep(now)
        if self._fast is not None:
            self._fast.sweep()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


class _StampedBody(aiohttp.BytesPayload):
    """A request body that notes when it is written: after waiting for a connection, before any byte leaves
    (aiohttp hands head and body to the socket together)."""

    def __init__(self, body: bytes, exchange: Exchange) -> None:
        super().__init__(body, content_type="application/json")
        self._exchange = exchange

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        self._exchange.sent = time.monotonic()
        await super().write_with_length(writer, content_length)


async def _rest_of(response: aiohttp.ClientResponse) -> None:
    """Read over the end of a message whose answer is complete; drop the connection if it does not come."""
    try:
        async with asyncio.timeout(GRACE_S):
            while await response.content.readany():
                pass
    except (TimeoutError, aiohttp.ClientError):
        response.close()


def connection_failure(error: Exception, *, sent: bool) -> Failure:
    """Our word for what aiohttp raised before a response began. `sent`: the request may have left."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Failure("tls", f"the server's certificate was refused: {reason(error)}", retryable=False)
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure("tls", f"TLS handshake failed: {reason(error)}", retryable=True)
    if isinstance(error, TimeoutError) and not sent:
        return Failure("connect", "could not connect (TCP or TLS) within --connect-timeout", retryable=True)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Failure("connect", f"could not connect: {reason(error)}", retryable=True)
    if isinstance(error, aiohttp.ClientResponseError | ValueError):
        return Failure("decode", f"the answer was not HTTP: {reason(error)}", retryable=True)
    when = "before it answered" if sent else "before the request was sent"
    return Failure("disconnected", f"connection lost {when}: {reason(error)}", retryable=True)


def reason(error: Exception) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise InputError(f"--ca-file {ca_file}: expected a readable PEM file: {error.strerror or error}") from None
