"""Receives one HTTP response as it arrives; it ends as a Completion or a Failure. Sans I/O.

    bytes -> content coding -> SSE events -> documents -> assembler, with a stamp for each read

The transport stamps each read with the clock and passes the stamp along; events of one read share it. The
end is decided by meaning, not by the socket: `[DONE]`, the API's terminal event, an error or damage make the
reception final at once; otherwise the end of the body decides between complete (every choice has a finish
reason) and truncated. Nothing a server sends raises.

Every 2xx response is read as a stream: the content type is not believed. A whole JSON body is JSON outside
any SSE field, which the decoder reports too. Responses with another status are collected and classified.

The module is long because it is one state machine: every part of it decides whether the response is final.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from batchstream.records import Api, Completion, Delta, Failure, RateNews
from batchstream.wire.chat import ChoicesAssembler
from batchstream.wire.coding import CodingError, ContentDecoder
from batchstream.wire.faults import classify, failure, is_error
from batchstream.wire.jsontext import is_cut, parse, text_of
from batchstream.wire.messages import MessagesAssembler
from batchstream.wire.parts import NOT_ORDINARY, VISIBLE, Assembler
from batchstream.wire.payload import SENTINEL, DamagedError, documents
from batchstream.wire.refusal import Refusal
from batchstream.wire.responses import ResponsesAssembler
from batchstream.wire.sse import MAX_EVENT_BYTES, Event, SSEDecoder
from batchstream.wire.stencil import Stencil
from batchstream.wire.waits import rate_news

MAX_BODY_BYTES = 512 << 20
_RUNS = 2  # so often a read is searched for neighbours that differ in their text alone: the work stays linear
State = Literal["complete", "truncated", "error"]

_OBJECT = re.compile(r'\s*(?:\[\s*)?\{\s*"')  # the beginning of a JSON object with a key

_REQUEST_ID_HEADERS = (
    "x-request-id", "request-id", "x-generation-id", "x-amzn-requestid", "apim-request-id",
    "x-ms-request-id", "x-litellm-call-id", "x-trace-id", "cf-ray",
)  # fmt: skip
_CODING = -1
_places = {**{name: place for place, name in enumerate(_REQUEST_ID_HEADERS)}, "content-encoding": _CODING}


def assembler_for(api: Api, n: int | None, on_delta: Callable[[Delta], None] | None) -> Assembler:
    """A fresh assembler of that API."""
    if api == "responses":
        return ResponsesAssembler(n, on_delta)
    if api == "messages":
        return MessagesAssembler(n, on_delta)
    return ChoicesAssembler(n, on_delta)


class Reception:
    """One response of `api`. `n` is the number of choices asked for (None: unknown).

    Instants are what `now` said, in seconds, or None: `headers_at`, `first_event_at` (first data event),
    `first_output_at` (first with generated output), `first_visible_at` (first with output that is not reasoning),
    `last_output_at`, `ended_at`. `events` counts data events, `chunks` those with generated output, `gap_max` is the
    longest wait between two of them. `ttft_event` and `ttfo_event` are the 1-based ordinals of the first events with
    output and with visible output. `final` means that nothing more needs to be read. `state` is None until then.

    `lane="full"` keeps the fast lane shut (for tests); results are the same.
    """

    def __init__(
        self,
        api: Api,
        *,
        n: int | None = None,
        on_delta: Callable[[Delta], None] | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        max_body_bytes: int = MAX_BODY_BYTES,
        lane: Literal["auto", "full"] = "auto",
    ) -> None:
        self.headers_at: float | None = None
        self.first_event_at: float | None = None
        self.first_output_at: float | None = None
        self.first_visible_at: float | None = None
        self.last_output_at: float | None = None
        self.ended_at: float | None = None
        self.events = 0
        self.chunks = 0
        self.gap_max: float | None = None
        self.ttft_event: int | None = None
        self.ttfo_event: int | None = None
        self.status: int | None = None
        self.headers: Sequence[tuple[str, str]] = ()
        self.request_id: str | None = None
        self.rates: RateNews | None = None
        self.saw_done = False
        self.final = False
        self.state: State | None = None
        self._failure: Failure | None = None
        self._assembler = assembler_for(api, n, on_delta)
        self._done_ends = api in ("chat", "completions")
        self._fast = False  # until the head says that this is a stream
        self._may_be_fast = lane == "auto"
        self._sse = SSEDecoder(documents=True, max_event_bytes=max_event_bytes)
        self._max_event = max_event_bytes
        self._max_body = max_body_bytes
        self._coding: ContentDecoder | None = None
        self._received = 0  # decoded bytes
        self._refusal: Refusal | None = None  # the status is not 2xx
        self._malformed = False  # the body begins with a brace and is no JSON
        self._lost = ""  # a cut payload, while it is seen whether an error follows that explains it

    # What the transport tells

    def head(self, status: int, headers: Sequence[tuple[str, str]], now: float) -> None:
        """The response's status and headers (names in any case) have arrived."""
        self.status = status
        self.headers = headers
        self.headers_at = now
        if not 200 <= status < 300:
            self._refusal = Refusal(status, headers)
        self._fast = self._refusal is None and self._may_be_fast
        best = len(_REQUEST_ID_HEADERS)
        coding: str | None = None
        limited = False
        for name, value in headers:
            name = name.lower()
            place = _places.get(name)
            if place is None:
                limited = limited or "ratelimit" in name
                continue
            if place == _CODING:
                coding = value if coding is None else coding
            elif place < best and value:
                best, self.request_id = place, value
        if limited:
            self.rates = rate_news({name.lower(): value for name, value in reversed(headers)})
        if coding is not None:
            decoder = ContentDecoder(coding)
            self._coding = None if decoder.identity else decoder

    def feed(self, data: bytes, now: float) -> bool:
        """Bytes of the body have arrived. True: the response is final, nothing more needs to be read."""
        if self.final:
            return True
        if self._coding is None:
            if not self._fast:
                self._decoded(data, now)
                return self.final
            sse, stencil = self._sse, self._assembler.stencil
            if stencil is not None and sse.between and not sse.partial and (found := stencil.read(data)) is not None:
                self._received += len(data)
                self._texts(stencil, found, now)
                return self.final
            payloads = sse.ordinary(data)
            if payloads is None:
                self._decoded(data, now)
            else:
                self._received += len(data)
                self._ordinary(payloads, now)
        else:
            self._encoded(self._coding.feed(data), now)
        return self.final

    def end(self, clean: bool, now: float, reason: str = "") -> None:
        """The body has ended; not `clean` means that the connection was lost or the body is incomplete."""
        if self.final:
            return
        if self._coding is not None:
            self._encoded(self._coding.end(), now)
            if self.final:
                return
        if self._refusal is not None:
            self._refusal.end()
            self._refused(self._refusal, now)
            return
        self._pending(now)
        if self.final:
            return
        assembler = self._assembler
        if not assembler.started():
            self._nothing_came(clean, reason, now)
        elif assembler.finished():
            self._finish("complete", None, now)
        else:
            self._finish("truncated", failure("truncated", self._how_it_ended(clean, reason)), now)

    def outcome(self) -> tuple[Completion | None, Failure | None]:
        """The completion (partial with a failure; None if nothing came) and the failure, None if complete.

        Asked before the end, the response counts as truncated.
        """
        if self.state is None:
            cut = None if self._assembler.finished() else failure("truncated", "the response had not ended")
            return self._assembler.completion(), cut
        if self._refusal is not None:
            return None, self._failure
        return self._assembler.completion(), self._failure

    # Bytes to events

    def _encoded(self, pieces: Iterator[bytes], now: float) -> None:
        try:
            for piece in pieces:
                self._decoded(piece, now)
                if self.final:
                    return
        except CodingError as error:
            if self._refusal is None:
                self._finish("error", failure("decode", str(error)), now)
            else:
                self._refused(self._refusal, now)  # the status still tells what is wrong

    def _decoded(self, data: bytes, now: float) -> None:
        if self._refusal is not None:
            self._refusal.feed(data)
            if self._refusal.settled:
                self._refused(self._refusal, now)
            return
        self._received += len(data)
        self._take(self._sse.feed(data), now)
        if self.final:
            return
        if self._sse.overflow:
            self._finish("error", failure("decode", f"an event is larger than {self._max_event} bytes"), now)
        elif self._received > self._max_body:
            self._too_large(now)

    def _texts(self, stencil: Stencil, found: tuple[str, int], now: float) -> None:
        """Events of one read that all brought text, and others did before."""
        text, events = found
        stencil.take(text)
        self.events += events
        gap = now - self.last_output_at if self.last_output_at is not None else 0.0
        if self.gap_max is None or gap > self.gap_max:
            self.gap_max = gap
        self.last_output_at = now
        self.chunks += events
        if self._received > self._max_body:
            self._too_large(now)

    def _ordinary(self, payloads: list[bytes], now: float) -> None:
        """Payloads of plain events of one read: each down the fast lane if it can, else in full."""
        assembler = self._assembler
        quick = assembler.quick
        place, runs = 0, 0
        while place < len(payloads):
            stencil = assembler.stencil
            if stencil is not None and runs < _RUNS:
                runs += 1
                found = stencil.run(payloads[place:])
                if found[1]:
                    self._texts(stencil, found, now)
                    place += found[1]
                    continue
            payload = payloads[place]
            place += 1
            if payload == b"[DONE]":
                self.events += 1
                if self.first_event_at is None:
                    self.first_event_at = now
                self._sentinel(now)
            elif (brought := quick(payload)) == NOT_ORDINARY:
                self._payload(Event("message", payload), now)
            else:
                self.events += 1
                if brought:
                    self._output(brought, now)
                elif self.first_event_at is None:
                    self.first_event_at = now
            if self.final:
                return
        if self._received > self._max_body:
            self._too_large(now)

    def _take(self, events: list[Event], now: float) -> None:
        """Events of one read, one by one."""
        for event in events:
            if self._fast and event.origin == "data" and event.type != "error":
                brought = self._assembler.quick(event.data)
                if brought != NOT_ORDINARY:
                    self.events += 1
                    if brought:
                        self._output(brought, now)
                    elif self.first_event_at is None:
                        self.first_event_at = now
                    continue
            self._payload(event, now)
            if self.final:
                return

    def _too_large(self, now: float) -> None:
        self._finish("error", failure("decode", f"the body is larger than {self._max_body} bytes"), now)

    def _output(self, brought: int, now: float) -> None:
        """An event with generated output."""
        last = self.last_output_at
        if last is None:
            self.first_output_at = now
            self.ttft_event = self.events
            if self.first_event_at is None:
                self.first_event_at = now
        elif self.gap_max is None or now - last > self.gap_max:
            self.gap_max = now - last
        self.last_output_at = now
        self.chunks += 1
        if brought == VISIBLE and self.first_visible_at is None:
            self.first_visible_at = now
            self.ttfo_event = self.events

    # Events to meaning

    def _payload(self, event: Event, now: float, *, pending: bool = False) -> None:
        """One event, in full. `pending`: its block was never closed, so what is no JSON is a cut."""
        is_data = event.origin == "data"
        if is_data and self.first_event_at is None and not pending:
            self.first_event_at = now
        try:
            found = documents(event.data)
        except DamagedError as damage:
            if self._lost:
                self._damaged(self._lost, now)
            else:
                self._broken(event, text_of(event.data), damage.before, now, pending=pending)
            return
        if self._lost and event.origin != "error" and not any(map(is_error, found)):
            self._damaged(self._lost, now)
        elif found:
            self._documents(found, event, now)
        else:
            self._no_document(event, now, pending=pending)

    def _no_document(self, event: Event, now: float, *, pending: bool) -> None:
        """Noise, unless it stands where an error does."""
        self.events += event.origin == "data"
        if event.origin == "error":
            text = text_of(event.data)
            self._fault({"error": _value(text)}, text, now)
        elif event.type == "error" and not pending:
            self._fault(None, text_of(event.data), now)

    def _documents(self, found: list[Any], event: Event, now: float) -> None:
        for document in found:
            self.events += event.origin == "data"
            if document is SENTINEL:
                self._sentinel(now)
            elif event.origin == "error":
                self._fault({"error": document}, "", now)
            else:
                for item in document if isinstance(document, list) else [document]:
                    if not self.final:
                        self._document(item, event, now)
            if self.final:
                return

    def _document(self, document: Any, event: Event, now: float) -> None:
        """One parsed document: what it adds to the answer first, then the error it may carry."""
        assembler = self._assembler
        is_data = event.origin == "data"
        name = event.type if is_data else ""
        wrong = is_error(document, name)
        if isinstance(document, dict) and not (wrong and "choices" not in document):
            brought = assembler.add(document, name)
            if not is_data and brought and not assembler.was_whole:
                is_data = True  # a delta without `data:` counts as an event
                self.events += 1
                if self.first_event_at is None:
                    self.first_event_at = now
            if brought and is_data:
                self._output(brought, now)
            elif not is_data and not brought and not assembler.was_whole:
                self._sse.junk = True
        if wrong:
            self._fault(document, "", now)
        elif assembler.error is not None:
            self._fault(assembler.error, "", now)
        elif assembler.ended or (not is_data and not self.events and assembler.was_whole and assembler.finished()):
            self._finish("complete", None, now)

    def _sentinel(self, now: float) -> None:
        self.saw_done = True
        if not self._done_ends and not self._assembler.finished():
            return  # a gateway's habit; the API's own terminal event is what counts
        if self._assembler.started():
            self._finish("complete", None, now)
        else:
            self._finish("error", failure("empty_stream", "the stream held [DONE] and no choice"), now)

    def _fault(self, envelope: Any, text: str, now: float) -> None:
        self._finish("error", classify(None, self.headers, envelope, text), now)

    def _broken(self, event: Event, text: str, before: list[Any], now: float, *, pending: bool) -> None:
        """A payload that begins like JSON and is none. At the end of the body, that is a cut."""
        if event.origin == "document" and not _OBJECT.match(text):
            self._sse.junk = True  # a line that happens to begin with a bracket
            self._malformed |= text.startswith("{")
            return
        self._documents(before, event, now)
        if self.final:
            return
        self.events += event.origin == "data"
        if pending:
            self._malformed |= event.origin == "document" and not is_cut(text)
        elif event.type == "error" and event.origin == "data":
            self._fault(None, text, now)
        elif event.origin == "error":
            self._fault({"error": text}, text, now)
        elif event.cut:
            self._lost = text
            self._fast = False  # the next event decides
        else:
            self._damaged(text, now)

    def _damaged(self, text: str, now: float) -> None:
        self._finish("error", failure("decode", f"a payload is not JSON, text is lost: {_excerpt(text)}"), now)

    def _pending(self, now: float) -> None:
        """What the decoder still holds at the end of the body."""
        for event in self._sse.end():
            if not self.final:
                self._payload(event, now, pending=True)
        if self._lost and not self.final:
            self._damaged(self._lost, now)

    # Ends

    def _nothing_came(self, clean: bool, reason: str, now: float) -> None:
        """The body ended without any choice."""
        if self._malformed:
            kind, message = "decode", "the body begins like JSON and is none"
        elif self._sse.junk and not self.events:
            kind, message = "not_sse", "the body is no event stream and no completion"
        else:
            kind, message = "empty_stream", "the response held no choice"
        lost = "" if clean else f" ({reason or 'the connection was lost'})"
        self._finish("error", failure(kind, message + lost), now)

    def _how_it_ended(self, clean: bool, reason: str) -> str:
        how = "the stream ended" if clean else "the connection was lost"
        how += f" ({reason})" if reason else ""
        return f"{how} without [DONE] or a finish reason, after {self.chunks} chunks"

    def _refused(self, refusal: Refusal, now: float) -> None:
        self._finish("error", refusal.failure(), now)

    def _finish(self, state: State, cause: Failure | None, now: float) -> None:
        self.state = state
        self._failure = cause
        self.final = True
        self.ended_at = now


def _value(text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return text


def _excerpt(text: str) -> str:
    line = " ".join(text[:200].split())
    return line if len(line) <= 80 else line[:80] + "…"
