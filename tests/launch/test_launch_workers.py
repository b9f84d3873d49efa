"""Several worker processes for one job: the same results, one account of limits, and nobody missed when one dies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli import batchstream, rows_of, start, without_timing

from batchstream.api import stream_results
from batchstream.endpoints.simulate import SimulateConfig, Simulator, running
from batchstream.job import Job
from batchstream.launch.processes import worker_count
from batchstream.policy.limits import Rates

KEY = "sk-canary-0a1b2c3d4e5f6071"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"question {i}"}) for i in range(300)]
    lines[7] = '{"prompt": 5}'
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def slow() -> Iterator[Simulator]:
    with running(SimulateConfig(tokens=5, ttft=0.05, gap=0.01)) as simulator:
        yield simulator


def at(simulator: Simulator, *more: object) -> list[object]:
    return ["--base-url", simulator.base_url, "--model", "sim", "--concurrency", "12", "--no-progress", *more]


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def workers_of(run: subprocess.Popen[str]) -> list[int]:
    """The pids of a run's worker processes that are alive and at work (they have opened a segment by then)."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"launch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def summary_of(out: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(out.with_name(out.name + ".summary.json").read_text())
    return found


def asked_twice(simulator: Simulator) -> int:
    digests = [entry.digest for entry in simulator.ledger.entries]
    return len(digests) - len(set(digests))


def test_any_number_of_workers_gives_the_same_results(prompts: Path, tmp_path: Path) -> None:
    files = {}
    for count in (1, 3):
        with running(SimulateConfig(tokens=5, ttft=0.002, faults=("429=0.05", "truncate(times=1)=0.05"))) as simulator:
            out = tmp_path / f"{count}.jsonl"
            done = batchstream("run", prompts, *at(simulator, "--workers", count, "-o", out), cwd=tmp_path)
            assert done.returncode == 3, done.stderr  # the malformed row
            files[count] = without_timing(rows_of(out))
            assert summary_of(out)["evidence"]["workers"] == count
    assert files[1] == files[3]
    assert [row["row"] for row in files[3]] == list(range(300))
    segments = {path.name.split("-")[1] for path in (tmp_path / "3.jsonl.journal").glob("seg-*")}
    assert segments == {"0", "1", "2"}, "each worker writes a segment of its own"


def test_the_rows_of_a_killed_worker_are_taken_over(prompts: Path, tmp_path: Path, slow: Simulator) -> None:
    out = tmp_path / "out.jsonl"
    run = start("run", prompts, *at(slow, "--workers", 2, "-o", out), cwd=tmp_path)
    eventually(lambda: slow.ledger.requests > 60, "60 requests")
    os.kill(workers_of(run)[0], signal.SIGKILL)
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 3, stderr
    assert "signal 9" in stderr
    assert "taken over" in stderr or "takes over" in stderr
    assert [row["row"] for row in rows_of(out)] == list(range(300))
    twice = asked_twice(slow)
    assert 0 < twice <= 6
    assert summary_of(out)["run"]["asked_again"] == twice
    assert summary_of(out)["run"]["unanswered"] == 0


def test_a_killed_parent_takes_its_workers_along_and_the_next_start_works_at_once(
    prompts: Path, tmp_path: Path, slow: Simulator
) -> None:
    out = tmp_path / "out.jsonl"
    run = start("run", prompts, *at(slow, "--workers", 2, "-o", out), cwd=tmp_path)
    eventually(lambda: slow.ledger.requests > 40, "40 requests")
    workers = workers_of(run)
    run.kill()
    run.communicate()
    again = batchstream("run", prompts, *at(slow, "--workers", 3, "-o", out, "--lock-wait", 5), cwd=tmp_path)
    assert again.returncode == 3, again.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert [row["row"] for row in rows_of(out)] == list(range(300))
    assert asked_twice(slow) == summary_of(out)["run"]["asked_again"] <= 12


def test_a_signal_to_the_whole_group_drains_all_workers(prompts: Path, tmp_path: Path, slow: Simulator) -> None:
    out = tmp_path / "out.jsonl"
    run = start("run", prompts, *at(slow, "--workers", 2, "-o", out), cwd=tmp_path)
    eventually(lambda: slow.ledger.requests > 40, "40 requests")
    for pid in (*workers_of(run), run.pid):  # as a terminal's Ctrl-C or systemd does it
        os.kill(pid, signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM, stderr
    assert not any(entry.closed_early for entry in slow.ledger.entries), "what was in flight was cut"
    assert batchstream("run", prompts, *at(slow, "-o", out), cwd=tmp_path).returncode == 3
    assert asked_twice(slow) == 0


def test_a_429_that_one_worker_meets_closes_the_gate_for_all(prompts: Path, tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=2, ttft=0.02, faults=("429(retry-after=1.5)@20",))) as simulator:
        done = batchstream("run", prompts, *at(simulator, "--workers", 3, "-o", "out.jsonl"), cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        entries = list(simulator.ledger.entries)
    refused = next(entry for entry in entries if entry.status == 429)
    assert refused.head_at is not None
    # Those on their way already, and what the news takes to get round.
    inside = [e for e in entries if refused.head_at + 0.3 < e.received_at < refused.head_at + 1.4]
    assert not inside, f"{len(inside)} requests left through a closed gate"


def test_the_last_request_of_a_budget_is_one_workers(prompts: Path, tmp_path: Path, slow: Simulator) -> None:
    done = batchstream("run", prompts, *at(slow, "--workers", 3, "--max-requests", 50, "-o", "o.jsonl"), cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "--max-requests 50 are used up" in done.stderr
    assert slow.ledger.requests == 50
    assert batchstream("run", prompts, *at(slow, "--workers", 2, "-o", "o.jsonl"), cwd=tmp_path).returncode == 3
    assert asked_twice(slow) == 0


def test_a_cap_on_tokens_or_cost_is_overrun_by_no_more_than_what_was_in_flight(
    prompts: Path, tmp_path: Path, slow: Simulator
) -> None:
    priced = at(slow, "--workers", 3, "--price", "in=0,out=1000000", "--param", "max_tokens=5", "-o", "o.jsonl")
    done = batchstream("run", prompts, *priced, "--max-cost", 300, cwd=tmp_path)  # 5 an answer
    assert done.returncode == 5, done.stderr
    spent = json.loads((tmp_path / "o.jsonl.summary.json").read_text())["limits"]["cost"]
    assert 300 <= spent <= 300 + 12 * 5
    assert slow.ledger.requests == spent / 5
    more = batchstream("run", prompts, *priced, "--max-cost", 700, cwd=tmp_path)
    assert more.returncode == 5, more.stderr
    total = json.loads((tmp_path / "o.jsonl.summary.json").read_text())["limits"]["cost"]
    assert 700 <= total <= 700 + 12 * 5
    assert slow.ledger.requests == total / 5, "what earlier runs have cost counts"
    done = batchstream("run", prompts, *priced, "--max-tokens-total", 200, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "--max-tokens-total 200 are used up" in done.stderr


def test_a_worker_that_dies_leaves_its_account_and_the_budget_holds(
    prompts: Path, tmp_path: Path, slow: Simulator
) -> None:
    run = start("run", prompts, *at(slow, "--workers", 2, "--max-requests", 200, "-o", "o.jsonl"), cwd=tmp_path)
    eventually(lambda: slow.ledger.requests > 60, "60 requests")
    os.kill(workers_of(run)[0], signal.SIGKILL)
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 5, stderr
    assert slow.ledger.requests == 200


@pytest.mark.parametrize("window", ["rolling", "fixed"])
def test_the_rate_of_all_workers_together_is_kept_also_when_one_dies(tmp_path: Path, window: str) -> None:
    """600 a minute on a clock that runs 20 times as fast; the endpoint refuses what is more."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(1500)))
    sim = [word for setting in ("tokens=1", "rpm=600", "speedup=20") for word in ("--sim", setting)]
    limits = ("--workers", 3, "--concurrency", 30, "--rpm", 600, "--window", window)
    run = start("run", rows, "--provider", "sim", *sim, *limits, "-o", "out.jsonl", "--no-progress", cwd=tmp_path)
    journal = tmp_path / "out.jsonl.journal"
    eventually(lambda: sum(path.stat().st_size for path in journal.glob("seg-*")) > 200_000, "300 answers or so")
    os.kill(workers_of(run)[0], signal.SIGKILL)
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    found = summary_of(tmp_path / "out.jsonl")
    assert found["limits"]["refused"] == 0
    assert found["rows"]["ok"] == 1500


@pytest.mark.parametrize("seed", [1, 2, pytest.param(range(3, 40), marks=pytest.mark.sweep)])
def test_workers_killed_at_any_moment_cost_no_row_and_no_answer(
    prompts: Path, tmp_path: Path, seed: int | range
) -> None:
    for number in (seed,) if isinstance(seed, int) else seed:
        chance, cwd = random.Random(number), tmp_path / str(number)
        cwd.mkdir()
        with running(SimulateConfig(tokens=4, ttft=0.02, gap=0.005, faults=("503=0.05",))) as simulator:
            run = start("run", prompts, *at(simulator, "--workers", 3, "-o", "out.jsonl"), cwd=cwd)
            killed = 0
            for _ in range(chance.randrange(1, 4)):
                wanted = simulator.ledger.requests + chance.randrange(1, 80)
                while simulator.ledger.requests < wanted and run.poll() is None:
                    time.sleep(0.005)
                time.sleep(chance.random() * 0.05)
                if run.poll() is None and (alive := workers_of(run)):
                    os.kill(chance.choice(alive), signal.SIGKILL)
                    killed += 1
            if chance.random() < 0.5 and run.poll() is None:
                run.kill()
            run.communicate(timeout=120)
            resumed = batchstream(
                "run", prompts, *at(simulator, "--workers", chance.randrange(1, 5), "-o", "out.jsonl"),
                "--lock-wait", 5, cwd=cwd,
            )  # fmt: skip
            assert resumed.returncode == 3, resumed.stderr  # the malformed row
            whole = [entry for entry in simulator.ledger.entries if entry.status == 200]
        rows = rows_of(cwd / "out.jsonl")
        assert [row["row"] for row in rows] == list(range(300))
        assert {row["status"] for row in rows if row["row"] != 7} == {"ok"}
        answers = [entry.digest for entry in whole if not entry.closed_early]
        # An answer may have come whole and its worker died before it was written: no more than were in flight.
        assert len(answers) - len(set(answers)) <= 12 * (killed + 1)


def test_trouble_with_the_account_stops_all_workers(prompts: Path, tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=5, key="another-key-than-ours")) as simulator:
        done = batchstream("run", prompts, *at(simulator, "--workers", 3, "--api-key-env", "K"), cwd=tmp_path, K=KEY)
        assert done.returncode == 4, done.stderr
        assert simulator.ledger.requests < 60
    assert KEY not in done.stderr


def test_the_key_is_in_no_workers_command_line(prompts: Path, tmp_path: Path, slow: Simulator) -> None:
    run = start("run", prompts, *at(slow, "--workers", 2, "--api-key-env", "K", "-o", "o.jsonl"), cwd=tmp_path, K=KEY)
    eventually(lambda: slow.ledger.requests > 20, "20 requests")
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers_of(run)]
    run.kill()
    run.communicate()
    assert len(lines) == 2
    assert not any(KEY.encode() in line for line in lines)


async def test_results_are_streamed_from_all_workers(prompts: Path, tmp_path: Path, slow: Simulator) -> None:
    job = Job(input=str(prompts), output=str(tmp_path / "o.jsonl"), base_url=slow.base_url, model="m", workers=2)
    rows = [result.row async for result in stream_results(job)]
    assert sorted(rows) == list(range(300))
    assert asyncio.get_running_loop().is_running()


def test_auto_takes_a_worker_for_every_64_slots_and_one_where_the_rate_is_limited() -> None:
    job = Job(input="x", workers="auto")
    cores = len(os.sched_getaffinity(0))
    assert worker_count(job, 16, Rates()) == 1
    assert worker_count(job, 64 * cores, Rates()) == cores
    assert worker_count(job, 64 * cores, Rates(rpm=600)) == 1
    assert worker_count(Job(input="x", workers=4), 100, Rates(rpm=600)) == 4
    assert worker_count(Job(input="x", workers=4), 100, Rates(rpm={"m": 3})) == 3
    assert worker_count(Job(input="x", workers=4), 100, Rates(tpm=100_000)) == 2
    assert worker_count(Job(input="x", workers=4), 2, Rates()) == 2, "one without a slot has nothing to do"
