"""What surrounds the text in the events of one stream: nearly all of them differ in nothing else.

A chat chunk is some 250 bytes around one token, the same bytes each time. Once a payload has been decoded, its
neighbours need not be: where the bytes before and behind the text are the same, and what stands between them is the
inside of a JSON string, the event means what the decoded one meant, with that text.

That this is so is proved, not guessed, when a stencil is learnt: the payload is decoded again with a probe in
the place of the text, and must give the same but for the probe. Then the place is the inside of the string that
becomes the text, and the grammar of JSON does the rest. Everything that fits only nearly is left to the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

PROBE = "¶probe"

_special = re.compile(rb'["\\\x00-\x1f]').search
_string = msgspec.json.Decoder(str).decode


class Stencil:
    """`before` and `behind`: the bytes of a payload around its text."""

    __slots__ = ("_around", "_head", "_joint", "_tail")

    def __init__(self, before: bytes, behind: bytes) -> None:
        self._head = b"data: " + before
        self._tail = behind + b"\n\n"
        self._joint = self._tail + self._head
        self._around = len(self._joint)

    def read(self, data: bytes) -> tuple[str, int] | None:
        """The text of `data` and the number of its events, where it is whole events of this stencil and none of
        them is without text. None for anything else."""
        if not data.startswith(self._head) or not data.endswith(self._tail) or len(data) < self._around:
            return None
        middle = data[len(self._head) : -len(self._tail)]
        if _special(middle) is None:
            pieces = [middle]
        else:
            pieces = middle.split(self._joint)
            middle = b"".join(pieces)
        if not all(pieces):
            return None
        try:
            if _special(middle) is not None:
                return "".join([_string(b'"%b"' % piece) for piece in pieces]), len(pieces)
            if middle.isascii() or len(pieces) == 1:
                return middle.decode(), len(pieces)
            # Each on its own: a character that is cut by the end of an event is damaged, not continued.
            return "".join([piece.decode() for piece in pieces]), len(pieces)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None


def learn(payload: bytes, text: str, holds: Callable[[bytes], bool]) -> Stencil | None:
    """The stencil of `payload`, whose text is `text`.

    `holds(other)` decodes another payload and says whether it means the same, but for the text, which is PROBE.
    None where the place of the text is not plain to see.
    """
    if not text or text == PROBE or b"\n" in payload or b"\r" in payload:
        return None
    inside = b'"%b"' % text.encode("utf-8", "replace")
    place = payload.find(inside)
    if place < 0 or payload.find(inside, place + 1) >= 0:
        return None
    before, behind = payload[: place + 1], payload[place + len(inside) - 1 :]
    return Stencil(before, behind) if holds(before + PROBE.encode() + behind) else None
