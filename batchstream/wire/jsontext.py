"""JSON as servers really send it: read leniently, find where a document ends, keep only what can be stored.

Lenient means: NaN and Infinity, raw control characters, duplicate keys (the last wins) and numbers of
any size are accepted; malformed UTF-8 becomes U+FFFD. Nothing but `ValueError` leaves `parse`.

Strict JSON, which is nearly all there is, goes through msgspec; what msgspec refuses goes to the lenient
parser of the standard library. On strict JSON both give the same objects.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

_SMALL = 1 << 53
_DEPTH_LIMIT = 64  # containers nested deeper than this hold no answer
_HEADROOM = 200  # more nesting that must still be writable, for the callers' own stack

_strict = msgspec.json.Decoder().decode


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # Python refuses longer integers


_lenient = json.JSONDecoder(strict=False)
_any_number = json.JSONDecoder(strict=False, parse_int=_number)


def text_of(data: bytes) -> str:
    """UTF-8 decoded as the WHATWG says: each malformed maximal subpart becomes one U+FFFD."""
    return data.decode("utf-8", "replace")


def parse(text: str | bytes) -> Any:
    """The JSON document that `text` is. Raises ValueError if it is none, or is nested too deeply to read."""
    try:
        return _strict(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return _parse_leniently(text if isinstance(text, str) else text_of(text))


def _parse_leniently(text: str) -> Any:
    try:
        return _lenient.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _any_number.decode(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def is_cut(text: str) -> bool:
    """Whether `text` is no JSON document merely because its end is missing."""
    try:
        _parse_leniently(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip()) - 8 or error.msg.startswith("Unterminated string")
    except ValueError:
        return False
    return False


def storable(value: Any) -> Any:
    """`value` if it can be written as JSON; else a copy that can: unpaired surrogates replaced by U+FFFD, and what
    is nested absurdly deep left out."""
    if _plain(value, 4):
        return value
    guarded = value
    for _ in range(_HEADROOM):
        guarded = [guarded]
    try:
        msgspec.json.encode(guarded)
    except (UnicodeError, RecursionError, ValueError, OverflowError):
        return _repaired(value, 0)
    return value


def _plain(value: Any, depth: int) -> bool:
    """Surely storable: a few levels of numbers and ASCII text, as nearly every usage object is. Cheaper than trying."""
    if type(value) is not dict:
        return False
    for item in value.values():
        kind = type(item)
        if kind is int:
            if not -_SMALL < item < _SMALL:
                return False
        elif kind is str:
            if not item.isascii():
                return False
        elif kind is dict:
            if not depth or not _plain(item, depth - 1):
                return False
        elif item is not None and kind is not bool:
            return False
    return "".join(value).isascii()


def _repaired(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict | list) and depth >= _DEPTH_LIMIT:
        return None
    if isinstance(value, dict):
        return {whole(key): _repaired(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_repaired(item, depth + 1) for item in value]
    return value


def whole(text: str) -> str:
    """`text` with surrogate halves joined where they meet and U+FFFD for lonely ones."""
    if text.isascii():
        return text
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
