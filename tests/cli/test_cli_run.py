"""`run` as a user or a cron table calls it: exit codes, the last line, what is on which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import BAD_KEY, GOOD_KEY, batchstream, command, environment, rows_of, start

from batchstream.endpoints.simulate import Simulator

At = Callable[[Simulator], list[str]]
SLOW = ["--provider", "sim", "--sim", "ttft=0.2", "--sim", "gap=0.05", "--sim", "tokens=12", "--concurrency", "2"]


def last(text: str) -> str:
    return text.splitlines()[-1]


def everything_under(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_a_run_keeps_stdout_for_data_and_leaves_results_and_summary(prompts: Path, tmp_path: Path) -> None:
    done = batchstream("run", prompts, "--provider", "sim", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == ""
    assert "12 ok" in done.stderr
    assert [row["id"] for row in rows_of(tmp_path / "prompts.results.jsonl")] == [f"p{i}" for i in range(12)]
    summary = json.loads((tmp_path / "prompts.results.jsonl.summary.json").read_text())
    assert summary["rows"]["ok"] == 12


def test_a_finished_job_sends_nothing_and_keeps_the_figures_of_its_run(
    prompts: Path, endpoint: Simulator, at: At, tmp_path: Path
) -> None:
    first = batchstream("run", prompts, *at(endpoint), cwd=tmp_path)
    kept = (tmp_path / "prompts.results.jsonl.summary.json").read_bytes()
    second = batchstream("run", prompts, *at(endpoint), cwd=tmp_path)
    assert (first.returncode, second.returncode, endpoint.ledger.requests) == (0, 0, 12)
    assert "nothing was sent" in last(second.stderr)
    assert (tmp_path / "prompts.results.jsonl.summary.json").read_bytes() == kept


def test_quiet_says_nothing_when_all_is_well(prompts: Path, tmp_path: Path) -> None:
    done = batchstream("run", prompts, "--provider", "sim", "-q", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_summary_goes_to_stdout_or_to_a_file_when_asked(prompts: Path, tmp_path: Path) -> None:
    to_stdout = batchstream("run", prompts, "--provider", "sim", "-q", "--summary-json", "-", cwd=tmp_path)
    assert json.loads(to_stdout.stdout)["rows"]["ok"] == 12
    to_file = batchstream("run", prompts, "--provider", "sim", "-q", "--summary-json", "s.json", cwd=tmp_path)
    assert (to_file.stdout, json.loads((tmp_path / "s.json").read_text())["rows"]["ok"]) == ("", 12)


def test_a_summary_without_a_directory_is_refused_before_the_first_request(
    prompts: Path, endpoint: Simulator, at: At, tmp_path: Path
) -> None:
    done = batchstream("run", prompts, *at(endpoint), "--summary-json", "no/where.json", cwd=tmp_path)
    assert (done.returncode, endpoint.ledger.requests) == (2, 0)
    assert "--summary-json no/where.json" in last(done.stderr)


def test_a_summary_that_cannot_be_written_is_not_passed_over(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    done = batchstream("run", prompts, "--provider", "sim", "--summary-json", "taken", cwd=tmp_path)
    assert done.returncode == 14
    assert "finished; but the summary could not be written: taken: " in last(done.stderr)
    assert len(rows_of(tmp_path / "prompts.results.jsonl")) == 12


def test_a_summary_is_as_readable_as_other_files(prompts: Path, tmp_path: Path) -> None:
    batchstream("run", prompts, "--provider", "sim", "-q", cwd=tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.glob("*") if path.is_file()}
    assert len(modes) == 1


def test_log_format_json_makes_every_line_of_stderr_an_object(prompts: Path, tmp_path: Path) -> None:
    faulty = ["--sim", "faults=500(times=1)=1", "--sim", "tokens=4", "-v", "--log-format", "json"]
    done = batchstream("run", prompts, "--provider", "sim", *faulty, cwd=tmp_path)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"attempt_failed", "summary"} <= {event["event"] for event in events}
    failed = [event for event in events if event["event"] == "attempt_failed"]
    assert sorted(event["row"] for event in failed) == list(range(12))
    assert {(event["attempt"], event["kind"], event["status"]) for event in failed} == {(1, "server", 500)}


def test_verbose_names_row_attempt_and_reason_of_each_failed_attempt(prompts: Path, tmp_path: Path) -> None:
    faulty = ["--sim", "faults=500(times=2)=1", "--limit", "1", "-v"]
    done = batchstream("run", prompts, "--provider", "sim", *faulty, cwd=tmp_path)
    assert "row 0 (id p0), attempt 1: server: HTTP 500" in done.stderr
    assert "row 0 (id p0), attempt 2: server: HTTP 500" in done.stderr
    assert "attempt 3" not in done.stderr


def test_a_wrong_key_stops_the_run_with_one_line_that_names_its_variable(
    prompts: Path, guarded: Simulator, tmp_path: Path
) -> None:
    args = ["run", prompts, "--provider", "shuttleai", "--base-url", guarded.base_url, "-q"]
    done = batchstream(*args, cwd=tmp_path, SHUTTLEAI_API_KEY=BAD_KEY)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert "SHUTTLEAI_API_KEY" in done.stderr
    assert "the same command resumes" in done.stderr
    assert not (tmp_path / "prompts.results.jsonl").exists()
    assert BAD_KEY.encode() not in done.stderr.encode() + everything_under(tmp_path)

    again = batchstream(*args, cwd=tmp_path, SHUTTLEAI_API_KEY=GOOD_KEY)
    assert (again.returncode, len(rows_of(tmp_path / "prompts.results.jsonl"))) == (0, 12)
    assert GOOD_KEY.encode() not in again.stderr.encode() + everything_under(tmp_path)


def test_a_missing_key_is_told_by_its_variable_before_anything_is_sent(
    prompts: Path, guarded: Simulator, tmp_path: Path
) -> None:
    done = batchstream("run", prompts, "--provider", "shuttleai", "--base-url", guarded.base_url, cwd=tmp_path)
    assert (done.returncode, guarded.ledger.requests) == (4, 0)
    assert "SHUTTLEAI_API_KEY" in last(done.stderr)


def test_a_key_that_the_endpoint_echoes_is_redacted(prompts: Path, tmp_path: Path) -> None:
    fault = f"401(message=Incorrect key {GOOD_KEY})=1"
    done = batchstream(
        "run", prompts, "--provider", "sim", "--api-key-env", "MY_KEY", "--sim", f"faults={fault}", "-v",
        cwd=tmp_path, MY_KEY=GOOD_KEY,
    )  # fmt: skip
    assert done.returncode == 4
    assert "Incorrect key [key]" in done.stderr
    assert GOOD_KEY not in done.stderr
    assert GOOD_KEY.encode() not in everything_under(tmp_path)


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, endpoint: Simulator, at: At) -> None:
    lines = [json.dumps({"prompt": f"Say {i}."}) for i in range(1, 31)]
    lines[16] = '{"prompt": '
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    strict = batchstream("run", "in.jsonl", *at(endpoint), "--invalid", "fail", cwd=tmp_path)
    assert (strict.returncode, endpoint.ledger.requests) == (10, 0)
    assert "in.jsonl:17:" in last(strict.stderr)

    recorded = batchstream("run", "in.jsonl", *at(endpoint), cwd=tmp_path)
    assert (recorded.returncode, endpoint.ledger.requests) == (3, 29)
    row = rows_of(tmp_path / "in.results.jsonl")[16]
    assert "in.jsonl:17:" in row["error"]["message"]
    assert batchstream("run", "in.jsonl", *at(endpoint), "--max-failures", "1", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("out", "code"), [("no/such/dir/out.jsonl", 14), ("out.txt", 2), ("prompts.jsonl", 2), ("a-directory.jsonl", 2)]
)
def test_an_output_that_cannot_be_is_refused_before_the_first_request(
    out: str, code: int, prompts: Path, endpoint: Simulator, at: At, tmp_path: Path
) -> None:
    (tmp_path / "a-directory.jsonl").mkdir()
    done = batchstream("run", prompts, *at(endpoint), "-o", out, cwd=tmp_path)
    assert (done.returncode, endpoint.ledger.requests) == (code, 0)
    assert out in last(done.stderr)
    assert f"(exit {code}; " in last(done.stderr)
    assert "Traceback" not in done.stderr


def test_an_output_of_somebody_else_is_not_replaced(prompts: Path, endpoint: Simulator, at: At, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("precious\n")
    done = batchstream("run", prompts, *at(endpoint), "-o", "mine.jsonl", cwd=tmp_path)
    assert (done.returncode, endpoint.ledger.requests) == (2, 0)
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_drains_the_run_ends_by_it_and_the_same_command_resumes(
    number: signal.Signals, prompts: Path, tmp_path: Path
) -> None:
    run = start("run", prompts, *SLOW, "--no-progress", cwd=tmp_path)
    journal = tmp_path / "prompts.results.jsonl.journal"
    while not any(b'"t":"o"' in path.read_bytes() for path in journal.glob("seg-*")):
        time.sleep(0.05)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == -number  # a shell shows 128 + N
    assert number.name in last(said)
    assert f"(exit {128 + number}; the same command resumes)" in last(said)
    assert "Traceback" not in said
    assert not (tmp_path / "prompts.results.jsonl").exists()
    assert json.loads((tmp_path / "prompts.results.jsonl.summary.json").read_text())["run"]["exit_code"] == 128 + number

    fast = ["--provider", "sim"]
    assert batchstream("run", prompts, *fast, cwd=tmp_path).returncode == 0
    assert [row["row"] for row in rows_of(tmp_path / "prompts.results.jsonl")] == list(range(12))


def test_nohup_means_that_a_closed_terminal_ends_nothing(prompts: Path, tmp_path: Path) -> None:
    line = f"trap '' HUP; exec {sys.executable} -m batchstream run {prompts} {' '.join(SLOW)} -q"
    run = subprocess.Popen(["sh", "-c", line], cwd=tmp_path, env=environment())
    journal = tmp_path / "prompts.results.jsonl.journal"
    while not any(b'"t":"o"' in path.read_bytes() for path in journal.glob("seg-*")):
        time.sleep(0.05)
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 0
    assert len(rows_of(tmp_path / "prompts.results.jsonl")) == 12


def test_a_second_run_is_told_who_holds_the_job(prompts: Path, tmp_path: Path) -> None:
    first = start("run", prompts, *SLOW, "--rpm", "2", "--no-progress", cwd=tmp_path)  # minutes: it outlasts the others
    journal = tmp_path / "prompts.results.jsonl.journal"
    while not list(journal.glob("seg-*")):
        time.sleep(0.05)
    try:
        second = batchstream("run", prompts, *SLOW, cwd=tmp_path)
        skipped = batchstream("run", prompts, *SLOW, "--if-locked", "skip", cwd=tmp_path)
        checked = batchstream("check", prompts, *SLOW, cwd=tmp_path)
        report = batchstream("report", "prompts.results.jsonl", cwd=tmp_path)
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert (second.returncode, skipped.returncode, checked.returncode) == (11, 0, 11)
    assert f"pid {first.pid}" in last(second.stderr)
    assert f"pid {first.pid}" in last(checked.stderr)
    assert f"still running (pid {first.pid}" in report.stderr


def test_a_changed_model_is_refused_by_name(prompts: Path, tmp_path: Path) -> None:
    assert batchstream("run", prompts, "--provider", "sim", cwd=tmp_path).returncode == 0
    for name in ("run", "check"):
        changed = batchstream(name, prompts, "--provider", "sim", "--model", "other", cwd=tmp_path)
        assert changed.returncode == 12
        assert "model: was 'sim', is 'other'" in last(changed.stderr)


def test_a_limit_of_the_user_stops_the_run_with_5_and_it_resumes(prompts: Path, tmp_path: Path) -> None:
    limited = ["--provider", "sim", "--concurrency", "1", "--max-requests", "5"]
    codes = [batchstream("run", prompts, *limited, cwd=tmp_path).returncode for _ in range(3)]
    assert codes == [5, 5, 0]


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_nothing(closed: str, prompts: Path, tmp_path: Path) -> None:
    line = f"{sys.executable} -m batchstream run {prompts} --provider sim {closed}"
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment()).returncode == 0
    assert len(rows_of(tmp_path / "prompts.results.jsonl")) == 12


def test_nobody_has_to_read_what_a_run_says(prompts: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    args = ["run", str(prompts), "--provider", "sim", "--sim", "faults=500(times=1)=1", "-v", "--summary-json", "-"]
    done = subprocess.run(command(*args), cwd=tmp_path, env=environment(), stdout=writer, stderr=writer, timeout=120)
    os.close(writer)
    assert done.returncode == 0
    assert len(rows_of(tmp_path / "prompts.results.jsonl")) == 12


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    args = command("run", "nix.jsonl", "--provider", "sim")
    buffered = environment(PYTHONUNBUFFERED="")  # what is left in the buffer fails again when the interpreter ends
    done = subprocess.run(args, cwd=tmp_path, env=buffered, stderr=writer, timeout=120)
    os.close(writer)
    assert done.returncode == 10


def test_a_bug_is_exit_1_with_a_traceback_that_holds_no_key(prompts: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "import batchstream.launch.here\n"
        "def broken(*args, **options): raise RuntimeError('odd: ' + os.environ['SHUTTLEAI_API_KEY'])\n"
        "batchstream.launch.here.run = broken\n"
        "from batchstream.cli.main import main\n"
        f"sys.argv = ['batchstream', 'run', {str(prompts)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env=environment(SHUTTLEAI_API_KEY=GOOD_KEY),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "this is a bug in batchstream: RuntimeError: odd: [key]; please report it" in last(done.stderr)
    assert GOOD_KEY not in done.stderr


def test_an_interrupt_before_the_run_starts_ends_by_the_signal_without_a_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    run = subprocess.Popen(
        command("ask", "-", "--provider", "sim"), cwd=tmp_path, env=environment(), stdin=reader,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(2.0)
    run.send_signal(signal.SIGINT)
    out, said = run.communicate(timeout=60)
    os.close(writer)
    assert (run.returncode, out) == (-signal.SIGINT, "")
    assert "Traceback" not in said
    assert last(said) == "batchstream: error: interrupted"


@pytest.mark.parametrize("words", ["export prompts.results.jsonl --format csv", "report prompts.results.jsonl",
                                   "ask hi --provider sim", "--help"])  # fmt: skip
def test_data_for_a_closed_stdout_is_an_error_and_no_success(words: str, prompts: Path, tmp_path: Path) -> None:
    assert batchstream("run", prompts, "--provider", "sim", cwd=tmp_path).returncode == 0
    line = f"{sys.executable} -m batchstream {words} >&-"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 14
    assert "stdout: cannot write" in last(done.stderr)
    assert "Traceback" not in done.stderr
