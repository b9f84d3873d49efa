"""What a run may spend: requests, tokens, money. Pure adding up.

What is on the wire counts with an estimate until its usage is known. A request whose estimate would go beyond the cap
waits while others are under way, for they may turn out cheaper; with nobody under way it leaves, for the cap is not
reached yet. So a cap is overrun by no more than the requests in flight, and mostly by a part of one.

Several processes that work at one job keep one account: each writes what it has spent itself and reads what the others
have, and only one at a time lets a request leave (`Ledger`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from batchstream.policy.limits import Cost
from batchstream.records import Usage

MILLION = 1_000_000

CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English text and today's tokenizers; corrected by the usage that comes back."""

UNKNOWN_ANSWER_TOKENS = 256.0
"""Taken for an answer's length where neither the row sets a limit nor an answer has come yet."""

_NEWEST = 0.1  # weight of the newest answer in the running means


class Price(msgspec.Struct, frozen=True):
    """Money for a million tokens; `cached` of prompt tokens that the endpoint had cached (None: as the others).
    Reasoning tokens are part of the completion tokens and cost the same."""

    input: float
    output: float
    cached: float | None = None

    def of(self, usage: Usage) -> float:
        """What a request has cost."""
        prompt, cached = usage.prompt_tokens or 0, usage.cached_tokens or 0
        cached = min(cached, prompt)
        dear = (prompt - cached) * self.input + (usage.completion_tokens or 0) * self.output
        return (dear + cached * (self.input if self.cached is None else self.cached)) / MILLION

    def tokens(self, prompt: float, answer: float) -> float:
        """What so many tokens cost, none of them cached."""
        return (prompt * self.input + answer * self.output) / MILLION


Prices = dict[str, Price]
"""By model; "" for all others."""


def parse_prices(table: Mapping[str, float | Mapping[str, float]]) -> Prices:
    """Prices from {"in": …, "out": …, "cached": …}, or a table of these by model, or both. Raises ValueError."""
    common = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    found = {model: value for model, value in table.items() if isinstance(value, Mapping)}
    if common:
        found[""] = common
    return {model: _price(model, dict(parts)) for model, parts in found.items()}


def _price(model: str, parts: dict[str, float]) -> Price:
    whose = f" for {model}" if model else ""
    if not {"in", "out"} <= parts.keys() <= {"in", "out", "cached"}:
        raise ValueError(f"expected in, out and perhaps cached{whose}, got {', '.join(parts) or 'nothing'}")
    for name, value in parts.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"expected {name}{whose} to be 0 or more, got {value!r}")
    return Price(parts["in"], parts["out"], parts.get("cached"))


def price_of(prices: Prices, model: str) -> Price | None:
    return prices.get(model) or prices.get("")


class Budget(msgspec.Struct, frozen=True):
    """Limits the user set on one run; None is no limit. `seconds` count from the start of admission, `why` names the
    flag that set them; `cost` is money, of which `spent` has gone in earlier runs of the job."""

    seconds: float | None = None
    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    spent: float = 0.0
    why: str = ""


class Spent(msgspec.Struct, frozen=True):
    """What processes have spent, and expect to spend with what they have on the wire; `left`: requests that they let
    leave."""

    left: float = 0
    tokens: float = 0
    cost: float = 0.0
    expected_tokens: float = 0.0
    expected_cost: float = 0.0
    on_wire: float = 0


NONE_SPENT = Spent()


class Ledger(Protocol):
    """The account that the processes of a job share."""

    def alone(self) -> AbstractContextManager[object]:
        """Within it nobody else reads or writes."""

    def others(self) -> Spent:
        """The sum over all other processes."""

    def write(self, spent: Spent) -> None:
        """What this one has spent by now."""


class Spending:
    """`tokens` and `cost` of this process so far, `cost` with what earlier runs have spent; the `expected_*` are of
    requests on the wire. With a `ledger` the budget is that of all processes that share it."""

    def __init__(self, budget: Budget, prices: Prices, ledger: Ledger | None = None) -> None:
        self.budget = budget
        self.prices = prices
        self.ledger = ledger
        self.requests = 0
        self.tokens = 0
        self.cost = budget.spent
        self.expected_tokens = 0.0
        self.expected_cost = 0.0
        self._on_wire = 0
        self._left = 0

    def take(self, model: str, cost: Cost) -> bool:
        """Let a request of this estimate leave, if it fits (`may_leave`)."""
        if self.ledger is None:
            if not self.may_leave(model, cost):
                return False
            self.expect(model, cost)
            return True
        with self.ledger.alone():
            others = self.ledger.others()
            if self._cap_reached(others) is not None or not self.may_leave(model, cost, others):
                return False
            self._left += 1
            self.expect(model, cost)
            self._write()
            return True

    def may_leave(self, model: str, cost: Cost, others: Spent = NONE_SPENT) -> bool:
        """Whether a request of this estimate fits; else it waits for those on the wire."""
        if not self._on_wire and not others.on_wire:
            return True
        budget = self.budget
        tokens = self.tokens + self.expected_tokens + others.tokens + others.expected_tokens
        if budget.tokens is not None and tokens + cost.input + cost.output > budget.tokens:
            return False
        if budget.cost is None:
            return True
        money = self.cost + self.expected_cost + others.cost + others.expected_cost
        return money + self._estimate(model, cost) <= budget.cost

    def expect(self, model: str, cost: Cost) -> None:
        """A request of this estimate leaves."""
        self._on_wire += 1
        self.expected_tokens += cost.input + cost.output
        self.expected_cost += self._estimate(model, cost)

    def ended(self, model: str, cost: Cost, usage: Usage | None, events: int = 0) -> None:
        """A request is off the wire. Of an answer without a usage its `events` with output stand for its tokens, and
        the estimate for its prompt's; a failure without one (no `events`) is not known to have cost anything."""
        self._on_wire -= 1
        self.expected_tokens -= cost.input + cost.output
        self.expected_cost -= self._estimate(model, cost)
        if usage is None and events:
            usage = Usage(round(cost.input), events, round(cost.input) + events)
        if usage is not None:
            self.tokens += usage.total_tokens or 0
            if (price := price_of(self.prices, model)) is not None:
                self.cost += price.of(usage)
        if self.ledger is not None:
            with self.ledger.alone():
                self._write()

    def used_up(self) -> str | None:
        """The reason to stop, when a cap is reached. Where the requests of several processes are counted: not before
        those that this one let leave are on the wire."""
        if self.ledger is None:
            return self._cap_reached(NONE_SPENT)
        if self.requests < self._left:
            return None
        with self.ledger.alone():
            return self._cap_reached(self.ledger.others())

    def _cap_reached(self, others: Spent) -> str | None:
        budget = self.budget
        requests = self.requests if self.ledger is None else self._left + others.left
        tokens, cost = self.tokens + round(others.tokens), self.cost + others.cost
        if budget.requests is not None and requests >= budget.requests:
            return f"--max-requests {budget.requests} are used up"
        if budget.tokens is not None and tokens >= budget.tokens:
            return f"--max-tokens-total {budget.tokens} are used up ({tokens} so far)"
        if budget.cost is not None and cost >= budget.cost:
            so_far = f"{cost:.6g} so far, earlier runs of this job included"
            return f"--max-cost {budget.cost:g} is used up ({so_far}; a higher one goes on)"
        return None

    def _write(self) -> None:
        assert self.ledger is not None  # noqa: S101  (whoever calls)
        own = self.cost - self.budget.spent
        self.ledger.write(Spent(self._left, self.tokens, own, self.expected_tokens, self.expected_cost, self._on_wire))

    def _estimate(self, model: str, cost: Cost) -> float:
        price = price_of(self.prices, model)
        return price.tokens(cost.input, cost.output) if price is not None else 0.0


class Estimator:
    """Tokens of a request before it is sent: from the size of its body and its limit on the answer, corrected by the
    usages that came back."""

    def __init__(self) -> None:
        self._ratio = 1.0
        self._answer = UNKNOWN_ANSWER_TOKENS
        self._seen = 0

    def cost(self, weight: float, size: int, limit: int | None) -> Cost:
        """`size`: bytes of the body; `limit`: the row's own on the tokens of all its answers, or None."""
        output = self._answer if limit is None else float(limit)
        return Cost(weight, size / CHARACTERS_PER_TOKEN * self._ratio, output)

    def learn(self, cost: Cost, usage: Usage) -> None:
        """What a request estimated as `cost` really took."""
        if usage.prompt_tokens and cost.input:
            seen = usage.prompt_tokens / (cost.input / self._ratio)
            self._ratio += max(_NEWEST, 1 / (self._seen + 1)) * (seen - self._ratio)
        if usage.completion_tokens is not None:
            self._answer += max(_NEWEST, 1 / (self._seen + 1)) * (usage.completion_tokens - self._answer)
        self._seen += 1
