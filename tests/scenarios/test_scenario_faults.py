"""A thousand things go wrong and every row ends right: the whole CLI against the simulated endpoint."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli import batchstream, rows_of, start, without_timing

from batchstream.api import read_results
from batchstream.endpoints.simulate import SimulateConfig, Simulator, running

FAULTS = ("429=0.05", "500=0.05", "truncate=0.05", "reset=0.02")
ROWS = 2000


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "prompt": f"Question number {i}: why?", "max_tokens": 12} for i in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def against(simulator: Simulator, *args: object) -> list[object]:
    return [*args, "--base-url", simulator.base_url, "--model", "sim", "--no-progress"]


def stored(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, read through the Python API."""
    return [msgspec.to_builtins(result) for result in read_results(path)]


def check_rows(rows: list[dict[str, Any]], count: int) -> None:
    assert [row["row"] for row in rows] == list(range(count))
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(count)]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["attempts"] == len(row["retries"]) + 1 for row in rows)


def test_two_thousand_rows_through_faults_all_end_ok_and_the_ledger_agrees(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(ROWS))
    with running(SimulateConfig(seed=7, tokens=12, faults=FAULTS)) as simulator:
        done = batchstream(*against(simulator, "run", source, "-o", "out.jsonl", "--concurrency", 64), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = rows_of(tmp_path / "out.jsonl")
        check_rows(rows, ROWS)
        assert sum(row["attempts"] for row in rows) == simulator.ledger.requests
        kinds = {retry["kind"] for row in rows for retry in row["retries"]}
        assert {"rate_limit", "server", "truncated"} <= kinds
        faulty = sum(simulator.ledger.faults.values())
        assert faulty == simulator.ledger.requests - ROWS

        again = batchstream(*against(simulator, "run", source, "-o", "out.jsonl", "--concurrency", 64), cwd=tmp_path)
        assert again.returncode == 0
        assert simulator.ledger.requests == sum(row["attempts"] for row in rows), "a finished job sends nothing"


def test_the_same_rows_as_parquet_give_the_same_results_as_parquet(tmp_path: Path) -> None:
    rows = prompts(300)
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet", row_group_size=64)
    with running(SimulateConfig(seed=7, tokens=12, faults=FAULTS)) as simulator:
        for name in ("jsonl", "parquet"):
            args = ("run", f"prompts.{name}", "-o", f"out.{name}", "--concurrency", 32)
            done = batchstream(*against(simulator, *args), cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            simulator.ledger.reset()
    from_jsonl = rows_of(tmp_path / "out.jsonl")
    from_parquet = stored(tmp_path / "out.parquet")
    assert pq.read_schema(tmp_path / "out.parquet").names == list(from_jsonl[0])
    assert without_timing(from_parquet) == without_timing(from_jsonl)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_killed_run_is_completed_by_the_same_command(tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(400))
    config = SimulateConfig(seed=3, tokens=12, gap=0.004, faults=("500=0.03",))
    with running(config) as simulator:
        args = against(simulator, "run", source, "-o", name, "--concurrency", 16)
        for _ in range(2):
            before = simulator.ledger.requests
            run = start(*args, cwd=tmp_path)
            while simulator.ledger.requests < before + 120 and run.poll() is None:
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
            run.communicate()
            assert not (tmp_path / name).exists()
        done = batchstream(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        killed = list(simulator.ledger.entries)
        digests = [entry.digest for entry in killed if entry.finished and entry.status == 200]
        summary = json.loads((tmp_path / f"{name}.summary.json").read_text())
        # Rows whose answer went out twice were in flight at a kill: at most as many as there are slots, for each kill.
        assert len(digests) - len(set(digests)) <= 32
        assert summary["rows"] == {"total": 400, "ok": 400, "failed": 0, "invalid": 0}
    with running(config) as fresh:
        whole = batchstream(*against(fresh, "run", source, "-o", f"whole-{name}", "--concurrency", 16), cwd=tmp_path)
        assert whole.returncode == 0, whole.stderr
    if name.endswith(".jsonl"):
        resumed, unbroken = rows_of(tmp_path / name), rows_of(tmp_path / f"whole-{name}")
    else:
        resumed, unbroken = stored(tmp_path / name), stored(tmp_path / f"whole-{name}")
    assert without_timing(resumed) == without_timing(unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_drains_and_the_process_dies_of_it(tmp_path: Path, number: signal.Signals) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(300))
    with running(SimulateConfig(tokens=12, gap=0.01)) as simulator:
        args = against(simulator, "run", source, "-o", "out.jsonl", "--concurrency", 8)
        run = start(*args, cwd=tmp_path)
        while simulator.ledger.requests < 40:
            time.sleep(0.01)
        run.send_signal(number)
        _, stderr = run.communicate(timeout=60)
        assert run.returncode == -number, stderr
        assert "same command" in stderr.strip().splitlines()[-1]
        assert not (tmp_path / "out.jsonl").exists()
        assert not any(entry.closed_early for entry in simulator.ledger.entries), "what was in flight was cut"
        done = batchstream(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert simulator.ledger.requests == 300, "a drained run asks nothing twice"


def test_a_second_signal_cuts_what_is_in_flight(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(20))
    with running(SimulateConfig(tokens=12, gap=5.0)) as simulator:
        args = against(simulator, "run", source, "-o", "out.jsonl", "--concurrency", 8)
        run = start(*args, cwd=tmp_path)
        while simulator.ledger.requests < 8:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=20)
        assert run.returncode == -signal.SIGINT


def test_a_second_start_is_refused_at_once_and_names_the_holder(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(50))
    with running(SimulateConfig(tokens=12, gap=0.5)) as simulator:
        args = against(simulator, "run", source, "-o", "out.jsonl")
        first = start(*args, cwd=tmp_path)
        while simulator.ledger.requests < 1:
            time.sleep(0.01)
        second = batchstream(*args, cwd=tmp_path)
        assert second.returncode == 11
        assert f"pid {first.pid}" in second.stderr
        assert batchstream(*args, "--if-locked", "skip", cwd=tmp_path).returncode == 0
        first.kill()
        first.communicate()


def test_a_changed_job_is_refused_naming_the_difference(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(5))
    with running(SimulateConfig(tokens=4)) as simulator:
        assert batchstream(*against(simulator, "run", source), cwd=tmp_path).returncode == 0
        other = batchstream(*against(simulator, "run", source), "--param", "temperature=1", cwd=tmp_path)
        assert other.returncode == 12
        assert "temperature" in other.stderr
        fresh = batchstream(*against(simulator, "run", source), "--param", "temperature=1", "--new-job", cwd=tmp_path)
        assert fresh.returncode == 0, fresh.stderr


def test_failed_rows_are_published_with_exit_3_and_asked_again_on_request(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", [*prompts(10), {"id": "bad", "prompt": "poison"}])
    config = SimulateConfig(tokens=4, faults=("400(times=1)~poison",))
    with running(config) as simulator:
        args = against(simulator, "run", source, "-o", "out.jsonl")
        done = batchstream(*args, cwd=tmp_path)
        assert done.returncode == 3
        row = rows_of(tmp_path / "out.jsonl")[10]
        assert (row["status"], row["error"]["kind"], row["error"]["status"]) == ("failed", "invalid_request", 400)
        assert batchstream(*args, cwd=tmp_path).returncode == 3
        assert batchstream(*args, "--max-failures", 1, cwd=tmp_path).returncode == 0
        assert simulator.ledger.requests == 11
        cured = batchstream(*args, "--retry-failed", cwd=tmp_path)
        assert cured.returncode == 0, cured.stderr
        assert simulator.ledger.requests == 12
        assert rows_of(tmp_path / "out.jsonl")[10]["status"] == "ok"


def test_prompts_from_stdin_are_kept_for_the_next_start(tmp_path: Path) -> None:
    import subprocess

    from cli import command, environment

    text = "".join(json.dumps(row) + "\n" for row in prompts(30))
    with running(SimulateConfig(tokens=4)) as simulator:
        args = command(*against(simulator, "run", "-", "-o", "out.jsonl"))
        done = subprocess.run(
            args, input=text, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        check_rows(rows_of(tmp_path / "out.jsonl"), 30)
