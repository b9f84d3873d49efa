"""What surrounds the text in the events of one stream: nearly all of them differ in nothing else.

A chat chunk is some 250 bytes around one token, the same bytes each time. Once one has been decoded, its
neighbours need not be: where the bytes before and behind the text are the same, and what stands between them is the
inside of a JSON string, the event means what the decoded one meant, with that text.

Why that holds is in `learn`. Whatever fits only nearly is left to the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

_special = re.compile(rb'["\\\x00-\x1f]').search
_string = msgspec.json.Decoder(str).decode


class Stencil:
    """`before` and `behind`: the bytes of a payload around its text. `take` is where the texts go."""

    __slots__ = ("_before", "_behind", "_event_joint", "_head", "_joint", "_tail", "take")

    def __init__(self, before: bytes, behind: bytes, take: Callable[[str], None]) -> None:
        self.take = take
        self._before = before
        self._behind = behind
        self._joint = behind + b"\n" + before
        self._head = b"data: " + before
        self._tail = behind + b"\n\n"
        self._event_joint = self._tail + self._head

    def read(self, data: bytes) -> tuple[str, int] | None:
        """The text of `data` and the number of its events, where it is whole events of this stencil and none of
        them is without text. None for anything else."""
        head, tail = self._head, self._tail
        if len(data) < len(self._event_joint) or not data.startswith(head) or not data.endswith(tail):
            return None
        middle = data[len(head) : -len(tail)]
        if middle and _special(middle) is None and middle.isascii():
            return middle.decode(), 1
        pieces = middle.split(self._event_joint)
        text, count = _texts(pieces)
        return (text, count) if count == len(pieces) else None

    def run(self, payloads: list[bytes]) -> tuple[str, int]:
        """The text of the first of `payloads`, as many as are of this stencil and have text, and their number.
        None of them holds a newline."""
        if not payloads[0].startswith(self._before):
            return "", 0
        joined = b"\n".join(payloads)
        pieces = joined[len(self._before) :].split(self._joint)
        # Behind the last text is the rest of its payload, and perhaps payloads of another form.
        last = pieces[-1]
        end = last.find(self._behind)
        if end < 0 or last[end + len(self._behind) :][:1] not in (b"", b"\n"):
            pieces.pop()
        else:
            pieces[-1] = last[:end]
        return _texts(pieces)


def _texts(pieces: list[bytes]) -> tuple[str, int]:
    """The insides of JSON strings as one text, up to the first that is none or is empty; and how many they are."""
    middle = b"".join(pieces)
    if _special(middle) is None and middle.isascii() and all(pieces):
        return middle.decode(), len(pieces)
    texts = []
    try:
        # Each on its own: a character that is cut by the end of an event is damaged, not continued.
        for piece in pieces:
            text = _string(b'"%b"' % piece)
            if not text:
                break
            texts.append(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    return "".join(texts), len(texts)


def learn(payload: bytes, key: bytes, text: str, take: Callable[[str], None]) -> Stencil | None:
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
                return Stencil(payload[:begin], payload[end:], take)
    return None
