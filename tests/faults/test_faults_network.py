"""Everything a network can do to a request, wherever it can: {fault} x {place} through transport and runner.

Each cell ends in the documented kind, in bounded time and memory, after the right number of attempts, on both ways
through aiohttp. `MATRIX` is the whole of it; a cell that is missing there has no meaning (a redirect in mid-body).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from scripted import Wire, serving

from batchstream.engine.client import Client, Target
from batchstream.engine.progress import Progress
from batchstream.engine.runner import Runner
from batchstream.net.deadlines import Limits
from batchstream.net.transport import Transport
from batchstream.policy.breaker import Breaker, BreakerSettings
from batchstream.policy.budget import Budget
from batchstream.policy.limits import Lanes, Rates
from batchstream.policy.retry import RetryPolicy
from batchstream.records import InvalidRow, Request, Result

LIMITS = Limits(connect=1.0, first_output=0.6, idle=0.6)
ATTEMPTS = 2
PATIENCE_S = 60
"""For one cell on a busy machine: no cell may hang, none is timed."""


@pytest.fixture(params=["fast", "public"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- what a server says


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def delta(text: str, finish: str | None = None) -> bytes:
    event = {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    return chunk(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")


REST = {
    "connect": HEAD + delta("Hel") + delta("lö", "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "after request": HEAD + delta("Hel") + delta("lö", "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "after headers": delta("Hel") + delta("lö", "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "between events": delta("lö", "stop") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "after finish_reason": chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
}
PLACES = tuple(REST)
BEFORE = {
    "connect": (),
    "after request": (),
    "after headers": (HEAD,),
    "between events": (HEAD, delta("Hel")),
    "after finish_reason": (HEAD, delta("Hel"), delta("lö", "stop")),
}

Fault = Callable[[Wire, str], Awaitable[None]]


async def rst(wire: Wire, place: str) -> None:
    wire.reset()


async def fin(wire: Wire, place: str) -> None:
    return


async def fin_in_an_event(wire: Wire, place: str) -> None:
    half = delta("lost")[:30] if place not in ("connect", "after request") else HEAD[:40]
    await wire.send(half)


async def fin_in_a_character(wire: Wire, place: str) -> None:
    if place in ("connect", "after request"):
        await wire.send(HEAD)
    await wire.send(b'ff\r\ndata: {"choices":[{"delta":{"content":"' + "ö".encode()[:1])


async def stall(wire: Wire, place: str) -> None:
    await asyncio.sleep(3600)


async def byte_at_a_time(wire: Wire, place: str) -> None:
    if place == "connect":
        await wire.request()
    await wire.send(*(REST[place][i : i + 1] for i in range(len(REST[place]))))
    await wire.request()


async def garbage(wire: Wire, place: str) -> None:
    raw = b"\x00\xff\x16\x03garbage\r\n\r\n"
    await wire.send(raw if place in ("connect", "after request") else chunk(b'data: {"choices": [{]]\n\n'))
    await asyncio.sleep(3600)


async def bad_gateway(wire: Wire, place: str) -> None:
    await wire.send(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 11\r\nConnection: close\r\n\r\n<h1>502</h1")
    await wire.request()


async def web_page(wire: Wire, place: str) -> None:
    await wire.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 25\r\n\r\n<html>Please log in</html>"[:-1]
    )
    await wire.request()


async def redirect(wire: Wire, place: str) -> None:
    await wire.send(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/stolen\r\nContent-Length: 0\r\n\r\n")
    await wire.request()


async def comments(wire: Wire, place: str) -> None:
    if place in ("connect", "after request"):
        await wire.send(HEAD)
    while True:
        await wire.send(chunk(b": keep-alive\n\n"))
        await asyncio.sleep(0.02)


async def short_of_its_length(wire: Wire, place: str) -> None:
    if place == "connect":
        await wire.request()
    await wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5000\r\n\r\n")
    event = b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\n'
    await wire.send(event)


async def longer_than_its_length(wire: Wire, place: str) -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event)
    await wire.send(head + event + event + b"data: [DONE]\n\n")
    await wire.request()


async def broken_chunk(wire: Wire, place: str) -> None:
    await asyncio.sleep(0.05)  # with the head in one segment aiohttp's own parser would refuse all of it
    await wire.send(b"zz\r\nno chunk\r\n")
    await asyncio.sleep(0.3)


class Cell(NamedTuple):
    kind: str
    attempts: int


OK = Cell("ok", 1)


def tried(kind: str) -> Cell:
    return Cell(kind, ATTEMPTS)


EARLY = ("connect", "after request")
MATRIX: dict[str, tuple[Fault, dict[str, Cell]]] = {
    "RST": (rst, {**dict.fromkeys(EARLY, tried("disconnected")), "after headers": tried("empty_stream"),
                  "between events": tried("truncated"), "after finish_reason": OK}),
    "FIN": (fin, {**dict.fromkeys(EARLY, tried("disconnected")), "after headers": tried("empty_stream"),
                  "between events": tried("truncated"), "after finish_reason": OK}),
    "FIN in mid-event": (fin_in_an_event, {**dict.fromkeys(EARLY, tried("disconnected")),
                  "after headers": tried("empty_stream"), "between events": tried("truncated"),
                  "after finish_reason": OK}),
    "FIN in mid-UTF-8": (fin_in_a_character, {**dict.fromkeys(PLACES, tried("empty_stream")),
                  "between events": tried("truncated"), "after finish_reason": OK}),
    "stall": (stall, {**dict.fromkeys(PLACES, tried("timeout")), "after finish_reason": OK}),
    "one byte at a time": (byte_at_a_time, dict.fromkeys(PLACES, OK)),
    "garbage": (garbage, {**dict.fromkeys(PLACES, tried("decode")), "after finish_reason": tried("decode")}),
    "502 HTML": (bad_gateway, dict.fromkeys(EARLY, tried("server"))),
    "200 HTML": (web_page, dict.fromkeys(EARLY, Cell("not_sse", 1))),
    "redirect": (redirect, dict.fromkeys(EARLY, Cell("redirect", 1))),
    "endless comments": (comments, {**dict.fromkeys(PLACES, tried("timeout")), "after finish_reason": OK}),
    "Content-Length, too long": (short_of_its_length, dict.fromkeys(EARLY, tried("truncated"))),
    "Content-Length, too short": (longer_than_its_length, {"after request": tried("truncated")}),
    "broken chunking": (broken_chunk, {"after headers": tried("empty_stream"), "between events": tried("truncated"),
                        "after finish_reason": OK}),
}  # fmt: skip


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


async def ask(
    base: str, path: str, *, limits: Limits = LIMITS, prompt: str = "hi", ca_file: str | None = None
) -> Result:
    """One row through client and runner with the policy of a run; its result."""
    notebook = Notebook()
    request = Request(0, "r", "chat", {"messages": [{"role": "user", "content": prompt}], "stream": True}, 0)

    async def rows():
        yield [request]

    async with Transport(connect_timeout=limits.connect, path=path, ca_file=ca_file) as transport:  # type: ignore[arg-type]
        runner = Runner(
            Client(transport, Target(f"{base}/v1", "the-secret-key-of-this-test"), limits), notebook, Progress(0.0),
            concurrency=1, policy=RetryPolicy(ATTEMPTS), lanes=Lanes(Rates()),
            breaker=Breaker(BreakerSettings(enabled=False)), budget=Budget(),
        )  # fmt: skip
        assert await asyncio.wait_for(runner.run(rows(), drain_timeout=1), PATIENCE_S) is None
    (result,) = notebook.results
    assert result.attempts == len(result.retries) + 1
    return result


def kind_of(result: Result) -> str:
    return "ok" if result.error is None else result.error.kind


async def cell(fault: Fault, place: str, path: str) -> tuple[Result, int]:
    """The result, and how many requests (or connections before one) the server saw."""
    seen = 0

    async def handler(wire: Wire) -> None:
        nonlocal seen
        seen += 1
        if place != "connect" or fault in (
            bad_gateway,
            web_page,
            redirect,
            comments,
            fin_in_a_character,
            fin_in_an_event,
        ):
            # (An answer to a request that nobody has read needs one: these are read and answered at once.)
            await wire.request()
        await wire.send(*BEFORE[place])
        await asyncio.sleep(0.05)  # a reset overtakes what is still unread
        await fault(wire, place)

    async with serving(handler) as base:
        return await ask(base, path), seen


@pytest.mark.parametrize("name", MATRIX)
async def test_a_fault_ends_as_documented_wherever_it_strikes(name: str, path: str) -> None:
    fault, cells = MATRIX[name]
    found = await asyncio.gather(*(cell(fault, place, path) for place in cells))
    told = {place: Cell(kind_of(result), result.attempts) for place, (result, _) in zip(cells, found, strict=True)}
    if path == "public" and name == "broken chunking":
        # aiohttp closes the connection without telling the reader of the body: there the limits have to.
        cells = {place: want if want is OK else tried("timeout") for place, want in cells.items()}
    if path == "public" and name == "Content-Length, too short":
        cells = dict.fromkeys(cells, tried("decode"))  # aiohttp takes what is too much for a broken next answer
    assert told == cells
    for place, (result, seen) in zip(cells, found, strict=True):
        assert seen == result.attempts, f"{place}: the server saw {seen} requests, the row was told {result.attempts}"
        if place == "between events" and result.error is not None:
            assert result.text == "Hel", "the partial text of the last attempt is kept, attempts are not joined"
        if kind_of(result) == "ok":
            assert result.text == "Hellö"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_carries_neither_key_nor_prompt_anywhere(status: int, path: str) -> None:
    stolen = 0

    async def thief(wire: Wire) -> None:
        nonlocal stolen
        stolen += bool(await wire.request())
        await wire.send(REST["connect"])

    async with serving(thief) as elsewhere:

        async def handler(wire: Wire) -> None:
            await wire.request()
            await wire.send(
                b"HTTP/1.1 %d Go\r\nLocation: %b/v1/chat/completions\r\nContent-Length: 0\r\n\r\n"
                % (status, elsewhere.encode())
            )
            await wire.request()

        async with serving(handler) as base:
            result = await ask(base, path)
    assert (kind_of(result), result.attempts, stolen) == ("redirect", 1, 0)


# --- faults that have only one place


async def test_nobody_listening(path: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening: refused for as long as the test lasts
        result = await ask(f"http://127.0.0.1:{held.getsockname()[1]}", path)
    assert (kind_of(result), result.attempts) == ("connect", ATTEMPTS)


async def test_a_name_that_nobody_knows(path: str) -> None:
    result = await ask("http://no-such-host.invalid", path)
    assert (kind_of(result), result.attempts) == ("connect", ATTEMPTS)


async def test_a_black_hole_that_never_answers_a_connect(path: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(0)
        crowd = []
        for _ in range(4):  # fills the backlog: the kernel drops every further SYN
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(held.getsockname())
            crowd.append(filler)
        await asyncio.sleep(0.05)
        result = await ask(f"http://127.0.0.1:{held.getsockname()[1]}", path)
        for filler in crowd:
            filler.close()
    assert (kind_of(result), result.attempts) == ("connect", ATTEMPTS)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, which a run does not show
async def test_a_half_open_connection_that_takes_no_bytes(path: str) -> None:
    """The other side is gone and did not say so: the request fills the window and no more."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        held.bind(("127.0.0.1", 0))
        held.listen(8)
        base = f"http://127.0.0.1:{held.getsockname()[1]}"
        result = await ask(base, path, prompt="x" * (16 << 20))
    assert (kind_of(result), result.attempts) == ("timeout", ATTEMPTS)


def set_loopback(*, up: bool) -> None:
    """In a network namespace of our own: what is sent while it is down reaches nobody, and nobody is told."""
    flags = struct.pack("16sh14x", b"lo", 1 if up else 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS


async def ask_a_peer_that_vanishes(place: str, path: str) -> Result:
    async def handler(wire: Wire) -> None:
        await wire.request()
        await wire.send(*BEFORE[place])
        await asyncio.sleep(0.1)
        set_loopback(up=False)
        await asyncio.sleep(3600)

    set_loopback(up=True)
    async with serving(handler) as base:
        return await ask(base, path)


VANISH = """
import asyncio, sys
import test_faults_network as t
result = asyncio.run(t.ask_a_peer_that_vanishes(sys.argv[1], sys.argv[2]))
print(*[retry.kind for retry in result.retries], t.kind_of(result))
"""


@pytest.mark.parametrize(
    ("place", "kinds"),
    [
        ("after request", ["timeout", "connect"]),
        ("after headers", ["timeout", "connect"]),
        ("between events", ["timeout", "connect"]),
        ("after finish_reason", ["ok"]),
    ],
)
def test_a_half_open_connection_whose_peer_has_vanished(place: str, kinds: list[str], path: str) -> None:
    """Neither FIN nor RST, ever: the network itself is gone. The second attempt finds no way there."""
    alone = ["unshare", "--net", "--map-root-user"]
    if not (os.environ.get("CI") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0):
        pytest.skip("this machine lets nobody have a network namespace of their own")
    asked = subprocess.run(
        [*alone, sys.executable, "-c", VANISH, place, path],
        capture_output=True, text=True, env=environment_of_a_child(), timeout=120, check=False,
    )  # fmt: skip
    assert asked.stdout.split() == kinds, asked.stderr


async def test_a_storm_of_429_is_waited_out_without_eating_attempts(path: str) -> None:
    seen = 0

    async def handler(wire: Wire) -> None:
        nonlocal seen
        while await wire.request():
            seen += 1
            if seen <= 6:
                await wire.send(b"HTTP/1.1 429 No\r\nretry-after-ms: 30\r\nContent-Length: 0\r\n\r\n")
            else:
                await wire.send(REST["connect"])

    async with serving(handler) as base:
        result = await ask(base, path)
    assert (kind_of(result), result.attempts, seen) == ("ok", 7, 7)
    assert {retry.kind for retry in result.retries} == {"rate_limit"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert),
               "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.parametrize("why", ["self-signed", "wrong host"])
async def test_a_certificate_that_proves_nothing_gets_no_request(
    why: str, path: str, certificate: tuple[Path, Path]
) -> None:
    requests = 0
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    async def handler(wire: Wire) -> None:
        nonlocal requests
        requests += bool(await wire.request())

    async with serving(handler, ssl=context) as base:
        if why == "self-signed":
            result = await ask(base.replace("127.0.0.1", "localhost"), path)
        else:
            result = await ask(base, path, ca_file=str(certificate[0]))
    assert (kind_of(result), result.attempts, requests) == ("tls", 1, 0)


@pytest.mark.parametrize("how", [rst, fin], ids=["RST", "FIN"])
async def test_a_handshake_that_breaks_off_is_tried_again(how: Fault, path: str) -> None:
    seen = 0

    async def handler(wire: Wire) -> None:
        nonlocal seen
        seen += 1
        await wire.reader.read(10)
        await how(wire, "connect")

    async with serving(handler) as base:
        result = await ask(base.replace("http:", "https:"), path)
    assert kind_of(result) in ("tls", "connect", "disconnected")
    assert result.attempts == seen == ATTEMPTS


async def test_a_handshake_that_never_ends_is_a_connect_failure(path: str) -> None:
    async with serving(stall_from_the_start) as base:
        result = await ask(base.replace("http:", "https:"), path)
    assert (kind_of(result), result.attempts) == ("connect", ATTEMPTS)


async def stall_from_the_start(wire: Wire) -> None:
    await asyncio.sleep(3600)


GIGABYTE_SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
block = b"x" * (1 << 20)
sent = []
for _ in range(int(sys.argv[1])):
    connection, _ = listener.accept()
    connection.recv(65536)
    total = 0
    try:
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\n\\r\\ndata: {\\"a\\": \\"")
        for _ in range(1024):
            connection.sendall(block)
            total += 1
    except OSError:
        pass
    connection.close()
    print(total, flush=True)
"""

ASK_IN_A_CHILD = """
import asyncio, resource, sys
import test_faults_network as t
result = asyncio.run(t.ask(sys.argv[1], sys.argv[2], limits=t.Limits(5, 60, 60)))
print(t.kind_of(result), result.attempts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def environment_of_a_child() -> dict[str, str]:
    """In which this very module can be imported."""
    path = os.pathsep.join(entry for entry in (str(Path(__file__).parent), *sys.path) if entry)
    return {**os.environ, "PYTHONPATH": path}


def test_an_event_of_a_gigabyte_is_given_up_in_bounded_memory(path: str) -> None:
    env = environment_of_a_child()
    command = [sys.executable, "-c", GIGABYTE_SERVER, str(ATTEMPTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        base = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        try:
            asked = subprocess.run(
                [sys.executable, "-c", ASK_IN_A_CHILD, base, path],
                capture_output=True, text=True, env=env, timeout=120, check=False,
            )  # fmt: skip
            assert asked.returncode == 0, asked.stderr
            sent = [int(server.stdout.readline()) for _ in range(ATTEMPTS)]
        finally:
            server.kill()
    kind, attempts, peak_mib = asked.stdout.split()
    assert (kind, int(attempts)) == ("decode", ATTEMPTS)
    assert max(sent) < 1024, f"{sent} MiB were taken before the event was given up"
    assert int(peak_mib) < 400, f"{peak_mib} MiB"
