"""Limits and budgets from the command line: what is estimated, where a run stops, and how the same command goes on."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from cli import batchstream, rows_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "max_tokens": 10}) + "\n" for i in range(40)))
    return path


def sim(*args: object, cwd: Path):
    return batchstream("run", "prompts.jsonl", "-o", "out.jsonl", "--provider", "sim", "--no-progress", *args, cwd=cwd)


def test_a_cap_on_the_cost_stops_the_job_and_a_higher_one_goes_on(prompts: Path, tmp_path: Path) -> None:
    priced = ("--price", "in=1000,out=1000000", "--concurrency", 4)
    done = sim(*priced, "--max-cost", 100, cwd=tmp_path)
    assert done.returncode == 5
    assert "--max-cost 100" in done.stderr.splitlines()[-1]
    spent = json.loads((tmp_path / "out.jsonl.summary.json").read_text())["limits"]["cost"]
    assert 100 <= spent <= 100 + 4 * 11
    again = sim(*priced, "--max-cost", 100, cwd=tmp_path)
    assert again.returncode == 5, "the cap is the job's, not the run's"
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text())["attempts"]["total"] <= 14
    done = sim(*priced, "--max-cost", 1000, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == 40
    total = json.loads((tmp_path / "out.jsonl.summary.json").read_text())["limits"]["cost"]
    assert total == pytest.approx(40 * 10, rel=0.05)


@pytest.mark.parametrize("command", [("check",), ("run", "--dry-run")])
def test_requests_tokens_cost_and_time_are_estimated_before(command, prompts: Path, tmp_path: Path) -> None:
    done = batchstream(*command, "prompts.jsonl", "--provider", "sim", "--rpm", 4, "--request-weight", 2,
                       "--price", "in=0,out=1000000", "--max-cost", 5, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line[:10].strip(): line[10:] for line in done.stdout.splitlines()}
    assert lines["Requests"].startswith("40, retries apart; they count for 80")
    assert "at most 400" in lines["Tokens"]
    assert lines["Cost"].startswith("about 400,")
    assert "--max-cost 5 stops before" in lines["Cost"]
    assert lines["Time"].startswith("at least 20 min 00 s at 4 requests a minute")
    assert not (tmp_path / "prompts.results.jsonl.journal").exists(), "nothing is sent, nothing begun"


def test_an_account_that_runs_dry_at_the_third_request_stops_at_once_and_goes_on_when_cured(
    prompts: Path, tmp_path: Path
) -> None:
    done = sim("--sim", "faults=402@3..999", "--concurrency", 1, cwd=tmp_path)
    assert done.returncode == 4
    assert "402" in done.stderr.splitlines()[-1]
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (summary["rows"]["ok"], summary["rows"]["failed"], summary["run"]["pending"]) == (2, 0, 38)
    assert summary["run"]["elapsed_s"] < 5
    done = sim("--concurrency", 1, cwd=tmp_path)
    assert done.returncode == 0
    assert {row["status"] for row in rows_of(tmp_path / "out.jsonl")} == {"ok"}


@pytest.mark.parametrize("fault", ["429(retry-after=4000)@3", "429(message=Daily limit exceeded)@3"])
def test_a_wait_beyond_patience_says_when_the_same_command_can_go_on(fault: str, prompts: Path, tmp_path: Path) -> None:
    done = sim("--sim", f"faults={fault}", "--concurrency", 1, cwd=tmp_path)
    assert done.returncode == 5
    said = re.search(r"go on at (\S+)", done.stderr.splitlines()[-1])
    assert said, done.stderr
    away = (datetime.fromisoformat(said[1].rstrip(":")) - datetime.now().astimezone()).total_seconds()
    assert 3900 < away < 4002 if "4000" in fault else 0 < away <= 86_400


def test_a_deadline_that_is_over_admits_nothing(prompts: Path, tmp_path: Path) -> None:
    done = sim("--deadline", "2020-01-01T00:00", cwd=tmp_path)
    assert done.returncode == 5
    assert "--deadline 2020-01-01T00:00 is over" in done.stderr.splitlines()[-1]


def test_a_models_weight_is_read_from_the_endpoint(prompts: Path, tmp_path: Path) -> None:
    done = sim(
        "--plan", "premium", "--model", "sim/double", "--sim", "plan=premium", "--sim", "speedup=60", cwd=tmp_path
    )
    assert done.returncode == 0
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["limits"]["refused"] == 0, "the endpoint counts each request twice, and so did we"
    assert "requests a minute" in done.stderr


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--plan", "premium", "--rpm", "3"], "plan and rpm"),
        (["--max-cost", "3"], "--price"),
        (["--price", "in=1", "--max-cost", "3"], "in, out"),
        (["--price", "cheap"], "in=N,out=N"),
        (["--breaker", "sometimes"], "failures=20,refusals=3"),
        (["--deadline", "tomorrow"], "06:00"),
        (["--rpm", "0"], "above 0"),
        (["--rpm", "sim=x"], "MODEL=N"),
        (["--request-weight", "2", "--request-weight", "m=3"], "got both"),
        (["--max-time", "3", "--deadline", "06:00"], "one of them"),
        (["--window", "sliding"], "rolling"),
    ],
)
def test_a_limit_that_makes_no_sense_is_one_line(args: list[str], hint: str, prompts: Path, tmp_path: Path) -> None:
    done = sim(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert hint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_job_file_states_limits_as_tables(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        "[input]\npath = 'prompts.jsonl'\n[endpoint]\nprovider = 'sim'\n[limits]\n"
        "rpm = { sim = 60000 }\ntpm = 1e6\nrequest_weight = 2\nconcurrency = 'auto'\nmax_cost = 1000\n"
        "price.in = 1\nprice.out = 2\nprice.sim = { in = 1, out = 2, cached = 0.5 }\n"
        "[retry]\nbreaker = 'failures=3'\n[output]\npath = 'out.jsonl'\n"
    )
    done = batchstream("run", "job.toml", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
