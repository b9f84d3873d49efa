"""Everything this package uses of aiohttp that is not its public interface, in one small place.

We want aiohttp's connector (pool, DNS cache, happy eyeballs, TLS) with a protocol of our own on its
connections. Four things are needed for that: the connector's protocol factory, a `ResponseHandler` to
derive from, a `ClientRequest` to tell the connector where to go, and `Connection.protocol`.
tests/net/test_net_aiohttp_private.py fails, naming the thing, when a release of aiohttp changes one of them;
`supported()` then sends every request over the public path.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import Any

import aiohttp
import yarl
from aiohttp.client_proto import ResponseHandler as ResponseHandler  # (re-exported: the base of our protocol)
from aiohttp.connector import Connection as Connection  # (re-exported, likewise)


def missing() -> list[str]:
    """What the installed aiohttp no longer has of what we rely on; empty is good."""
    gone = []
    if "_factory" not in _names(aiohttp.TCPConnector, "_create_direct_connection"):
        gone.append("TCPConnector._factory")
    if list(inspect.signature(aiohttp.TCPConnector.connect).parameters) != ["self", "req", "traces", "timeout"]:
        gone.append("TCPConnector.connect(req, traces, timeout)")
    handler = ("data_received", "connection_lost", "eof_received", "is_connected", "close", "should_close")
    gone += [f"ResponseHandler.{name}" for name in handler if not hasattr(ResponseHandler, name)]
    if "_parser" not in _names(ResponseHandler, "data_received"):
        gone.append("ResponseHandler._parser")
    if not {"loop", "ssl"} <= set(inspect.signature(aiohttp.ClientRequest.__init__).parameters):
        gone.append("ClientRequest(method, url, loop=, ssl=)")
    if not isinstance(getattr(Connection, "protocol", None), property):
        gone.append("Connection.protocol")
    return gone


def _names(owner: type, method: str) -> tuple[str, ...]:
    """The attributes that a method uses. (From its code: reading the source would cost 30 ms of every start.)"""
    code = getattr(getattr(owner, method, None), "__code__", None)
    return () if code is None else code.co_names


@functools.cache
def supported() -> bool:
    """May the fast path be used with the installed aiohttp?"""
    return not missing()


def connector_for(protocol: type[ResponseHandler], **options: Any) -> aiohttp.TCPConnector:
    """A connector whose connections speak through `protocol`."""
    connector = aiohttp.TCPConnector(**options)
    connector._factory = functools.partial(protocol, loop=asyncio.get_running_loop())
    return connector


def route(url: yarl.URL, tls: Any) -> aiohttp.ClientRequest:
    """What the connector needs to know of a request: whom to reach, and how to trust it."""
    return aiohttp.ClientRequest("POST", url, loop=asyncio.get_running_loop(), ssl=tls)


async def connect(
    connector: aiohttp.TCPConnector, where: aiohttp.ClientRequest, limits: aiohttp.ClientTimeout
) -> Connection:
    """A connection from the pool, or a new one. Raises aiohttp's connection errors."""
    return await connector.connect(where, [], limits)


def in_tunnel_setup(protocol: ResponseHandler) -> bool:
    """aiohttp itself is reading from this connection (a proxy's answer to CONNECT)."""
    return protocol._parser is not None
