"""Runs through the Python API against the simulated endpoint: stops, budgets, retries, gates, what stays pending."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from batchstream.api import read_results, stream, stream_results
from batchstream.endpoints.simulate import SimulateConfig, Simulator, running
from batchstream.errors import IdentityError, StoppedError, UsageError
from batchstream.job import Job
from batchstream.launch.conclusion import Report
from batchstream.launch.here import run
from batchstream.records import Delta, Result


def write(folder: Path, count: int, **extra: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", **extra}) + "\n" for i in range(count)))
    return str(path)


def go(simulator: Simulator, source: str, **options: Any) -> Report:
    return run(Job(input=source, base_url=simulator.base_url, model="sim", **options))


def results(report: Report) -> list[Result]:
    return list(read_results(report.output))


def test_max_requests_is_kept_exactly_and_the_same_job_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path, 50)
    with running(SimulateConfig(tokens=4)) as simulator:
        report = go(simulator, source, max_requests=20, concurrency=8)
        assert (report.exit_code, simulator.ledger.requests) == (5, 20)
        assert "--max-requests" in report.message
        assert report.summary is not None
        assert report.summary.rows.ok == 20
        report = go(simulator, source)
        assert (report.exit_code, simulator.ledger.requests) == (0, 50)


def test_a_budget_that_is_just_enough_is_no_stop(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        assert go(simulator, write(tmp_path, 20), max_requests=20).exit_code == 0


def test_max_tokens_total_overshoots_by_no_more_than_what_is_in_flight(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=10)) as simulator:
        report = go(simulator, write(tmp_path, 100), max_tokens_total=200, concurrency=4)
        assert report.exit_code == 5
        per_row = simulator.ledger.billed_tokens / simulator.ledger.requests
        assert 200 <= simulator.ledger.billed_tokens <= 200 + 5 * per_row


def test_max_time_drains_and_stops(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=10, gap=0.02)) as simulator:
        report = go(simulator, write(tmp_path, 200), max_time=0.5, concurrency=2)
        assert report.exit_code == 5
        assert not any(entry.closed_early for entry in simulator.ledger.entries)
        assert report.summary is not None
        assert report.summary.rows.ok == simulator.ledger.requests


@pytest.mark.parametrize(
    ("key", "kind"), [("shuttle-nofunds", "quota"), ("shuttle-suspended", "permission"), ("x", "auth")]
)
def test_trouble_with_the_account_stops_the_run_and_leaves_the_rows_pending(
    tmp_path: Path, key: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    source = write(tmp_path, 300)
    with running(SimulateConfig(tokens=4, key="good-key-for-sim")) as simulator:
        report = go(simulator, source, api_key_env="MY_KEY", concurrency=4)
        assert report.exit_code == 4
        assert kind in report.message
        assert simulator.ledger.requests <= 8
        assert report.summary is not None
        assert report.summary.rows.total == 0
        monkeypatch.setenv("MY_KEY", "good-key-for-sim")
        assert go(simulator, source, api_key_env="MY_KEY").exit_code == 0


def test_one_row_is_enough_to_stop_for_the_account(tmp_path: Path) -> None:
    with running(SimulateConfig(key="good-key-for-sim")) as simulator:
        report = go(simulator, write(tmp_path, 1))
        assert (report.exit_code, report.summary and report.summary.rows.total) == (4, 0)


def test_breaker_off_records_every_failure_and_stops_for_none(tmp_path: Path) -> None:
    with running(SimulateConfig(key="good-key-for-sim")) as simulator:
        report = go(simulator, write(tmp_path, 40), breaker="off")
        assert report.exit_code == 3
        assert {result.error.kind for result in results(report) if result.error} == {"auth"}
        assert simulator.ledger.requests == 40


def test_a_refusal_of_single_rows_among_answers_is_the_rows_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "poison" if i == 7 else f"q {i}"}) + "\n" for i in range(40)))
    with running(SimulateConfig(tokens=4, faults=("403~poison",))) as simulator:
        report = go(simulator, str(path), concurrency=2)
        assert report.exit_code == 3
        assert [(result.row, result.error.kind) for result in results(report) if result.error] == [(7, "permission")]


def test_an_endpoint_that_only_fails_stops_the_run_before_all_rows_are_burnt(tmp_path: Path) -> None:
    with running(SimulateConfig(faults=("400=1",))) as simulator:
        report = go(simulator, write(tmp_path, 500), concurrency=4)
        assert report.exit_code == 4
        assert simulator.ledger.requests < 60


def test_nobody_listening_ends_with_exit_4_and_everything_pending(tmp_path: Path) -> None:
    with running() as simulator:
        base_url = simulator.base_url
    for count in (1, 30):
        report = run(Job(input=write(tmp_path, count), base_url=base_url, model="m", max_attempts=2, new_job=True))
        assert report.exit_code == 4
        assert "connect" in report.message
        assert report.summary is not None
        assert report.summary.rows.total == 0


def test_a_wait_longer_than_max_wait_stops_with_exit_5(tmp_path: Path) -> None:
    with running(SimulateConfig(faults=("429(retry-after=4000)@3",))) as simulator:
        report = go(simulator, write(tmp_path, 60), concurrency=1)
        assert report.exit_code == 5
        assert "4000" in report.message
        assert simulator.ledger.requests == 3


def test_a_daily_limit_stops_with_exit_5_and_leaves_the_rest_pending(tmp_path: Path) -> None:
    source = write(tmp_path, 30)
    with running(SimulateConfig(tokens=4, gap=0.01, rpd=5)) as simulator:
        report = go(simulator, source, concurrency=2)
        assert report.exit_code == 5
        assert "daily" in report.message
        assert report.summary is not None
        assert (report.summary.rows.ok, report.summary.rows.failed) == (5, 0)
        assert simulator.ledger.requests <= 8


def test_a_429_closes_the_gate_for_everybody_until_the_stated_time(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4, ttft=0.01, faults=("429(retry-after=1)@30",))) as simulator:
        report = go(simulator, write(tmp_path, 120), concurrency=8)
        assert report.exit_code == 0
        entries = list(simulator.ledger.entries)
        refused = next(entry for entry in entries if entry.status == 429)
        assert refused.ended_at is not None
        news = refused.ended_at + 0.05  # what was on its way when the news came is nobody's fault
        assert not [entry for entry in entries if news < entry.received_at < refused.ended_at + 1.0]


def test_a_row_that_waits_for_its_retry_holds_no_slot(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4, faults=("503(retry-after=2,times=1)@1",))) as simulator:
        report = go(simulator, write(tmp_path, 100), concurrency=1)
        assert report.exit_code == 0
        order = [entry.attempt for entry in simulator.ledger.entries]
        assert order.index(2) > 50, "the only slot was not given back"


def test_every_failed_attempt_is_kept_with_its_partial_text(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=8, faults=("truncate(k=3,times=2)=1",))) as simulator:
        report = go(simulator, write(tmp_path, 5))
        for result in results(report):
            assert (result.status, result.attempts, len(result.retries)) == ("ok", 3, 2)
            assert {retry.kind for retry in result.retries} == {"truncated"}
            assert all(retry.text and result.text and result.text.startswith(retry.text) for retry in result.retries)


def test_a_row_that_fails_for_good_keeps_its_partial_text(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=8, faults=("truncate(k=3)=1",))) as simulator:
        report = go(simulator, write(tmp_path, 2), max_attempts=2)
        assert report.exit_code == 3
        for result in results(report):
            assert result.error is not None
            assert (result.error.kind, result.attempts) == ("truncated", 2)
            assert result.text


def test_a_rate_keeps_its_distance(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        assert go(simulator, write(tmp_path, 20), rpm=1200, concurrency=8).exit_code == 0
        times = [entry.received_at for entry in simulator.ledger.entries]
        assert times[-1] - times[0] >= 19 * 0.05 * 0.95


def test_a_model_must_be_named_somewhere(tmp_path: Path) -> None:
    with running() as simulator, pytest.raises(UsageError, match="--model"):
        run(Job(input=write(tmp_path, 1), base_url=simulator.base_url))


def test_a_stranger_never_gets_the_default_providers_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHUTTLEAI_API_KEY", "shuttle-do-not-send-this")
    with running(SimulateConfig(key="shuttle-do-not-send-this")) as simulator:
        report = go(simulator, write(tmp_path, 1))
        assert report.exit_code == 4, "the key was sent although nobody named it"


def test_a_missing_key_is_said_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHUTTLEAI_API_KEY", raising=False)
    with pytest.raises(StoppedError, match="SHUTTLEAI_API_KEY"):
        run(Job(input=write(tmp_path, 1)))


async def test_stream_results_gives_each_result_as_it_ends(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4)) as simulator:
        job = Job(input=write(tmp_path, 25), base_url=simulator.base_url, model="sim")
        rows = [result.row async for result in stream_results(job)]
        assert sorted(rows) == list(range(25))
        assert [result.row async for result in stream_results(job)] == []


async def test_leaving_stream_results_early_stops_the_run(tmp_path: Path) -> None:
    with running(SimulateConfig(tokens=4, gap=0.01)) as simulator:
        job = Job(input=write(tmp_path, 200), base_url=simulator.base_url, model="sim", concurrency=4)
        results_of_it = stream_results(job)
        async for _ in results_of_it:
            break
        await results_of_it.aclose()
        asked = simulator.ledger.requests
        await asyncio.sleep(0.2)
        assert simulator.ledger.requests == asked < 100


async def test_stream_gives_deltas_and_then_the_result(tmp_path: Path) -> None:
    items = [item async for item in stream("Why?", provider="sim", sim={"tokens": 6})]
    deltas, result = items[:-1], items[-1]
    assert isinstance(result, Result)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == result.text


async def test_stream_never_mixes_two_attempts(tmp_path: Path) -> None:
    items = [item async for item in stream("Why?", provider="sim", sim={"faults": "truncate(k=3,times=1)=1"})]
    result = items[-1]
    assert isinstance(result, Result)
    assert (result.status, result.attempts) == ("failed", 1)
    again = [item async for item in stream("Why?", provider="sim", sim={"faults": "500(times=1)=1"})][-1]
    assert isinstance(again, Result)
    assert (again.status, again.attempts) == ("ok", 2)


def test_a_mended_row_is_asked_without_buying_the_others_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"question {i}"}) for i in range(30)]
    path.write_text("\n".join([*lines[:17], "{broken", *lines[18:]]) + "\n")
    with running(SimulateConfig(tokens=4)) as simulator:
        report = go(simulator, str(path))
        assert report.exit_code == 3
        assert "--retry-failed" in report.message
        path.write_text("\n".join(lines) + "\n")
        report = go(simulator, str(path), retry_failed=True)
        assert report.exit_code == 0
        assert simulator.ledger.requests == 30
        assert [result.status for result in results(report)] == ["ok"] * 30
        assert go(simulator, str(path)).message.startswith("finished before")


def test_a_changed_answered_row_is_refused_even_when_failed_ones_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{broken\n')
    with running(SimulateConfig(tokens=4)) as simulator:
        go(simulator, str(path))
        path.write_text('{"prompt": "another"}\n{"prompt": "two"}\n')
        with pytest.raises(IdentityError, match="row 0"):
            go(simulator, str(path), retry_failed=True)
        assert simulator.ledger.requests == 1


def test_a_first_start_with_a_wrong_url_does_not_bind_the_second(tmp_path: Path) -> None:
    source = write(tmp_path, 5)
    with running() as gone:
        wrong = gone.base_url
    assert run(Job(input=source, base_url=wrong, model="sim", max_attempts=1)).exit_code == 4
    with running(SimulateConfig(tokens=4)) as simulator:
        assert go(simulator, source).exit_code == 0


def test_an_option_of_the_wrong_type_is_said_in_one_line() -> None:
    with pytest.raises(UsageError, match="concurrency: expected int, got str: '3'"):
        Job(input="x.jsonl", concurrency="3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="durability: expected one of row, batch, os, got 'gold'"):
        Job(input="x.jsonl", durability="gold")  # type: ignore[arg-type]


@pytest.mark.parametrize("pasted", ["sk-proj-abc", "gsk_0a1b2c3d4e5f6g7h8i9j0k", "hush hush"])
def test_a_key_pasted_where_its_name_belongs_is_refused_and_not_repeated(pasted: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Job(input="x.jsonl", api_key_env=pasted)
    assert pasted not in str(refusal.value)
