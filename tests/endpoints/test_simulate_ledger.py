"""Ledger, timing, connections, the command's server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import aiohttp
import pytest

from batchstream.endpoints.sim.answers import chance_of
from batchstream.endpoints.sim.exchange import Pace
from batchstream.endpoints.sim.latency import parse_distribution
from batchstream.endpoints.sim.wheel import Wheel
from batchstream.endpoints.simulate import SimulateConfig, Simulator
from batchstream.errors import UsageError


def body(text: str, **extra: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}], "stream": True, **extra}


def test_the_ledger_tells_each_request_as_it_was(simulated) -> None:
    sim = simulated(tokens=8, mark_header="X-Row")
    sim.chat("a", headers={"x-row": "17"})
    sim.chat("a")
    sim.chat("b", stream=False)
    first, second, third = sim.ledger()
    assert [entry["ordinal"] for entry in (first, second, third)] == [1, 2, 3]
    assert [entry["attempt"] for entry in (first, second, third)] == [1, 2, 1]
    assert first["digest"] == second["digest"] != third["digest"]
    assert (first["mark"], second["mark"]) == ("17", None)
    assert (first["model"], first["path"], first["status"]) == ("sim", "/v1/chat/completions", 200)
    assert [entry["stream"] for entry in (first, second, third)] == [True, True, False]
    for entry in (first, second, third):
        assert entry["billed_tokens"] == entry["prompt_tokens"] + 8
        assert entry["finished"]
        assert entry["received_at"] <= entry["first_token_at"] <= entry["last_token_at"] <= entry["ended_at"]
        assert abs(entry["received_wall"] - time.time()) < 60
    stats = sim.request("GET", "/sim/stats").json
    assert (stats["requests"], stats["bodies"], stats["statuses"]) == (3, 2, {"200": 3})
    assert stats["billed_tokens"] == sum(entry["billed_tokens"] for entry in (first, second, third))


def test_a_bounded_ledger_keeps_the_latest_and_all_totals(simulated) -> None:
    sim = simulated(ledger_limit=2, tokens=3)
    for row in range(5):
        sim.chat(f"{row}")
    assert [entry["ordinal"] for entry in sim.ledger()] == [4, 5]
    assert sim.request("GET", "/sim/stats").json["events"] == 15


def test_a_client_that_leaves_is_noted_and_bills_what_was_generated_so_far(simulated) -> None:
    sim = simulated(tokens=1000, gap=0.01)
    client = sim.client()
    client.send("POST", "/v1/chat/completions", body("x"))
    client.read(lambda raw: raw.count(b"data: ") >= 5)
    client.close()
    while (entry := sim.ledger()[0])["ended_at"] is None:
        time.sleep(0.01)
    assert entry["closed_early"]
    assert not entry["finished"]
    assert 4 <= entry["events"] < 1000
    assert entry["billed_tokens"] == entry["prompt_tokens"] + entry["events"]


@pytest.mark.parametrize("role_early", [True, False])
def test_delays_are_at_least_what_was_asked_and_the_head_waits_only_when_told_to(simulated, role_early: bool) -> None:
    sim = simulated(tokens=5, ttft=0.2, gap=0.05, role_early=role_early)
    sim.chat()
    sim.chat(stream=False)
    streamed, whole = sim.ledger()
    assert streamed["first_token_at"] - streamed["received_at"] >= 0.2
    assert streamed["last_token_at"] - streamed["received_at"] >= 0.2 + 4 * 0.05
    assert (streamed["head_at"] - streamed["received_at"] >= 0.2) is not role_early
    assert whole["head_at"] - whole["received_at"] >= 0.2 + 4 * 0.05


def test_delays_are_drawn_from_seed_body_and_attempt() -> None:
    def planned(seed: int, digest: int, attempt: int) -> list[float]:
        ttft, gap = parse_distribution("0.1..0.6", "ttft"), parse_distribution("exp(0.02)", "gap")
        pace = Pace(100.0, ttft, gap, 0.01, chance_of(seed, digest, attempt))
        return [pace.first, *(pace.gap() for _ in range(5))]

    assert planned(1, 2, 3) == planned(1, 2, 3)
    assert len({tuple(planned(*where)) for where in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0)]}) == 4
    assert 100.1 <= planned(1, 2, 3)[0] <= 100.6


def test_requests_on_one_connection_are_answered_in_order_also_when_pipelined(simulated) -> None:
    sim = simulated(tokens=3)
    client = sim.client()
    for row in range(3):
        client.send("POST", "/v1/chat/completions", body(f"row {row}"))
    answer = client.read(lambda raw: raw.count(b"[DONE]") == 3)
    assert answer.end == "wanted"
    assert [entry["ordinal"] for entry in sim.ledger() if entry["finished"]] == [1, 2, 3]


def test_a_connection_closes_when_the_client_asks_for_it(simulated) -> None:
    client = simulated().client()
    client.send("POST", "/v1/chat/completions", body("x"), {"connection": "close"})
    assert client.read(lambda _: False).end == "eof"


def test_a_broken_request_is_answered_and_the_connection_closed(simulated) -> None:
    client = simulated().client()
    client.socket.sendall(b"nonsense\r\n\r\n")
    answer = client.read(lambda _: False)
    assert (answer.status, answer.end) == (400, "eof")
    assert "nonsense" in answer.json["error"]["message"]


def test_a_client_that_waits_for_100_continue_gets_it(simulated) -> None:
    client = simulated().client()
    data = json.dumps(body("x")).encode()
    client.socket.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(data)
    )
    assert client.read(lambda raw: raw.endswith(b"\r\n\r\n")).raw == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.socket.sendall(data)
    assert client.read().status == 200


def test_a_client_that_reads_slowly_holds_up_only_itself(simulated) -> None:
    sim = simulated(tokens=100_000)
    slow = sim.client()
    slow.send("POST", "/v1/chat/completions", body("slow"))
    slow.read(lambda raw: len(raw) > 0)
    assert sim.chat("quick", max_tokens=10).end == "complete"
    assert not sim.ledger()[0]["finished"], "20 MB are more than the sockets hold"
    rest = slow.read(lambda raw: raw.endswith(b"0\r\n\r\n"))
    assert rest.raw.count(b"data: {") > 99_000
    assert sim.ledger()[0]["events"] == 100_000


class FakeStream:
    """Notes its turns; wants to go on at once, for ever."""

    def __init__(self, *, blocked: bool = False) -> None:
        self.blocked = blocked
        self.turns = 0
        self.steps = self._go()

    def _go(self) -> Generator[float, None, None]:
        while True:
            self.turns += 1
            yield 0.0


async def test_a_blocked_stream_gets_no_turn_until_it_is_resumed_and_a_dropped_one_none_at_all() -> None:
    wheel = Wheel(asyncio.get_running_loop())
    blocked, dropped, free = FakeStream(blocked=True), FakeStream(), FakeStream()
    for stream in (blocked, dropped, free):
        wheel.start(stream)
    wheel.drop(dropped)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (blocked.turns, dropped.turns) == (0, 1)
    assert free.turns > 10
    blocked.blocked = False
    wheel.resume(blocked)
    wheel.resume(blocked)  # a second resume must not give it two places in the queue
    before = free.turns
    for _ in range(20):
        await asyncio.sleep(0)
    assert blocked.turns == pytest.approx(free.turns - before, abs=2)
    wheel.close()
    stopped = free.turns
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert free.turns == stopped


async def test_an_error_in_one_stream_does_not_stop_the_others() -> None:
    def broken() -> Generator[float, None, None]:
        yield 0.0
        raise ValueError("a bug")

    loop = asyncio.get_running_loop()
    seen: list[object] = []
    loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
    wheel, bad, free = Wheel(loop), FakeStream(), FakeStream()
    bad.steps = broken()
    wheel.start(bad)
    wheel.start(free)
    for _ in range(20):
        await asyncio.sleep(0)
    wheel.close()
    assert [type(error) for error in seen] == [ValueError]
    assert free.turns > 10


async def test_a_client_that_left_costs_no_more_turns() -> None:
    simulator = Simulator(SimulateConfig(tokens=1_000_000, gap=0.001))
    url = await simulator.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.split(":")[2].split("/")[0]))
    data = json.dumps(body("x")).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    await reader.readuntil(b"data: ")
    writer.close()
    await writer.wait_closed()
    entry = simulator.ledger.entries[0]
    for _ in range(1000):
        if entry.ended_at is not None:
            break
        await asyncio.sleep(0.01)
    assert entry.ended_at is not None
    events = entry.events
    await asyncio.sleep(0.1)
    assert entry.events == events
    await simulator.stop()


async def test_in_the_loop_of_hundreds_of_streams_every_answer_is_whole_and_order_changes_nothing() -> None:
    texts: list[dict[str, str]] = []
    for order in (1, -1):
        simulator = Simulator(SimulateConfig(tokens="5..15", ttft="0.01..0.1", gap=0.002, jitter=0.004))
        url = await simulator.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(row: int, session: aiohttp.ClientSession = session, url: str = url) -> tuple[str, str]:
                async with session.post(f"{url}/chat/completions", json=body(f"row {row}")) as response:
                    return f"{row}", (await response.read()).decode()

            texts.append(dict(await asyncio.gather(*(ask(row) for row in list(range(300))[::order]))))
        assert len(simulator.ledger.entries) == 300
        assert all(entry.finished for entry in simulator.ledger.entries)
        await simulator.stop()
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) == 300


async def test_stopping_drops_streams_and_frees_the_port() -> None:
    simulator = Simulator(SimulateConfig(faults=("stall=1",)))
    url = await simulator.start()
    port = int(url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/models HTTP/1.1\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await simulator.stop()
    with contextlib.suppress(ConnectionResetError):
        await reader.read()  # returns, or a reset does as well
    writer.close()
    other = Simulator()
    assert await other.start(port=port) == url
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
        await Simulator().start(port=port)
    await other.stop()


SERVE = "from batchstream.endpoints.simulate import *; serve(SimulateConfig(tokens=3), port=0)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_the_base_url_first_and_ends_with_a_signal(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith("/v1")
        server.send_signal(number)
        assert server.wait(20) == 0
        assert server.stdout.read() == ""
