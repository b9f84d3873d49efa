"""Two runs compared: intervals that cover, verdicts that do not cry wolf, conditions that say what they mean."""

from __future__ import annotations

import random

import msgspec
import pytest

from batchstream.figures.compare import Side, broken, compare, parse_condition, side
from batchstream.records import Latencies, Result, RowError


def run(chance: random.Random, count: int, *, factor: float = 1.0, failed: int = 0, name: str = "a") -> Side:
    rows = []
    for row in range(count):
        ttft = chance.lognormvariate(-2.0, 0.5) * factor
        ok = row >= failed
        error = None if ok else RowError("server", 500, "no", retryable=True)
        timing = Latencies(ttft_s=ttft, latency_s=ttft + 0.5, total_s=ttft + 0.5)
        rows.append(Result(row, str(row), "ok" if ok else "failed", timing=timing, error=error, attempts=1))
    return side(name, (msgspec.json.encode(row) for row in rows))


def verdicts(a: Side, b: Side) -> dict[str, str | None]:
    return {f"{d.metric}.{d.stat}": d.verdict for d in compare(a, b)}


def test_equal_runs_are_seldom_told_apart() -> None:
    """Of 300 pairs of runs with one and the same distribution, at most 5 % may show a difference of any percentile."""
    told = dict.fromkeys(("ttft_s.p50", "ttft_s.p95", "ttft_s.p99", "ttft_s.paired"), 0)
    for seed in range(300):
        chance = random.Random(seed)
        found = verdicts(run(chance, 400), run(chance, 400))
        for key in told:
            told[key] += found[key] != "no difference shown"
    assert max(told.values()) <= 0.05 * 300 + 5, told


def test_a_slower_endpoint_is_told_so() -> None:
    chance = random.Random(1)
    found = verdicts(run(chance, 2000), run(chance, 2000, factor=1.3))
    assert found["ttft_s.p50"] == found["ttft_s.p95"] == found["ttft_s.paired"] == "higher"
    assert found["failed.share"] == "no difference shown"


def test_pairs_show_what_the_spread_of_the_rows_hides() -> None:
    """The same rows, each five per cent slower: the percentiles overlap, the differences row by row do not."""
    found = verdicts(run(random.Random(3), 300), run(random.Random(3), 300, factor=1.05))
    assert found["ttft_s.p50"] == "no difference shown"
    assert found["ttft_s.paired"] == "higher"


def test_runs_of_other_rows_are_not_paired() -> None:
    a, b = run(random.Random(1), 300), run(random.Random(2), 100)
    assert "ttft_s.paired" not in verdicts(a, b)


def test_small_samples_have_no_verdict_on_a_tail() -> None:
    found = verdicts(run(random.Random(1), 50), run(random.Random(2), 50))
    assert "ttft_s.p99" not in found
    assert found["ttft_s.p50"] == "no difference shown"


def test_more_failures_are_a_difference() -> None:
    found = verdicts(run(random.Random(1), 1000, failed=5), run(random.Random(2), 1000, failed=60))
    assert found["failed.share"] == "higher"


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("ttft.p95 > +10%", True), ("ttft.p95 > +60%", False), ("ttft.p95 < +10%", False), ("ttft.p50>100ms", True),
        ("ttft.p50 > 2s", False), ("failed > 1%", True), ("failed > 5%", False), ("latency.max > 0.1s", True),
        ("ttft.mean < -10%", False),
    ],
)  # fmt: skip
def test_conditions(condition: str, holds: bool) -> None:
    a, b = run(random.Random(1), 1000), run(random.Random(1), 1000, factor=1.4, failed=20)
    assert (broken(parse_condition(condition), a, b) is not None) == holds


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft.p95", "ttft.p95 > 10%", "ttft.p95 > +10ms", "speed.p50 > 1s", "ttft.p42 > 1s", "failed > 3s"],
)
def test_conditions_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_condition(text)


def test_a_condition_that_cannot_be_told_is_no_pass() -> None:
    few = run(random.Random(1), 20)
    with pytest.raises(ValueError, match="needs 299 values"):
        broken(parse_condition("ttft.p99 > 1s"), None, few)
    with pytest.raises(ValueError, match="compares two runs"):
        broken(parse_condition("ttft.p50 > +1%"), None, few)
