"""When the next request may leave: the rate of a lane and its gate. Pure; the caller gives the time.

A lane is endpoint + key + model. A 429 is news about the lane, not about one request: its gate closes for
everybody until the stated time, or, when nothing is stated and nothing gets through any more, until the
next minute begins on the wall clock (a fixed window of a minute is the commonest design).
"""

from __future__ import annotations

from collections.abc import Callable

from batchstream.records import Failure

WINDOW_S = 60.0
SHUT_AFTER = 5
"""So many 429s without a hint and without a success between them mean that the window is used up; fewer may be
chance (of 2,000 requests with 10 % random 429s, five in a row meet about one run in fifty)."""


class Lane:
    """State of one lane; all times are seconds, `now` monotonic, `wall` since the epoch.

    `rpm` requests a minute are spaced evenly (GCRA with a burst of one): never more than
    `rpm` + 1 in any 60 seconds, never idle while one is allowed.
    """

    __slots__ = ("_hintless", "_interval", "_next", "_rpm", "closed_until")

    def __init__(self, rpm: float | None = None) -> None:
        self._rpm = rpm
        self._interval = WINDOW_S / rpm if rpm else 0.0
        self._next = 0.0
        self._hintless = 0
        self.closed_until = 0.0

    def wait(self, now: float) -> float:
        """Seconds until a request may leave, 0.0 for now; it then has to `take` its place."""
        return max(0.0, self.closed_until - now, self._next - now)

    def take(self, now: float) -> None:
        """A request leaves."""
        self._next = max(self._next, now) + self._interval

    def reserve(self, now: float) -> float:
        """`wait`, and `take` when that is 0.0."""
        wait = self.wait(now)
        if wait == 0.0:
            self.take(now)
        return wait

    def share(self, fraction: float) -> None:
        """Keep to this share of the lane's rates from now on; others have the rest."""
        if self._rpm:
            self._interval = WINDOW_S / (self._rpm * fraction)

    def close(self, until: float) -> None:
        """Nothing leaves before the instant `until`; an earlier closing is never shortened."""
        self.closed_until = max(self.closed_until, until)

    def succeeded(self) -> None:
        self._hintless = 0

    def rate_limited(self, failure: Failure, now: float, wall: float, uniform: Callable[[float, float], float]) -> None:
        """A 429 came back: close the gate as far as it says, or as experience says."""
        if failure.retry_after is not None:
            self.close(now + failure.retry_after)
            return
        self._hintless += 1
        if self._hintless >= SHUT_AFTER:
            self.close(now + (WINDOW_S - wall % WINDOW_S) + uniform(0.0, 1.0))
