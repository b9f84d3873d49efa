"""One request and its response: what goes out, when, and where it breaks.

A response is a generator that writes and yields the instants at which it wants to go on (see `wheel`).
Instants are planned from the request's arrival, never from the previous write, so lateness of one
token does not shift the others; tokens that are late go out together, as a busy server's do.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Protocol

from batchstream.endpoints.sim.answers import Answer
from batchstream.endpoints.sim.asks import Ask
from batchstream.endpoints.sim.dialects import BODIES, SCRIPTS, default_error, error_event, json_bytes
from batchstream.endpoints.sim.faultplan import Fault
from batchstream.endpoints.sim.latency import Distribution
from batchstream.endpoints.sim.ledger import Entry
from batchstream.endpoints.sim.script import Script
from batchstream.endpoints.sim.wheel import Steps

LAST_CHUNK = b"0\r\n\r\n"
PAGE = b"<!DOCTYPE html><html><head><title>Just a moment...</title></head><body>Checking your browser</body></html>"


class Outlet(Protocol):
    """The connection, as an exchange sees it."""

    blocked: bool

    def write(self, data: bytes) -> None: ...
    def close(self) -> None:
        """Close once everything written is out."""

    def reset(self) -> None:
        """Drop the connection with a RST."""

    def over(self, exchange: Exchange, reusable: bool) -> None:
        """The response is complete; the connection may take the next request when `reusable`."""


class Pace:
    """The planned instants of one answer. `instant`: all tokens at once, after the first's delay."""

    def __init__(
        self, received: float, ttft: Distribution, gap: Distribution, jitter: float, chance: random.Random
    ) -> None:
        self.first = received + ttft.drawer(chance)()
        self.instant = gap.constant == 0 and jitter == 0
        draw = gap.drawer(chance)
        self.gap: Callable[[], float] = draw if jitter == 0 else lambda: draw() + chance.uniform(0.0, jitter)

    def last(self, steps: int) -> float:
        """When the last of so many tokens is due: when an answer without a stream goes out."""
        return self.first if self.instant else self.first + math.fsum(self.gap() for _ in range(steps - 1))


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; nothing for no data, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


class Exchange:
    """Writes one response into `outlet` and its story into `entry`; `steps` is what the wheel turns.

    `on_end` is called exactly once, when the exchange is over in whatever way.
    """

    def __init__(self, outlet: Outlet, entry: Entry, keep_alive: bool, on_end: Callable[[Entry], None]) -> None:
        self.outlet = outlet
        self.entry = entry
        self.keep_alive = keep_alive
        self.steps: Steps = self._nothing()
        self._on_end = on_end
        self._answer: Answer | None = None
        self._ended = False

    @property
    def blocked(self) -> bool:
        return self.outlet.blocked

    def abandon(self) -> None:
        """The client has gone."""
        self.entry.closed_early = not self._ended
        self._end(finished=False)

    # --- the ways to answer: each gives the generator for `steps`

    def whole(self, head: Callable[..., bytes], status: int, body: bytes, due: float = 0.0) -> Steps:
        """A complete response at `due`. `head(status, length)` makes its head."""
        yield due
        self._write_head(head(status, len(body)) + body, status)
        self._over()

    def reply(self, head: Callable[..., bytes], ask: Ask, answer: Answer, pace: Pace, fault: Fault | None) -> Steps:
        """The answer without a stream, at the instant a stream would have ended."""
        self._answer = answer
        body = json_bytes(BODIES[ask.api](ask, answer))
        yield pace.last(answer.steps)
        self.entry.events = answer.steps
        kind = fault.kind if fault else None
        if fault is None or kind == "whole":
            self._stamp()
            self._write_head(head(200, len(body)) + body, 200)
            self._over()
        elif kind == "garbage":
            cut = body[: len(body) // 2]
            self._write_head(head(200, len(cut)) + cut, 200)
            self._over()
        elif kind == "drip":
            self._write_head(head(200, len(body)), 200)
            yield from self._drip(body, fault.numbers.get("every", 0.0))
            self._stamp()
            self._over()
        else:
            self._write_head(head(200, len(body)) + body[: len(body) // 2], 200)
            yield from self._break(kind or "", fault.numbers.get("every", 1.0), chunked=False)

    def stream(self, head: Callable[..., bytes], ask: Ask, answer: Answer, pace: Pace, options: StreamOptions) -> Steps:
        """The answer as SSE. `head(200, None)` announces a chunked body."""
        self._answer = answer
        script, fault = SCRIPTS[ask.api](ask, answer), options.fault
        kind = fault.kind if fault else None
        if fault is not None and kind == "drip":
            yield pace.first
            yield from self._drip_stream(head, script, fault.numbers.get("every", 0.0))
            return
        if fault is not None and kind == "length":
            yield from self._lie(head, script, pace, options.cut)
            return
        begin = head(200, None) + chunk(script.opening)
        if options.role_early:
            self._write_head(begin, 200)
            begin = b""
        yield pace.first
        if begin:
            self._write_head(begin, 200)
        if fault is None:
            yield from self._send(script.events, pace, options.burst, script.closing)
            self._over()
            return
        yield from self._send(islice(script.events, options.cut), pace, options.burst, None)
        if kind == "garbage":
            self.outlet.write(
                chunk(b'data: {"id":"' + answer.identity.encode() + b'","choices":[{"index":0,"delta":{"content":"\n\n')
            )
            yield from self._send(script.events, pace, options.burst, script.closing)
            self._over()
        elif kind == "error":
            status = int(fault.numbers.get("status", 500))
            kind_text, message = default_error(status)
            self.outlet.write(
                chunk(
                    error_event(
                        ask.api,
                        fault.texts.get("message", message),
                        fault.texts.get("type", kind_text),
                        fault.texts.get("code", status),
                    )
                )
                + LAST_CHUNK
            )
            self._over(finished=False)
        else:
            if kind in ("truncate-event", "truncate-utf8"):
                self.outlet.write(
                    chunk(_cut_event(next(script.events, b"") or script.closing(), inside=kind == "truncate-utf8"))
                )
            yield from self._break(kind or "", fault.numbers.get("every", 1.0), chunked=True)

    def reset_early(self) -> Steps:
        """The connection is reset before any byte of an answer."""
        self._end(finished=False)
        self.outlet.reset()
        yield math.inf

    # --- parts

    def _send(self, events: Iterator[bytes], pace: Pace, burst: int, closing: Callable[[], bytes] | None) -> Steps:
        """The events at their instants; with `closing`, the end of the body with the last of them."""
        batch: list[bytes] = []
        if pace.instant:
            while True:
                following = list(islice(events, burst))
                if not following:
                    break
                if batch:
                    self._write_events(batch)
                    yield 0.0
                batch = following
        else:
            # `due` goes on where an earlier call for the same pace stopped.
            for event in events:
                if pace.first > time.monotonic():
                    if batch:
                        self._write_events(batch)
                        batch = []
                    yield pace.first
                batch.append(event)
                pace.first += pace.gap()
        self._write_events(batch, b"" if closing is None else chunk(closing()) + LAST_CHUNK)

    def _write_events(self, batch: list[bytes], end: bytes = b"") -> None:
        if batch:
            self.entry.events += len(batch)
            self._stamp()
        self.outlet.write(chunk(b"".join(batch)) + end)

    def _break(self, kind: str, every: float, *, chunked: bool) -> Steps:
        """The end of a response that does not end as it should."""
        if kind == "reset":
            self._end(finished=False)
            self.outlet.reset()
        elif kind.startswith("truncate") and chunked:
            self.outlet.write(LAST_CHUNK)
            self._over(finished=False)
        elif kind in ("stall", "comments"):
            while kind == "comments" and chunked:
                self.outlet.write(chunk(b": keep-alive\n\n"))
                yield time.monotonic() + max(every, 0.001)
            yield math.inf
        else:
            self._end(finished=False)
            self.outlet.close()

    def _lie(self, head: Callable[..., bytes], script: Script, pace: Pace, cut: int) -> Steps:
        """A body that is shorter than its Content-Length, and then the socket closes."""
        events = list(islice(script.events, cut))
        body = script.opening + b"".join(events)
        yield pace.first
        if events:
            self._stamp()
        self.entry.events = len(events)
        self._write_head(head(200, len(body) + 1000, stream=True) + body, 200)
        yield from self._break("close", 0.0, chunked=False)

    def _drip_stream(self, head: Callable[..., bytes], script: Script, every: float) -> Steps:
        self._write_head(head(200, None), 200)
        yield from self._drip(chunk(script.opening), every)
        for event in script.events:
            yield from self._drip(chunk(event), every)
            self.entry.events += 1
            self._stamp()
        yield from self._drip(chunk(script.closing()) + LAST_CHUNK, every)
        self._over()

    def _drip(self, data: bytes, every: float) -> Steps:
        for at in range(len(data)):
            self.outlet.write(data[at : at + 1])
            yield time.monotonic() + every if every else 0.0

    def _write_head(self, data: bytes, status: int) -> None:
        self.entry.status = status
        self.entry.head_at = time.monotonic()
        self.outlet.write(data)

    def _stamp(self) -> None:
        now = time.monotonic()
        if self.entry.first_token_at is None:
            self.entry.first_token_at = now
        self.entry.last_token_at = now

    def _over(self, *, finished: bool = True) -> None:
        self._end(finished=finished)
        self.outlet.over(self, self.keep_alive)

    def _end(self, *, finished: bool) -> None:
        if self._ended:
            return
        self._ended = True
        entry, answer = self.entry, self._answer
        if answer is not None and entry.events:
            entry.prompt_tokens = answer.prompt_tokens
            entry.completion_tokens = answer.generated(entry.events)
            entry.billed_tokens = entry.prompt_tokens + entry.completion_tokens
        entry.ended_at = time.monotonic()
        entry.finished = finished and entry.status == 200
        self._on_end(entry)

    def _nothing(self) -> Generator[float, None, None]:
        yield math.inf


class StreamOptions:
    """What a stream does besides its answer: `cut` is the k of the fault."""

    def __init__(self, fault: Fault | None, cut: int, *, role_early: bool, burst: int) -> None:
        self.fault = fault
        self.cut = cut
        self.role_early = role_early
        self.burst = burst


def _cut_event(event: bytes, *, inside: bool) -> bytes:
    """The first part of an event: up to the middle, or into its first character of several bytes
    (when it has one)."""
    lead = next((at for at, byte in enumerate(event) if byte >= 0xC0), None) if inside else None
    return event[: lead + 1] if lead is not None else event[: len(event) // 2]
