"""Rows through a runner against a simulated endpoint in the same process: no journal, the endpoint's ledger at hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from batchstream.endpoints.simulate import Simulator
from batchstream.engine.client import Client, Target
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Runner, Stop
from batchstream.net.deadlines import Limits
from batchstream.net.transport import Transport
from batchstream.policy.breaker import Breaker
from batchstream.policy.budget import Budget
from batchstream.policy.concurrency import Concurrency
from batchstream.policy.limits import Lanes, Rates
from batchstream.policy.retry import RetryPolicy
from batchstream.records import InvalidRow, Request, Result

NONE = Rates()


class Notebook:
    """A sink (engine.runner.Sink) that keeps the results."""

    def __init__(self) -> None:
        self.results: list[Result] = []

    async def room(self) -> None: ...
    def admit(self, request: Request) -> bool:
        return True

    def gave_up(self, request: Request, *, maybe_billed: bool) -> None: ...

    def done(self, row: Request | InvalidRow, result: Result) -> None:
        self.results.append(result)


def asked(row: int, model: str = "sim", **more: Any) -> Request:
    messages = [{"role": "user", "content": f"question {row}"}]
    return Request(row, str(row), "chat", {"model": model, "messages": messages, "stream": True, **more}, row)


async def in_one_batch(rows: list[Request]) -> AsyncIterator[list[Request | InvalidRow]]:
    yield list(rows)


class Ran:
    """How it went: the sink's results, the run's counters, why it stopped."""

    def __init__(self, results: list[Result], progress: Progress, stop: Stop | None, seconds: float) -> None:
        self.results, self.progress, self.stop, self.seconds = results, progress, stop, seconds

    @property
    def ok(self) -> int:
        return sum(result.status == "ok" for result in self.results)


async def go(
    simulator: Simulator,
    rows: list[Request],
    *,
    rates: Rates = NONE,
    concurrency: int | Concurrency = 8,
    meanwhile: Callable[[Runner], object] = lambda _: None,
    patience: float = 120,
    start: bool = True,
    **more: Any,
) -> Ran:
    """Run `rows` to their end (or stop); `meanwhile` is called once the runner runs, `more` goes to the runner."""
    notebook, progress = Notebook(), Progress(time.monotonic())
    base_url = await simulator.start() if start else simulator.base_url
    async with Transport() as transport:
        options: dict[str, Any] = {"policy": RetryPolicy(), "breaker": Breaker(), "budget": Budget(), **more}
        client = Client(transport, Target(base_url), Limits())
        runner = Runner(client, notebook, progress, concurrency=concurrency, lanes=Lanes(rates), **options)
        running = asyncio.ensure_future(runner.run(in_one_batch(rows), drain_timeout=1))
        await asyncio.sleep(0)
        meanwhile(runner)
        stop = await asyncio.wait_for(running, patience)
    await simulator.stop()
    return Ran(notebook.results, progress, stop, time.monotonic() - progress.started)
