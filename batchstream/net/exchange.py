"""One request under way, as both paths and the sweeper see it, and what a redirect becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import yarl

from batchstream.net.deadlines import Limits, overdue
from batchstream.records import Failure
from batchstream.wire.reception import Reception

GRACE_S = 0.1
"""How long the end of a message is awaited once the answer in it is complete."""


class Traffic:
    """What went over the wire so far. `reads`: reads from sockets that brought a part of a response; `events`: data
    events in them; `connections`: how many were opened for requests, `opening_s` the seconds that took together,
    `opening_max_s` the longest: requests waited for them, before `sent`."""

    __slots__ = ("connections", "events", "opening_max_s", "opening_s", "reads")

    def __init__(self) -> None:
        self.reads = 0
        self.events = 0
        self.connections = 0
        self.opening_s = 0.0
        self.opening_max_s = 0.0

    def opened(self, seconds: float) -> None:
        self.connections += 1
        self.opening_s += seconds
        self.opening_max_s = max(self.opening_max_s, seconds)


class Exchange:
    """`depart` is called when everything is ready, just before the request is written (what it raises keeps the request
    from leaving); `sent`: when writing began, None until then. `settled`: the fast path's future, `task`: the public
    path's task; one of them is there for the sweeper to end. `broken`: why no response came, `garbage`: what came
    instead of HTTP, `unspoken`: or HTTP that the fast path does not speak; `expired`: which limit was passed; `reads`:
    how many brought a part of the response."""

    __slots__ = (
        "broken", "depart", "expired", "garbage", "limits", "reads", "reception", "redirect", "sent", "settled", "task",
        "unspoken",
    )  # fmt: skip

    def __init__(self, reception: Reception, limits: Limits, depart: Callable[[], object] | None = None) -> None:
        self.reception = reception
        self.depart = depart
        self.limits = limits
        self.reads = 0
        self.sent: float | None = None
        self.broken: str | None = None
        self.garbage: str | None = None
        self.unspoken = False
        self.redirect: Failure | None = None
        self.expired: str | None = None
        self.settled: asyncio.Future[None] | None = None
        self.task: asyncio.Task[Any] | None = None

    def sweep(self, now: float) -> None:
        """End the exchange if one of its limits is passed, or if only the end of the message is missing."""
        reception = self.reception
        if self.sent is None or self.expired is not None:
            return
        if reception.final:
            if reception.ended_at is not None and now - reception.ended_at > GRACE_S:
                self._release()
            return
        error_since = reception.headers_at if reception.status not in (None, 200) else None
        self.expired = overdue(self.limits, now, self.sent, reception.last_output_at, error_since)
        if self.expired is not None:
            if self.settled is None and self.task is not None:
                self.task.cancel()
            self._release()

    def _release(self) -> None:
        if self.settled is not None and not self.settled.done():
            self.settled.set_result(None)


def redirect(status: int, headers: Sequence[tuple[str, str]]) -> Failure | None:
    """The failure that a redirect is, or None for every other status."""
    if not 300 <= status < 400 or status == 304:
        return None
    location = next((value for name, value in headers if name.lower() == "location"), "")
    try:
        target = yarl.URL(location).host or "another path"
    except ValueError:
        target = "a malformed address"
    why = "redirects are refused, they would carry the key there: correct --base-url"
    return Failure("redirect", f"HTTP {status} redirects to {target}; {why}", retryable=False, status=status)
