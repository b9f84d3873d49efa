"""HTTP/1.1 response framing, sans I/O: bytes as they arrive → head, body bytes, end of message.

Rules: RFC 9112 (sections 2-7). Written for one POST a connection at a time, so there is no pipelining:
bytes behind the end of a message are never the next answer, they make the connection unfit for reuse.
Strict where leniency lets one response be taken for two (request smuggling's mirror image): a bad chunk
size, a bare CR, conflicting lengths or an unknown transfer coding are errors, not guesses.
Work is linear in the bytes: nothing but an unfinished line is ever copied or kept.
"""

from __future__ import annotations

import re

MAX_HEAD = 65536
MAX_LINE = 4096  # a chunk-size line with its extensions; trailers share MAX_HEAD

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\0]*)?")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")

Headers = tuple[tuple[str, str], ...]

_FRAMING = frozenset({"connection", "transfer-encoding", "content-length"})

# A server says nearly the same in each response: what was checked once is looked up. Bounded, and only short lines.
_REMEMBERED = 4096
_sizes: dict[bytes, int] = {}
_statuses: dict[bytes, tuple[int, bool]] = {}  # and whether such connections persist unless said otherwise
_fields: dict[bytes, tuple[tuple[str, str], str]] = {}  # see _field
_heads: dict[bytes, tuple[int, Headers, bool, int, int]] = {}  # status, headers, persistent, state, rest
_framings: dict[tuple[object, ...], tuple[bool, int]] = {}  # of chunked messages
_MAX_REMEMBERED_HEAD = 4096
_HEADS = 64  # whole heads differ by their date at least, once a second

_HEAD, _SIZE, _DATA, _TRAILER, _LENGTH, _CLOSE, _DONE = range(7)


class ResponseFramer:
    """Frames one response.

    After each `feed`: `status` and `headers` are set once the head is complete (1xx heads are skipped);
    `complete` once the message has ended; `error` says what was not HTTP, or (`unspoken`) HTTP of a kind that is not
    framed here. `reusable` tells whether the
    connection may carry another request.
    """

    __slots__ = (
        "_framing",
        "_persistent",
        "_rest",
        "_state",
        "_tail",
        "complete",
        "error",
        "headers",
        "status",
        "surplus",
        "unspoken",
    )

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: Headers = ()
        self.complete = False
        self.error: str | None = None
        self.unspoken = False
        self.surplus = False
        self._framing: dict[str, str] = {}
        self._state = _HEAD
        self._tail = b""
        self._rest = 0  # bytes still to come of the chunk (with its CRLF) or of the body
        self._persistent = True

    @property
    def reusable(self) -> bool:
        return self.complete and self._persistent and not self.surplus and self.error is None

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they arrive; returns the body bytes among them (transfer coding removed)."""
        if self.complete or self.error is not None:
            self.surplus = self.surplus or bool(data)
            return b""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if self._state == _SIZE:
            # One whole chunk a read: the paced stream.
            line_end = data.find(b"\r\n", 0, MAX_LINE)
            size = _sizes.get(data[:line_end], 0)
            if size and len(data) == line_end + size + 4 and data.endswith(b"\r\n"):
                return data[line_end + 2 : -2]
        start = 0
        if self._state == _HEAD:
            start = self._head(data)
            if start < 0 or self._state == _DONE:
                return b""
        if self._state == _LENGTH:
            return self._fixed(data, start)
        if self._state == _CLOSE:
            return data[start:]
        return self._chunked(data, start)

    def end(self) -> bool:
        """The connection has closed. True if that is where the message ends properly."""
        if self._state == _CLOSE and not self.complete:
            self.complete = True
            self._persistent = False
        return self.complete

    # ------------------------------------------------------------------ head

    def _head(self, data: bytes) -> int:
        """Where the body begins in `data`, or -1 when the head is not complete (or not a head)."""
        start = 0
        while True:
            end = data.find(b"\r\n\r\n", start)
            if end < 0:
                if len(data) - start > MAX_HEAD:
                    self._fail(f"response head longer than {MAX_HEAD} bytes")
                elif not b"HTTP/1."[: len(data) - start].startswith(data[start : start + 7]):
                    self._fail(f"expected an HTTP/1.x status line, got {data[start : start + 40]!r}")
                else:
                    self._tail = data[start:]
                return -1
            head = data[start:end]
            start = end + 4
            known = _heads.get(head)
            if known is not None:
                self.status, self.headers, self._persistent, self._state, self._rest = known
                return start
            status = self._parse_head(head)
            if status is None:
                return -1
            if status >= 200:
                self.status = status
                self._choose_framing()
                if self._state == _DONE and start < len(data):
                    self.surplus = True
                if self.error is not None:
                    return -1
                self._remember(head)
                return start
            if status == 101:
                self._fail("unexpected HTTP 101 Switching Protocols")
                return -1

    def _remember(self, head: bytes) -> None:
        assert self.status is not None  # noqa: S101  (the head is final)
        if self._state != _DONE and len(head) <= _MAX_REMEMBERED_HEAD:
            if len(_heads) >= _HEADS:
                _heads.clear()
            _heads[head] = (self.status, self.headers, self._persistent, self._state, self._rest)

    def _parse_head(self, head: bytes) -> int | None:
        lines = head.split(b"\r\n")
        said = _statuses.get(lines[0]) or _status(lines[0])
        if said is None:
            self._fail(f"expected an HTTP/1.x status line, got {lines[0][:40]!r}")
            return None
        status, self._persistent = said
        headers = []
        framing: dict[str, str] = {}
        for line in lines[1:]:
            field = _fields.get(line) or _field(line)
            if field is None:
                self._fail(f"malformed response header {line[:40]!r}")
                return None
            header, name = field
            headers.append(header)
            if name:
                framing[name] = f"{framing[name]},{header[1]}" if name in framing else header[1]
        self.headers = tuple(headers)
        self._framing = framing
        return status

    def _values(self, name: str) -> list[str]:
        """All comma-separated members of a header that is about framing, in lower case."""
        value = self._framing.get(name)
        if value is None:
            return []
        return [part.strip().lower() for part in value.split(",") if part.strip()]

    def _choose_framing(self) -> None:
        said = (self.status, self._persistent, *self._framing.items())
        known = _framings.get(said)
        if known is not None:
            self._persistent, self._state = known
            return
        self._work_out_framing()
        if self._state == _SIZE and self.error is None and len(_framings) < _REMEMBERED:
            _framings[said] = self._persistent, self._state

    def _work_out_framing(self) -> None:
        connection = self._values("connection")
        if "close" in connection:
            self._persistent = False
        elif "keep-alive" in connection:
            self._persistent = True
        codings, lengths = self._values("transfer-encoding"), set(self._values("content-length"))
        if self.status in (204, 304):
            self._finish()
        elif codings:
            if codings != ["chunked"]:
                self.unspoken = True
                self._fail(f"transfer coding {', '.join(codings)!r} is not supported")
            if lengths:  # RFC 9112 6.3: the coding wins, and the connection is not to be trusted further
                self._persistent = False
            self._state = _SIZE
        elif lengths:
            length = lengths.pop()
            if lengths or not (length.isascii() and length.isdigit() and len(length) < 19):
                self._fail(f"malformed Content-Length {length[:40]!r}")
                return
            self._rest = int(length)
            self._state = _LENGTH
            if self._rest == 0:
                self._finish()
        else:
            self._state = _CLOSE

    # ------------------------------------------------------------------ body

    def _fixed(self, data: bytes, start: int) -> bytes:
        body = data[start : start + self._rest]
        self._rest -= len(body)
        if self._rest == 0:
            self._finish()
            self.surplus = start + len(body) < len(data)
        return body

    def _chunked(self, data: bytes, start: int) -> bytes:
        """The hot path: one read usually holds one or more whole chunks."""
        if self._state == _SIZE and (body := self._whole_chunks(data, start)) is not None:
            return body
        pieces: list[bytes] = []
        position, length = start, len(data)
        state, rest = self._state, self._rest
        while position < length:
            if state == _SIZE:
                line_end = data.find(b"\r\n", position, position + MAX_LINE)
                if line_end < 0:
                    if length - position >= MAX_LINE:
                        self._fail("chunk-size line too long")
                    else:
                        self._tail = data[position:]
                    break
                line = data[position:line_end]
                size = _sizes.get(line, -1)
                if size < 0 and (size := _chunk_size(line)) < 0:
                    self._fail(f"expected a chunk size, got {line[:40]!r}")
                    break
                position = line_end + 2
                if size == 0:
                    state = _TRAILER
                    continue
                end = position + size
                if end + 2 <= length and data.startswith(b"\r\n", end):
                    pieces.append(data[position:end])
                    position = end + 2
                    continue
                rest, state = size + 2, _DATA
            elif state == _DATA:
                end = position + rest
                if end <= length:
                    if data[end - 2 : end] == b"\r\n" if rest >= 2 else data[position:end] == b"\n":
                        if rest > 2:
                            pieces.append(data[position : end - 2])
                        position, state = end, _SIZE
                        continue
                    self._fail("a chunk is not closed by CRLF where its size says")
                    break
                piece = data[position : length if rest - (length - position) >= 2 else end - 2]
                if rest - (length - position) == 1 and data[-1:] != b"\r":
                    self._fail("a chunk is not closed by CRLF where its size says")
                    break
                if piece:
                    pieces.append(piece)
                rest -= length - position
                break
            else:
                position = self._trailer(data, position)
                state = self._state if self._state == _DONE else _TRAILER
                break
        self._state, self._rest = state, rest
        if len(pieces) == 1:
            return pieces[0]
        return b"".join(pieces)

    def _whole_chunks(self, data: bytes, start: int) -> bytes | None:
        """The body where `data` is whole chunks of known sizes, perhaps with the end of the message; else None.

        Split at each CRLF, sizes and bodies take turns, if no body holds a CRLF; that every size is the length of what
        stands behind it proves it.
        """
        parts = (data[start:] if start else data).split(b"\r\n")
        bodies = parts[1::2]
        if len(parts) % 2 == 0 or parts[-1] or list(map(_sizes.get, parts[:-1:2])) != list(map(len, bodies)):
            return None
        if not all(bodies):
            if not all(bodies[:-1]):
                return None  # something follows the end
            self._finish()
        return b"".join(bodies)

    def _trailer(self, data: bytes, position: int) -> int:
        """Trailer fields are read over; the blank line ends the message."""
        while True:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                if len(data) - position > MAX_HEAD:
                    self._fail(f"trailers longer than {MAX_HEAD} bytes")
                else:
                    self._tail = data[position:]
                return position
            blank = line_end == position
            position = line_end + 2
            if blank:
                self._finish()
                self.surplus = position < len(data)
                return position

    def _finish(self) -> None:
        self.complete = True
        self._state = _DONE

    def _fail(self, message: str) -> None:
        self.error = message
        self._persistent = False


def _chunk_size(line: bytes) -> int:
    """The size that a chunk's first line states, or -1 when it states none."""
    match = _CHUNK.fullmatch(line)
    if match is None:
        return -1
    size = int(match[1], 16)
    if len(line) <= 8 and len(_sizes) < _REMEMBERED:
        _sizes[line] = size
    return size


def _status(line: bytes) -> tuple[int, bool] | None:
    """The status, and whether the version lets the connection persist; None for what is no status line."""
    match = _STATUS.fullmatch(line)
    if match is None:
        return None
    said = int(match[2]), match[1] == b"1"
    if len(line) <= 128 and len(_statuses) < _REMEMBERED:
        _statuses[line] = said
    return said


def _field(line: bytes) -> tuple[tuple[str, str], str] | None:
    """A header line's name and value; and its name in lower case if it is about framing, else "". None for what is
    no header line."""
    match = _FIELD.fullmatch(line)
    if match is None:
        return None
    header = (match[1].decode("ascii"), match[2].decode("utf-8", "surrogateescape"))
    name = header[0].lower()
    field = (header, name if name in _FRAMING else "")
    if len(line) <= 128 and len(_fields) < _REMEMBERED:
        _fields[line] = field
    return field
