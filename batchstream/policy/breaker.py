"""When to stop the whole run instead of burning the remaining rows, and when to wait for an endpoint that is down.

Pure counting. `Breaker` looks at rows that were given up, `Outage` at single requests: many in a row that found nobody,
or a gateway with nobody behind it, after there had been an answer in this run, mean that the endpoint is down just now.
Then one request at a time asks whether it is back, and what it costs the row is not counted as an attempt. An endpoint
that has never answered in this run is likelier a wrong address: that ends quickly, by the breaker.
"""

from __future__ import annotations

import math

import msgspec

from batchstream.policy.retry import NOT_THE_ROWS
from batchstream.records import Failure

OF_THE_ROW = frozenset({"context_length", "content_filter"})
"""Kinds that speak about one row; a file may well be full of them."""

DOWN_AFTER = 5
"""So many requests in a row that met a dead endpoint, with no answer between them, are an outage."""

PROBE_S = (1.0, 30.0)
"""Seconds between two requests that ask whether the endpoint is back: at first, doubled each time, at most."""

_DOWN_KINDS = frozenset({"connect", "disconnected"})
_DOWN_STATUSES = frozenset({502, 503, 504, 520, 521, 522, 523, 524, 530})


class BreakerSettings(msgspec.Struct, frozen=True):
    """`refusals`: so many rows in a row refused for the account's or the endpoint's sake, with no success between them;
    `failures`: so many rows given up in a row, all for the same reason and with no success between them. 0: never."""

    failures: int = 20
    refusals: int = 3
    enabled: bool = True


ON = BreakerSettings()


def parse_breaker(text: str) -> BreakerSettings:
    """ "on", "off", or "failures=50,refusals=1". Raises ValueError saying what was expected."""
    if text in ("on", "off"):
        return BreakerSettings(enabled=text == "on")
    found: dict[str, int] = {}
    for word in text.split(","):
        name, equals, number = (part.strip() for part in word.partition("="))
        if name not in ("failures", "refusals") or not equals or not number.isdecimal():
            raise ValueError(f"expected on, off or a setting such as failures=20,refusals=3, got {text!r}")
        found[name] = int(number)
    return msgspec.structs.replace(BreakerSettings(), **found)


class Breaker:
    """Counts what ended in a row. `refused` and `row_failed` return the reason to stop, or None."""

    __slots__ = ("_alike", "_kind", "_refusals", "_settings", "enabled")

    def __init__(self, settings: BreakerSettings = ON) -> None:
        self.enabled = settings.enabled
        self._settings = settings
        self._refusals = 0
        self._alike = 0
        self._kind = ""

    def succeeded(self) -> None:
        self._refusals = self._alike = 0

    def refused(self, failure: Failure) -> str | None:
        """A row was given up for no fault of its own (`policy.retry.NOT_THE_ROWS`)."""
        self._refusals += 1
        if self.enabled and 0 < self._settings.refusals <= self._refusals:
            return f"{failure.kind}: {failure.message}"
        return None

    def row_failed(self, failure: Failure) -> str | None:
        """A row has been given up after its last attempt."""
        if not self.enabled or failure.kind in OF_THE_ROW or failure.kind in NOT_THE_ROWS:
            return None
        self._alike = self._alike + 1 if failure.kind == self._kind else 1
        self._kind = failure.kind
        if 0 < self._settings.failures <= self._alike:
            return f"{self._alike} rows failed in a row with {failure.kind}: {failure.message}"
        return None


class Outage:
    """Whether the endpoint is down, and when the next request may ask. `longest`: seconds after which to stop."""

    __slots__ = (
        "_answered",
        "_first",
        "_in_a_row",
        "_interval",
        "_last",
        "_probe_at",
        "_probing",
        "enabled",
        "longest",
    )

    def __init__(self, longest: float, *, enabled: bool = True) -> None:
        self.longest = longest
        self.enabled = enabled
        self._answered = False
        self._in_a_row = 0
        self._first = math.inf  # instant of the first of them
        self._last: Failure | None = None
        self._interval = PROBE_S[0]
        self._probe_at = 0.0
        self._probing = False

    @property
    def down(self) -> bool:
        return self.enabled and self._answered and self._in_a_row >= DOWN_AFTER

    def answered(self) -> None:
        """A response came that only a living endpoint can give."""
        self._answered = True
        if self._in_a_row:
            self._in_a_row, self._interval, self._probing = 0, PROBE_S[0], False

    def failed(self, failure: Failure, now: float) -> None:
        if failure.kind not in _DOWN_KINDS and failure.status not in _DOWN_STATUSES and not self._probing:
            return
        was_down = self.down
        if self._in_a_row == 0:
            self._first = now
        self._in_a_row += 1
        self._last = failure
        if self._probing or not was_down:
            self._probe_at = now + self._interval
        if self._probing:
            self._interval = min(2 * self._interval, PROBE_S[1])
            self._probing = False

    def wait(self, now: float) -> float:
        """Seconds until a request may leave; infinity while one is asking."""
        if not self.down:
            return 0.0
        return math.inf if self._probing else max(0.0, self._probe_at - now)

    def take(self) -> None:
        """A request leaves; when the endpoint is down it is the one that asks."""
        self._probing = self.down

    def over(self, now: float) -> str | None:
        """The reason to stop, when it has been down for too long."""
        if not self.down or self._last is None or now - self._first < self.longest:
            return None
        return (
            f"the endpoint has been down for {now - self._first:.0f} s (--max-outage {self.longest:g}):"
            f" {self._last.kind}: {self._last.message}"
        )
