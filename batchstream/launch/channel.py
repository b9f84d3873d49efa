"""What a job's parent process and its workers say to each other, and how: framed MessagePack over a socket pair.

The parent gives rows and orders, a worker tells what became of them. Nothing of it is ever stored, and the key goes
only this way: a command line or an environment could be read by others.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import msgspec

from batchstream.engine.client import Target
from batchstream.engine.runner import Stop
from batchstream.figures.evidence import Evidence
from batchstream.files.journal import JournalDir
from batchstream.job import Job
from batchstream.policy.limits import Rates
from batchstream.policy.sharding import Shard
from batchstream.records import Failure, InvalidRow, Request


class Begin(msgspec.Struct, tag=True):
    """The first word to a worker: the job, the endpoint and the limits of the whole job (`Share` says how much of them
    is this worker's).

    `spent` is what earlier runs have cost; `ledger_fd`, `place`: the account of budgets, and whose line in it;
    `held_until`: instant of the monotonic clock before which its share of the rates is another's, who has died.
    `durable`, `failures`: whether the parent wants to hear of each stored result and of each failed attempt."""

    job: Job
    base_url: str
    key: str | None
    headers: dict[str, str]
    out: str
    shard: Shard | None
    worker: int
    slots: int | None
    rates: Rates
    secrets: tuple[str, ...]
    spent: float = 0.0
    ledger_fd: int | None = None
    place: int = 0
    held_until: float = 0.0
    durable: bool = False
    failures: bool = False

    @classmethod
    def of(
        cls,
        job: Job,
        target: Target,
        journal: JournalDir,
        rates: Rates,
        slots: int | None,
        secrets: tuple[str, ...],
        spent: float,
    ) -> Begin:
        """For any worker of the job; `Pool` fills in what is one worker's own."""
        return cls(
            job,
            target.base_url,
            target.key,
            target.headers,
            str(journal.out),
            journal.shard,
            0,
            slots,
            rates,
            secrets,
            spent,
        )

    def __repr__(self) -> str:
        return f"Begin(worker {self.worker})"


class Given(msgspec.Struct, tag=True):
    """Rows to serve; `blocks`: hashes of input blocks that have been read, for the journal (index, rows, hash)."""

    requests: list[Request]
    invalid: list[InvalidRow]
    blocks: list[tuple[int, int, bytes]]


class NoMoreRows(msgspec.Struct, tag=True):
    """Serve what you have, then end."""


class Share(msgspec.Struct, tag=True):
    """From now on: so many requests at once (at most, where their number is being found out), and this fraction of each
    lane's rates."""

    slots: int
    fraction: float


class Gate(msgspec.Struct, tag=True):
    """Both ways: a 429 has closed a lane until this instant of the monotonic clock, one and the same for all."""

    lane: str
    until: float


class Halt(msgspec.Struct, tag=True):
    """Admit nothing more, drain, end."""

    stop: Stop


class Cut(msgspec.Struct, tag=True):
    """End now."""


Order = Begin | Given | NoMoreRows | Share | Gate | Halt | Cut


class Told(msgspec.Struct, tag=True):
    """What a worker's progress has come to (`counts`, by attribute; all from its start), TTFTs since the last time, and
    the rows whose results became durable since then."""

    counts: dict[str, Any]
    ttft: list[float]
    stored: list[int]


class Durable(msgspec.Struct, tag=True):
    """One stored result, as its JSON."""

    result: bytes


class Failed(msgspec.Struct, tag=True):
    """One attempt at a row failed."""

    row: int
    failure: Failure
    attempt: int


class Ended(msgspec.Struct, tag=True):
    """The last word of a worker."""

    stop: Stop | None
    evidence: Evidence


class Broken(msgspec.Struct, tag=True):
    """The last word of a worker that cannot go on: the storage's fault, or (with a traceback) ours."""

    message: str
    storage: bool


News = Told | Gate | Durable | Failed | Ended | Broken

_encode = msgspec.msgpack.Encoder().encode
_LENGTH = 4


class Channel:
    """One end of the socket pair; `read` gives what the other end says, None once it is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kinds: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = msgspec.msgpack.Decoder(kinds).decode

    @classmethod
    async def over(cls, end: socket.socket, kinds: Any) -> Channel:
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer, kinds)

    def send(self, message: Order | News) -> None:
        """Never waits: who gives rows gives no more than are wanted. To one who is gone it is lost; `read` tells."""
        if not self._writer.is_closing():
            data = _encode(message)
            self._writer.write(len(data).to_bytes(_LENGTH, "big") + data)

    async def read(self) -> Any:
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH), "big")
            return self._decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def close(self) -> None:
        """Everything said has gone out, or the other end is gone."""
        with contextlib.suppress(ConnectionError):  # it had ended before: `read` has told
            await self._writer.drain()
        self._writer.close()
