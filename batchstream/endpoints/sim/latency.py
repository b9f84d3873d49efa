"""How long things take: distributions written as short texts, drawn from a seeded generator.

0.2                 always 0.2 s
0.1..0.3            uniform between the two
exp(0.2)            exponential with that mean
lognormal(0.2,0.5)  median 0.2 s, sigma 0.5 of the logarithm: a few slow ones, as in the field
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable

import msgspec

from batchstream.errors import UsageError

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(_NUMBER), "constant"),
    (re.compile(rf"{_NUMBER}\.\.{_NUMBER}"), "uniform"),
    (re.compile(rf"exp\({_NUMBER}\)"), "exp"),
    (re.compile(rf"lognormal\({_NUMBER},\s*{_NUMBER}\)"), "lognormal"),
)


class Distribution(msgspec.Struct, frozen=True):
    """`first` and `second` are the numbers of the text, in its order (seconds, but for lognormal's sigma)."""

    kind: str
    first: float
    second: float = 0.0

    @property
    def constant(self) -> float | None:
        """The value, when it is always the same."""
        return self.first if self.kind == "constant" else None

    def drawer(self, chance: random.Random) -> Callable[[], float]:
        """A function that draws the next value (seconds)."""
        if self.kind == "uniform":
            return lambda: chance.uniform(self.first, self.second)
        if self.kind == "exp":
            return lambda: chance.expovariate(1 / self.first)
        if self.kind == "lognormal":
            return lambda: chance.lognormvariate(math.log(self.first), self.second)
        return lambda: self.first


def parse_distribution(text: str | float, field: str) -> Distribution:
    """Read one of the forms above; `field` names it in the `UsageError`."""
    compact = str(text).replace(" ", "")
    for pattern, kind in _FORMS:
        match = pattern.fullmatch(compact)
        if match is None:
            continue
        found = Distribution(kind, *(float(number) for number in match.groups()))
        if kind == "uniform" and found.first > found.second:
            raise UsageError(f"{field}: expected LOW..HIGH with LOW at most HIGH, got {text!r}")
        if kind in ("exp", "lognormal") and found.first <= 0:
            raise UsageError(f"{field}: expected {kind} with a first number above 0, got {text!r}")
        return found
    raise UsageError(f"{field}: expected seconds as 0.2, 0.1..0.3, exp(0.2) or lognormal(0.2,0.5), got {text!r}")
