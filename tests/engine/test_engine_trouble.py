"""Runs whose disk, input or caller fails under them: they end, and what was paid for is kept."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import gzip
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import command, environment, rows_of
from scripted import Wire, serving

from batchstream.api import read_results, stream_results
from batchstream.endpoints.simulate import SimulateConfig, running
from batchstream.engine import store
from batchstream.engine.runner import Stop
from batchstream.errors import BudgetError, InputError, StoppedError, StorageError
from batchstream.files import fsio, publish
from batchstream.files.results import read_journal
from batchstream.files.segment import Segment
from batchstream.job import Job
from batchstream.launch.here import run, run_async
from batchstream.records import Result
from batchstream.shard import Control, Hooks, ahead


def write(folder: Path, count: int, **extra: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", **extra}) + "\n" for i in range(count)))
    return str(path)


class FullDisk(fsio.RealDisk):
    """Takes no record that contains `refused` until it is `cured`."""

    def __init__(self, refused: bytes) -> None:
        self.refused = refused
        self.cured = False
        self.refusals = 0

    def write(self, fd: int, data: bytes) -> int:
        if self.refused in data and not self.cured:
            self.refusals += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)

    async def refuses(self) -> None:
        while not self.refusals:  # noqa: ASYNC110  (another thread counts them)
            await asyncio.sleep(0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FullDisk:
    full = FullDisk(request.param)
    monkeypatch.setattr(fsio, "disk", full)
    return full


ADMISSION = pytest.mark.parametrize("disk", [b'"t":"a"'], indirect=True)


@ADMISSION
async def test_a_disk_that_is_full_before_the_first_request_is_tried_again_until_it_is_cured(
    tmp_path: Path, disk: FullDisk
) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m", concurrency=1)
        going = asyncio.create_task(run_async(job))
        await disk.refuses()
        assert simulator.ledger.requests == 0
        disk.cured = True
        report = await asyncio.wait_for(going, 30)
        assert (report.exit_code, simulator.ledger.requests) == (0, 20)


@ADMISSION
async def test_a_stop_while_the_disk_refuses_ends_the_run_without_a_request(tmp_path: Path, disk: FullDisk) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m")
        control = Control()
        going = asyncio.create_task(run_async(job, control=control))
        await disk.refuses()
        control.stop(Stop("signal", "got SIGTERM; draining", 15))
        report = await asyncio.wait_for(going, 30)
        assert (report.exit_code, simulator.ledger.requests) == (143, 0)


@pytest.mark.parametrize("disk", [b'"invalid_row"'], indirect=True)
async def test_malformed_rows_wait_for_the_disk_like_all_others(
    tmp_path: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n' + '{"prompt": 5}\n' * 5000)
    taken: list[int] = []
    append = Segment.append

    def noted(segment: Segment, row: int, *rest: Any) -> bool:
        taken.append(row)
        return append(segment, row, *rest)

    monkeypatch.setattr(Segment, "append", noted)
    going = asyncio.create_task(run_async(Job(input=str(path), provider="sim", model="m")))
    await disk.refuses()
    await asyncio.sleep(1.0)
    assert len(taken) < 200, "the input goes into memory while the disk refuses"
    disk.cured = True
    report = await asyncio.wait_for(going, 60)
    assert report.summary is not None
    assert (report.exit_code, report.summary.rows.invalid) == (3, 5000)


def test_an_input_that_breaks_off_costs_none_of_the_answers_under_way(tmp_path: Path) -> None:
    chance = random.Random(3)
    lines = "".join(json.dumps({"prompt": chance.randbytes(4000).hex()}) + "\n" for _ in range(2000))
    whole = gzip.compress(lines.encode())
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with running(SimulateConfig(tokens=4, gap=0.02)) as simulator:
        job = Job(input=str(path), base_url=simulator.base_url, model="m", concurrency=64)
        with pytest.raises(InputError, match="cut off"):
            run(job)
        stored = read_journal(tmp_path / "prompts.results.jsonl")
        assert simulator.ledger.requests > 64
        assert (stored.ok, stored.asked_again) == (simulator.ledger.requests, 0)


def test_without_a_breaker_one_wait_of_a_day_is_one_failed_row(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4, faults=("429(retry-after=86400)@3",))) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m", breaker="off", max_time=20)
        report = run(job)
        assert report.summary is not None
        assert (report.exit_code, report.summary.rows.ok, report.summary.rows.failed) == (3, 19, 1)


def test_a_row_with_a_result_is_not_noted_as_given_up(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m", max_tokens_total=30, concurrency=1)
        report = run(job)
        assert report.exit_code == 5
        records = b"".join(path.read_bytes() for path in report.journal.glob("seg-*"))
        assert b'"t":"o"' in records
        assert b'"t":"u"' not in records


@pytest.mark.parametrize("disk", [b'"t":"o"'], indirect=True)
async def test_a_disk_that_is_cured_while_the_last_answers_come_in_keeps_them_all(
    tmp_path: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE_S", 0.1)
    with running(SimulateConfig(tokens=20, ttft=1.0, gap=0.1)) as simulator:
        lines = [json.dumps({"prompt": f"question {i}", "max_tokens": 1 if i == 0 else 20}) for i in range(50)]
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(lines) + "\n")
        job = Job(input=str(path), base_url=simulator.base_url, model="m", concurrency=4)
        control = Control()
        going = asyncio.create_task(run_async(job, control=control))
        while not control.stopping:  # noqa: ASYNC110  (the run stops itself)
            await asyncio.sleep(0.02)
        disk.cured = True
        with pytest.raises(StorageError, match="No space left"):
            await asyncio.wait_for(going, 60)
        stored = read_journal(tmp_path / "prompts.results.jsonl")
        assert (stored.ok, stored.asked_again) == (simulator.ledger.requests, 0)


def test_a_hook_that_raises_ends_the_run_before_more_is_bought(tmp_path: Path) -> None:
    def hook(result: Result) -> None:
        raise KeyError(result.row)

    with running(SimulateConfig(tokens=4, gap=0.01)) as simulator:
        job = Job(input=write(tmp_path, 400), base_url=simulator.base_url, model="m", concurrency=4)
        with pytest.raises(KeyError):
            run(job, hooks=Hooks(on_durable=hook))
        assert simulator.ledger.requests < 100
        assert read_journal(tmp_path / "prompts.results.jsonl").ok == simulator.ledger.requests


KEY = 'sk-odd"key-0123456789'


async def test_a_key_that_an_endpoint_repeats_reaches_neither_journal_nor_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    async def handler(wire: Wire) -> None:
        while request := await wire.request():
            assert KEY.encode() in request
            delta = {"choices": [{"index": 0, "delta": {"content": f"you are {KEY}"}, "finish_reason": "stop"}]}
            body = f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n".encode()
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with serving(handler) as url:
        job = Job(input=write(tmp_path, 2), base_url=url, model="m", api_key_env="MY_KEY")
        assert [result.text async for result in stream_results(job)] == ["you are [key]"] * 2
    assert [result.text for result in read_results(tmp_path / "prompts.results.jsonl")] == ["you are [key]"] * 2
    segments = b"".join(path.read_bytes() for path in (tmp_path / "prompts.results.jsonl.journal").glob("seg-*"))
    assert b"you are [key]" in segments
    assert b"0123456789" not in segments


async def test_stream_results_tells_its_caller_that_the_run_stopped_early(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m", max_requests=5)
        rows: list[int] = []

        async def collect() -> None:
            async for result in stream_results(job):
                rows.append(result.row)  # noqa: PERF401  (what came before the error counts)

        with pytest.raises(BudgetError, match="--max-requests"):
            await collect()
        assert len(rows) == 5
    with running(SimulateConfig(key="good-key-for-sim")) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m", new_job=True)
        with pytest.raises(StoppedError, match="auth"):
            [result async for result in stream_results(job)]


async def test_what_the_input_says_after_a_stop_is_nobodys_error(caplog: pytest.LogCaptureFixture) -> None:
    def rows() -> Iterator[list[Any]]:
        yield [1]
        raise InputError("cut off")

    async with contextlib.aclosing(ahead(rows())) as batches:
        async for _ in batches:
            await asyncio.sleep(0.1)
            break
    gc.collect()
    await asyncio.sleep(0)
    assert caplog.records == []


def piped(folder: Path) -> subprocess.Popen[bytes]:
    """A run that has begun to read its stdin, and gets one line so far."""
    run = subprocess.Popen(
        command("run", "-", "-o", "out.jsonl", "--provider", "sim", "--model", "m"),
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdin is not None
    run.stdin.write(b'{"prompt": "first"}\n')
    run.stdin.flush()
    while not (folder / "out.jsonl.journal/input.jsonl.tmp").exists():
        time.sleep(0.02)
    return run


def test_a_signal_ends_a_run_that_waits_for_its_input(tmp_path: Path) -> None:
    with piped(tmp_path) as run:
        run.send_signal(signal.SIGTERM)
        assert run.wait(30) == -signal.SIGTERM
        assert run.stderr is not None
        assert b"got SIGTERM; nothing was sent (exit 143; the same command resumes)" in run.stderr.read()


def test_ctrl_c_on_both_ends_of_a_pipe_does_not_make_half_an_input_the_whole(tmp_path: Path) -> None:
    run = piped(tmp_path)
    run.send_signal(signal.SIGINT)
    time.sleep(0.02)  # whoever writes the pipe gets it too, and takes a moment to go
    run.communicate(timeout=30)
    assert run.returncode == -signal.SIGINT
    again = piped(tmp_path)
    _, said = again.communicate(b'{"prompt": "second"}\n', timeout=60)
    assert again.returncode == 0, said
    assert len(rows_of(tmp_path / "out.jsonl")) == 2


def test_a_last_row_that_is_always_refused_has_a_way_out_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "poison" if i == 9 else f"q {i}"}) + "\n" for i in range(10)))
    with running(SimulateConfig(tokens=4, faults=("403~poison",))) as simulator:
        for _ in range(2):
            report = run(Job(input=str(path), base_url=simulator.base_url, model="m", concurrency=1))
            assert (report.exit_code, "--breaker off" in report.message) == (4, True)
        report = run(Job(input=str(path), base_url=simulator.base_url, model="m", breaker="off"))
        assert report.summary is not None
        assert (report.exit_code, report.summary.rows.ok, report.summary.rows.failed) == (3, 9, 1)


def signalled_while_publishing(control: Control, monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    """The signals come when the fifth result is on its way into the results file."""
    real, loop = publish.write_lines, asyncio.get_running_loop()

    async def arrive() -> None:
        for _ in range(times):
            if control.stopping:
                control.abort()
            control.stop(Stop("signal", "got SIGTERM", 15))

    def write_lines(disk: Any, path: Path, lines: Iterator[bytes]) -> None:
        def interrupted() -> Iterator[bytes]:
            for number, line in enumerate(lines):
                if number == 5:
                    asyncio.run_coroutine_threadsafe(arrive(), loop).result()
                yield line

        real(disk, path, interrupted())

    monkeypatch.setattr(publish, "write_lines", write_lines)


@pytest.mark.parametrize(("times", "code"), [(1, 0), (2, 143)])
async def test_a_signal_while_the_results_are_made_lets_them_end_and_the_second_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, code: int
) -> None:
    with running(SimulateConfig(tokens=2)) as simulator:
        job = Job(input=write(tmp_path, 20), base_url=simulator.base_url, model="m")
        control = Control()
        with monkeypatch.context() as patch:
            signalled_while_publishing(control, patch, times=times)
            report = await run_async(job, control=control)
        assert (report.exit_code, report.published) == (code, code == 0)
        assert report.output.exists() == (code == 0)
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]
        assert code == 0 or "not published" in report.message
        again = await run_async(job)
        assert (again.exit_code, simulator.ledger.requests) == (0, 20)
        assert len(rows_of(report.output)) == 20
