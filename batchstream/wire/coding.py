"""Content codings undone as bytes arrive: identity, gzip and deflate (several members), and liars.

Requests ask for `identity`, since a compressor that does not flush holds tokens back; some servers compress
all the same. "deflate" means zlib by the standard and raw deflate by habit; and a label may stand on a plain
body: the first bytes decide. Output comes in bounded pieces, so that a small read cannot fill the memory.
What cannot be decoded (br, zstd, damage) is a `CodingError`: loud, because an undecoded body reads as an
empty answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

PIECE = 1 << 20  # most bytes given out at once

_SNIFFED = 16  # so many printable bytes are text, not deflate
_TEXT = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}


class CodingError(Exception):
    """The body cannot be decoded. Stays inside this room."""


class Decompressor:
    """Undoes one coding, "gzip" or "deflate". A plain body passes through."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._head = b""  # bytes that do not tell yet what the body is
        self._plain = False
        self._member: zlib._Decompress | None = None
        self._members = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decoded bytes in pieces of at most PIECE. Raises CodingError on damage."""
        if self._plain:
            yield data
            return
        data = self._head + data
        self._head = b""
        while data:
            if self._member is None:
                self._member = self._begin(data)
                if self._plain:
                    yield data
                    return
                if self._member is None:
                    self._head = data
                    return
            before = self._member.copy()
            try:
                piece = self._member.decompress(data, PIECE)
            except zlib.error as error:
                yield from _up_to_damage(before, data)
                raise CodingError(f"damaged {self._coding} data: {error}") from None
            if piece:
                yield piece
            if self._member.eof:
                data = self._member.unused_data
                self._member = None
                self._members += 1
            else:
                data = self._member.unconsumed_tail
                if not data and len(piece) < PIECE:
                    return

    def _begin(self, data: bytes) -> zlib._Decompress | None:
        """A decompressor for what `data` begins, None if that takes more bytes to tell. Sets `_plain`.

        Behind a whole member only another one counts; padding and rubbish are dropped.
        """
        if self._coding == "gzip":
            magic = b"\x1f\x8b"
            if data.startswith(magic):
                return zlib.decompressobj(31)
            undecided = magic.startswith(data)
        else:
            if len(data) >= 2 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0:
                return zlib.decompressobj(15)
            undecided = len(data) < _SNIFFED and all(byte in _TEXT for byte in data)
            if not undecided and not self._members and any(byte not in _TEXT for byte in data[:_SNIFFED]):
                return zlib.decompressobj(-15)
        if not undecided and not self._members:
            self._plain = True
        return None

    def end(self) -> bytes:
        """What was held back to find out what the body is: a short plain text."""
        head, self._head = self._head, b""
        return head if not self._members else b""


def _up_to_damage(member: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """What `data` decodes to before it is damaged. zlib throws that away with the error, so that how much of an
    answer survives would depend on the cuts between reads."""
    for place in range(len(data)):
        try:
            piece = member.decompress(data[place : place + 1])
        except zlib.error:
            return
        if piece:
            yield piece


class ContentDecoder:
    """Undoes a Content-Encoding header. `unknown` names a coding that is not known here, or is None."""

    def __init__(self, header: str) -> None:
        self.unknown: str | None = None
        self._chain: list[Decompressor] = []
        for name in reversed([part.strip().lower() for part in header.split(",")]):
            if name in ("gzip", "x-gzip", "deflate"):
                self._chain.append(Decompressor(name.removeprefix("x-")))
            elif name not in ("", "identity", "none", "utf-8"):
                self.unknown = name[:40]

    @property
    def identity(self) -> bool:
        return not self._chain and self.unknown is None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decoded pieces. Raises CodingError, when iterated, on damage or an unknown coding."""
        if self.unknown is not None:
            raise CodingError(f"the body is encoded as {self.unknown!r}, which was not asked for and is not understood")
        yield from self._through(data, 0)

    def end(self) -> Iterator[bytes]:
        """What is left at the end of the body. Raises CodingError."""
        for place, coding in enumerate(self._chain):
            rest = coding.end()
            if rest:
                yield from self._through(rest, place + 1)

    def _through(self, data: bytes, place: int) -> Iterator[bytes]:
        if place == len(self._chain):
            yield data
            return
        for piece in self._chain[place].feed(data):
            yield from self._through(piece, place + 1)
