"""Server-sent events from bytes, by the WHATWG rules (HTML living standard, 9.2.6), in linear time.

Framing happens on bytes, and only CR, LF and CRLF end a line: a text decoder would break characters at
the ends of reads, and `str.splitlines` would break lines at U+2028. A CR ends its line at once; an LF that
follows it, perhaps in the next read, is swallowed. What is incomplete is kept as a list of pieces and joined
once, so that an event arriving byte by byte costs no more than one arriving whole.

With `documents=True` the decoder also reports what the standard ignores but servers send: JSON without
`data:` (an error injected by a proxy, a whole JSON body, JSON lines) and a field named `error`.
Such a document is reported as soon as its last bracket has arrived. It ends the block it stands in.
"""

from __future__ import annotations

import re

import msgspec

from batchstream.wire.jsontext import Scanner

MAX_EVENT_BYTES = 64 << 20

_BOM = b"\xef\xbb\xbf"
_FIELD = re.compile(rb"(?:data|event|id|retry|error):")
_FIELD_NAMES = (b"data:", b"event:", b"id:", b"retry:", b"error:")
_BLANKS = b" \t"


class Event(msgspec.Struct, gc=False):
    """One dispatched event: its type ("message" if the server names none), its data, the last event id.

    `origin` is "data" for an event of the standard, "document" for JSON outside any field,
    "error" for the value of a field named so. `cut` means that no blank line but a document ended the block.
    """

    type: str
    data: bytes
    id: str = ""
    origin: str = "data"
    cut: bool = False


class SSEDecoder:
    """Feed it bytes in any cuts; it returns events. It never raises.

    `retry` is the last reconnection time the stream stated, in milliseconds, or None. `overflow` turns
    True, and nothing more is decoded, when a pending event exceeds `max_event_bytes`. `junk` turns True when
    a line was neither blank, comment nor field. `between`: nothing is pending but `partial`, a part of a block's
    first line.
    """

    def __init__(self, *, documents: bool = False, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.retry: int | None = None
        self.overflow = False
        self.junk = False
        self._documents = documents
        self._max = max_event_bytes
        self._head: bytes | None = b""  # bytes that may be a byte order mark; None once decided
        self._after_cr = False
        self.partial: list[bytes] = []  # the line whose end has not arrived
        self._partial_size = 0
        self._data: list[bytes] = []  # values of the data fields of the pending block
        self._data_size = 0
        self._type = ""
        self._id = ""
        self._scanner: Scanner | None = None  # while a document outside any field is collected
        self._pieces: list[bytes] = []
        self._pieces_size = 0
        self._mid_line = False  # the document's current line has been taken in part
        self._after_document = False  # a document ended and the rest of its line has not arrived
        self.between = False

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes."""
        events: list[Event] = []
        self._take(data, events)
        self.between = not (
            self._data
            or self._type
            or self._scanner
            or self._after_cr
            or self._after_document
            or self._head is not None
        )
        return events

    def _take(self, data: bytes, events: list[Event]) -> None:
        if self._head is not None:
            data = self._without_bom(data)
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == 0x0A:
                data = data[1:]
        if self._after_document:
            data = self._rest_of_document_line(data)
        if not data or self.overflow:
            return
        ended = data[-1] == 0x0A
        if not ended and data[-1] == 0x0D:
            ended = self._after_cr = True
        elif not ended and b"\n" not in data and b"\r" not in data:
            self._keep_partial(data, events)
            return
        if self.partial:
            self.partial.append(data)
            data = b"".join(self.partial)
            self.partial.clear()
            self._partial_size = 0
        lines = data.splitlines()
        tail = b"" if ended else lines.pop()
        self._lines(lines, events)
        if tail:
            self._keep_partial(tail, events)
        elif self._data_size + self._pieces_size > self._max:
            self.overflow = True

    def ordinary(self, data: bytes) -> list[bytes] | None:
        """The payloads that `data` completes, if all is ordinary: one-line `data: ` blocks ended by LF, perhaps
        with a part of such a line at either side. None, and nothing has changed, if anything is not.

        The ordinary read is nearly every read, and takes a handful of calls instead of a loop over lines.
        """
        if not self.between:
            if self._head != b"" or not data.startswith(b"data: "):
                return None
            self._head = None  # the stream begins, and with no byte order mark
            self.between = True
        partial = self.partial
        if partial:
            if b"\n" not in data:
                return None
            data = b"".join((*partial, data))
        if not data.startswith(b"data: ") or b"\r" in data:
            return None
        if not partial and data.find(b"\n") == len(data) - 2 and data.endswith(b"\n"):
            return [data[6:-2]]  # one event a read: the paced stream
        rest = b""
        if not data.endswith(b"\n\n"):
            end = data.rfind(b"\n\n") + 2
            rest = data[end:]
            if end < 2 or b"\n" in rest or not rest.startswith(b"data: "):
                return None
            data = data[:end]
        payloads = data[6:-2].split(b"\n\ndata: ")
        if data.count(b"\n") != 2 * len(payloads):
            return None
        if partial or rest:
            self.partial = [rest] if rest else []
            self._partial_size = len(rest)
        return payloads

    def end(self) -> list[Event]:
        """The pending block at the end of the stream, which the standard discards; nothing if there is none."""
        events: list[Event] = []
        if self._head:
            self.partial.append(self._head)
        self._head = None
        if self.partial:
            line = b"".join(self.partial)
            self.partial.clear()
            self._lines([line], events)
        if self._scanner is not None:
            self._end_document(events)
        if self._data:
            self._dispatch(events)
        return events

    def _lines(self, lines: list[bytes], events: list[Event]) -> None:
        """Take complete lines. The first branches are the ordinary stream: one data line, one blank line."""
        values = self._data
        for line in lines:
            if self._scanner is not None:
                self._document_line(line, events)
            elif line.startswith(b"data:"):
                values.append(line[6:] if line.startswith(b" ", 5) else line[5:])
                self._data_size += len(line)
            elif not line:
                if values:
                    data = values[0] if len(values) == 1 else b"\n".join(values)
                    events.append(Event(self._type or "message", data, self._id))
                    values.clear()
                    self._data_size = 0
                self._type = ""
            else:
                self._other_line(line, events)

    def _dispatch(self, events: list[Event]) -> None:
        """Close the block before its blank line."""
        if self._data:
            events.append(Event(self._type or "message", b"\n".join(self._data), self._id, cut=True))
            self._data.clear()
            self._data_size = 0
        self._type = ""

    def _other_line(self, line: bytes, events: list[Event]) -> None:
        name, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if name == b"":
            return
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._type = value.decode("utf-8", "replace")
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif name == b"retry":
            if value.isdigit() and len(value) <= 18:
                self.retry = int(value)
        elif self._documents and name == b"error" and value.strip()[:1] in (b"{", b"[", b'"'):
            self._dispatch(events)
            events.append(Event("error", value, self._id, "error"))
        elif self._documents and _opens_document(line):
            self._begin_document(line, events)
        else:
            self.junk = True

    # JSON outside any field

    def _begin_document(self, line: bytes, events: list[Event]) -> None:
        self._dispatch(events)
        self._scanner = Scanner()
        self._mid_line = False
        self._document_line(line, events)

    def _document_line(self, line: bytes, events: list[Event]) -> None:
        """Take a complete line, or the rest of one, while a document is open."""
        if not self._mid_line and _FIELD.match(line):
            # The stream goes on: what was opened is never closed.
            self._end_document(events)
            self._lines([line], events)
            return
        self._mid_line = False
        rest = self._document_bytes(line, events)
        while rest is not None and _opens_document(rest):
            self._scanner = Scanner()
            rest = self._document_bytes(rest, events)
        if self._scanner is not None:
            self._pieces.append(b"\n")

    def _document_bytes(self, data: bytes, events: list[Event]) -> bytes | None:
        """Scan `data` as part of the open document: what follows the document's end, or None if it goes on."""
        assert self._scanner is not None  # noqa: S101
        close = self._scanner.feed(data)
        if close < 0:
            self._pieces.append(data)
            self._pieces_size += len(data)
            return None
        self._pieces.append(data[:close])
        self._end_document(events)
        return data[close:]

    def _end_document(self, events: list[Event]) -> None:
        events.append(Event("message", b"".join(self._pieces).strip(), self._id, "document"))
        self._pieces.clear()
        self._pieces_size = 0
        self._scanner = None

    def _rest_of_document_line(self, data: bytes) -> bytes:
        """What follows a document on its own line is another document or nothing to us."""
        data = data.lstrip(_BLANKS)
        if data:
            self._after_document = False
            if data[:1] not in (b"{", b"[", b"\r", b"\n"):
                self.partial.append(b":")
        return data

    def _keep_partial(self, data: bytes, events: list[Event]) -> None:
        """Keep the beginning of a line for later; of a document, look for the end already."""
        if self._documents:
            data = self._partial_document(data, events)
        if data:
            self.partial.append(data)
            self._partial_size += len(data)
        if self._partial_size + self._data_size + self._pieces_size > self._max:
            self.overflow = True

    def _partial_document(self, data: bytes, events: list[Event]) -> bytes:
        if self._scanner is None:
            if self.partial and self.partial != [b" "]:
                return data
            if not data.strip(_BLANKS):
                return b"" if self.partial else b" "  # blanks before a document, or before junk: one will do
            if not _opens_document(data):
                return data
            self.partial.clear()
            self._partial_size = 0
            self._dispatch(events)
            self._scanner = Scanner()
        elif not self._mid_line:
            # Whether this line goes on with the document shows in its first bytes, perhaps of several reads.
            if self.partial and _FIELD.match(self.partial[0]):
                return data
            data = b"".join((*self.partial, data))
            self.partial.clear()
            self._partial_size = 0
            if _FIELD.match(data) or any(name.startswith(data) for name in _FIELD_NAMES):
                return data
        rest = self._document_bytes(data, events)
        while rest is not None and _opens_document(rest):
            self._scanner = Scanner()
            rest = self._document_bytes(rest, events)
        self._mid_line = rest is None
        if rest is not None:
            self._after_document = True
            if rest.lstrip(_BLANKS):
                self._after_document = False
                return b":"  # the rest of the line means nothing: make a comment of it
        return b""

    def _without_bom(self, data: bytes) -> bytes:
        data = (self._head or b"") + data
        if len(data) < 3 and _BOM.startswith(data):
            self._head = data
            return b""
        self._head = None
        return data[3:] if data.startswith(_BOM) else data


def _opens_document(line: bytes) -> bool:
    return line.lstrip(_BLANKS)[:1] in (b"{", b"[")
