"""When the requests of a measurement are due: schedules that are fixed in advance. Pure; chance is an argument.

Closed loop: so many requests at once, the next leaves when one comes back; a slow endpoint is asked less often, which
hides how slow it is (coordinated omission). Open loop: requests are due at their instants, whatever comes back.
Gamma arrivals have the shape `burstiness` (as vLLM's benchmark has it): 1 is Poisson, less is burstier, more is evener.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Protocol

import msgspec

Arrival = Literal["closed", "constant", "poisson", "gamma", "ramp", "replay"]


class Chance(Protocol):
    """What is used of `random.Random`; seeded by whoever makes it."""

    def expovariate(self, lambd: float, /) -> float: ...
    def gammavariate(self, alpha: float, beta: float, /) -> float: ...


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage of a measurement puts on an endpoint. `concurrency`: requests at once (closed); `rate`: requests a
    second, for a ramp at its begin, `rate_to` at its end; `burstiness` of gamma arrivals."""

    arrival: Arrival
    concurrency: int | None = None
    rate: float | None = None
    rate_to: float | None = None
    burstiness: float | None = None

    def __str__(self) -> str:
        if self.arrival == "closed":
            return f"concurrency {self.concurrency}"
        if self.arrival == "replay":
            return "replay"
        if self.arrival == "ramp":
            return f"ramp {self.rate:g}..{self.rate_to:g}/s"
        burst = f" (burstiness {self.burstiness:g})" if self.arrival == "gamma" else ""
        return f"{self.arrival} {self.rate:g}/s{burst}"

    @property
    def level(self) -> float:
        """The one number that a sweep turns."""
        return float(self.concurrency or self.rate_to or self.rate or 0.0)


def offsets(load: Load, chance: Chance, *, seconds: float | None = None, count: int | None = None) -> Iterator[float]:
    """Seconds from the stage's begin at which its requests are due, ascending: the first `count`, those before
    `seconds`, or whichever ends first. Raises ValueError for a closed loop or a replay, which have no such schedule,
    and where neither end is given."""
    if seconds is None and count is None:
        raise ValueError("expected an end of the schedule: seconds, count or both")
    for number, offset in enumerate(_endless(load, chance, seconds)):
        if (count is not None and number >= count) or (seconds is not None and offset >= seconds):
            return
        yield offset


def _endless(load: Load, chance: Chance, seconds: float | None) -> Iterator[float]:
    rate = load.rate
    if rate is None or load.arrival in ("closed", "replay"):
        raise ValueError(f"{load.arrival} has no schedule of its own")
    if load.arrival == "ramp":
        yield from _ramp(rate, load.rate_to or rate, seconds or 0.0)
        return
    number, at = 0, 0.0
    while True:
        # Constant: a product and no sum, which would drift.
        yield number / rate if load.arrival == "constant" else at
        number += 1
        if load.arrival == "poisson":
            at += chance.expovariate(rate)
        elif load.arrival == "gamma":
            shape = load.burstiness or 1.0
            at += chance.gammavariate(shape, 1.0 / (rate * shape))


def _ramp(begin: float, end: float, seconds: float) -> Iterator[float]:
    """The rate grows evenly from `begin` to `end`: by t, begin·t + (end − begin)·t²/(2·seconds) requests are due."""
    if seconds <= 0:
        raise ValueError("expected the seconds that a ramp takes")
    bend = (end - begin) / (2.0 * seconds)
    number = 0
    while (inside := begin * begin + 4.0 * bend * number) >= 0.0:
        yield number / begin if bend == 0.0 else (math.sqrt(inside) - begin) / (2.0 * bend)
        number += 1


def next_level(tried: list[tuple[float, bool]], *, first: float, whole: bool, closeness: float = 0.05) -> float | None:
    """The next level of a search for the highest that is still good, None when it is found (or none is good).

    `tried`: (level, was it good) so far. Doubles until one is bad, then halves the gap until it is `closeness` of the
    good one, or for `whole` numbers until they are neighbours.
    """
    good = max((level for level, fine in tried if fine), default=0.0)
    bad = min((level for level, fine in tried if not fine), default=math.inf)
    if not tried:
        return first
    if bad == math.inf:
        return good * 2.0
    if bad - good <= (1.0 if whole else closeness * max(good, first * closeness)):
        return None
    middle = (good + bad) / 2.0
    return float(math.floor(middle)) if whole else middle
