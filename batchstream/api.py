"""The Python API beside `run`: results as they end, the deltas of one request, stored results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchstream.connect import opened, plan
from batchstream.engine.client import Client
from batchstream.engine.course import Course
from batchstream.engine.outcome import result_of
from batchstream.engine.runner import Stop
from batchstream.errors import BudgetError, StoppedError
from batchstream.files import results
from batchstream.job import Job
from batchstream.launch.here import run_async
from batchstream.policy.retry import RetryPolicy
from batchstream.records import Attempt, Delta, Request, Result
from batchstream.shard import Control, Hooks, limits_of, transport_for
from batchstream.wire.body import build_body


async def stream_results(job: Job) -> AsyncIterator[Result]:
    """Run `job` and yield each result as soon as it is on stable storage, in the order in which they end.

    Rows that have a result from an earlier run are not repeated (`read_results` has them all afterwards). Leaving the
    loop early stops the run; what is in flight is cut and stays pending. Raises as `run` does, and, when the run
    stopped before its rows did, `StoppedError` (key, account, endpoint) or `BudgetError` (a limit) after the results.
    """
    queue: asyncio.Queue[Result | None] = asyncio.Queue()
    control = Control()
    running = asyncio.create_task(run_async(job, hooks=Hooks(on_durable=queue.put_nowait), control=control))
    running.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (result := await queue.get()) is not None:
            yield result
        report = await running
        if report.stop is not None:
            raise (BudgetError if report.stop.cause == "budget" else StoppedError)(report.message)
    finally:
        if not running.done():
            control.stop(Stop("signal", "the caller left"))
            control.abort()
            with contextlib.suppress(Exception):
                await running


async def stream(prompt: str | list[dict[str, Any]], **options: Any) -> AsyncIterator[Delta | Result]:
    """Ask one prompt (text, or a list of messages) and yield its deltas as they come, then its `Result`.

    `options` are those of `Job` (provider, model, param, …). A failed attempt is tried again only while nothing of the
    answer has been yielded: pieces of two attempts are never mixed. Nothing is stored. Raises `UsageError` and
    `StoppedError` for what keeps the request from being sent; a request that fails ends in a failed `Result`.
    """
    job = Job(input="-", **options)
    chosen = plan(job)
    common: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    if job.system is not None:
        common["system"] = job.system
    if chosen.model is not None:
        common["model"] = chosen.model
    body = build_body(chosen.api, {**common, **job.param}, include_usage=job.include_usage)
    request = Request(0, "0", chosen.api, body, digest=0)
    queue: asyncio.Queue[Delta | Result | None] = asyncio.Queue()
    async with opened(job, chosen) as target, transport_for(job) as transport:
        client = Client(transport, target, limits_of(job))
        asking = asyncio.create_task(_ask(client, request, RetryPolicy(job.max_attempts, job.max_wait), queue))
        asking.add_done_callback(lambda _: queue.put_nowait(None))  # a bug in there must not leave us waiting
        try:
            while (item := await queue.get()) is not None:
                yield item
                if isinstance(item, Result):
                    return
            await asking
        finally:
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking


async def _ask(
    client: Client, request: Request, policy: RetryPolicy, queue: asyncio.Queue[Delta | Result | None]
) -> None:
    spoken = False

    def say(delta: Delta) -> None:
        nonlocal spoken
        spoken = True
        queue.put_nowait(delta)

    async def send(course: Course) -> Attempt:
        attempt = await client.attempt(course.request, time.monotonic(), say)
        failure = attempt.failure
        if spoken and failure is not None and failure.retryable:
            attempt.failure = msgspec.structs.replace(failure, retryable=False)
        return attempt

    async def wait(_: Course, seconds: float) -> None:
        await asyncio.sleep(seconds)

    epoch = time.time() - time.monotonic()
    course = Course(request, policy, send, wait)
    attempt = await course.run()
    queue.put_nowait(result_of(request, attempt, course.retries, epoch))


def read_results(out: str | Path) -> Iterator[Result]:
    """The results of a job by its output path, in input order: from a finished job as well as from one that runs or
    died (then those stored so far). Does not disturb a running job. Raises `InputError`, `DamagedError`."""
    decode = msgspec.json.Decoder(Result).decode
    return (decode(result) for result in results.read_results(Path(out)))
