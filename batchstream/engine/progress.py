"""What a run knows about itself while it runs: counters that the engine turns and a display reads.

A plain object without locks: one event loop writes it, the display's thread polls it a few times a second.
Each attribute is replaced or appended to in one step of the interpreter, so a reader may see counters that are a
row apart, never a broken one. Anything exact comes from the journal, not from here.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque

from batchstream.net.exchange import Traffic

RECENT = 2000
"""How many of the newest TTFTs the display's percentiles look back over."""


class Progress:
    """Counters of one run. Times are seconds of the monotonic clock unless said otherwise.

    `total`: rows of the input, None while unknown; `resumed`: rows that had a result before this run;
    `done`: rows that got one in this run, `ok` + `failed`; `failures`: the failed ones by kind;
    `requests`: those that were sent and have ended; `in_flight`: those that have not ended;
    `waiting`: rows that wait for their next attempt;
    `tokens`: completion tokens the endpoint reported, failed attempts included;
    `retries`: failed attempts that are tried again, by kind in `retry_kinds`;
    `ttft`: the newest TTFTs in seconds; `gate_until`: instant before which nothing is sent, None when open;
    `traffic`: what went over the wire; `slips`: how late each row of a schedule left, in seconds;
    `message`: one line on what binds the run now, "" for nothing;
    `binding`: what holds up the next row (`engine.departures`) since `binding_since`, `held`: seconds spent with
    each before; `slots`: requests at once that are allowed now, `adaptive` when that is being found out, `levels` its
    path as (instant, slots); `limited`: 429s;
    `per_minute`: requests that the known limits allow in a minute, None for any number; `cost`: money spent by the
    prices that were given, earlier runs of the job included, None without prices.
    """

    __slots__ = (
        "adaptive", "binding", "binding_since", "cost", "done", "failed", "failures", "gate_until", "held", "in_flight",
        "levels", "limited", "message", "ok", "per_minute", "requests", "resumed", "retries", "retry_kinds",
        "slips", "slots", "started", "tokens", "total", "traffic", "ttft", "waiting",
    )  # fmt: skip

    def __init__(self, started: float, total: int | None = None, resumed: int = 0) -> None:
        self.started = started
        self.total = total
        self.resumed = resumed
        self.done = 0
        self.ok = 0
        self.failed = 0
        self.requests = 0
        self.in_flight = 0
        self.waiting = 0
        self.retries = 0
        self.tokens = 0
        self.failures: Counter[str] = Counter()
        self.retry_kinds: Counter[str] = Counter()
        self.slips = array("d")
        self.ttft: deque[float] = deque(maxlen=RECENT)
        self.gate_until: float | None = None
        self.traffic = Traffic()
        self.message = ""
        self.binding = "input"
        self.binding_since = started
        self.held: dict[str, float] = {}
        self.slots = 0
        self.adaptive = False
        self.levels: list[tuple[float, int]] = []
        self.limited = 0
        self.per_minute: float | None = None
        self.cost: float | None = None

    def held_until(self, now: float) -> dict[str, float]:
        """`held` with what is being waited for at the instant `now`."""
        return {**self.held, self.binding: self.held.get(self.binding, 0.0) + max(0.0, now - self.binding_since)}
