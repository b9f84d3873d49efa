"""Shards by hand, each with a journal of its own, and the merge that proves each row to be there once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli import batchstream, environment, rows_of, start, without_timing

from batchstream.endpoints.simulate import SimulateConfig, Simulator, running

ROWS = 300
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(ROWS)))
    return path


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    with running(SimulateConfig(tokens=3, ttft=0.001)) as found:
        yield found


def run(simulator: Simulator, *more: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return batchstream("run", "prompts.jsonl", "-o", "out.jsonl", *at(simulator), *more, cwd=cwd, **env)


def at(simulator: Simulator) -> list[str]:
    return ["--base-url", simulator.base_url, "--model", "sim", "--concurrency", "16", "--no-progress", "-q"]


def merge(cwd: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return batchstream("merge", "out.jsonl", *more, cwd=cwd)


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def asked_twice(simulator: Simulator) -> int:
    digests = [entry.digest for entry in simulator.ledger.entries]
    return len(digests) - len(set(digests))


def all_shards(simulator: Simulator, cwd: Path, of: int) -> None:
    for index in range(1, of + 1):
        done = run(simulator, "--shard", f"{index}/{of}", cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert not (cwd / "out.jsonl").exists()


def test_merged_shards_are_the_results_of_one_run(tmp_path: Path, simulator: Simulator) -> None:
    (tmp_path / "whole").mkdir()
    whole = batchstream("run", "prompts.jsonl", "-o", "whole/out.jsonl", *at(simulator), "--workers", "2", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    all_shards(simulator, tmp_path, 3)
    assert simulator.ledger.requests == 2 * ROWS, "a shard asked for rows of another"
    merged = merge(tmp_path, "--summary-json", "-")
    assert merged.returncode == 0, merged.stderr
    assert f"3 shards merged: {ROWS} rows, each there once" in merged.stderr
    assert json.loads(merged.stdout)["rows"]["ok"] == ROWS
    assert without_timing(rows_of(tmp_path / "out.jsonl")) == without_timing(rows_of(tmp_path / "whole/out.jsonl"))
    first = (tmp_path / "out.jsonl").read_bytes()
    assert merge(tmp_path).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == first, "a second merge gives the same bytes"
    again = run(simulator, "--shard", "2/3", cwd=tmp_path)
    assert again.returncode == 0
    assert run(simulator, cwd=tmp_path).returncode == 0
    assert simulator.ledger.requests == 2 * ROWS, "all was done before"


def test_a_killed_shard_resumes_by_itself_beside_the_others(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=5, ttft=0.05, gap=0.01)) as slow:
        shards = [
            start("run", "prompts.jsonl", "-o", "out.jsonl", *at(slow), "--shard", f"{i}/2", cwd=tmp_path)
            for i in (1, 2)
        ]
        eventually(lambda: slow.ledger.requests > 80, "80 requests")
        for shard in shards:
            shard.send_signal(signal.SIGSTOP)  # it still holds its lock
        busy = merge(tmp_path)
        same = run(slow, "--shard", "2/2", cwd=tmp_path)
        shards[0].send_signal(signal.SIGKILL)
        shards[0].communicate()
        shards[1].send_signal(signal.SIGCONT)
        _, stderr = shards[1].communicate(timeout=60)
        assert shards[1].returncode == 0, stderr
        assert busy.returncode == 11, busy.stderr
        assert (same.returncode, "shard 2/2" in same.stderr) == (11, True), same.stderr
        early = merge(tmp_path)
        assert early.returncode == 10, early.stderr
        assert "--shard 1/2;" in early.stderr
        assert not (tmp_path / "out.jsonl").exists()
        assert run(slow, "--shard", "1/2", cwd=tmp_path).returncode == 0
        assert merge(tmp_path).returncode == 0
        assert [row["row"] for row in rows_of(tmp_path / "out.jsonl")] == list(range(ROWS))
        assert 0 < asked_twice(slow) <= 16


def test_a_run_without_shards_takes_in_what_they_have(tmp_path: Path, simulator: Simulator) -> None:
    assert run(simulator, "--shard", "1/3", cwd=tmp_path).returncode == 0
    report = batchstream("report", "out.jsonl", cwd=tmp_path)
    assert "1 of 3 shards are done" in report.stderr
    assert "96 done" in report.stdout or "108 done" in report.stdout
    assert run(simulator, cwd=tmp_path).returncode == 0
    assert [row["row"] for row in rows_of(tmp_path / "out.jsonl")] == list(range(ROWS))
    assert simulator.ledger.requests == ROWS
    late = run(simulator, "--shard", "2/3", cwd=tmp_path)
    assert late.returncode == 12, late.stderr
    assert simulator.ledger.requests == ROWS


def test_another_number_of_shards_is_refused(tmp_path: Path, simulator: Simulator) -> None:
    assert run(simulator, "--shard", "1/3", cwd=tmp_path).returncode == 0
    other = run(simulator, "--shard", "2/4", cwd=tmp_path)
    assert other.returncode == 12, other.stderr
    assert "begun with 3 shards" in other.stderr


def test_shards_of_different_jobs_are_not_merged(tmp_path: Path, simulator: Simulator) -> None:
    assert run(simulator, "--shard", "1/2", cwd=tmp_path).returncode == 0
    assert run(simulator, "--shard", "2/2", "--param", "temperature=1", cwd=tmp_path).returncode == 0
    refused = merge(tmp_path)
    assert refused.returncode == 12, refused.stderr
    assert "params.temperature: was absent, is 1" in refused.stderr


def test_shards_that_saw_different_inputs_are_not_merged(tmp_path: Path, simulator: Simulator, prompts: Path) -> None:
    assert run(simulator, "--shard", "1/2", cwd=tmp_path).returncode == 0
    with prompts.open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert run(simulator, "--shard", "2/2", cwd=tmp_path).returncode == 0
    refused = merge(tmp_path)
    assert refused.returncode == 12, refused.stderr
    assert f"rows of the input: {ROWS} and {ROWS + 1}" in refused.stderr


@pytest.mark.parametrize("harm", ["lost", "foreign"])
def test_a_row_that_is_not_there_once_is_noticed(tmp_path: Path, simulator: Simulator, harm: str) -> None:
    all_shards(simulator, tmp_path, 2)
    first, second = (tmp_path / f"out.jsonl.journal/shard-{index}-of-2" for index in (1, 2))
    if harm == "lost":
        (segment,) = second.glob("seg-*")
        lines = segment.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if b'"row":40,' not in line]
        segment.write_bytes(b"".join(line for line in kept if b'"t":"m"' not in line))
    else:
        for path in second.iterdir():
            path.unlink()
        for path in first.iterdir():
            (second / path.name).write_bytes(path.read_bytes())
    refused = merge(tmp_path)
    assert refused.returncode == 13, refused.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_others_is_not_replaced(tmp_path: Path, simulator: Simulator) -> None:
    all_shards(simulator, tmp_path, 2)
    (tmp_path / "out.jsonl").write_text("mine\n")
    refused = merge(tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert merge(tmp_path, "--overwrite").returncode == 0


def test_failed_rows_are_asked_again_in_their_shard(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=3, faults=("400@40",))) as simulator:
        codes = [run(simulator, "--shard", f"{index}/2", cwd=tmp_path).returncode for index in (1, 2)]
        assert sorted(codes) == [0, 3]
        assert merge(tmp_path).returncode == 3
        assert merge(tmp_path, "--max-failures", 1).returncode == 0
        again = run(simulator, "--shard", f"{codes.index(3) + 1}/2", "--retry-failed", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert simulator.ledger.requests == ROWS + 1
    assert merge(tmp_path).returncode == 0
    assert all(row["status"] == "ok" for row in rows_of(tmp_path / "out.jsonl"))


def test_starting_over_puts_the_shards_aside(tmp_path: Path, simulator: Simulator) -> None:
    all_shards(simulator, tmp_path, 2)
    assert run(simulator, "--new-job", cwd=tmp_path).returncode == 0
    assert simulator.ledger.requests == 2 * ROWS
    assert merge(tmp_path).returncode == 10
    assert len(list((tmp_path / "out.jsonl.journal").glob("before-*/shard-*-of-2"))) == 2


@pytest.mark.parametrize("options", [["--sample", 70, "--seed", 3], ["--limit", 77], ["--invalid", "skip"]])
def test_chosen_rows_are_dealt_out_like_all(
    tmp_path: Path, simulator: Simulator, prompts: Path, options: list[object]
) -> None:
    lines = prompts.read_text().splitlines()
    lines[5] = lines[100] = '{"prompt": 5}'
    prompts.write_text("\n".join(lines) + "\n")
    codes = [run(simulator, "--shard", f"{index}/4", *options, cwd=tmp_path).returncode for index in range(1, 5)]
    assert set(codes) <= {0, 3}
    assert merge(tmp_path, "--max-failures", 2).returncode == 0
    whole = batchstream(
        "run", "prompts.jsonl", "-o", "whole.jsonl", *at(simulator), *options, "--max-failures", 2, cwd=tmp_path
    )
    assert whole.returncode == 0, whole.stderr
    assert without_timing(rows_of(tmp_path / "out.jsonl")) == without_timing(rows_of(tmp_path / "whole.jsonl"))


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


@pytest.fixture
def shell(tmp_path: Path, simulator: Simulator) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the README's words as they stand; `batchstream run` gets this test's endpoint as its default."""
    tool = tmp_path / "bin" / "batchstream"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\nif [ "$1" = run ]; then set -- "$@" {shlex.join(at(simulator))}; fi\n'
        f'exec {shlex.quote(sys.executable)} -m batchstream "$@"\n'
    )
    tool.chmod(0o755)

    def run_shell(script: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{tool.parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, env={**environment(**env), "PATH": path},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run_shell


def test_the_xargs_recipe(
    tmp_path: Path, simulator: Simulator, shell: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = shell(block("sh", "xargs"))
    assert done.returncode == 0, done.stderr
    assert [row["row"] for row in rows_of(tmp_path / "answers.jsonl")] == list(range(ROWS))
    assert simulator.ledger.requests == ROWS


def test_the_slurm_recipe(
    tmp_path: Path, simulator: Simulator, shell: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = block("bash", "SBATCH")
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())  # type: ignore[union-attr]
    for task in range(first, last + 1):
        told = {"ID": task, "MIN": first, "MAX": last, "COUNT": last - first + 1, "STEP": 1}
        done = shell(script, **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in told.items()})
        assert done.returncode == 0, done.stderr
    alone = {"ID": 3, "MIN": 3, "MAX": 3, "COUNT": 1, "STEP": 1}
    refused = shell(script, **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in alone.items()})
    assert refused.returncode == 12, "a task that is alone in its array would ask for everything"
    assert shell("batchstream merge answers.jsonl").returncode == 0
    assert simulator.ledger.requests == ROWS == len(rows_of(tmp_path / "answers.jsonl"))


def test_the_kubernetes_recipe(
    tmp_path: Path, simulator: Simulator, shell: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    manifest = block("yaml", "kind: Job").replace("/data/", "")
    count = int(re.search(r"completions: (\d+)", manifest)[1])  # type: ignore[index]
    variable, value = re.search(r"name: (BATCHSTREAM_SHARDS), value: \"(\d+)\"", manifest).groups()  # type: ignore[union-attr]
    assert int(value) == count
    words = re.search(r"command: \[(.*)\]", manifest)[1].split(", ")  # type: ignore[index]
    for index in range(count):
        done = shell(shlex.join(words), **{variable: value, "JOB_COMPLETION_INDEX": str(index)})
        assert done.returncode == 0, done.stderr
    assert shell("batchstream merge answers.jsonl").returncode == 0
    assert simulator.ledger.requests == ROWS == len(rows_of(tmp_path / "answers.jsonl"))


def test_a_shard_wants_an_input_that_each_can_read(tmp_path: Path) -> None:
    refused = batchstream("run", "-", "-o", "out.jsonl", "--provider", "sim", "--shard", "1/2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "stdin can be read once" in refused.stderr
    unknown = batchstream("run", "prompts.jsonl", "-o", "o.jsonl", "--provider", "sim", "--shard", "auto", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "name the shard itself: I/N" in unknown.stderr
