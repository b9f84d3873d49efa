"""The stream of one answer in one API's spelling, as bytes ready to go out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from batchstream.endpoints.sim.answers import VOCABULARY, AnswerChoice, Piece


class Script(NamedTuple):
    """`opening` holds no generated output; `events` gives the SSE bytes of one step after the other
    (made as they are asked for: a long answer costs nothing before its time); `closing`, called after the
    last of them, ends the stream."""

    opening: bytes
    events: Iterator[bytes]
    closing: Callable[[], bytes]


class Block(NamedTuple):
    """Neighbouring pieces of a kind: what the Responses and Messages APIs make an item of."""

    kind: str  # reasoning | content | tool
    call: int
    pieces: list[Piece]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if piece.kind != "call")


_ENCODED = {word: msgspec.json.encode(word)[1:-1] for word in VOCABULARY}


def escaped(text: str) -> bytes:
    """`text` as it stands between the quotes of JSON."""
    known = _ENCODED.get(text)
    return known if known is not None else msgspec.json.encode(text)[1:-1]


def sse(payload: Any, name: str | None = None) -> bytes:
    """One event. `payload` is encoded as JSON."""
    line = b"data: " + msgspec.json.encode(payload) + b"\n\n"
    return line if name is None else b"event: " + name.encode() + b"\n" + line


def blocks(choice: AnswerChoice) -> list[Block]:
    """The pieces of a choice as blocks, in order."""
    found: list[Block] = []
    for piece in choice.pieces:
        kind = "tool" if piece.kind in ("call", "arguments") else piece.kind
        if not found or (found[-1].kind, found[-1].call) != (kind, piece.call):
            found.append(Block(kind, piece.call, []))
        found[-1].pieces.append(piece)
    return found
