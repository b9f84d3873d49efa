"""What is answered: text, reasoning, tool calls and usage, as a pure function of seed and request body.

The same body always gets the same answer and the same ids, whatever ran before or beside it, so a
run that was killed and resumed ends with the same results. Attempts of one body differ in nothing
but their faults and delays. Each answer begins with a tag of its own: no two bodies share an answer.

A token is a piece of text. The vocabulary has what breaks careless clients: several bytes a
character, characters that some call line ends, quotes, backslashes, blanks at both ends.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from batchstream.endpoints.sim.asks import Ask, Tool

VOCABULARY = (
    " the", " and", " of", " to", " café", " in", " that", " is",
    " for", " it", " as", " was", " naïve", " with", " be", " by",
    " on", " not", " he", "\n\n", " größer", ",", " are", " at",
    ".", " this", " have", " from", " 日本", " or", " had", " \"so\"",
    "ing", " but", " some", "tion", " 🙂", " what", " there", " we",
    " can", " out", "\\", " were", " Ω\u2028", " when", " your", " said",
    " use", " an", " each", ";", " über\u0085", " which", " she", " do",
    " how", " their", " if", "\t", " señor", " will", " up", " {x}",
)  # fmt: skip
assert len(VOCABULARY) == 64  # noqa: S101  (the walk below needs a power of two)

PieceKind = Literal["content", "reasoning", "call", "arguments"]


class Piece(msgspec.Struct, frozen=True):
    """One token. `call` is the ordinal of the tool call; a `call` piece opens it, its text is the name."""

    kind: PieceKind
    text: str
    call: int = 0


class AnswerChoice(msgspec.Struct, frozen=True):
    """`finish` in the words of chat: stop, length, tool_calls."""

    pieces: tuple[Piece, ...]
    finish: str

    def joined(self, kind: PieceKind, call: int | None = None) -> str:
        """The text of all pieces of a kind (of one tool call)."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind and call in (None, piece.call))

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Name and arguments of the tool calls."""
        opened = [piece for piece in self.pieces if piece.kind == "call"]
        return [(piece.text, self.joined("arguments", piece.call)) for piece in opened]


class Answer(msgspec.Struct, frozen=True):
    """`identity` is 24 hex digits that make all ids of the response; `created` is fixed by the body too."""

    identity: str
    created: int
    choices: tuple[AnswerChoice, ...]
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    @property
    def steps(self) -> int:
        """Tokens of the longest choice: all choices advance together, a token a step."""
        return max(len(choice.pieces) for choice in self.choices)

    def generated(self, steps: int) -> int:
        """Tokens that exist after so many steps."""
        return sum(min(steps, len(choice.pieces)) for choice in self.choices)


def digest_of(path: str, raw: bytes, body: Any) -> int:
    """The identity of a request, as an integer of 8 bytes: path and body, without `stream` and
    `stream_options` (how the answer travels must not change the answer), whatever the order of its keys.
    `body` is the decoded body; one that is no object goes by its `raw` bytes."""
    if isinstance(body, dict):
        kept = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        raw = msgspec.json.encode(kept, order="sorted")
    return int.from_bytes(blake2b(path.encode() + b"\0" + raw, digest_size=8).digest(), "big")


def chance_of(seed: int, digest: int, *parts: int | str) -> random.Random:
    """A generator for one purpose of one request, independent of all others."""
    key = ":".join(map(str, (seed, digest, *parts)))
    return random.Random(key)  # noqa: S311  (reproducible is what it is for)


def answer(ask: Ask, digest: int, seed: int, tokens: tuple[int, int]) -> Answer:
    """The answer to `ask`, the body of which has `digest`; `tokens` is the range of natural lengths."""
    root = blake2b(f"{seed}:{digest}".encode(), digest_size=12).digest()
    choices = tuple(_choice(ask, index, root, tokens) for index in range(ask.choices))
    return Answer(
        identity=root.hex(),
        created=1_764_000_000 + int.from_bytes(root[:3], "big"),
        choices=choices,
        prompt_tokens=ask.prompt_tokens,
        completion_tokens=sum(len(choice.pieces) for choice in choices),
        reasoning_tokens=sum(piece.kind == "reasoning" for choice in choices for piece in choice.pieces)
        if ask.reasoning
        else 0,
    )


_WORDS = {kind: tuple(Piece(kind, word) for word in VOCABULARY) for kind in ("content", "reasoning")}


def _choice(ask: Ask, index: int, root: bytes, tokens: tuple[int, int]) -> AnswerChoice:
    own = blake2b(root + index.to_bytes(4, "big"), digest_size=16).digest()
    low, high = tokens
    length = low + int.from_bytes(own[:4], "big") % (high - low + 1)
    if ask.ignore_eos and ask.max_tokens is not None:
        length = max(0, ask.max_tokens - ask.reasoning)
    pieces = _walk("reasoning", own[4:8], ask.reasoning)
    if ask.tools:
        for call, tool in enumerate(ask.tools):
            pieces += _call(call, tool, own)
        finish = "tool_calls"
    else:
        pieces += [Piece("content", own[12:15].hex()), *_walk("content", own[8:12], length - 1)][:length]
        finish = "stop"
    if ask.stop and not ask.tools:
        pieces = _stopped(pieces, ask.stop)
    if ask.max_tokens is not None and len(pieces) > ask.max_tokens:
        pieces, finish = pieces[: ask.max_tokens], "length"
    elif ask.ignore_eos and ask.max_tokens == len(pieces):
        finish = "length"
    return AnswerChoice(tuple(pieces), finish)


def _walk(kind: Literal["content", "reasoning"], start: bytes, length: int) -> list[Piece]:
    """`length` words: an odd stride through a vocabulary of 64 meets each word before the first again."""
    words, place, stride = _WORDS[kind], start[0], start[1] | 1
    return [words[(place + step * stride) & 63] for step in range(length)]


def _stopped(pieces: list[Piece], stop: tuple[str, ...]) -> list[Piece]:
    """The pieces before the first stop sequence in the content, which is itself left out."""
    text = "".join(piece.text for piece in pieces if piece.kind == "content")
    ends = [end for sequence in stop if (end := text.find(sequence)) >= 0]
    if not ends:
        return pieces
    left, kept = min(ends), []
    for piece in pieces:
        if piece.kind != "content":
            kept.append(piece)
            continue
        if left <= 0:
            break
        kept.append(Piece("content", piece.text[:left]))
        left -= len(piece.text)
    return kept


def _call(call: int, tool: Tool, own: bytes) -> list[Piece]:
    arguments = msgspec.json.encode(_value(tool.schema, own[8] + call, 0)).decode()
    return [
        Piece("call", tool.name, call),
        *(Piece("arguments", arguments[at : at + 8], call) for at in range(0, len(arguments), 8)),
    ]


def _value(schema: Any, salt: int, depth: int) -> Any:
    """A value that fits a JSON schema (its common part), the same for the same salt."""
    if not isinstance(schema, dict):
        schema = {}
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][salt % len(schema["enum"])]
    kind = schema.get("type", "object" if depth == 0 else "string")
    if kind == "object":
        properties = schema.get("properties")
        named = enumerate(properties.items()) if isinstance(properties, dict) else ()
        return {name: _value(part, salt + at, depth + 1) for at, (name, part) in named}
    if kind == "array":
        return [_value(schema.get("items"), salt, depth + 1)]
    if kind in ("integer", "number"):
        return salt if kind == "integer" else salt + 0.5
    if kind == "boolean":
        return salt % 2 == 0
    return None if kind == "null" else VOCABULARY[salt & 63].strip() + " é"
