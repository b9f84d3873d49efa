"""What the data of one event holds: JSON documents, the end sentinel, noise, or damage.

Servers put more than one document into a block, repeat the `data:` prefix inside it, and send what is no JSON
at all. A payload that does not begin like JSON is noise; one that does, and is none, means lost text.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from batchstream.wire.jsontext import parse, text_of

SENTINEL: Literal["[DONE]"] = "[DONE]"
"""Stands for the end sentinel in a list of documents."""

_PEEL = re.compile(r"\A\s*(?:data:\s*)+")
_SENTINELS = frozenset({"[DONE]", '"[DONE]"'})
_HEAD_LIMIT = 64  # a sentinel is short: longer payloads are not upper-cased to look for one


def is_sentinel(text: str) -> bool:
    return len(text) < _HEAD_LIMIT and text.strip().upper() in _SENTINELS


class DamagedError(ValueError):
    """A payload begins like JSON and is none. `before` are the whole documents in front of the damage."""

    def __init__(self, before: list[Any]) -> None:
        super().__init__("no JSON")
        self.before = before


def documents(data: bytes) -> list[Any]:
    """The documents of a payload in order: parsed JSON containers, or SENTINEL; noise is left out.

    Raises DamagedError.
    """
    if data.startswith(b"{"):
        try:
            return [parse(data)]
        except ValueError:
            pass
    text = _peeled(text_of(data))
    if not text:
        return []
    if is_sentinel(text):
        return [SENTINEL]
    if text[0] in "{[":
        try:
            return [parse(text)]
        except ValueError:
            pass
    elif "\n" not in text:
        return []
    return _line_by_line(text)


def _line_by_line(text: str) -> list[Any]:
    """The documents of the lines of a payload that is not one document itself.

    An error that a server injects behind a cut document says more than the damage: whole documents
    behind it are returned with those before it, and only a block without any error is DamagedError.
    """
    found: list[Any] = []
    damaged_at: int | None = None
    for raw in text.split("\n"):
        line = _peeled(raw)
        if is_sentinel(line):
            found.append(SENTINEL)
        elif line[:1] in ("{", "["):
            try:
                found.append(parse(line))
            except ValueError:
                if damaged_at is None:
                    damaged_at = len(found)
    if damaged_at is None:
        return found
    for place in range(damaged_at, len(found)):
        document = found[place]
        if isinstance(document, dict) and (document.get("error") or document.get("object") == "error"):
            return [*found[:damaged_at], document]
    raise DamagedError(found[:damaged_at])


def _peeled(text: str) -> str:
    """`text` trimmed, without `data:` prefixes."""
    peel = _PEEL.match(text)
    return (text[peel.end() :] if peel else text).strip()
