"""The job files that come with the package: they are valid, and they run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli import batchstream, rows_of

import batchstream as package

JOBS = Path(package.__file__).parent.parent / "jobs"


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A copy, as a user has it after cloning."""
    shutil.copytree(
        JOBS,
        tmp_path / "jobs",
        ignore=lambda folder, names: [n for n in names if folder.endswith("out") and n != ".gitignore"],
    )
    return tmp_path / "jobs"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_job_file_checks_and_runs_against_the_simulation(path: Path, jobs: Path, tmp_path: Path) -> None:
    args = [f"jobs/{path.name}", "--provider", "sim"]
    check = batchstream("check", *args, cwd=tmp_path)
    assert check.returncode == 0, check.stderr
    assert "malformed" not in check.stdout
    done = batchstream("run", *args, "--rpm", "60000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [made.parent.name for made in tmp_path.rglob("*.journal")] == ["out"]


def test_the_prompts_show_every_shape_of_a_row_but_the_batch_line(jobs: Path, tmp_path: Path) -> None:
    rows = rows_of(jobs / "prompts.jsonl")
    assert all(any(key in row for row in rows) for key in ("prompt", "system", "messages", "id", "max_tokens", "stop"))
    assert all({"custom_id", "method", "url", "body"} == set(row) for row in rows_of(jobs / "batch.jsonl"))
    assert batchstream("run", "jobs/batch.jsonl", "--provider", "sim", "-q", cwd=tmp_path).returncode == 0


def test_the_table_comes_out_as_a_table_with_its_kept_columns(jobs: Path, tmp_path: Path) -> None:
    assert batchstream("run", "jobs/articles.toml", "--provider", "sim", "-q", cwd=tmp_path).returncode == 0
    source = pq.read_table(jobs / "articles.parquet")
    table = pq.read_table(jobs / "out" / "articles.parquet")
    assert table.column("id").to_pylist() == source.column("article_id").to_pylist()
    assert [kept["title"] for kept in table.column("input").to_pylist()] == source.column("title").to_pylist()


def test_a_probe_measures_again_under_another_name(jobs: Path, tmp_path: Path) -> None:
    args = ["run", "jobs/latency-probe.toml", "--provider", "sim", "--rpm", "60000"]
    for name in ("one.jsonl", "two.jsonl"):
        assert batchstream(*args, "-q", "-o", name, cwd=tmp_path).returncode == 0
        assert len(rows_of(tmp_path / name)) == 5
