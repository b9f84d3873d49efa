"""`report` and `export`: what a journal says, while the job runs, after it stopped, and when it is damaged."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli import batchstream, rows_of, start

SIM = ["--provider", "sim", "--sim", "tokens=8"]


@pytest.fixture
def finished(prompts: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out.jsonl"
    assert batchstream("run", prompts, *SIM, "-o", out, "-q", cwd=tmp_path).returncode == 0
    return out


def test_a_finished_job_has_the_figures_that_its_run_had(finished: Path, tmp_path: Path) -> None:
    done = batchstream("report", finished, "--format", "json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads(finished.with_name("out.jsonl.summary.json").read_text())


def test_the_journal_counts_and_not_a_summary_that_says_otherwise(finished: Path, tmp_path: Path) -> None:
    beside = finished.with_name("out.jsonl.summary.json")
    told = json.loads(beside.read_text())
    told["rows"]["ok"] = 99
    beside.write_text(json.dumps(told))
    found = json.loads(batchstream("report", finished, "--format", "json", cwd=tmp_path).stdout)
    assert (found["rows"]["ok"], found["run"]["elapsed_s"], found["evidence"]) == (12, None, None)
    beside.write_text("no JSON")
    assert json.loads(batchstream("report", finished, "--format", "json", cwd=tmp_path).stdout)["rows"]["ok"] == 12


def test_text_and_markdown_are_on_stdout(finished: Path, tmp_path: Path) -> None:
    text = batchstream("report", finished, cwd=tmp_path)
    markdown = batchstream("report", finished, "--format", "markdown", cwd=tmp_path)
    assert "12 ok" in text.stdout
    assert markdown.stdout.startswith("- **Rows**: ")
    assert text.stderr == markdown.stderr == ""


def test_several_jobs_are_reported_one_after_the_other(finished: Path, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    batchstream("run", prompts, *SIM, "-o", other, "--limit", "5", "-q", cwd=tmp_path)
    done = batchstream("report", finished, other, "--format", "json", cwd=tmp_path)
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        summary, end = decoder.raw_decode(text)
        found.append(summary["rows"]["ok"])
        text = text[end:].strip()
    assert found == [12, 5]


def test_a_results_file_without_its_journal_is_enough(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    alone = finished.rename(tmp_path / "elsewhere" / "alone.jsonl")
    done = batchstream("report", alone, "--format", "json", cwd=tmp_path)
    assert json.loads(done.stdout)["rows"]["ok"] == 12


def test_a_killed_job_is_reported_and_exported_as_far_as_it_came(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    slow = ["--provider", "sim", "--sim", "ttft=0.2", "--concurrency", "2"]
    run = start("run", prompts, *slow, "-o", out, "--durability", "row", cwd=tmp_path)
    while not any(b'"t":"o"' in path.read_bytes() for path in tmp_path.glob("out.jsonl.journal/seg-*")):
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    report = batchstream("report", out, "--format", "json", cwd=tmp_path)
    assert "not finished; the same command resumes it" in report.stderr
    ok = json.loads(report.stdout)["rows"]["ok"]
    assert 0 < ok < 12
    exported = batchstream("export", out, "--format", "jsonl", cwd=tmp_path)
    assert exported.stdout.count("\n") == ok


def test_a_damaged_journal_is_exit_13_and_salvage_counts_what_is_left(finished: Path, tmp_path: Path) -> None:
    segment = next(tmp_path.glob("out.jsonl.journal/seg-*"))
    data = segment.read_bytes()
    at = data.index(b'"row":3,"d"')
    segment.write_bytes(data[:at] + b"!" + data[at + 1 :])
    refused = batchstream("report", finished, cwd=tmp_path)
    assert refused.returncode == 13
    assert len(refused.stderr.splitlines()) == 1
    salvaged = batchstream("report", finished, "--salvage", "--format", "json", cwd=tmp_path)
    assert (salvaged.returncode, json.loads(salvaged.stdout)["rows"]["ok"]) == (0, 11)
    assert "1 damaged records were passed over" in salvaged.stderr


def test_nothing_there_is_exit_10(tmp_path: Path) -> None:
    for args in (["report", "nix.jsonl"], ["export", "nix.jsonl", "--format", "csv"]):
        done = batchstream(*args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (10, "")
        assert "nix.jsonl" in done.stderr


def test_every_format_has_every_row(finished: Path, tmp_path: Path) -> None:
    rows = rows_of(finished)
    assert batchstream("export", finished, "--format", "jsonl", cwd=tmp_path).stdout == finished.read_text()
    flat = batchstream("export", finished, "--format", "csv", "-o", "out.csv", cwd=tmp_path)
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [row["text"] for row in rows]
    table = batchstream("export", finished, "--format", "parquet", "-o", "out.parquet", cwd=tmp_path)
    assert pq.read_table(tmp_path / "out.parquet").column("text").to_pylist() == [row["text"] for row in rows]
    assert (flat.returncode, table.returncode, flat.stdout, table.stdout) == (0, 0, "", "")


def test_batch_lines_hold_the_body_that_the_api_would_have_sent(finished: Path, tmp_path: Path) -> None:
    done = batchstream("export", finished, "--format", "openai-batch", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.split("\n") if line]
    for line, row in zip(lines, rows_of(finished), strict=True):
        body = line["response"]["body"]
        assert (line["custom_id"], line["response"]["status_code"]) == (row["id"], 200)
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": row["text"]}
        assert body["usage"]["completion_tokens"] == row["usage"]["completion_tokens"]


def test_batch_lines_of_another_api_have_its_shape(prompts: Path, tmp_path: Path) -> None:
    batchstream("run", prompts, *SIM, "--api", "responses", "-o", "r.jsonl", "-q", cwd=tmp_path)
    done = batchstream("export", "r.jsonl", "--format", "openai-batch", cwd=tmp_path)
    assert {json.loads(line)["response"]["body"]["object"] for line in done.stdout.split("\n") if line} == {"response"}


@pytest.mark.parametrize("target", ["there.csv", "-"])
def test_an_export_that_cannot_be_is_refused(target: str, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("precious\n")
    style = "csv" if target != "-" else "parquet"
    done = batchstream("export", finished, "--format", style, "-o", target, cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "there.csv").read_text() == "precious\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("args", [["export", "--format", "csv"], ["report"]])
def test_a_full_stdout_is_exit_14_in_one_line(args: list[str], finished: Path, tmp_path: Path) -> None:
    import subprocess

    from cli import command, environment

    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(args[0], finished, *args[1:]), cwd=tmp_path, env=environment(), stdout=full,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 14
    assert done.stderr.splitlines() == ["batchstream: error: stdout: cannot write: No space left on device"]


def test_a_reader_that_leaves_ends_an_export_quietly(tmp_path: Path) -> None:
    row = json.dumps({"row": 0, "text": "x" * 1000})
    (tmp_path / "big.jsonl").write_text(f"{row}\n" * 2000)
    with start("export", "big.jsonl", "--format", "jsonl", cwd=tmp_path) as export:
        assert export.stdout is not None
        assert export.stderr is not None
        export.stdout.readline()
        export.stdout.close()
        assert export.stderr.read() == ""
        assert export.wait(60) == -signal.SIGPIPE


@pytest.fixture
def two(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(60)))
    for name, ttft in (("a", 0.01), ("b", 0.05)):
        sim = ["--provider", "sim", "--sim", f"ttft={ttft}", "--sim", "tokens=3", "--concurrency", "20"]
        assert batchstream("run", "p.jsonl", *sim, "-o", f"{name}.jsonl", "-q", cwd=tmp_path).returncode == 0
    return tmp_path


def test_two_runs_are_compared_with_intervals(two: Path) -> None:
    done = batchstream("report", "a.jsonl", "b.jsonl", "--compare", cwd=two)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ttft ") and " paired " in line]
    assert line.endswith("higher")
    same = batchstream("report", "a.jsonl", "a.jsonl", "--compare", cwd=two)
    assert "No difference shown" in same.stdout


def test_a_condition_that_holds_is_exit_code_3(two: Path) -> None:
    bad = batchstream("report", "a.jsonl", "b.jsonl", "--fail-if", "ttft.p50 > +50%", cwd=two)
    assert bad.returncode == 3
    assert "ttft.p50 > +50%" in bad.stderr
    good = batchstream("report", "b.jsonl", "--fail-if", "failed > 0%", "--fail-if", "ttft.p50 > 10s", cwd=two)
    assert (good.returncode, good.stdout) == (0, "")
    wrong = batchstream("report", "b.jsonl", "--fail-if", "ttft.p50 > +5%", cwd=two)
    assert wrong.returncode == 2
    assert "compares two runs" in wrong.stderr
