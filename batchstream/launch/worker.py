"""A worker process: `run_shard` over the rows that its parent gives it, with its own loop and its own segment.

Signals are the parent's business (a terminal sends them to all processes of a job, systemd too). When the parent is
gone this process ends at once: what was answered has been written, and the lock must go with the last of the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchstream.engine.client import Target
from batchstream.engine.gauges import Gauges, quiet_gc
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Runner
from batchstream.errors import StorageError
from batchstream.files.journal import JournalDir
from batchstream.launch.channel import (
    Begin,
    Broken,
    Channel,
    Cut,
    Durable,
    Ended,
    Failed,
    Gate,
    Given,
    Halt,
    NoMoreRows,
    Order,
    Share,
    Told,
)
from batchstream.launch.ledger import SharedLedger
from batchstream.launch.loops import loop_factory
from batchstream.records import Failure, InvalidRow, Request, Result
from batchstream.shard import Control, Hooks, Stoppable, run_shard

TELL_S = 0.1

LOOK_S = 0.2
"""How often the thread that waits for rows looks whether anybody still wants them."""

_json = msgspec.json.Encoder().encode


def main() -> None:
    """`python -m batchstream.launch.worker FD`: FD is this end of the socket pair."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_work(end))


async def _work(end: socket.socket) -> None:
    channel = await Channel.over(end, Order)
    begin = await channel.read()
    if begin is None:
        return
    worker = Worker(channel, begin)
    try:
        channel.send(await worker.run())
    except StorageError as error:
        channel.send(Broken(str(error), storage=True))
    except Exception:
        channel.send(Broken(traceback.format_exc(), storage=False))
    await channel.close()


class Worker:
    def __init__(self, channel: Channel, begin: Begin) -> None:
        self._channel = channel
        self._begin = begin
        self._control = Reins(begin.held_until)
        self._progress = Progress(time.monotonic())
        self._rows: queue.SimpleQueue[list[Request | InvalidRow] | None] = queue.SimpleQueue()
        self._blocks: list[tuple[int, int, bytes]] = []
        self._stored: list[int] = []
        self._told: dict[str, Any] = {}

    async def run(self) -> Ended:
        begin, control = self._begin, self._control
        journal = JournalDir.join(Path(begin.out), durability=begin.job.durability, shard=begin.shard)
        hooks = Hooks(
            on_stored=self._stored.extend,
            on_durable=self._durable if begin.durable else None,
            on_failure=self._failed if begin.failures else None,
            on_gate=lambda lane, until: self._channel.send(Gate(lane, until)),
        )
        tasks = [asyncio.create_task(self._obey()), asyncio.create_task(self._report())]
        gauges = Gauges()
        try:
            with quiet_gc():
                gauges.start()
                stop = await run_shard(
                    begin.job, Target(begin.base_url, begin.key, begin.headers), journal, self._given(),
                    self._take_blocks, self._progress, control, hooks,
                    rates=begin.rates, slots=begin.slots, secrets=begin.secrets, worker=begin.worker,
                    spent=begin.spent,
                    ledger=None if begin.ledger_fd is None else SharedLedger(begin.ledger_fd, begin.place),
                )  # fmt: skip
        finally:
            gauges.stop()
            for task in tasks:
                task.cancel()
            self._tell()
        return Ended(stop, gauges.evidence(self._progress.traffic))

    async def _obey(self) -> None:
        while True:
            match await self._channel.read():
                case Given(requests, invalid, blocks):
                    self._blocks += blocks
                    self._rows.put([*requests, *invalid])
                case NoMoreRows():
                    self._rows.put(None)
                case Share() as share:
                    self._control.share(share)
                case Gate() as gate:
                    self._control.close_gate(gate)
                case Halt(stop):
                    self._control.stop(stop)
                    self._rows.put(None)  # its reader may be waiting
                case Cut():
                    self._control.abort()
                case None:
                    os._exit(1)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            self._tell()

    def _tell(self) -> None:
        counts = counts_of(self._progress)
        if counts["cost"] is not None:
            counts["cost"] -= self._begin.spent  # the parent adds it once
        ttft = list(self._progress.ttft)
        self._progress.ttft.clear()
        if self._stored or ttft or counts != self._told:
            self._told = counts
            self._channel.send(Told(counts, ttft, self._stored[:]))
            self._stored.clear()

    def _given(self) -> Iterator[list[Request | InvalidRow]]:
        while not self._control.ended:
            with contextlib.suppress(queue.Empty):
                if (rows := self._rows.get(timeout=LOOK_S)) is None:
                    return
                yield rows

    def _take_blocks(self) -> list[tuple[int, int, bytes]]:
        blocks, self._blocks = self._blocks, []
        return blocks

    def _durable(self, result: Result) -> None:
        self._channel.send(Durable(_json(result)))

    def _failed(self, request: Request, failure: Failure, attempt: int) -> None:
        self._channel.send(Failed(request.row, failure, attempt))


class Reins(Control):
    """A worker's share of the limits may change, and gates may close, before its runner is there and after."""

    def __init__(self, held_until: float) -> None:
        super().__init__()
        self._held_until = held_until
        self._reined: Runner | None = None
        self._share: Share | None = None
        self._gates: list[Gate] = []

    def bind(self, runner: Stoppable) -> None:
        super().bind(runner)
        if isinstance(runner, Runner):
            self._reined = runner
            runner.hold(self._held_until)
        if self._share is not None:
            self.share(self._share)
        for gate in self._gates:
            self.close_gate(gate)

    @property
    def ended(self) -> bool:
        """The runner takes in no more rows, for a reason of its own perhaps."""
        return self._reined is not None and self._reined.stopped

    def share(self, share: Share) -> None:
        self._share = share
        if self._reined is not None:
            self._reined.share(share.slots, share.fraction)

    def close_gate(self, gate: Gate) -> None:
        if self._reined is not None:
            self._reined.close_gate(gate.lane, gate.until)
        else:
            self._gates.append(gate)


OF_THE_PARENT = ("started", "total", "resumed", "ttft", "levels", "binding_since", "traffic", "slips")
"""What only the parent knows of the whole, or hears of otherwise."""


def counts_of(progress: Progress) -> dict[str, Any]:
    """The attributes of a progress as plain data."""
    values = {name: getattr(progress, name) for name in Progress.__slots__ if name not in OF_THE_PARENT}
    values["held"] = progress.held_until(time.monotonic())
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}


if __name__ == "__main__":
    main()
