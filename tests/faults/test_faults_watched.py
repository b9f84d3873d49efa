"""Who looks at a job does not disturb it, and who stops listening does not end it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from cli import batchstream, command, environment, rows_of, start

from batchstream.endpoints.simulate import SimulateConfig, running

ROWS = 40


def write_prompts(folder: Path) -> None:
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "question {row}"}}\n' for row in range(ROWS)))


def state_of(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file below, byte for byte, with its mode and the time of its last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.stat()
        found[str(path)] = (path.read_bytes() if path.is_file() else b"", about.st_mode, about.st_mtime_ns)
    return found


def report(folder: Path, *more: object) -> dict[str, int]:
    done = batchstream("report", "o.jsonl", "--format", "json", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows: dict[str, int] = json.loads(done.stdout)["rows"]
    return rows


def test_a_report_on_a_running_job_changes_no_byte_of_it_and_the_run_goes_on(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    # Half of the rows are answered, then a 429 closes the gate for all: nothing is written meanwhile.
    with running(SimulateConfig(tokens=4, faults=("429(retry-after=5)@21",))) as simulator:
        args = ("run", "p.jsonl", "-o", "o.jsonl", "--base-url", simulator.base_url, "--model", "sim", "-q")
        run = start(*args, "--concurrency", 4, cwd=tmp_path)
        deadline = time.monotonic() + 30
        while simulator.ledger.requests < 21 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.4)  # the last group has been synced
        before = state_of(tmp_path)
        rows = report(tmp_path)
        unchanged = state_of(tmp_path)
        second = batchstream(*args, cwd=tmp_path)
        _, stderr = run.communicate(timeout=120)
        assert run.returncode == 0, stderr
        assert unchanged == before
        assert 0 < rows["ok"] < ROWS
        assert second.returncode == 11, "the run had ended before it was looked at: the test proves nothing"
        assert len({entry.digest for entry in simulator.ledger.entries}) == ROWS
    assert {row["status"] for row in rows_of(tmp_path / "o.jsonl")} == {"ok"}


def test_a_report_on_a_dead_job_changes_no_byte_of_it(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    with running(SimulateConfig(tokens=4, gap=0.02)) as simulator:
        args = (
            "run",
            "p.jsonl",
            "-o",
            "o.jsonl",
            "--base-url",
            simulator.base_url,
            "--model",
            "sim",
            "--concurrency",
            4,
        )
        run = start(*args, cwd=tmp_path)
        while simulator.ledger.requests < 20:
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        run.kill()
        run.communicate()
        before = state_of(tmp_path)
        rows = report(tmp_path)
        assert rows["ok"] >= 10
        assert report(tmp_path, "--salvage") == rows
        assert state_of(tmp_path) == before
        done = batchstream(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert simulator.ledger.requests <= ROWS + 4


def test_salvage_counts_what_is_whole_and_changes_nothing(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    done = batchstream(
        "run", "p.jsonl", "-o", "o.jsonl", "--provider", "sim", "--durability", "row", "-q", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (segment,) = (tmp_path / "o.jsonl.journal").glob("seg-*")
    data = bytearray(segment.read_bytes())
    place = data.index(b'"t":"o","row":7,') + 100
    data[place] ^= 0x20
    segment.write_bytes(data)
    before = state_of(tmp_path)
    refused = batchstream("report", "o.jsonl", cwd=tmp_path)
    assert refused.returncode == 13
    assert "--salvage" in refused.stderr
    assert report(tmp_path, "--salvage")["ok"] == ROWS - 1
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("talk", [["-v"], ["-v", "--log-format", "json"], ["--summary-json", "-"]], ids=" ".join)
def test_a_run_whose_reader_leaves_in_the_middle_ends_as_if_nobody_had_listened(
    tmp_path: Path, talk: list[str]
) -> None:
    write_prompts(tmp_path)
    args = [
        "run",
        "p.jsonl",
        "-o",
        "o.jsonl",
        "--provider",
        "sim",
        "--sim",
        "faults=500=0.3",
        "--sim",
        "gap=0.005",
        *talk,
    ]
    out, err = os.pipe(), os.pipe()
    run = subprocess.Popen(command(*args), cwd=tmp_path, env=environment(), stdout=out[1], stderr=err[1])
    os.close(out[1])
    os.close(err[1])
    os.close(out[0])
    if "-v" in talk:
        assert os.read(err[0], 10)
    os.close(err[0])
    assert run.wait(timeout=60) == 0
    assert {row["status"] for row in rows_of(tmp_path / "o.jsonl")} == {"ok"}
