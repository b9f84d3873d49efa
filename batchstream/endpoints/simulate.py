"""An OpenAI-compatible endpoint that only pretends: four APIs, models, keys, rate windows, faults, a ledger.

Strategy: raw asyncio protocols and one wheel for all streams, so that hundreds of streams keep their
schedule on one core. What is answered and what goes wrong is a pure function of (seed, request body,
attempt): the order and the concurrency of the requests change nothing.

    POST /v1/chat/completions  /v1/completions  /v1/responses  /v1/messages
    GET  /v1/models  /v1/models/verbose  /v1/models/{id}
    GET  /sim/ledger (JSON lines)  /sim/stats      POST /sim/reset
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast

from batchstream.endpoints.sim.answers import answer, chance_of, digest_of
from batchstream.endpoints.sim.asks import PATHS, Ask, Refusal, decoded, understand
from batchstream.endpoints.sim.dialects import default_error, error_payload, json_bytes
from batchstream.endpoints.sim.exchange import PAGE, Exchange, Pace, StreamOptions
from batchstream.endpoints.sim.faultplan import Fault, parse_faults
from batchstream.endpoints.sim.gate import NEEDS_PLAN, Gate
from batchstream.endpoints.sim.http1 import BadRequest, HttpRequest, RequestReader
from batchstream.endpoints.sim.latency import parse_distribution
from batchstream.endpoints.sim.ledger import Entry, Ledger
from batchstream.endpoints.sim.settings import SimulateConfig, make_config
from batchstream.endpoints.sim.wheel import Steps, Wheel
from batchstream.errors import UsageError
from batchstream.records import Api

__all__ = ["SimulateConfig", "Simulator", "make_config", "running", "serve"]

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_LINGER_RST = struct.pack("ii", 1, 0)


class _Connection(asyncio.Protocol):
    """One client connection: one exchange at a time, in the order of the requests."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._reader = RequestReader()
        self._exchange: Exchange | None = None
        self.blocked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._simulator._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._simulator._connections.discard(self)
        if self._exchange is not None:
            self._exchange.abandon()
            self._simulator._wheel.drop(self._exchange)
            self._exchange = None

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._next()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        if self._exchange is not None:
            self._simulator._wheel.resume(self._exchange)

    def write(self, data: bytes) -> None:
        if data:
            self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    def reset(self) -> None:
        # Without lingering, closing sends a RST instead of a FIN.
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RST)
        self._transport.abort()

    def over(self, exchange: Exchange, reusable: bool) -> None:
        self._exchange = None
        if reusable:
            self._simulator._loop.call_soon(self._next)
        else:
            self._transport.close()

    def _next(self) -> None:
        """Begin the next exchange, if its request is here and the connection is free."""
        if self._exchange is not None or self._transport.is_closing():
            return
        try:
            request = self._reader.next_request()
        except BadRequest as error:
            body = json_bytes(error_payload(None, str(error), "invalid_request_error", error.status))
            self._transport.write(_head(error.status, len(body), {"connection": "close"}) + body)
            self._transport.close()
            return
        if request is not None:
            self._exchange = exchange = self._simulator._begin(self, request)
            self._simulator._wheel.start(exchange)
        elif self._reader.expects_continue:
            self._reader.expects_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


class Simulator:
    """The endpoint. `start` binds within the running event loop; `base_url` ends with /v1.

    `ledger` may be read at any time from the same thread; `GET /sim/ledger` from everywhere else.
    """

    def __init__(self, config: SimulateConfig | None = None) -> None:
        self.config = config or SimulateConfig()
        self.ledger = Ledger(self.config.ledger_limit)
        self.base_url = ""
        self._faults = parse_faults(self.config.faults)
        self._ttft = parse_distribution(self.config.ttft, "ttft")
        self._gap = parse_distribution(self.config.gap, "gap")
        self._tokens = self.config.token_range
        self._gate = Gate(self.config)
        self._connections: set[_Connection] = set()
        self._answering: set[int] = set()  # ordinals of the requests that were admitted and are not over

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Bind, begin to serve and give the base URL. Port 0 takes a free one. Raises `UsageError`
        when the address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._wheel = Wheel(self._loop)
        try:
            self._server = await self._loop.create_server(lambda: _Connection(self), host, port, backlog=1024)
        except OSError as error:
            raise UsageError(
                f"simulate: cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
            ) from None
        bound = self._server.sockets[0].getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        self.base_url = f"http://{shown}:{bound[1]}/v1"
        return self.base_url

    async def stop(self) -> None:
        """Stop serving; connections that are open are dropped."""
        self._server.close()
        for connection in list(self._connections):
            connection._transport.abort()
        self._wheel.close()
        await self._server.wait_closed()

    def reset(self) -> None:
        """Forget everything that was asked: ledger, attempts, rate windows."""
        self.ledger.reset()
        self._gate = Gate(self.config)

    # --- routes

    def _begin(self, connection: _Connection, request: HttpRequest) -> Exchange:
        """The exchange for one request."""
        if request.method == "POST" and request.target != "/sim/reset":
            return self._asked(connection, request)
        entry = Entry(0, time.monotonic(), time.time(), request.target, None, False, "", 0)
        exchange = Exchange(connection, entry, request.keep_alive, lambda _: None)
        try:
            status, body, content_type = 200, *self._look_up(request)
        except Refusal as refusal:
            status, content_type = refusal.status, "application/json"
            body = json_bytes(error_payload(None, refusal.message, refusal.kind, refusal.code))
        headers = {"content-type": content_type}
        exchange.steps = exchange.whole(lambda code, length: _head(code, length, headers), status, body)
        return exchange

    def _look_up(self, request: HttpRequest) -> tuple[bytes, str]:
        """Body and content type of everything that is no completion."""
        if request.method == "GET" and request.target == "/sim/ledger":
            return self.ledger.to_jsonl(), "application/x-ndjson"
        if request.method == "GET" and request.target == "/sim/stats":
            totals = {**self.ledger.totals(), "connections": len(self._connections)}
            return json_bytes(totals), "application/json"
        if request.method == "POST":
            self.reset()
            return b'{"ok":true}', "application/json"
        if request.method != "GET":
            raise Refusal(405, f"{request.method} is not allowed here", "invalid_request_error", 405)
        self._gate.check_key(request.headers)
        return json_bytes(self._models(request.target)), "application/json"

    def _models(self, target: str) -> dict[str, Any]:
        models = [
            {"id": name, "object": "model", "created": 1_764_000_000, "owned_by": "sim"} for name in self.config.models
        ]
        if target == "/v1/models":
            return {"object": "list", "data": models}
        if target == "/v1/models/verbose":
            return {"object": "list", "data": [{**model, **self._details(str(model["id"]))} for model in models]}
        for model in models:
            if target == f"/v1/models/{model['id']}":
                return model
        raise Refusal(404, f"There is nothing at {target}", "invalid_request_error", 404)

    def _details(self, model: str) -> dict[str, Any]:
        permission = {
            "context_length": self.config.context_length,
            "max_output": self.config.context_length,
            "tool_calling": True,
        }
        plan = "basic" if model == NEEDS_PLAN else "free"
        return {"plan": plan, "request_multiplier": self.config.models[model], "permission": permission}

    def _asked(self, connection: _Connection, request: HttpRequest) -> Exchange:
        """The exchange for a completion; it goes into the ledger whatever becomes of it."""
        body = decoded(request.body)
        digest = digest_of(request.target, request.body, body)
        entry = Entry(
            ordinal=self.ledger.requests + 1,
            received_at=time.monotonic(),
            received_wall=time.time(),
            path=request.target,
            model=None,
            stream=False,
            digest=f"{digest:016x}",
            attempt=self.ledger.attempt(digest),
            mark=request.headers.get(self.config.mark_header.lower()),
        )
        self.ledger.add(entry)
        exchange = Exchange(connection, entry, request.keep_alive, self._over)
        headers = {"x-request-id": f"req_{digest:016x}"}
        api = PATHS.get(request.target)
        try:
            ask = self._admit(api, request, body, entry)
        except Refusal as refusal:
            headers |= refusal.headers
            exchange.steps = self._refuse(exchange, api, refusal, headers)
            return exchange
        headers |= self._gate.headers(entry.received_wall)
        self._answering.add(entry.ordinal)
        attempt = self.ledger.admit(digest)
        chance = chance_of(self.config.seed, digest, attempt)
        fault = self._faults.choose(entry.ordinal, request.body, attempt, chance.random())
        entry.fault = fault.label if fault else None
        pace = Pace(entry.received_at, self._ttft, self._gap, self.config.jitter, chance)
        exchange.steps = self._steps(exchange, ask, digest, pace, fault, headers)
        return exchange

    def _over(self, entry: Entry) -> None:
        self._answering.discard(entry.ordinal)
        self.ledger.close(entry)

    def _admit(self, api: Api | None, request: HttpRequest, body: Any, entry: Entry) -> Ask:
        """Key, path, body, limits, in this order. Raises `Refusal`."""
        try:
            self._gate.check_key(request.headers)
        except Refusal:
            entry.key_ok = False
            raise
        if api is None or api not in self.config.apis:
            raise Refusal(404, f"There is nothing at {request.target}", "invalid_request_error", 404)
        ask = understand(api, body, self.config)
        entry.model, entry.stream = ask.model, ask.stream
        if self.config.at_once is not None and len(self._answering) >= self.config.at_once:
            raise Refusal(429, "Too many requests at once.", "rate_limit_error", 429)
        self._gate.admit(ask, entry.received_wall)
        return ask

    def _refuse(self, exchange: Exchange, api: Api | None, refusal: Refusal, headers: dict[str, str]) -> Steps:
        body = json_bytes(error_payload(api, refusal.message, refusal.kind, refusal.code))
        return exchange.whole(lambda code, length: _head(code, length, headers), refusal.status, body)

    def _steps(
        self, exchange: Exchange, ask: Ask, digest: int, pace: Pace, fault: Fault | None, headers: dict[str, str]
    ) -> Steps:
        """What the exchange will do: the faults that come before the answer, then the answer."""

        def head(status: int, length: int | None, *, stream: bool | None = None) -> bytes:
            streams = length is None if stream is None else stream
            if streams:
                return _head(
                    status,
                    length,
                    {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers},
                )
            return _head(status, length, headers)

        if fault is not None:
            if fault.status is not None:
                return self._refuse(exchange, ask.api, _refusal_of(fault), headers | _waits(fault))
            if fault.kind == "error" and not ask.stream:
                return self._refuse(exchange, ask.api, _refusal_of(fault), headers)
            if fault.kind == "reset-early":
                return exchange.reset_early()
            if fault.kind == "html":
                return exchange.whole(
                    lambda code, length: _head(code, length, {"content-type": "text/html"}), 200, PAGE
                )
            if fault.kind == "json-error":
                kind, message = default_error(500)
                return exchange.whole(head, 200, json_bytes(error_payload(ask.api, message, kind, 500)))
            if fault.kind == "redirect":
                return exchange.whole(lambda code, length: _head(code, length, {"location": "/v1/elsewhere"}), 302, b"")
            if fault.kind == "slow-headers":
                return self._late(exchange, ask, digest, pace, fault, head)
        found = answer(ask, digest, self.config.seed, self._tokens)
        if not ask.stream or (fault is not None and fault.kind == "whole"):
            return exchange.reply(head, ask, found, pace, fault)
        given = fault.numbers.get("k") if fault else None
        drawn = chance_of(self.config.seed, digest, "cut", exchange.entry.attempt).randrange(max(1, found.steps))
        cut = drawn if given is None else min(int(given), found.steps)
        options = StreamOptions(fault, cut, role_early=self.config.role_early, burst=self.config.burst)
        return exchange.stream(head, ask, found, pace, options)

    def _late(
        self, exchange: Exchange, ask: Ask, digest: int, pace: Pace, fault: Fault, head: Callable[..., bytes]
    ) -> Steps:
        """Nothing for a while, then the answer as it would have been."""
        wait = fault.numbers.get("s", 5.0)
        pace.first += wait
        yield exchange.entry.received_at + wait
        found = answer(ask, digest, self.config.seed, self._tokens)
        if not ask.stream:
            yield from exchange.reply(head, ask, found, pace, None)
            return
        options = StreamOptions(None, 0, role_early=self.config.role_early, burst=self.config.burst)
        yield from exchange.stream(head, ask, found, pace, options)


def _head(status: int, length: int | None, headers: dict[str, str]) -> bytes:
    """A response head; `length` None announces a chunked body."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}", f"date: {formatdate(usegmt=True)}"]
    if "content-type" not in headers:
        lines.append("content-type: application/json")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _refusal_of(fault: Fault) -> Refusal:
    status = fault.status or int(fault.numbers.get("status", 500))
    kind, message = default_error(status)
    return Refusal(
        status, fault.texts.get("message", message), fault.texts.get("type", kind), fault.texts.get("code", status)
    )


def _waits(fault: Fault) -> dict[str, str]:
    """The headers of a status fault that state a wait."""
    found: dict[str, str] = {}
    if "retry-after" in fault.numbers:
        found["retry-after"] = f"{fault.numbers['retry-after']:g}"
    if "retry-after-ms" in fault.numbers:
        found["retry-after-ms"] = f"{fault.numbers['retry-after-ms']:g}"
    if "retry-date" in fault.numbers:
        found["retry-after"] = formatdate(time.time() + fault.numbers["retry-date"], usegmt=True)
    return found


def serve(config: SimulateConfig, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve until SIGINT or SIGTERM. The base URL is the first line on stdout, written when the
    socket takes connections. Raises `UsageError` when the address cannot be had."""

    async def until_signal() -> None:
        simulator = Simulator(config)
        base_url = await simulator.start(host, port)
        done = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, done.set)
        sys.stdout.write(base_url + "\n")
        sys.stdout.flush()
        await done.wait()
        await simulator.stop()

    _run(until_signal())


@contextlib.contextmanager
def running(config: SimulateConfig | None = None) -> Iterator[Simulator]:
    """A simulator in a thread of its own, for callers without an event loop; stopped on leaving.
    The threads share the interpreter: to measure, run `serve` in another process."""
    simulator = Simulator(config)
    ready, done = threading.Event(), asyncio.Event()

    async def until_done() -> None:
        await simulator.start()
        ready.set()
        await done.wait()
        await simulator.stop()

    thread = threading.Thread(target=_run, args=(until_done(),), name="simulate", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield simulator
    finally:
        simulator._loop.call_soon_threadsafe(done.set)
        thread.join()


def _run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
        return
    uvloop.run(main)
