"""What was asked and what it would have cost: the other side's truth, for tests and for curious users."""

from __future__ import annotations

from collections import Counter, deque

import msgspec


class Entry(msgspec.Struct):
    """One request. Instants are monotonic seconds of the server's process (on Linux comparable with
    other processes of the same machine), stamped just before the write that carries the bytes.

    `ordinal` and `attempt` count from 1; `attempt` counts requests with the same `digest` (path and
    body without `stream` and `stream_options`). `events` are steps of generated output.
    `completion_tokens` is what was generated until the end (or until the client left), `billed_tokens`
    that plus the prompt; a request that was refused bills nothing. `status` 0: the connection was
    reset before an answer. `finished`: the whole answer went out.
    """

    ordinal: int
    received_at: float
    received_wall: float
    path: str
    model: str | None
    stream: bool
    digest: str
    attempt: int
    mark: str | None = None
    key_ok: bool = True
    fault: str | None = None
    status: int = 0
    events: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    billed_tokens: int = 0
    head_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    finished: bool = False
    closed_early: bool = False


class Ledger:
    """`entries`: the latest `limit` requests (all when None), in order of arrival; `totals` count all."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reset()

    def reset(self) -> None:
        self.entries: deque[Entry] = deque(maxlen=self.limit)
        self.statuses: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.requests = self.events = self.billed_tokens = self.completion_tokens = self.closed_early = 0
        # About 100 bytes for each distinct body: the price of a fault decision that does not depend on order.
        self._attempts: Counter[int] = Counter()
        self._admitted: Counter[int] = Counter()

    def attempt(self, digest: int) -> int:
        """Count one more request for the body with this digest, and give its number."""
        self._attempts[digest] += 1
        return self._attempts[digest]

    def admit(self, digest: int) -> int:
        """Count one more request that passed key, validation and rate limits: the number faults go by,
        or the rate windows (wall clock) would decide which attempt meets which fault."""
        self._admitted[digest] += 1
        return self._admitted[digest]

    def add(self, entry: Entry) -> None:
        self.requests += 1
        self.entries.append(entry)

    def close(self, entry: Entry) -> None:
        """The exchange is over: its figures join the totals."""
        self.statuses[entry.status] += 1
        if entry.fault is not None:
            self.faults[entry.fault] += 1
        self.events += entry.events
        self.completion_tokens += entry.completion_tokens
        self.billed_tokens += entry.billed_tokens
        self.closed_early += entry.closed_early

    def to_jsonl(self) -> bytes:
        encoder = msgspec.json.Encoder()
        return b"".join(encoder.encode(entry) + b"\n" for entry in self.entries)

    def totals(self) -> dict[str, object]:
        return {
            "requests": self.requests,
            "bodies": len(self._attempts),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "faults": dict(sorted(self.faults.items())),
            "events": self.events,
            "completion_tokens": self.completion_tokens,
            "billed_tokens": self.billed_tokens,
            "closed_early": self.closed_early,
        }
