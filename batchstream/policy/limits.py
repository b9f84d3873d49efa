"""When the next request may leave: the rates of a lane and its gate. Pure; the caller gives time and chance.

A lane is endpoint + key + model. A 429 is news about the lane, not about one request: its gate closes for everybody
until the stated time. Where nothing is stated it depends on what is known: a lane with fixed windows waits for its
next window; one with a rolling rate pauses and slows down; one without a known limit takes a few 429s in a row for
chance, and more than that for a used up minute of the wall clock (a fixed window of a minute is the commonest design).

Requests that had left before the gate closed come back with the same news; it is not counted twice. When a gate opens
the waiting crowd leaves by and by (`_Ramp`), or it would be back at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from batchstream.policy.retry import RetryBudget
from batchstream.policy.windows import MINUTE_S, Fixed, Rolling, Ticket, Window
from batchstream.records import Failure, RateNews

SHUT_AFTER = 5
"""So many 429s without a hint and without a success between them mean that the window is used up; fewer may be
chance (of 2,000 requests with 10 % random 429s, five in a row meet about one run in fifty)."""

RAMP_SHARE = 0.25
"""The crowd behind a gate leaves over this share of the time it was closed …"""

RAMP_S = (0.5, 5.0)
"""… but at least and at most so many seconds."""

SLOWER = 0.8
"""A 429 without a hint, against a rolling limit that was kept: the true one is lower; so much less from now on …"""

FASTER_EVERY_S = 60.0
"""… and back by a twentieth of the limit each minute without another."""

Binding = Literal["", "gate", "rpm", "tpm"]


class Cost(msgspec.Struct, frozen=True):
    """What a request takes from its lane's limits: `requests` (its weight), tokens of `input` and `output`."""

    requests: float = 1.0
    input: float = 0.0
    output: float = 0.0


ONE = Cost()
NOTHING = Cost(0.0, 0.0, 0.0)

TokenMode = Literal["both", "input", "output"]
Counts = Literal["requests", "both", "input", "output"]


class Reserved(msgspec.Struct):
    """The places a request has taken in the lane's windows; to be settled when it is known what it really cost.
    `at`: the instant it left; `sent_before`: requests (weights) that had left by this lane, itself included."""

    at: float
    cost: Cost
    tickets: list[Ticket]
    sent_before: float


class Limit(msgspec.Struct, frozen=True):
    """One limit: its `window`, and what it counts."""

    window: Window
    counts: Counts

    def units(self, cost: Cost) -> float:
        if self.counts == "requests":
            return cost.requests
        if self.counts == "input":
            return cost.input
        return cost.output if self.counts == "output" else cost.input + cost.output

    @property
    def name(self) -> Literal["rpm", "tpm"]:
        return "rpm" if self.counts == "requests" else "tpm"


class Lane:
    """State of one lane; all times are seconds, `now` monotonic, `wall` since the epoch.

    `limits` may be shared with other lanes (an account's limit over all models). `crowd` is how many may want to leave
    at once; the ramp after a gate is laid out for so many. A `deaf` one lets all leave, whatever comes back.
    """

    def __init__(self, limits: tuple[Limit, ...] = (), *, deaf: bool = False) -> None:
        self.limits = limits
        self._deaf = deaf
        self.closed_until = 0.0
        self.crowd = 16
        self.retries = RetryBudget()
        self._fraction = 1.0
        self._slowed = 1.0
        self._slowed_at = 0.0
        self._hintless = 0
        self._news_at = -math.inf
        self._ramp = _Ramp()
        self._sent = 0.0
        self._credit = math.inf  # requests that may leave until `_credit_until`, by the endpoint's own headers
        self._credit_until = -math.inf
        self._tell_windows()

    def wait(self, now: float, cost: Cost = ONE) -> float:
        """Seconds until a request may leave, 0.0 for now; it then has to `take` its place."""
        if self._deaf:
            return 0.0
        if self.closed_until > now:
            return self.closed_until - now
        wait = self._ramp.wait(now)
        if self._credit < cost.requests and self._credit_until > now:
            wait = max(wait, self._credit_until - now)
        for limit in self.limits:
            wait = max(wait, limit.window.wait(now, limit.units(cost)))
        return wait

    def take(self, now: float, cost: Cost = ONE) -> Reserved:
        """A request leaves."""
        self._recover(now)
        self._ramp.take(now)
        self._sent += cost.requests
        self._credit -= cost.requests
        tickets = [limit.window.take(now, limit.units(cost)) for limit in self.limits]
        return Reserved(now, cost, tickets, self._sent)

    def binding(self, now: float, cost: Cost = ONE) -> Binding:
        """What a request would wait for now; "" for nothing."""
        if self.closed_until > now or self._ramp.wait(now) > 0.0:
            return "gate"
        if self._credit < cost.requests and self._credit_until > now:
            return "rpm"
        waits = [(limit.window.wait(now, limit.units(cost)), limit.name) for limit in self.limits]
        longest = max(waits, default=(0.0, "rpm"))
        return longest[1] if longest[0] > 0.0 else ""

    def settle(self, reserved: Reserved, spent: Cost) -> None:
        """A request has cost `spent`: less or more tokens than reserved; nothing when it never left or was refused."""
        if spent != reserved.cost:
            for limit, ticket in zip(self.limits, reserved.tickets, strict=True):
                limit.window.settle(ticket, limit.units(spent))

    def per_minute(self, cost: Cost = ONE) -> float | None:
        """Requests of this cost that the lane lets leave in a minute at present; None: any number."""
        rates = [limit.window.limit_now() / units * MINUTE_S / limit.window.length
                 for limit in self.limits if (units := limit.units(cost)) > 0.0]  # fmt: skip
        return min(rates, default=None)

    def share(self, fraction: float) -> None:
        """Keep to this share of the lane's limits from now on; others have the rest."""
        self._fraction = fraction
        self._tell_windows()

    def close(self, until: float, now: float | None = None) -> None:
        """Nothing leaves before the instant `until`; an earlier closing is never shortened."""
        if until > self.closed_until:
            closed_for = until - now if now is not None else RAMP_S[0]
            self.closed_until = until
            self._ramp = _Ramp(until, min(max(RAMP_SHARE * closed_for, RAMP_S[0]), RAMP_S[1]), self.crowd)

    def succeeded(self) -> None:
        self._hintless = 0

    def rate_limited(
        self,
        failure: Failure,
        now: float,
        wall: float,
        uniform: Callable[[float, float], float],
        reserved: Reserved | None = None,
    ) -> None:
        """A 429 came back for the request that had `reserved` (None: unknown which): close the gate as far as it says,
        or as experience says."""
        sent, cost = (now, ONE) if reserved is None else (reserved.at, reserved.cost)
        if reserved is not None:
            self.settle(reserved, NOTHING)
        known = reserved is not None and sent <= self._news_at
        self._news_at = max(self._news_at, now) if failure.retry_after is not None or not known else self._news_at
        if failure.retry_after is not None:
            self._windows_reset(now + failure.retry_after)
            self.close(now + failure.retry_after, now)
            return
        opens = [instant for limit in self._about(failure)
                 if (instant := limit.window.refused(sent, limit.units(cost), now)) is not None]  # fmt: skip
        if known:  # the gate was closed for the same news
            return
        self._hintless += 1
        if opens:
            length = min(limit.window.length for limit in self.limits)
            self.close(min(opens) + uniform(0.0, 0.01 * length), now)
        elif self._hintless >= SHUT_AFTER:
            self.close(now + (MINUTE_S - wall % MINUTE_S) + uniform(0.0, 1.0), now)
        elif self.limits:
            self._slowed, self._slowed_at = max(0.1, self._slowed * SLOWER), now
            self._tell_windows()
            self.close(now + uniform(0.5, 1.0), now)

    def _about(self, failure: Failure) -> list[Limit]:
        """The limits that a refusal is about: the message mostly says whether it counts requests or tokens."""
        name = "tpm" if "token" in failure.message.lower() else "rpm"
        return [limit for limit in self.limits if limit.name == name] or list(self.limits)

    def learn(self, news: RateNews, now: float, reserved: Reserved) -> None:
        """The rate-limit headers of a response to the request that had `reserved`: how many more may leave until the
        endpoint's window is over. Those that left after it are not in the number yet."""
        if news.remaining_requests is not None and news.reset_requests is not None:
            self._credit = news.remaining_requests * self._fraction - (self._sent - reserved.sent_before)
            self._credit_until = now + news.reset_requests
            self._windows_reset(self._credit_until)
        if news.remaining_tokens is not None and news.remaining_tokens <= 0.0 and news.reset_tokens:
            self.close(now + news.reset_tokens, now)

    def _windows_reset(self, at: float) -> None:
        for limit in self.limits:
            if limit.counts == "requests":
                limit.window.resets(at)

    def _recover(self, now: float) -> None:
        if self._slowed < 1.0 and now - self._slowed_at > FASTER_EVERY_S:
            self._slowed, self._slowed_at = min(1.0, self._slowed + 0.05), now
            self._tell_windows()

    def _tell_windows(self) -> None:
        for limit in self.limits:
            limit.window.scale(self._fraction * self._slowed)


class _Ramp:
    """How a crowd leaves after a gate: the k-th of `crowd` at start + over × sqrt(k / crowd), slowly at first."""

    __slots__ = ("_crowd", "_left", "_over", "_start")

    def __init__(self, start: float = -math.inf, over: float = 0.0, crowd: int = 1) -> None:
        self._start, self._over, self._crowd, self._left = start, over, max(1, crowd), 0

    def wait(self, now: float) -> float:
        if now >= self._start + self._over:
            return 0.0
        return max(0.0, self._start + self._over * math.sqrt(self._left / self._crowd) - now)

    def take(self, now: float) -> None:
        self._left += 1


def rolling(rpm: float | None) -> Lane:
    """A lane with nothing but `rpm` requests a minute, evenly spaced."""
    return Lane((Limit(Rolling(rpm), "requests"),) if rpm else ())


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may ask of an endpoint. `rpm` and `tpm`: for all models together, or by model; `weights`: requests
    that one of a model counts for ("" for all others); `fixed`: windows are the provider's minutes; `phase`: instant of
    the monotonic clock at which one begins; `minute`: seconds of the provider's minute (a simulated one may be faster);
    `together`: all models share their limits, so that a 429 for one is news for all. `measured`: nothing that comes
    back holds a request up, because what it comes to is what is measured."""

    rpm: float | dict[str, float] | None = None
    tpm: float | dict[str, float] | None = None
    tpm_counts: TokenMode = "both"
    weights: dict[str, float] = {}
    fixed: bool = False
    phase: float = 0.0
    minute: float = MINUTE_S
    together: bool = False
    measured: bool = False

    def weight(self, model: str) -> float:
        return self.weights.get(model, self.weights.get("", 1.0))

    @property
    def known(self) -> bool:
        """Whether there is any limit to keep."""
        return self.rpm is not None or self.tpm is not None


class Lanes:
    """The lanes of one runner, made as models come up."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._lanes: dict[str, Lane] = {}
        self._common = tuple(
            self._limit(limit, counts) for limit, counts in self._stated() if isinstance(limit, float | int)
        )

    def __call__(self, model: str) -> Lane:
        """The lane of `model`; the same one for all where their limits are one account's (and none states others)."""
        by_model = isinstance(self.rates.rpm, dict) or isinstance(self.rates.tpm, dict)
        key = "" if self.rates.together and not by_model else model
        lane = self._lanes.get(key)
        if lane is None:
            own = tuple(
                self._limit(limit[model], counts)
                for limit, counts in self._stated()
                if isinstance(limit, dict) and model in limit
            )
            lane = self._lanes[key] = Lane((*self._common, *own), deaf=self.rates.measured)
        return lane

    def _stated(self) -> tuple[tuple[float | dict[str, float] | None, Counts], ...]:
        return (self.rates.rpm, "requests"), (self.rates.tpm, self.rates.tpm_counts)

    def _limit(self, limit: float, counts: Counts) -> Limit:
        rates = self.rates
        if rates.fixed:
            return Limit(Fixed(limit, rates.minute, rates.phase), counts)
        return Limit(Rolling(limit, rates.minute), counts)
