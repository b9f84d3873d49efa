from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchstream.policy.budget import Budget, Estimator, Price, Spending, parse_prices
from batchstream.policy.limits import Cost
from batchstream.records import Usage
from batchstream.shard import until

DEAR = {"": Price(1_000_000.0, 2_000_000.0)}
"""One a prompt token, two a completion token."""


def test_cached_tokens_have_their_own_price_and_reasoning_tokens_the_answers() -> None:
    price = Price(10.0, 100.0, cached=1.0)
    usage = Usage(1000, 500, 1500, cached_tokens=400, reasoning_tokens=300)
    assert price.of(usage) == pytest.approx((600 * 10 + 400 * 1 + 500 * 100) / 1e6)
    assert Price(10.0, 100.0).of(usage) == pytest.approx((1000 * 10 + 500 * 100) / 1e6)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 100)), max_size=200), st.integers(1, 8), st.floats(1, 2000))
def test_a_cap_is_never_overrun_by_more_than_what_is_in_flight(requests, slots, cap) -> None:
    """Each request: its estimate, and what it really costs."""
    spending = Spending(Budget(cost=cap), DEAR)
    on_wire: list[tuple[Cost, int]] = []
    most = max((real for _, real in requests), default=0)
    for estimate, real in requests:
        cost = Cost(1, estimate, 0)
        while len(on_wire) >= slots or (on_wire and not spending.may_leave("", cost)):
            first, spent = on_wire.pop(0)
            spending.ended("", first, Usage(spent, 0, spent))
        if spending.used_up():
            break
        assert spending.may_leave("", cost)
        spending.expect("", cost)
        on_wire.append((cost, real))
    for cost, real in on_wire:
        spending.ended("", cost, Usage(real, 0, real))
    assert spending.cost <= cap + slots * most + 1e-6


@given(st.lists(st.floats(1, 50), min_size=1, max_size=200), st.floats(1, 2000))
def test_with_true_estimates_a_cap_is_overrun_by_one_request_at_most(costs, cap) -> None:
    spending = Spending(Budget(cost=cap), DEAR)
    on_wire: list[Cost] = []
    for amount in costs:
        cost = Cost(1, amount, 0)
        while on_wire and not spending.may_leave("", cost):
            done = on_wire.pop(0)
            spending.ended("", done, None)
            spending.cost += done.input
        if spending.used_up():
            break
        spending.expect("", cost)
        on_wire.append(cost)
    assert spending.cost + sum(cost.input for cost in on_wire) <= cap + max(costs) + 1e-6


def test_what_earlier_runs_spent_counts_against_the_cap() -> None:
    assert Spending(Budget(cost=5.0, spent=5.0), DEAR).used_up() is not None
    assert Spending(Budget(cost=6.0, spent=5.0), DEAR).used_up() is None


def test_prices_are_of_all_models_or_of_one() -> None:
    assert parse_prices({"in": 1, "out": 2}) == {"": Price(1, 2)}
    assert parse_prices({"gpt": {"in": 1, "out": 2, "cached": 0.5}}) == {"gpt": Price(1, 2, 0.5)}
    assert parse_prices({"in": 1, "out": 2, "gpt": {"in": 3, "out": 4}}).keys() == {"", "gpt"}


@pytest.mark.parametrize(
    "table", [{"in": 1}, {"in": 1, "out": 2, "batch": 3}, {"in": -1, "out": 2}, {"gpt": {"out": 2}}]
)
def test_a_price_that_is_none_is_refused(table) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_prices(table)


def test_estimates_learn_from_the_usages_that_come_back() -> None:
    estimator = Estimator()
    assert estimator.cost(1, 400, 50) == Cost(1, 100, 50)
    for _ in range(50):
        estimator.learn(estimator.cost(1, 400, None), Usage(200, 30, 230))
    cost = estimator.cost(1, 400, None)
    assert (round(cost.input), round(cost.output)) == (200, 30)


NOON = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("deadline", "seconds"),
    [("2026-01-31T13:00:00+00:00", 3600), ("2026-01-31T11:00:00+00:00", 0), ("2026-01-31T13:00Z", 3600)],
)
def test_a_deadline_is_so_many_seconds_away(deadline: str, seconds: float) -> None:
    assert until(deadline, NOON) == seconds


def test_a_time_of_day_is_the_next_one() -> None:
    now = datetime(2026, 1, 15, 12, 0).astimezone()
    assert until("13:30", now) == 5400
    assert until("06:00", now) == 18 * 3600
    assert until("12:00", now) == 24 * 3600


def test_tokens_on_the_wire_count_with_their_estimate() -> None:
    spending = Spending(Budget(tokens=100), {})
    assert spending.may_leave("", Cost(1, 60, 60)), "with nobody under way the cap is simply not reached yet"
    spending.expect("", Cost(1, 30, 30))
    assert not spending.may_leave("", Cost(1, 30, 30))
    spending.ended("", Cost(1, 30, 30), Usage(30, 5, 35))
    assert spending.may_leave("", Cost(1, 30, 30))
    assert spending.used_up() is None
    spending.ended("", Cost(1, 0, 0), Usage(60, 5, 65))
    assert spending.used_up() is not None
