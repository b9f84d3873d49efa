"""Limits as endpoints really keep them: the simulated endpoint's windows, walls and storms, judged by its ledger.

Its minute is made to last a second (`speedup`), so that an hour of ShuttleAI's windows passes in a minute.
"""

from __future__ import annotations

import asyncio
import time
from itertools import groupby

import pytest
from rowsrun import Ran, asked, go

from batchstream.endpoints.sim.ledger import Entry
from batchstream.endpoints.simulate import SimulateConfig, Simulator
from batchstream.engine.runner import Runner
from batchstream.policy.breaker import Outage
from batchstream.policy.budget import Budget, Price
from batchstream.policy.concurrency import Concurrency
from batchstream.policy.limits import Rates

MINUTE = 1.0


def shuttleai(rpm: float = 30, *, phase: float | None = None) -> Rates:
    """A plan's rates; windows begin with the wall clock's, until better is known."""
    return Rates(rpm=rpm, fixed=True, minute=MINUTE, together=True, weights={"sim/double": 2.0},
                 phase=(time.monotonic() - time.time()) % MINUTE)  # fmt: skip


def by_window(simulator: Simulator) -> dict[int, list[Entry]]:
    """The ledger's entries by the endpoint's windows."""
    phase = simulator.config.window_phase or 0.0
    return {
        index: list(entries)
        for index, entries in groupby(simulator.ledger.entries, lambda e: int((e.received_wall - phase) // MINUTE))
    }


def bursts(entries: list[Entry]) -> int:
    """Runs of 429s with no accepted request between them."""
    return sum(refused for refused, _ in groupby(entry.status == 429 for entry in entries))


async def live(count: int, sim: SimulateConfig, rates: Rates) -> tuple[Ran, dict[int, list[Entry]]]:
    simulator = Simulator(sim)
    ran = await go(simulator, [asked(i, "sim/double") for i in range(count)], rates=rates, concurrency=20)
    assert (ran.ok, ran.stop) == (count, None), "no row is lost"
    return ran, by_window(simulator)


def check_windows_are_used(windows: dict[int, list[Entry]]) -> None:
    first, *others = windows.values()
    assert not any(entry.status == 429 for entries in others for entry in entries), "none after the first window"
    full = others[:-1]
    used = sum(len(entries) for entries in full) / (15 * len(full))
    print(f"{len(full)} full windows, {used:.1%} of the allowed calls used, {bursts(first)} bursts in the first")  # noqa: T201
    assert used >= 0.97


async def test_a_plans_windows_are_used_to_the_last_call_without_a_429() -> None:
    _, windows = await live(90, SimulateConfig(tokens=1, rpm=30, speedup=60), shuttleai())
    check_windows_are_used(windows)


@pytest.mark.sweep
async def test_900_rows_through_a_plans_windows_without_a_429() -> None:
    _, windows = await live(900, SimulateConfig(tokens=1, rpm=30, speedup=60), shuttleai())
    check_windows_are_used(windows)


def check_it_settles(windows: dict[int, list[Entry]]) -> None:
    per_window = [bursts(entries) for entries in windows.values()]
    print(f"bursts of 429s by window: {per_window}")  # noqa: T201
    assert max(per_window) <= 1
    accepted = [sum(entry.status == 200 for entry in entries) for entries in windows.values()]
    settled = accepted[4:-1]
    assert sum(settled) >= 0.9 * 15 * len(settled)


async def test_a_wrong_rate_and_an_unknown_phase_settle() -> None:
    sim = SimulateConfig(tokens=1, rpm=30, speedup=60, window_phase=0.37)
    _, windows = await live(120, sim, shuttleai(45))
    check_it_settles(windows)


@pytest.mark.sweep
@pytest.mark.parametrize("phase", [0.05, 0.25, 0.5, 0.75, 0.95])
async def test_a_wrong_rate_and_an_unknown_phase_settle_at_any_phase(phase: float) -> None:
    sim = SimulateConfig(tokens=1, rpm=30, speedup=60, window_phase=phase)
    _, windows = await live(450, sim, shuttleai(60))
    check_it_settles(windows)


async def test_headers_teach_a_limit_that_nobody_stated() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, rpm=30, speedup=60, ratelimit_headers=True, window_phase=0.3))
    ran = await go(simulator, [asked(i) for i in range(100)], concurrency=4)
    assert ran.ok == 100
    others = list(by_window(simulator).values())[1:]
    assert not any(entry.status == 429 for entries in others for entry in entries)


async def test_a_storm_of_429s_is_waited_out_by_all_and_the_way_back_is_spread() -> None:
    """1,000 rows at once, each refused once: the gate closes, nothing leaves by it, and all come back by and by."""
    simulator = Simulator(SimulateConfig(tokens=1, faults=("429(retry-after=2,times=1)=1",)))
    ran = await go(simulator, [asked(i) for i in range(1000)], concurrency=1000)
    assert (ran.ok, ran.stop) == (1000, None)
    assert {result.attempts for result in ran.results} == {2}
    entries = sorted(simulator.ledger.entries, key=lambda entry: entry.received_at)
    ends = sorted(entry.ended_at for entry in entries if entry.status == 429 and entry.ended_at is not None)
    latest = [(end, end + 2.0) for end in ends]
    on_the_way = 0.25  # what had left before the news was read; a thousand sockets share a core with their server
    leaks = [e for e in entries if any(shut + on_the_way < e.received_at < opens for shut, opens in latest[::50])]
    assert leaks == []
    back = [entry.received_at for entry in entries if entry.attempt == 2]
    assert back[-1] - back[0] >= 0.3
    fullest = max(sum(start <= at < start + 0.05 for at in back) for start in back[::20])
    print(f"all back within {back[-1] - back[0]:.2f} s, at most {fullest} within 50 ms")  # noqa: T201
    assert fullest <= 500


async def test_an_adaptive_run_finds_a_wall_and_hardly_touches_it() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, ttft="lognormal(0.05,0.3)", at_once=48))
    ran = await go(simulator, [asked(i) for i in range(5000)], concurrency=Concurrency(time.monotonic()))
    assert ran.ok == 5000
    refused = simulator.ledger.statuses[429] / simulator.ledger.requests
    print(f"ends at {ran.progress.slots}, {refused:.2%} refused, {5000 / ran.seconds:.0f} rows/s")  # noqa: T201
    assert refused < 0.02
    assert 24 <= ran.progress.slots <= 48
    assert ran.progress.levels[-1][1] == ran.progress.slots


async def test_tokens_a_minute_are_estimated_and_corrected() -> None:
    simulator = Simulator(SimulateConfig(tokens=20, tpm=600, speedup=60))
    rows = [asked(i, max_tokens=20) for i in range(60)]
    ran = await go(simulator, rows, rates=Rates(tpm=600, minute=MINUTE), concurrency=20)
    assert ran.ok == 60
    assert simulator.ledger.statuses[429] <= 3
    assert ran.progress.held.get("tpm", 0.0) > ran.seconds / 2


async def test_an_endpoint_that_goes_away_is_waited_for_and_the_run_goes_on() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, ttft=0.02))
    base_url = await simulator.start()
    port = int(base_url.split(":")[2].split("/")[0])

    async def outage() -> None:
        await asyncio.sleep(0.5)
        await simulator.stop()
        await asyncio.sleep(2.5)
        await simulator.start(port=port)

    going_away = asyncio.create_task(outage())
    ran = await go(simulator, [asked(i) for i in range(400)], concurrency=4, outage=Outage(60), start=False)
    await going_away
    assert (ran.ok, ran.stop) == (400, None)
    assert ran.progress.held.get("outage", 0.0) > 1
    assert simulator.ledger.requests < 420, "while it was away hardly anybody asked"


async def test_an_endpoint_that_stays_away_stops_the_run_after_max_outage() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, ttft=0.02))
    await simulator.start()
    asyncio.get_running_loop().call_later(0.5, lambda: going.append(asyncio.ensure_future(simulator.stop())))
    going: list[asyncio.Future[None]] = []
    ran = await go(simulator, [asked(i) for i in range(400)], concurrency=4, outage=Outage(2.0), start=False)
    assert ran.stop is not None
    assert ran.stop.cause == "endpoint"
    assert "--max-outage 2" in ran.stop.message
    assert len(ran.results) == ran.ok < 400, "nothing is recorded as failed"


async def test_a_cap_on_the_cost_is_overrun_by_no_more_than_the_streams_in_flight() -> None:
    simulator = Simulator(SimulateConfig(tokens=10, gap=0.002))
    price = {"": Price(1e6, 1e6)}
    rows = [asked(i, stream_options={"include_usage": True}) for i in range(100)]
    ran = await go(simulator, rows, concurrency=8, budget=Budget(cost=300), prices=price)
    assert ran.stop is not None
    assert ran.stop.cause == "budget"
    assert "--max-cost 300" in ran.stop.message
    most = max(entry.billed_tokens for entry in simulator.ledger.entries)
    assert 300 <= simulator.ledger.billed_tokens <= 300 + 8 * most
    assert ran.progress.cost == pytest.approx(simulator.ledger.billed_tokens)


async def test_without_usages_a_cap_goes_by_estimates_and_events() -> None:
    simulator = Simulator(SimulateConfig(tokens=10))
    rows = [asked(i, max_tokens=10) for i in range(200)]
    ran = await go(simulator, rows, budget=Budget(cost=300), prices={"": Price(1e6, 1e6)})
    assert ran.stop is not None
    assert 100 <= simulator.ledger.billed_tokens <= 600


async def test_a_slow_retry_holds_up_no_fresh_row_and_few_failures_cost_no_time() -> None:
    simulator = Simulator(SimulateConfig(tokens=1, faults=("500(times=1)=0.5",)))
    ran = await go(simulator, [asked(i) for i in range(300)], concurrency=8)
    assert ran.ok == 300


async def test_what_binds_is_noted_while_it_binds() -> None:
    seen: list[str] = []

    def watch(runner: Runner) -> None:
        asyncio.get_running_loop().call_later(0.5, lambda: seen.append(runner._progress.binding))

    await go(Simulator(SimulateConfig(tokens=1)), [asked(i) for i in range(20)], rates=Rates(rpm=1200), meanwhile=watch)
    await go(
        Simulator(SimulateConfig(tokens=1, ttft=0.2)), [asked(i) for i in range(20)], concurrency=2, meanwhile=watch
    )
    assert seen == ["rpm", "slots"]
