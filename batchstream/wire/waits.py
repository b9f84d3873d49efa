"""How long the server asks to wait, from wherever it says so (RFC 9110 10.2.3 and what providers really send).

In this order: `retry-after-ms`; `Retry-After` as a number or as an HTTP date relative to the response's own
Date (the local clock may be wrong, and is not ours to read here); `retryDelay` in the body; "try again in ..."
in the message; the reset of a rate-limit bucket with nothing remaining. What is not finite or negative is
nothing; a date that has passed is zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from batchstream.records import RateNews

_NUMBER = re.compile(r"\+?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_UNITS = {
    "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0,
    "millisecond": 1e-3, "second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0,
    "sec": 1.0, "min": 60.0, "hr": 3600.0, "msec": 1e-3,
}  # fmt: skip
_UNIT = "milliseconds?|msecs?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d"
_PART = re.compile(rf"(\d{{1,12}}(?:\.\d{{1,20}})?)\s*({_UNIT})(?![a-z])\s*(?:,|and)?\s*", re.IGNORECASE | re.ASCII)
_TIGHT_PART = re.compile(r"(\d{1,12}(?:\.\d{1,20})?)(ms|[smhd])", re.IGNORECASE | re.ASCII)
_AGAIN = re.compile(r"(?:try again|retry|retrying)\s+(?:in|after)\s+(?:about\s+)?(?=\d)", re.IGNORECASE)
_BARE = re.compile(r"\d{1,9}(?:\.\d{1,20})?(?![\w:/-]|\.\w|\s+\w)", re.ASCII)  # no unit: seconds

_RELAYED = "llm_provider-"  # LiteLLM's proxy passes the headers of the endpoint behind it on under this name

_EPOCH_FROM = 1e9  # a reset beyond 30 years is an instant, not a duration
_EPOCH_MS_FROM = 1e11
_DEPTH = 8


def stated_wait(headers: Sequence[tuple[str, str]], body: Any, message: str) -> float | None:
    """Seconds the server asks to wait, or None if it does not say. `body` is the parsed JSON, if any."""
    fields: dict[str, str] = {}
    for name, value in headers:
        fields.setdefault(name.lower(), value.strip())
    for name, value in headers:
        if name.lower().startswith(_RELAYED):  # what the proxy says itself comes first
            fields.setdefault(name.lower().removeprefix(_RELAYED), value.strip())
    now = http_date(fields.get("date", ""))
    wait = _number(fields.get("retry-after-ms", ""))
    if wait is not None:
        return wait / 1000.0
    wait = _retry_after(fields.get("retry-after", ""), now)
    if wait is None:
        wait = next(_delays(body, _DEPTH), None)
    if wait is None:
        wait = hinted_in_text(message)
    if wait is None:
        wait = _empty_bucket(fields, now)
    return wait


def rate_news(fields: Mapping[str, str]) -> RateNews | None:
    """The rate-limit headers of a response (names in small letters): x-ratelimit-limit-requests and its kin,
    Anthropic's anthropic-ratelimit-requests-limit, and the plain x-ratelimit-limit, taken for requests. None: none."""
    found: dict[str, float] = {}
    now: datetime | None = None
    for name, value in fields.items():
        if "ratelimit" not in name:
            continue
        words = name.replace("_", "-").split("-")
        part = next((word for word in ("limit", "remaining", "reset") if word in words), None)
        if part is None or "input" in words or "output" in words:
            continue
        what = "tokens" if "tokens" in words else "requests"
        if part == "reset":
            now = now or http_date(fields.get("date", ""))
            number = _reset(value.strip(), now)
        else:
            number = _number(value.strip())
        if number is not None:
            found.setdefault(f"{part}_{what}", number)
    return RateNews(**found) if found else None


def http_date(text: str) -> datetime | None:
    """An HTTP date in any of the three forms of RFC 9110 5.6.7, or None."""
    if not text or len(text) > 64:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


def hinted_in_text(message: str) -> float | None:
    """Seconds from "try again in 6m0s", "retry after 2 minutes and 5 seconds", "retry in 20"."""
    hint = _AGAIN.search(message)
    if hint is None:
        return None
    rest = message[hint.end() : hint.end() + 100]
    wait = duration(rest)
    if wait is not None:
        return wait
    bare = _BARE.match(rest)
    return float(bare.group()) if bare else None


def duration(text: str) -> float | None:
    """Seconds of a duration that `text` begins with ("1h2m3.5s", "12ms", "2 minutes and 5 seconds"), or None."""
    pos, total = 0, 0.0
    while True:
        part = _TIGHT_PART.match(text, pos) or None
        if part is None or text[part.end() : part.end() + 1].isalpha():
            part = _PART.match(text, pos)
        if part is None:
            return total if pos else None
        unit = part.group(2).lower()
        total += float(part.group(1)) * _UNITS[unit if unit in _UNITS else unit.removesuffix("s")]
        pos = part.end()


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _retry_after(text: str, now: datetime | None) -> float | None:
    seconds = _number(text)
    if seconds is not None:
        return seconds
    date = http_date(text)
    return max(0.0, (date - now).total_seconds()) if date is not None and now is not None else None


def _delays(body: Any, depth: int) -> Iterator[float]:
    """Values of `retryDelay` (Google's RetryInfo: "34s") anywhere in the body."""
    if depth == 0:
        return
    if isinstance(body, dict):
        delay = body.get("retryDelay")
        wait = duration(delay.strip()) if isinstance(delay, str) else None
        if wait is None and isinstance(delay, int | float) and not isinstance(delay, bool) and 0 <= delay < math.inf:
            wait = float(delay)
        if wait is None and isinstance(delay, str):
            wait = _number(delay.strip())
        if wait is not None:
            yield wait
        for value in body.values():
            yield from _delays(value, depth - 1)
    elif isinstance(body, list):
        for value in body:
            yield from _delays(value, depth - 1)


def _empty_bucket(fields: dict[str, str], now: datetime | None) -> float | None:
    """The longest reset among the buckets with nothing remaining."""
    waits = []
    for name, value in fields.items():
        if "ratelimit" in name and "remaining" in name and _number(value) == 0.0:
            reset = fields.get(name.replace("remaining", "reset"))
            wait = _reset(reset, now) if reset else None
            if wait is not None:
                waits.append(wait)
    return max(waits) if waits else None


def _reset(text: str, now: datetime | None) -> float | None:
    """A reset as servers write it: "6m0s", seconds, an epoch in seconds or milliseconds, RFC 3339."""
    value = _number(text)
    if value is not None:
        if value < _EPOCH_FROM:
            return value
        if now is None:
            return None
        return max(0.0, value / (1000.0 if value >= _EPOCH_MS_FROM else 1.0) - now.timestamp())
    wait = duration(text)
    if wait is not None:
        return wait
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return _retry_after(text, now)
    if now is None:
        return None
    return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now.timestamp())
