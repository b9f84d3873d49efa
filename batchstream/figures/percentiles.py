"""Exact percentiles of durations, with the sample sizes below which they are refused, and their uncertainty.

Definition: linear interpolation between the two nearest order statistics (Hyndman and Fan 1996, type 7), which is what
numpy, pandas, Excel and the other LLM benchmarks compute, so that figures can be set side by side. No sketch and no
histogram: every raw value is kept, to the microsecond, in four bytes.

Uncertainty: a distribution-free 95 % interval between two order statistics. The number of values below the true
q-quantile is Binomial(n, q), whatever the latencies' distribution, so ranks l and u with
``P(l <= Binomial(n, q) < u) >= 0.95`` enclose it (Conover, Practical Nonparametric Statistics, 3.2). Of all such pairs
the one with the fewest ranks between is taken, which keeps the interval no wider than the sample demands.

Refusal: a percentile of the tail is given only where such an interval exists, ``q**n + (1 - q)**n <= 0.05``. That asks
for 29 values for p90, 59 for p95, 299 for p99 and 2,995 for p99.9; below, the "p99" would be the maximum under another
name. The median claims nothing about a tail and is always given; below 6 values it has no interval.

Order costs little and no memory to speak of: the values stay in one array and are sorted in place, piece by piece; an
order statistic is found by bisecting on the value and counting in each piece.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence

CONFIDENCE = 0.95

_PIECE = 1 << 17
"""Values sorted at once. Sorting needs ~40 bytes a value for a moment: 5 MB, however large the sample is."""


class Sample:
    """Durations in seconds, kept as whole microseconds: 4 bytes a value (8 once one is longer than 71 minutes)."""

    __slots__ = ("_sorted", "_values")

    def __init__(self) -> None:
        self._values = array("I")
        self._sorted = 0  # so many values, in pieces of _PIECE, are in order

    def add(self, seconds: float | None) -> None:
        """Take in one duration; None (not known) is passed over. Raises ValueError for a negative one."""
        if seconds is None:
            return
        microseconds = int(seconds * 1e6 + 0.5)
        try:
            self._values.append(microseconds)
        except OverflowError:
            if microseconds < 0:
                raise ValueError(f"expected a duration of 0 s or more, got {seconds!r}") from None
            self._values = array("Q", self._values)
            self._values.append(microseconds)

    def add_all(self, durations: Iterable[float | None]) -> None:
        """Take in many, as `add` does each, in a quarter of the time."""
        known = [int(seconds * 1e6 + 0.5) for seconds in durations if seconds is not None]
        try:
            self._values.extend(array("I", known))
        except (OverflowError, TypeError):  # a long or a negative one among them, or there were long ones before
            for microseconds in known:
                self.add(microseconds / 1e6)

    def extend(self, other: Sample) -> None:
        """Take in all values of `other`, as if each had been added here."""
        if other._values.typecode != self._values.typecode:
            self._values = array("Q", self._values)
            self._values.extend(array("Q", other._values))
        else:
            self._values.extend(other._values)

    @property
    def n(self) -> int:
        return len(self._values)

    @property
    def min(self) -> float | None:
        return min(self._values) / 1e6 if self._values else None

    @property
    def max(self) -> float | None:
        return max(self._values) / 1e6 if self._values else None

    @property
    def mean(self) -> float | None:
        return round(sum(self._values) / self.n / 1e6, 6) if self._values else None

    def percentile(self, q: float) -> float | None:
        """The q-quantile in seconds, 0 <= q <= 1 (p99: 0.99), or None where `refused` says why."""
        if self.refused(q) is not None:
            return None
        rank, share = _position(self.n, q)
        low = self._ordered(rank)
        if share == 0.0:
            return low / 1e6
        return round((low + (self._ordered(rank + 1) - low) * share) / 1e6, 6)

    def at(self, q: float) -> float | None:
        """The q-quantile whatever the size of the sample: a point of its curve, no claim about a tail."""
        if not self._values:
            return None
        rank, share = _position(self.n, q)
        low = self._ordered(rank)
        high = self._ordered(min(rank + 1, self.n))
        return (low + (high - low) * share) / 1e6

    def interval(self, q: float, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """The confidence interval (95 %) of the q-quantile in seconds, or None for too small a sample."""
        ranks = interval_ranks(self.n, q, confidence)
        if ranks is None:
            return None
        return self._ordered(ranks[0]) / 1e6, self._ordered(ranks[1]) / 1e6

    def refused(self, q: float) -> str | None:
        """Why there is no q-quantile of this sample, or None where there is one."""
        needed = needed_for(q)
        if self.n >= needed:
            return None
        return f"needs {needed:,} values, has {self.n:,}"

    def _ordered(self, rank: int) -> int:
        """The value of that rank (1 = smallest) in microseconds."""
        self._sort()
        values, n = self._values, self.n
        if n <= _PIECE:
            return values[rank - 1]
        pieces = [(start, min(start + _PIECE, n)) for start in range(0, n, _PIECE)]
        low, high = 0, max(values[end - 1] for _, end in pieces)
        while low < high:
            middle = (low + high) // 2
            at_most = sum(bisect_right(values, middle, start, end) - start for start, end in pieces)
            if at_most >= rank:
                high = middle
            else:
                low = middle + 1
        return low

    def _sort(self) -> None:
        n = self.n
        if self._sorted == n:
            return
        unsorted_from = self._sorted - self._sorted % _PIECE  # the last piece may have grown
        for start in range(unsorted_from, n, _PIECE):
            piece = slice(start, min(start + _PIECE, n))
            self._values[piece] = array(self._values.typecode, sorted(self._values[piece]))
        self._sorted = n


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of values in ascending order, by the definition above and without refusal.

    Raises ValueError for an empty sequence.
    """
    if not ordered:
        raise ValueError("expected at least one value, got none")
    rank, share = _position(len(ordered), q)
    low = ordered[rank - 1]
    return low if share == 0.0 else low + (ordered[rank] - low) * share


def needed_for(q: float) -> int:
    """The smallest sample whose q-quantile is given; see "Refusal" above. Raises ValueError for q outside 0…1."""
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"expected a quantile between 0 and 1, got {q!r}")
    tail = max(q, 1.0 - q)
    if tail in (0.5, 1.0):  # the median; the minimum and the maximum, which are values and not estimates
        return 1
    n = math.ceil(math.log(1.0 - CONFIDENCE) / math.log(tail))
    while tail**n + (1.0 - tail) ** n > 1.0 - CONFIDENCE:  # one step at most: the other end is missed now and then
        n += 1
    return n


def interval_ranks(n: int, q: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Ranks (1 = smallest) of the two order statistics that enclose the true q-quantile in 95 % of samples (or in
    another share of them, `confidence`).

    None where no two do, and for the minimum and the maximum.
    """
    if n < 2 or not 0.0 < q < 1.0:
        return None
    # The most likely count of values below the quantile; from there the window grows towards the likelier side, which
    # for a distribution with one peak gives the shortest window that holds enough.
    first = last = min(max(int((n + 1) * q), 1), n - 1)
    log_peak = math.lgamma(n + 1) - math.lgamma(first + 1) - math.lgamma(n - first + 1)
    peak = math.exp(log_peak + first * math.log(q) + (n - first) * math.log1p(-q))
    odds = q / (1.0 - q)
    held = peak
    below = _step_down(peak, first, n, odds)
    above = _step_up(peak, last, n, odds)
    while held < confidence:
        if first > 1 and (below >= above or last == n - 1):
            first -= 1
            held += below
            below = _step_down(below, first, n, odds)
        elif last < n - 1:
            last += 1
            held += above
            above = _step_up(above, last, n, odds)
        else:
            return None
    return first, last + 1


def _step_down(probability: float, k: int, n: int, odds: float) -> float:
    """P(k - 1) of the binomial distribution from P(k)."""
    return probability * k / ((n - k + 1) * odds)


def _step_up(probability: float, k: int, n: int, odds: float) -> float:
    """P(k + 1) of the binomial distribution from P(k)."""
    return probability * (n - k) * odds / (k + 1)


def _position(n: int, q: float) -> tuple[int, float]:
    """Rank of the lower neighbour, and how far towards the next one the quantile lies."""
    place = (n - 1) * q
    whole = math.floor(place)
    return whole + 1, place - whole
