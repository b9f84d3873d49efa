"""HTTP/1.1 requests out of bytes: sans-IO, one reader for each connection.

`feed` takes bytes as they come, `next_request` gives the next whole request or None. A request that
breaks the rules raises `BadRequest` once; the connection is then to be answered and closed.
Only what a server of JSON APIs needs: Content-Length and chunked bodies, keep-alive, pipelining.
"""

from __future__ import annotations

import msgspec

MAX_HEAD = 64 << 10
MAX_BODY = 64 << 20


class BadRequest(Exception):  # noqa: N818  (the name HTTP gives it)
    """The bytes are no acceptable request; `status` is what to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpRequest(msgspec.Struct):
    """`headers` by lower-case name (the last of several wins); `target` is the path without its query."""

    method: str
    target: str
    query: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool


class RequestReader:
    """Collects the bytes of one connection. `expects_continue` is True once, when the client waits
    for `100 Continue` before it sends the body."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: HttpRequest | None = None
        self._length: int | None = None  # None with a head = chunked
        self._chunks: list[bytes] = []
        self._chunked_size = 0
        self.expects_continue = False

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_request(self) -> HttpRequest | None:
        if self._head is None and not self._read_head():
            return None
        assert self._head is not None  # noqa: S101  (told to the type checker)
        body = self._read_chunks() if self._length is None else self._read_length(self._length)
        if body is None:
            return None
        request, self._head = self._head, None
        self.expects_continue = False
        request.body = body
        return request

    def _read_head(self) -> bool:
        buffer = self._buffer
        while buffer[:2] == b"\r\n":  # an empty line before a request is to be ignored (RFC 9112, 2.2)
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n")
        if end > MAX_HEAD or (end < 0 and len(buffer) > MAX_HEAD):
            raise BadRequest(431, f"request head longer than {MAX_HEAD} bytes")
        if end < 0:
            return False
        lines = bytes(buffer[:end]).decode("latin-1").split("\r\n")
        del buffer[: end + 4]
        parts = lines[0].split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            raise BadRequest(400, f"expected 'METHOD target HTTP/1.1', got {lines[0][:80]!r}")
        headers: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise BadRequest(400, f"malformed header line {line[:80]!r}")
            headers[name.lower()] = value.strip()
        target, _, query = parts[1].partition("?")
        connection = headers.get("connection", "").lower()
        keep = "close" not in connection if parts[2] == "HTTP/1.1" else "keep-alive" in connection
        self._head = HttpRequest(parts[0], target, query, headers, b"", keep)
        self._length = _body_length(headers)
        self._chunks, self._chunked_size = [], 0
        self.expects_continue = headers.get("expect", "").lower() == "100-continue"
        return True

    def _read_length(self, length: int) -> bytes | None:
        if len(self._buffer) < length:
            return None
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return body

    def _read_chunks(self) -> bytes | None:
        buffer = self._buffer
        while (end := buffer.find(b"\r\n")) >= 0:
            text = bytes(buffer[:end]).split(b";")[0].strip()
            try:
                size = int(text, 16)
            except ValueError:
                raise BadRequest(400, f"expected a chunk size, got {text[:20]!r}") from None
            if size < 0 or self._chunked_size + size > MAX_BODY:
                raise BadRequest(413, f"body longer than {MAX_BODY} bytes")
            if len(buffer) < end + 2 + size + 2:
                return None
            self._chunks.append(bytes(buffer[end + 2 : end + 2 + size]))
            self._chunked_size += size
            del buffer[: end + 2 + size + 2]
            if size == 0:
                return b"".join(self._chunks)
        if len(buffer) > MAX_HEAD:
            raise BadRequest(400, "expected a chunk size")
        return None


def _body_length(headers: dict[str, str]) -> int | None:
    """Bytes of the body, None when it is chunked."""
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked":
            raise BadRequest(501, f"transfer-encoding {headers['transfer-encoding']!r} is not supported")
        return None
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(400, f"content-length: expected a number, got {text[:40]!r}")
    if int(text) > MAX_BODY:
        raise BadRequest(413, f"body longer than {MAX_BODY} bytes")
    return int(text)
