"""The only HTTP client: one aiohttp session, whose errors become ours at this border.

A call of `Transport.exchange` writes one request and pours the response, read by read and stamped
with the monotonic clock, into a `wire.reception.Reception`, which says when enough has been read.
What goes wrong on the way ends in a `Failure` value; nothing is raised but cancellation.

Choices, with their reasons: no limit on connections (the engine bounds concurrency; aiohttp's default
of 100 would queue requests unseen, inside somebody's TTFT); no redirects (a redirect would carry the key
elsewhere); proxies from the environment only when asked; `Accept-Encoding: identity` (a compressor that
does not flush holds tokens back); bodies are read raw and decoded by the reception, so that what a
server sends compressed all the same is read right; no cookies.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import yarl

from batchstream.errors import InputError
from batchstream.net.deadlines import SWEEP_S, Limits, overdue
from batchstream.records import Failure
from batchstream.wire.reception import Reception

_MAX_HEADER = 65536  # bytes of one response header line or field


class Exchange:
    """One request under way, as the sweeper sees it. `sent` is None until the request is being written."""

    __slots__ = ("expired", "limits", "reception", "sent", "task")

    def __init__(self, reception: Reception, limits: Limits) -> None:
        self.reception = reception
        self.limits = limits
        self.sent: float | None = None
        self.expired: str | None = None
        self.task: asyncio.Task[Any] | None = asyncio.current_task()


class Transport:
    """An HTTP client for streamed responses; use as an async context manager, on one event loop.

    `ca_file` names a PEM file of authorities to trust instead of the system's.
    """

    def __init__(self, *, trust_env: bool = False, ca_file: str | None = None, connect_timeout: float = 10.0) -> None:
        self._trust_env = trust_env
        self._tls: ssl.SSLContext | bool = _tls_context(ca_file) if ca_file else True
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout, sock_connect=connect_timeout)
        self._live: set[Exchange] = set()
        self._session: aiohttp.ClientSession
        self._sweeper: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Transport:
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, ssl=self._tls)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            trust_env=self._trust_env,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
            read_bufsize=1 << 18,
            max_line_size=_MAX_HEADER,
            max_field_size=_MAX_HEADER,
        )
        self._sweep()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._session.close()

    async def exchange(
        self, url: yarl.URL, headers: Mapping[str, str], body: bytes, reception: Reception, limits: Limits
    ) -> tuple[float | None, Failure | None]:
        """POST `body` and feed the response to `reception`.

        Returns the instant at which writing began (None: it never did, so nothing can have been billed)
        and a failure of the connection, or None where the reception itself tells how it ended.
        """
        exchange = Exchange(reception, limits)
        self._live.add(exchange)
        try:
            return exchange.sent, await self._stream(exchange, url, headers, body)
        except asyncio.CancelledError:
            if exchange.expired is None:
                raise
            if exchange.task is not None:
                exchange.task.uncancel()
            reception.end(False, time.monotonic(), exchange.expired)
            return exchange.sent, Failure("timeout", exchange.expired, retryable=True, status=reception.status)
        finally:
            self._live.discard(exchange)

    async def _stream(self, exchange: Exchange, url: yarl.URL, headers: Mapping[str, str], body: bytes) -> Failure | None:
        reception = exchange.reception
        try:
            async with self._session.post(
                url, data=_StampedBody(body, exchange), headers=headers, allow_redirects=False
            ) as response:
                now = time.monotonic()
                if 300 <= response.status < 400:
                    return _redirect(url, response.status, response.headers.get("Location"))
                reception.head(response.status, list(response.headers.items()), now)
                read = response.content.readany
                while data := await read():
                    if reception.feed(data, time.monotonic()):
                        # What follows the end of the answer is not waited for; the connection is reused
                        # only if its rest is already here.
                        if not response.content.at_eof():
                            response.close()
                        break
                else:
                    reception.end(True, time.monotonic())
        except aiohttp.ClientError as error:
            return self._broken(exchange, error)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            return self._broken(exchange, error)
        return None

    def _broken(self, exchange: Exchange, error: Exception) -> Failure | None:
        """A connection that failed: the reception's own matter once a response has begun."""
        reception = exchange.reception
        now = time.monotonic()
        if reception.status is not None:
            reception.end(False, now, _reason(error))
            return None
        return connection_failure(error, sent=exchange.sent is not None)

    def _sweep(self) -> None:
        now = time.monotonic()
        for exchange in self._live:
            if exchange.sent is None or exchange.expired is not None or exchange.task is None:
                continue
            reception = exchange.reception
            broken_since = reception.headers_at if reception.status not in (None, 200) else None
            exchange.expired = overdue(exchange.limits, now, exchange.sent, reception.last_output_at, broken_since)
            if exchange.expired is not None:
                exchange.task.cancel()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


class _StampedBody(aiohttp.BytesPayload):
    """A request body that notes when it is written: after waiting for a connection, before any byte leaves.
    aiohttp hands head and body to the socket together."""

    def __init__(self, body: bytes, exchange: Exchange) -> None:
        super().__init__(body, content_type="application/json")
        self._exchange = exchange

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        self._exchange.sent = time.monotonic()
        await super().write_with_length(writer, content_length)


def connection_failure(error: Exception, *, sent: bool) -> Failure:
    """Our word for what aiohttp raised before a response began. `sent`: the request may have left."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Failure("tls", f"the server's certificate was refused: {_reason(error)}", retryable=False)
    if isinstance(error, aiohttp.ClientSSLError):
        return Failure("tls", f"TLS handshake failed: {_reason(error)}", retryable=True)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Failure("connect", f"could not connect: {_reason(error)}", retryable=True)
    if isinstance(error, aiohttp.ClientResponseError | ValueError):
        return Failure("decode", f"the answer was not HTTP: {_reason(error)}", retryable=True)
    when = "before it answered" if sent else "before the request was sent"
    return Failure("disconnected", f"the server closed the connection {when}: {_reason(error)}", retryable=True)


def _redirect(url: yarl.URL, status: int, location: str | None) -> Failure:
    target = yarl.URL(location).host or url.host if location else "nowhere"
    message = f"HTTP {status} redirects to {target}; redirects are refused, they would carry the key there: correct --base-url"
    return Failure("redirect", message, retryable=False, status=status)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise InputError(f"--ca-file {ca_file}: expected a readable PEM file: {error.strerror or error}") from None
