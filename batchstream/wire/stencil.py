"""What surrounds the text in the events of one stream: nearly all of them differ in nothing else.

A chat chunk is some 250 bytes around one token, the same bytes each time. Once one has been decoded, its
neighbours need not be: where the bytes before and behind the text are the same, and what stands between them is the
inside of a JSON string, the event means what the decoded one meant, with that text.

Why that holds is in `learn`. Whatever fits only nearly is left to the decoder.
"""

from __future__ import annotations

import re

import msgspec

_special = re.compile(rb'["\\\x00-\x1f]').search
_string = msgspec.json.Decoder(str).decode


class Stencil:
    """`before` and `behind`: the bytes of a payload around its text."""

    __slots__ = ("_around", "_before", "_behind", "_head", "_joint", "_tail")

    def __init__(self, before: bytes, behind: bytes) -> None:
        self._before = before
        self._behind = behind
        self._around = len(before) + len(behind)
        self._head = b"data: " + before
        self._tail = behind + b"\n\n"
        self._joint = self._tail + self._head

    def payload(self, payload: bytes) -> str:
        """The text of one payload, "" where it is none of this stencil (or has no text)."""
        if len(payload) > self._around and payload.startswith(self._before) and payload.endswith(self._behind):
            text = payload[len(self._before) : -len(self._behind)]
            try:
                return text.decode() if _special(text) is None else _string(b'"%b"' % text)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                pass
        return ""

    def read(self, data: bytes) -> tuple[str, int] | None:
        """The text of `data` and the number of its events, where it is whole events of this stencil and none of
        them is without text. None for anything else."""
        if len(data) < len(self._joint) or not data.startswith(self._head) or not data.endswith(self._tail):
            return None
        middle = data[len(self._head) : -len(self._tail)]
        pieces = [middle]
        if _special(middle) is not None:
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


def learn(payload: bytes, key: bytes, text: str) -> Stencil | None:
    """The stencil of a payload that was decoded and gave `text` under `key`, b'"content"' for example.

    Without a backslash in it, JSON cannot spell a key in a second way, and every quote begins or ends a string. So
    where the key stands once, it is the key that gave `text`, and what follows is that string; another string in its
    place changes nothing else. None where the payload is not as plain as that.
    """
    if b"\\" in payload or b"\n" in payload or payload.count(key) != 1:
        return None
    for opening in (key + b':"', key + b': "'):
        place = payload.find(opening)
        if place >= 0:
            begin = place + len(opening)
            end = payload.find(b'"', begin)
            if payload[begin:end] == text.encode("utf-8", "replace"):
                return Stencil(payload[:begin], payload[end:])
    return None
