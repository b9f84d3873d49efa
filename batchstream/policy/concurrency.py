"""How many requests at once, found out while they run (`--concurrency auto`). Pure counting; the caller gives the time.

The idea: more at once is better as long as it brings throughput. A level is measured by Little's law: with all slots
busy, throughput = slots × work / time in flight, summed over requests that started at this level. Counting completions
instead would see the bunches in which requests leave after a change. Two levels are compared by what was gained of what
scaling would give: from n to m slots throughput may grow by m/n - 1; a third of that is worth it, less is not.

1. Grow by one with each answer, so that a round of requests doubles the level, while the rounds are worth it. The one
   that is not tells the capacity: slots × gain.
2. Then hold, and now and then try a little more, and a little less: less that costs no throughput saves latency, for
   the requests had only been queueing. Each pair of trials in vain doubles the pause before the next.
3. A refusal (429, 503, 529) shows a wall: stay below it at once. To look whether it has moved costs refusals, so it is
   allowed once for so many successes that they stay below a hundredth of all requests. A few refusals at a level that
   has been good are chance, or others at the same account.

inspect_ai starts at 20 too and shrinks by 0.8 for each episode of 429s; it knows no knee and measures no throughput.
"""

from __future__ import annotations

import math

START = 20
MOST = 1000

WORTH = 1 / 3
"""The share of perfect scaling that a step up must bring."""

FREE = 0.04
"""Throughput that a step down may cost."""

MEASURED_AT_LEAST = 48
"""Requests that make a measurement, at least; else twice the level (once, where that is many anyway)."""

REFUSALS_ALLOWED = 0.01
"""Refusals for each success that looking beyond a known wall may cost."""

REFUSED_ALL_OVER = 0.15
"""At a level that had been good, only such a share of refusals among the newest outcomes takes us down."""

TRIAL_REFUSALS = 3
"""So many refusals end a trial; fewer may be chance."""

MEMORY = 0.03
"""Weight of the newest outcome in the share of refusals."""

MANY = 160
"""From here on one round of requests is a good measurement; below it takes two."""

PAUSE_MOST = 16
"""Measurements between two trials at most."""

PATH_KEPT = 500


class Concurrency:
    """`level` is the number of requests that may be in flight now; `path` its changes as (instant, level)."""

    def __init__(self, now: float, *, start: int = START, most: int = MOST) -> None:
        self.level = min(start, most)
        self.most = most
        self.path: list[tuple[float, int]] = [(now, self.level)]
        self._growing = True
        self._base: tuple[int, float] | None = None  # level and throughput that a trial is compared with
        self._best = 0.0
        self._trial = 0  # +1: more is being tried, -1: less
        self._next = +1
        self._vain = 0
        self._pause = 1
        self._rest = 0
        self._wall = math.inf
        self._allowance = 0.0
        self._refused_share = 0.0
        self._refused = 0
        self._changed = now
        self._unqueued = math.inf
        self._begin(now)

    def ended(self, now: float, sent: float, work: float, *, busy: bool) -> None:
        """A request that left at `sent` was answered with `work` (tokens, events: any unit, but always the same).
        `busy`: all slots were in use, so that their number is what limited us."""
        self._allowance += REFUSALS_ALLOWED
        self._refused_share *= 1.0 - MEMORY
        if not busy:
            self._begin(now)
            return
        if self._growing or sent >= self._since:
            self._count += 1
            self._work += work
            self._time += now - sent
            if self._count >= self._wanted():
                self._decide(now)
        if self._growing:
            self._go(now, self.level + 1)

    def refused(self, now: float, sent: float) -> None:
        """A request that left at `sent` was pushed back (429, 503, 529)."""
        self._allowance -= 1.0
        self._refused_share += MEMORY * (1.0 - self._refused_share)
        if sent < self._changed:
            return  # old news: it left at another level
        self._refused += 1
        tried = self._growing or self._trial > 0
        if self._refused < TRIAL_REFUSALS or (not tried and self._refused_share < REFUSED_ALL_OVER):
            return
        self._wall = float(self.level)
        back = round(0.9 * self.level) if self._base is None or not self._trial else self._base[0]
        self._growing = False
        self._base, self._trial, self._next, self._rest = None, 0, +1, self._pause
        self._go(now, min(back, self.level - 1))
        self._begin(now)

    def _wanted(self) -> int:
        if self._growing:
            return max(MEASURED_AT_LEAST, self._at_first)
        return max(MEASURED_AT_LEAST, self.level * (1 if self.level >= MANY else 2))

    def _decide(self, now: float) -> None:
        """A level has been measured: where to go from here."""
        if self._growing:
            self._grow(now)
            return
        throughput = self.level * self._work / self._time if self._time > 0 else math.inf
        if self._trial:
            self._judge(now, throughput)
            return
        self._best = max(throughput, 0.98 * self._best)
        level, known = self._base or (self.level, throughput)
        self._base = (self.level, (known + throughput) / 2 if level == self.level else throughput)
        self._rest -= 1
        if self._rest <= 0:
            self._try(now, self._next)
        else:
            self._begin(now)

    def _grow(self, now: float) -> None:
        """A round is over. The level rises while answers come, so their times in flight lag behind it: here completions
        tell the throughput, and the shortest mean time in flight of any round what an answer takes unqueued."""
        throughput = self._work / (now - self._since) if now > self._since else math.inf
        self._unqueued = min(self._unqueued, self._time / self._count)
        level, known = self._base or (self._at_first, 0.0)
        worth = throughput >= known * (1.0 + WORTH * (self._at_first / level - 1.0))
        if worth and self.level < self._ceiling():
            self._base = (self._at_first, throughput)
        else:
            self._growing, self._base, self._rest = False, None, 1
            if not worth:
                per_request = self._work / self._count
                self._go(now, round(1.05 * max(throughput, known) / per_request * self._unqueued))
        self._begin(now)

    def _try(self, now: float, direction: int) -> None:
        """Go a step from the level that is known, to be judged when it is measured. Towards a wall: half the way, when
        so many refusals as that may bring are allowed."""
        wanted = self.level + direction * max(1, self.level // (4 if direction > 0 else 8))
        if direction > 0 and wanted >= self._wall:
            wanted = self.level + int(self._wall - self.level) // 2
            if wanted == self.level and self._allowance > 2 * TRIAL_REFUSALS:
                self._wall, wanted = math.inf, self.level + 1  # it may have moved
            elif self._allowance < TRIAL_REFUSALS:
                wanted = self.level
        wanted = max(1, min(wanted, self._ceiling()))
        self._trial = direction
        if wanted == self.level:
            self._in_vain(now)
        else:
            self._go(now, wanted)
            self._begin(now)

    def _judge(self, now: float, throughput: float) -> None:
        assert self._base is not None  # noqa: S101  (a trial begins from a measured level)
        level, known = self._base
        gain = throughput / known - 1.0
        if self._trial > 0:
            good = gain >= WORTH * (self.level / level - 1.0)
        else:
            good = gain >= -FREE and throughput >= (1.0 - 1.5 * FREE) * self._best
        if good:
            self._best = max(self._best, throughput)
            self._base = (self.level, throughput)
            self._pause, self._vain = 1, 0
            self._try(now, self._trial)
        else:
            self._go(now, level)
            self._in_vain(now)

    def _in_vain(self, now: float) -> None:
        """The other direction next; when that has been in vain as well, after a longer pause."""
        self._next, self._trial = -self._trial, 0
        self._vain += 1
        if self._vain % 2 == 0:
            self._pause = min(2 * self._pause, PAUSE_MOST)
        self._rest = self._pause if self._vain % 2 == 0 else 1
        self._begin(now)

    def _ceiling(self) -> int:
        return int(min(self.most, self._wall))

    def _go(self, now: float, level: int) -> None:
        level = max(1, min(level, self._ceiling()))
        if level == self.level:
            return
        self.level = level
        self.path.append((now, level))
        if len(self.path) > PATH_KEPT:
            del self.path[1:-1:2]  # every other one: the shape stays
        if not self._growing:
            self._changed = now
            self._refused = 0

    def _begin(self, now: float) -> None:
        """Measure from here on: what leaves now or later."""
        self._since = now
        self._at_first = self.level
        self._count = 0
        self._work = self._time = 0.0
