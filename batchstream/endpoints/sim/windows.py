"""Rate limits by fixed windows, as ShuttleAI's: a window begins with the wall-clock minute, each request
costs its model's multiplier, and what does not fit is refused until the next window begins."""

from __future__ import annotations

import math


class Window:
    """`limit` units in each `length` seconds; windows begin at `phase` + k × `length` of the clock
    whose instants are passed in."""

    def __init__(self, limit: float, length: float, phase: float = 0.0) -> None:
        self.limit = limit
        self.length = length
        self.phase = phase
        self._index = -math.inf
        self._used = 0.0

    def fits(self, now: float, cost: float) -> bool:
        """Whether `cost` fits into the window of `now`. A window that is empty takes any cost, or a
        model with a multiplier above the limit could never be asked."""
        self._turn(now)
        return self._used == 0 or self._used + cost <= self.limit + 1e-9

    def take(self, now: float, cost: float) -> None:
        self._turn(now)
        self._used += cost

    def remaining(self, now: float) -> float:
        self._turn(now)
        return max(0.0, self.limit - self._used)

    def reset_in(self, now: float) -> float:
        """Seconds until the next window begins."""
        return self.length - (now - self.phase) % self.length

    def _turn(self, now: float) -> None:
        index = math.floor((now - self.phase) / self.length)
        if index != self._index:
            self._index, self._used = index, 0.0
