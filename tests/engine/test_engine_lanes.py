"""Runners as their callers steer them: shares of slots and rates, gates told of by others, lanes beside each other."""

from __future__ import annotations

import time

import pytest
from rowsrun import asked, go

from batchstream.endpoints.simulate import SimulateConfig, Simulator
from batchstream.engine.runner import Runner
from batchstream.policy.limits import Rates, rolling


async def test_a_narrow_lane_holds_up_no_other() -> None:
    simulator = Simulator(SimulateConfig(tokens=1))
    rows = [asked(i, "sim/double" if i < 3 else "sim") for i in range(203)]
    await go(simulator, rows, rates=Rates(rpm={"sim/double": 60}), concurrency=2)
    order = [entry.model for entry in simulator.ledger.entries]
    assert order[-2:] == ["sim/double"] * 2, "the other 200 had gone before the narrow lane let its second row leave"


async def test_a_gate_that_another_process_reports_is_closed_here_too() -> None:
    simulator = Simulator(SimulateConfig(tokens=1))
    until = 0.0

    def close(runner: Runner) -> None:
        nonlocal until
        until = time.monotonic() + 0.3
        runner.close_gate("sim", until)

    await go(simulator, [asked(i) for i in range(20)], concurrency=1, meanwhile=close)
    later = [entry for entry in list(simulator.ledger.entries)[1:] if entry.received_at < until]
    assert len(later) <= 1, "only what had left already may arrive"


async def test_who_hears_a_429_is_told_which_gate_closes_until_when() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, faults=("429(retry-after=0.2)@3",)))
    told: list[tuple[str, float]] = []
    await go(
        simulator, [asked(i) for i in range(9)], concurrency=1, on_gate=lambda key, until: told.append((key, until))
    )
    ((key, until),) = told
    refused = next(entry for entry in simulator.ledger.entries if entry.status == 429)
    assert key == "sim"
    assert 0.2 <= until - (refused.ended_at or 0.0) < 0.4


async def test_slots_can_be_shared_anew_while_requests_run() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, ttft=0.02))
    await go(simulator, [asked(i) for i in range(40)], concurrency=1,
             meanwhile=lambda runner: runner.share(4, 1.0))  # fmt: skip
    spans = [(entry.received_at, entry.ended_at or 0.0) for entry in simulator.ledger.entries]
    at_once = max(sum(start <= other < end for start, end in spans) for other, _ in spans)
    assert at_once == 4


def test_half_a_share_of_a_lane_is_half_its_rate() -> None:
    lane = rolling(60)
    lane.share(0.5)
    lane.take(0.0)
    assert lane.wait(0.0) == pytest.approx(2.0, rel=0.01)
