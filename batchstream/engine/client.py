"""One attempt at one request: encode, exchange, and say what came with the instants at which it came."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import yarl

from batchstream.net.deadlines import Limits
from batchstream.net.transport import Transport
from batchstream.records import Api, Attempt, Delta, Request, Timing
from batchstream.wire.reception import Reception

PATHS: dict[Api, str] = {
    "chat": "chat/completions",
    "completions": "completions",
    "responses": "responses",
    "messages": "messages",
}
ANTHROPIC_VERSION = "2023-06-01"

_encode = msgspec.json.Encoder().encode


class Target(msgspec.Struct, frozen=True):
    """Where requests go. `key` is secret: it is in no repr and leaves only in a request header."""

    base_url: str
    key: str | None = None
    headers: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Target({self.base_url!r})"

    def url(self, api: Api) -> yarl.URL:
        return yarl.URL(f"{self.base_url.rstrip('/')}/{PATHS[api]}")

    def request_headers(self, api: Api) -> dict[str, str]:
        """All headers of a request to `api`; the user's own win over ours."""
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "batchstream",
        }
        if self.key is not None and api == "messages":
            headers["x-api-key"] = self.key
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        if api == "messages":
            headers["anthropic-version"] = ANTHROPIC_VERSION
        taken = {name.lower() for name in self.headers}
        return {**{k: v for k, v in headers.items() if k.lower() not in taken}, **self.headers}


class Client:
    """Attempts requests against one target over one transport."""

    def __init__(self, transport: Transport, target: Target, limits: Limits) -> None:
        self._transport = transport
        self._limits = limits
        self._routes = {api: (target.url(api), target.request_headers(api)) for api in PATHS}

    async def attempt(
        self,
        request: Request,
        due: float,
        on_delta: Callable[[Delta], None] | None = None,
        depart: Callable[[], object] | None = None,
    ) -> Attempt:
        """Send `request` once. Never raises for what the network or the server does; `depart` is called when it is
        about to leave (`net.transport`), and what that raises is raised here."""
        url, headers = self._routes[request.api]
        n = request.body.get("n")
        reception = Reception(request.api, n=n if isinstance(n, int) else None, on_delta=on_delta)
        body = _encode(request.body)
        sent, failure = await self._transport.exchange(url, headers, body, reception, self._limits, depart)
        if failure is None:
            completion, failure = reception.outcome()
        else:
            completion, _ = reception.outcome() if reception.status is not None else (None, None)
        timing = Timing(
            due=due,
            sent=sent,
            headers=reception.headers_at,
            first_event=reception.first_event_at,
            first_output=reception.first_output_at,
            first_visible=reception.first_visible_at,
            last_output=reception.last_output_at,
            ended=reception.ended_at or time.monotonic(),
            chunks=reception.chunks,
            gap_max=reception.gap_max,
        )
        return Attempt(timing, completion, failure, reception.request_id, reception.rates)
