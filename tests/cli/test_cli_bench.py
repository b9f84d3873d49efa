"""`batchstream bench` as users start it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cli import batchstream, rows_of, start

SIM = ["--provider", "sim", "--sim", "ttft=0.02", "--sim", "gap=0.002", "--sim", "tokens=4", "--no-progress"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "at": i * 0.05}) + "\n" for i in range(10)))
    return path


def summary(tmp_path: Path, name: str = "p.bench.jsonl") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / f"{name}.summary.json").read_text())
    return found


def test_a_sweep_is_a_stage_for_each_level(prompts: Path, tmp_path: Path) -> None:
    done = batchstream("bench", prompts, *SIM, "--concurrency", "1,4", "--requests", 20, "--warmup", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    figures = summary(tmp_path)
    assert figures["schema"] == "batchstream.bench/1"
    assert [stage["name"] for stage in figures["stages"]] == ["concurrency 1", "concurrency 4"]
    assert [stage["rows"] for stage in figures["stages"]] == [[0, 25], [25, 50]]
    assert [stage["summary"]["rows"]["ok"] for stage in figures["stages"]] == [20, 20]
    assert len(rows_of(tmp_path / "p.bench.jsonl")) == 50
    assert "concurrency 4" in done.stderr


@pytest.mark.parametrize(
    ("style", "said"), [("text", "concurrency 2"), ("markdown", "| concurrency 2 |"), ("json", "stages")]
)
def test_a_measurement_is_reported_by_its_stages(style: str, said: str, prompts: Path, tmp_path: Path) -> None:
    assert batchstream("bench", prompts, *SIM, "--concurrency", 2, cwd=tmp_path).returncode == 0
    done = batchstream("report", "p.bench.jsonl", "--format", style, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_same_command_again_asks_nothing(prompts: Path, tmp_path: Path) -> None:
    for said in ("", "measured before (1 stages); nothing was sent"):
        done = batchstream("bench", prompts, *SIM, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
    other = batchstream("bench", prompts, *SIM, "--concurrency", 2, cwd=tmp_path)
    assert other.returncode == 12, "another load is another measurement"


def test_an_open_loop_sends_what_its_schedule_says(prompts: Path, tmp_path: Path) -> None:
    args = ["--rate", 50, "--arrival", "constant", "--duration", "2s", "--slo", "latency=10s", "--summary-json", "-"]
    done = batchstream("bench", prompts, *SIM, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(done.stdout)["stages"]
    assert stage["scheduled"] == stage["summary"]["rows"]["total"] == 100
    assert stage["goodput"]["met"] == 100
    assert stage["slip_p99_s"] is not None
    assert {"ttft_sched_s", "latency_sched_s", "total_sched_s"} <= stage["sched"].keys()


def test_a_column_of_instants_is_replayed(prompts: Path, tmp_path: Path) -> None:
    done = batchstream("bench", prompts, *SIM, "--replay", "at", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (stage,) = summary(tmp_path)["stages"]
    assert (stage["scheduled"], stage["load"]["arrival"]) == (10, "replay")
    assert stage["seconds"] > 0.4


def test_an_interrupted_stage_is_measured_again_and_the_finished_ones_are_kept(prompts: Path, tmp_path: Path) -> None:
    args = ["bench", prompts, "--provider", "sim", "--sim", "ttft=0.3", "--no-progress", "--concurrency", "8,1"]
    run = start(*args, cwd=tmp_path)
    stages = tmp_path / "p.bench.jsonl.journal" / "STAGES.json"
    while not stages.exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT, stderr
    assert "1 stages are measured" in stderr
    kept = json.loads(stages.read_text())
    done = batchstream(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = summary(tmp_path)
    assert figures["stages"][0] == kept[0]
    assert figures["stages"][1]["summary"]["rows"]["ok"] == 10


def test_an_objective_that_is_not_met_fails_when_that_is_asked_for(prompts: Path, tmp_path: Path) -> None:
    args = ["bench", prompts, *SIM, "--slo", "ttft=1ms"]
    assert batchstream(*args, cwd=tmp_path).returncode == 0
    done = batchstream(*args, "--fail-on-slo", cwd=tmp_path)
    assert done.returncode == 3
    assert "--slo was not met at concurrency 1" in done.stderr.splitlines()[-1]


def test_a_search_finds_what_a_known_capacity_bears(prompts: Path, tmp_path: Path) -> None:
    """Twenty requests in each window of a second, the rest is refused: 21 a second are good by 95 %."""
    sim = ["--provider", "sim", "--sim", "rpm=20", "--sim", "speedup=60", "--sim", "tokens=1", "--no-progress"]
    more = ["--find", "rate", "--rate", 10, "--arrival", "constant", "--slo", "ttft=10s", "--duration", 3]
    done = batchstream("bench", prompts, *sim, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 19 <= summary(tmp_path)["found"] <= 22


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--concurrency", "2", "--rate", "3"], "give one of them"),
        (["--concurrency", "x"], "numbers with commas"),
        (["--slo", "ttft"], "METRIC=DURATION"),
        (["--slo", "speed=1s"], "expected one of ttft"),
        (["--ramp", "1..5"], "--ramp needs --duration"),
        (["--find", "rate"], "give it with --slo"),
        (["--replay", "nothing"], "nothing"),
        (["--fail-on-slo"], "give an objective"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused_in_one_line(
    args: list[str], said: str, prompts: Path, tmp_path: Path
) -> None:
    done = batchstream("bench", prompts, *SIM, *args, cwd=tmp_path)
    assert done.returncode in (2, 10), done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
