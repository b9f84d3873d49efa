"""A limit over a window of time, in two shapes: `Rolling` (any minute) and `Fixed` (the provider's minutes). Pure.

Units are what the limit counts: requests with their weights, or tokens. Instants are seconds of the monotonic clock.
Both reserve before a request leaves (`take`), and learn afterwards what it really cost (`settle`).

A request that costs more than the whole limit could never leave; it leaves when its window is empty.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

MINUTE_S = 60.0

SLACK = 0.005
"""A rolling limit is kept half a percent below the stated one: the endpoint stamps arrivals, not departures, and where
the network holds one request a little longer than the next, its minute would hold one too many."""

GUARD = 0.015
"""This share at both ends of a fixed window is left empty (a second each of a minute): clocks and ways differ."""

CLEAN_WINDOWS = 5
"""After so many windows without a 429 a limit that was learnt to be lower than stated is tried one step higher …"""

CLEAN_WINDOWS_MAX = 80
"""… and twice as late each time this fails, up to so many."""

_EPS = 1e-6

Ticket = list[float]
"""[instant of leaving, units], as `take` gives it and `settle` wants it back."""


class Rolling:
    """At most `limit` units in any `length` seconds (half open), evenly spaced.

    GCRA (ITU-T I.371) with a burst of one: after a request of cost c the next one leaves c × length / limit later. For
    equal costs that is the whole law; where costs differ, the costs of the last `length` seconds are added up as well.
    """

    def __init__(self, limit: float, length: float = MINUTE_S) -> None:
        self.stated = limit
        self.length = length
        self._limit = limit
        self._next = -math.inf
        self._taken: deque[Ticket] = deque()  # oldest first
        self._sum = 0.0

    def scale(self, factor: float) -> None:
        """Keep to this share of the stated limit from now on."""
        self._limit = self.stated * factor

    def limit_now(self) -> float:
        """Units a window that are kept to at present."""
        return self._limit

    def wait(self, now: float, cost: float) -> float:
        """Seconds until `cost` units may leave."""
        self._forget(now)
        at = max(now, self._next)
        over = self._sum + cost - self._limit
        if over > _EPS and self._taken:
            for instant, price in self._taken:
                over -= price
                at = max(at, instant + self._span)
                if over <= _EPS:
                    break
        return at - now

    def take(self, now: float, cost: float) -> Ticket:
        """`cost` units leave."""
        self._forget(now)
        ticket = [now, cost]
        self._taken.append(ticket)
        self._sum += cost
        self._next = max(now, self._next) + cost * self._span / self._limit
        return ticket

    def settle(self, ticket: Ticket, spent: float) -> None:
        """What was reserved has cost `spent` units (0.0: the request never left, or was refused)."""
        more = spent - ticket[1]
        ticket[1] = spent
        if self._taken and ticket[0] >= self._taken[0][0]:  # else it is forgotten already
            self._sum += more
            self._next += more * self._span / self._limit

    def refused(self, sent: float, cost: float, now: float) -> float | None:
        """The endpoint says that the limit is reached, not for how long: no news about a window without edges."""
        return None

    def resets(self, at: float) -> None:
        """The endpoint's window ends at this instant: no news here either."""

    @property
    def _span(self) -> float:
        return self.length * (1.0 + SLACK)

    def _forget(self, now: float) -> None:
        while self._taken and self._taken[0][0] <= now - self._span:
            self._sum -= self._taken.popleft()[1]
        if not self._taken:
            self._sum = 0.0


class Fixed:
    """At most `limit` units in each window [phase + k × length, phase + (k+1) × length), as soon as it opens.

    Where the windows begin is first assumed (the wall clock's minute) and then learnt. A 429 without a stated wait
    while we believe in room says one of three things:
    - the last `length` seconds hold a full limit of our requests, so the endpoint's window did not begin where we
      thought: it began before the oldest of these, and the next one not later than `length` after it;
    - nothing of this window was accepted: others use the account, or, the second time, it was no new window: one
      `length` later it will be, so windows are taken to begin there;
    - otherwise the limit is lower than stated: what was accepted in this window is all that it holds.
    """

    def __init__(self, limit: float, length: float = MINUTE_S, phase: float = 0.0) -> None:
        self.stated = limit
        self.length = length
        self.phase = phase
        self._factor = 1.0
        self._learnt: float | None = None
        self._patience = CLEAN_WINDOWS
        self._clean = 0
        self._taken: deque[Ticket] = deque()  # of the last `length` seconds, oldest first
        self._opened = -math.inf  # start of the window that `_used` is about
        self._used = 0.0
        self._barren = 0  # refusals in a row with nothing accepted
        self._before_guess: float | None = None
        self._step = 1.0  # largest cost seen: the step in which a learnt limit is raised

    def scale(self, factor: float) -> None:
        """Keep to this share of the stated limit from now on."""
        self._factor = factor

    def limit_now(self) -> float:
        """Units a window that are kept to at present."""
        limit = self.stated * self._factor
        return limit if self._learnt is None else min(limit, self._learnt)

    def wait(self, now: float, cost: float) -> float:
        """Seconds until `cost` units may leave."""
        guard = GUARD * self.length
        start = self._start(now)
        at = max(now, start + guard)
        if at > start + self.length - guard:
            start += self.length
            at = start + guard
        if self._turned(start) and self._used > _EPS and self._used + cost > self.limit_now() + _EPS:
            at = start + self.length + guard
        return at - now

    def take(self, now: float, cost: float) -> Ticket:
        """`cost` units leave."""
        self._turn(self._start(now))
        self._used += cost
        self._step = max(self._step, cost)
        ticket = [now, cost]
        self._taken.append(ticket)
        while self._taken[0][0] < now - self.length:
            self._taken.popleft()
        return ticket

    def settle(self, ticket: Ticket, spent: float) -> None:
        """What was reserved has cost `spent` units (0.0: the request never left, or was refused)."""
        if self._turned(self._start(ticket[0])):
            self._used = max(0.0, self._used + spent - ticket[1])
        ticket[1] = spent

    def refused(self, sent: float, cost: float, now: float) -> float | None:
        """A 429 without a stated wait, for a request that left at `sent` (its cost is settled as 0 already). The
        instant at which the next window opens."""
        self._clean = 0
        start = self._start(sent)
        opens = self._start(now) + self.length * (1.0 + GUARD)
        if self._turned(start):
            back, held = None, 0.0
            for instant, price in reversed(self._taken):
                if instant <= sent:
                    held += price
                    if held + cost > self.limit_now() + _EPS:
                        back = instant
                        break
            if back is not None and back < start:
                self._before_guess = self.phase
                self._begin_at(back)
            elif self._used <= _EPS:
                self._barren += 1
                if self._barren > 1:
                    self._begin_at(sent)
            elif back is None:
                self._lower()
        # Where the edges have moved, both the old and the new ones are waited for: the guess may be wrong.
        return max(opens, self._start(now) + self.length * (1.0 + GUARD))

    def resets(self, at: float) -> None:
        """The endpoint has said when its window ends."""
        late = (at - self.phase) % self.length
        if min(late, self.length - late) > GUARD / 2 * self.length:
            self._begin_at(at)

    def _lower(self) -> None:
        """The limit is what was accepted in this window; edges that were guessed from the stated one go back."""
        if self._learnt is not None:
            self._patience = min(2 * self._patience, CLEAN_WINDOWS_MAX)
        self._learnt = max(self._used, _EPS)
        if self._before_guess is not None:
            self._begin_at(self._before_guess)
            self._before_guess = None

    def _begin_at(self, instant: float) -> None:
        """Windows begin at `instant` and whole lengths before and after it; what was used is counted anew."""
        self.phase = instant % self.length
        newest = self._taken[-1][0] if self._taken else instant
        self._opened = self._start(newest)
        self._used = sum(price for at, price in self._taken if at >= self._opened)

    def _start(self, now: float) -> float:
        return self.phase + math.floor((now - self.phase) / self.length) * self.length

    def _turned(self, start: float) -> bool:
        """Whether `_used` is about the window that begins at `start`."""
        return abs(start - self._opened) < _EPS

    def _turn(self, start: float) -> None:
        if self._turned(start):
            return
        if self._used > _EPS:
            self._barren = 0
        if self._learnt is not None:
            self._raise(self._learnt)
        self._opened, self._used = start, 0.0

    def _raise(self, learnt: float) -> None:
        """A window has gone by: when it was full and clean, and enough like it, try one step more."""
        if self._used + self._step > learnt + _EPS:
            self._clean += 1
        if self._clean >= self._patience:
            self._clean = 0
            self._learnt = learnt + self._step
            if self._learnt >= self.stated:
                self._learnt = None


Window = Rolling | Fixed
MakeWindow = Callable[[float], Window]
