"""The body of a response with an error status: read as far as needed, then judged.

It may be JSON (an object, an array), server-sent events, text or nothing. The SSE decoder finds the JSON in all
of them; the first document that is an error settles the matter, so that a connection kept open costs no wait.
"""

from __future__ import annotations

from typing import Any

from batchstream.records import Failure
from batchstream.wire.faults import Headers, classify, is_error
from batchstream.wire.jsontext import text_of
from batchstream.wire.payload import SENTINEL, DamagedError, documents
from batchstream.wire.sse import Event, SSEDecoder

MAX_ERROR_BYTES = 1 << 20
"""So much of a body is read; what an error has to say fits."""


class Refusal:
    """Collects the body of a response with `status`. `settled` means that more of it would change nothing."""

    def __init__(self, status: int, headers: Headers) -> None:
        self.settled = False
        self._status = status
        self._headers = headers
        self._sse = SSEDecoder(documents=True, max_event_bytes=MAX_ERROR_BYTES)
        self._envelope: Any = None
        self._body: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        self._body.append(data)
        self._size += len(data)
        self._take(self._sse.feed(data))
        self.settled |= self._size > MAX_ERROR_BYTES

    def end(self) -> None:
        if not self.settled:
            self._take(self._sse.end())

    def failure(self) -> Failure:
        text = text_of(b"".join(self._body)[:MAX_ERROR_BYTES])
        return classify(self._status, self._headers, self._envelope, text)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            try:
                found = documents(event.data)
            except DamagedError as damage:
                found = damage.before
            for document in found:
                items = document if isinstance(document, list) else [document]
                if document is SENTINEL or not any(isinstance(item, dict) and item for item in items):
                    continue  # nothing that could be an error
                if self._envelope is None:
                    self._envelope = document
                if event.origin != "data" or is_error(document, event.type):
                    self._envelope = {"error": document} if event.origin == "error" else document
                    self.settled = True
                    return
