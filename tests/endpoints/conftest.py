"""A simulator for each test, and a client that hides nothing: status, headers, raw body, how it ended."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from batchstream.endpoints.simulate import Simulator, make_config, running


@dataclass
class Answer:
    """`raw` is everything that came; `end` is eof, reset, timeout or complete (by HTTP's own rules)."""

    raw: bytes
    end: str

    @property
    def head(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[0]

    @property
    def status(self) -> int:
        return int(self.head.split(b" ")[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def body(self) -> bytes:
        """The body without its chunks' frames, as far as it came."""
        rest = self.raw.partition(b"\r\n\r\n")[2]
        if self.headers.get("transfer-encoding") != "chunked":
            return rest
        found = b""
        while b"\r\n" in rest:
            size_text, _, rest = rest.partition(b"\r\n")
            size = int(size_text, 16)
            if size == 0:
                break
            found += rest[:size]
            rest = rest[size + 2 :]
        return found

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def payloads(self) -> list[Any]:
        """The JSON of each event, `[DONE]` as that text."""
        texts = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]


class Client:
    """One connection."""

    def __init__(self, base_url: str, timeout: float = 10.0) -> None:
        parts = urlsplit(base_url)
        self.base = parts.path
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=timeout)

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        fields = {"host": "sim", "content-length": str(len(data)), **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    def read(self, wanted: Callable[[bytes], bool] | None = None) -> Answer:
        """Until HTTP says the response is complete, the connection ends, or `wanted` is true of what came."""
        raw = b""
        while True:
            if wanted is not None and wanted(raw):
                return Answer(raw, "wanted")
            if wanted is None and _complete(raw):
                return Answer(raw, "complete")
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return Answer(raw, "reset")
            except TimeoutError:
                return Answer(raw, "timeout")
            if not data:
                return Answer(raw, "eof")
            raw += data

    def close(self) -> None:
        self.socket.close()


def _complete(raw: bytes) -> bool:
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found:
        return False
    if b"transfer-encoding: chunked" in head:
        return rest.endswith(b"0\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    return len(rest) >= length


class Sim:
    """A running simulator and short ways to ask it."""

    def __init__(self, simulator: Simulator, stack: ExitStack) -> None:
        self.simulator = simulator
        self.base_url = simulator.base_url
        self._stack = stack

    def client(self, timeout: float = 10.0) -> Client:
        client = Client(self.base_url, timeout)
        self._stack.callback(client.close)
        return client

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 10.0
    ) -> Answer:
        client = self.client(timeout)
        client.send(method, path, body, headers)
        return client.read()

    def chat(
        self, text: str = "hi", headers: dict[str, str] | None = None, timeout: float = 10.0, **parameters: Any
    ) -> Answer:
        """A streamed chat completion, unless told otherwise."""
        body = {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True, **parameters}
        return self.request("POST", "/v1/chat/completions", body, headers, timeout)

    def ledger(self) -> list[dict[str, Any]]:
        """Over HTTP, as everybody else reads it."""
        return [json.loads(line) for line in self.request("GET", "/sim/ledger").body.splitlines()]


@pytest.fixture
def simulated() -> Iterator[Callable[..., Sim]]:
    """`simulated(setting=value, …)` gives a running `Sim`; all are stopped after the test."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Sim:
            return Sim(stack.enter_context(running(make_config(settings))), stack)

        yield start
