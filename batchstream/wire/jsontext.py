"""JSON as servers really send it: read leniently, find where a document ends, keep only what can be stored.

Lenient means: NaN and Infinity, raw control characters, duplicate keys (the last wins) and numbers of
any size are accepted; malformed UTF-8 becomes U+FFFD. Nothing but `ValueError` leaves `loads`.
"""

from __future__ import annotations

import json
import re
from typing import Any

_INT_LIMIT = 2**63  # integers beyond 64 bits cannot be written to Parquet or by msgspec: they become floats
_LONG_DIGITS = re.compile(r"\d{19}")
_DEPTH_LIMIT = 64  # containers nested deeper than this hold no answer
_BRACKETS_WORTH_A_LOOK = 64

_decoder = json.JSONDecoder(strict=False)


def _bounded_int(digits: str) -> int | float:
    if len(digits) > 20:
        return float(digits)
    value = int(digits)
    return value if -_INT_LIMIT <= value < _INT_LIMIT else float(value)


_big_number_decoder = json.JSONDecoder(strict=False, parse_int=_bounded_int)


def text_of(data: bytes) -> str:
    """UTF-8 decoded as the WHATWG says: each malformed maximal subpart becomes one U+FFFD."""
    return data.decode("utf-8", "replace")


def loads(text: str) -> Any:
    """The JSON document that `text` is. Raises ValueError (a JSONDecodeError tells where) if it is none."""
    return _lenient(text).decode(text)


def _lenient(text: str) -> json.JSONDecoder:
    return _big_number_decoder if _LONG_DIGITS.search(text) else _decoder


def parse(text: str) -> Any:
    """Like `loads`, with nesting too deep for the interpreter reported as ValueError too."""
    try:
        return loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def is_cut(text: str) -> bool:
    """Whether `text` is no JSON document merely because its end is missing."""
    try:
        loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip()) - 8 or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False


def is_unusual(payload: bytes) -> bool:
    """Whether values from `payload` must pass `storable` before they are kept."""
    return (
        b"\\ud" in payload or b"\\uD" in payload or payload.count(b"[") + payload.count(b"{") > _BRACKETS_WORTH_A_LOOK
    )


def storable(value: Any, depth: int = 0) -> Any:
    """`value` with unpaired surrogates replaced by U+FFFD and what is nested absurdly deep left out."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        if depth >= _DEPTH_LIMIT:
            return None
        return {whole(key): storable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        if depth >= _DEPTH_LIMIT:
            return None
        return [storable(item, depth + 1) for item in value]
    return value


def whole(text: str) -> str:
    """`text` with surrogate halves joined where they meet and U+FFFD for lonely ones."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def dumps(value: Any) -> str:
    """Compact JSON text of `value`, characters beyond ASCII as themselves."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return "null"


class Scanner:
    """Finds the end of a JSON document that begins with a bracket, fed piece by piece, in linear time.

    It counts brackets outside strings and trusts the rest to the parser.
    """

    __slots__ = ("_depth", "_escaped", "_in_string")

    _outside = re.compile(rb'["{}\[\]]')
    _inside = re.compile(rb'["\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> int:
        """The offset in `data` just behind the document's last bracket, or -1 if it goes on."""
        pos = 0
        if self._escaped and data:
            self._escaped = False
            pos = 1
        while True:
            found = (self._inside if self._in_string else self._outside).search(data, pos)
            if found is None:
                return -1
            pos = found.end()
            mark = data[pos - 1]
            if mark == 0x22:  # "
                self._in_string = not self._in_string
            elif mark == 0x5C:  # backslash: what follows is no quote
                if pos == len(data):
                    self._escaped = True
                    return -1
                pos += 1
            elif mark in b"{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return pos
