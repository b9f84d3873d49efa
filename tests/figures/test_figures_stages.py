"""The figures of one stage, by hand from its rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from batchstream.figures.stages import Stage, fold
from batchstream.figures.summary import Run, Tally, summary
from batchstream.policy.arrivals import Load
from batchstream.records import Latencies, Result, RowError, Usage

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def result(
    row: int, at: float, ttft: float, latency: float, *, queue: float = 0.0, ok: bool = True
) -> tuple[int, bytes]:
    timing = Latencies(
        started_at=(BEGIN + timedelta(seconds=at)).isoformat(), queue_s=queue, ttft_s=ttft, latency_s=latency,
        total_s=latency, tpot_s=(latency - ttft) / 9, chunks=10,
    )  # fmt: skip
    error = None if ok else RowError("server", 500, "no", retryable=True)
    usage = Usage(prompt_tokens=5, completion_tokens=10, total_tokens=15) if ok else None
    found = Result(row, str(row), "ok" if ok else "failed", timing=timing, usage=usage, attempts=1, error=error)
    return row, msgspec.json.encode(found)


def stage(arrival: str = "constant", *, rows: tuple[int, int] = (0, 100), warmup: int = 0) -> Stage:
    load = Load(arrival=arrival, rate=10.0, concurrency=4 if arrival == "closed" else None)  # type: ignore[arg-type]
    return Stage(name="x", load=load, rows=rows, warmup=warmup, summary=summary(Tally(), Run()))


def test_throughput_is_over_the_seconds_from_the_first_request_to_the_last_answer() -> None:
    found = fold(stage(), [result(i, i * 0.1, 0.2, 1.0) for i in range(100)], {}, None)
    assert found.seconds == pytest.approx(9.9 + 1.0)
    assert found.requests_per_s == pytest.approx(100 / 10.9, rel=1e-3)
    assert found.summary.throughput.completion_tokens_per_s == pytest.approx(1000 / 10.9, rel=1e-3)


def test_what_a_request_waited_behind_its_schedule_is_in_the_latency_from_due() -> None:
    found = fold(stage(), [result(i, i * 0.1, 0.2, 1.0, queue=0.5) for i in range(100)], {}, None)
    assert found.summary.metrics["ttft_s"].p50 == pytest.approx(0.2)
    assert found.sched["ttft_sched_s"].p50 == pytest.approx(0.7)
    assert found.sched["latency_sched_s"].p90 == pytest.approx(1.5)


def test_rows_of_the_warm_up_and_of_other_stages_are_in_no_figure() -> None:
    rows = [result(i, i * 0.1, 9.0 if i < 10 else 0.2, 10.0 if i < 10 else 1.0) for i in range(60)]
    found = fold(stage(rows=(0, 50), warmup=10), rows, {"ttft": 0.3}, None)
    assert found.summary.rows.total == 40
    assert found.summary.metrics["ttft_s"].max == pytest.approx(0.2)
    assert found.goodput is not None
    assert (found.goodput.asked, found.goodput.met) == (40, 40)


@pytest.mark.parametrize(("arrival", "met"), [("closed", 80), ("constant", 70)])
def test_goodput_counts_those_that_met_every_objective_from_due_in_an_open_loop(arrival: str, met: int) -> None:
    rows = [
        result(i, i * 0.1, 0.4 if i < 10 else 0.2, 1.0, queue=0.2 if 20 <= i < 30 else 0.0, ok=i < 90)
        for i in range(100)
    ]
    found = fold(stage(arrival), rows, {"ttft": 0.3}, None)
    assert found.goodput is not None
    assert (found.goodput.asked, found.goodput.met) == (100, met)
    assert found.goodput.attainment == met / 100


def test_failed_requests_improve_no_percentile() -> None:
    """Half fail at once: the median of those that answered is good, that of all who asked is: never."""
    rows = [result(i, i * 0.1, 0.2, 1.0, ok=i % 5 < 2) for i in range(100)]
    found = fold(stage(), rows, {}, None)
    assert found.sched["ttft_sched_s"].p50 == pytest.approx(0.2)
    assert found.adjusted["ttft_sched_s"]["p50"] is None
    few = fold(stage(), [result(i, i * 0.1, 0.001 * i, 1.0, ok=i >= 4) for i in range(100)], {}, None)
    adjusted, plain = few.adjusted["ttft_sched_s"]["p90"], few.sched["ttft_sched_s"].p90
    assert adjusted is not None
    assert plain is not None
    assert adjusted > plain


def test_the_time_line_adds_up() -> None:
    found = fold(stage(), [result(i, i * 0.1, 0.2, 1.0, ok=i != 50) for i in range(100)], {}, None)
    assert sum(point.sent for point in found.timeline) == sum(point.ended for point in found.timeline) == 100
    assert sum(point.failed for point in found.timeline) == 1
    assert found.timeline[-1].in_flight == 0
    assert max(point.in_flight for point in found.timeline) in (10, 11)
