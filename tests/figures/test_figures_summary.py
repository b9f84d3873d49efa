"""A summary counts what the results say, each thing once, and claims nothing that they do not say."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchstream.figures.evidence import Evidence
from batchstream.figures.latency import DEFINITIONS
from batchstream.figures.summary import METRICS, Run, Summary, Tally, TokenSums, summary
from batchstream.records import FunctionCall, Latencies, Result, Retry, RowError, ToolCall, Usage

USAGE = Usage(prompt_tokens=10, completion_tokens=20, total_tokens=30, cached_tokens=4)
TIMING = Latencies(
    started_at="2025-03-01T10:00:05.250000Z",
    queue_s=0.001,
    ttfb_s=0.1,
    ttft_s=0.2,
    ttfo_s=0.3,
    latency_s=1.0,
    total_s=1.1,
    tpot_s=0.05,
    gap_max_s=0.06,
    chunks=20,
)


def ok(row: int = 0, **fields: Any) -> Result:
    given_: dict[str, Any] = {"text": "Hi", "finish_reason": "stop", "model": "m", "usage": USAGE, "timing": TIMING}
    return Result(row=row, id=str(row), status="ok", **({**given_, "attempts": 1} | fields))


def failed(kind: str, attempts: int = 1, **fields: Any) -> Result:
    return Result(
        row=0, id="0", status="failed", attempts=attempts, error=RowError(kind, None, "went wrong", True), **fields
    )


def retry(kind: str, usage: Usage | None = None) -> Retry:
    return Retry(kind=kind, status=None, message="", waited_s=0.1, latency_s=None, usage=usage)


def summed_up(*results: Result, run: Run | None = None, since: str | None = None) -> Summary:
    tally = Tally(since)
    for result in results:
        tally.add(msgspec.json.encode(result))
    return summary(tally, run or Run())


def test_rows_are_counted_by_how_they_ended():
    figures = summed_up(ok(), ok(), failed("timeout"), failed("server"), failed("timeout"), failed("invalid_row", 0))
    assert msgspec.to_builtins(figures.rows) == {"total": 6, "ok": 2, "failed": 4, "invalid": 1}
    assert list(figures.failures.items()) == [("timeout", 2), ("invalid_row", 1), ("server", 1)]
    assert figures.models == {"m": 2}


def test_a_retry_is_counted_by_the_failure_that_made_it_necessary():
    figures = summed_up(
        ok(attempts=3, retries=[retry("rate_limit"), retry("server")]), failed("server", 2, retries=[retry("server")])
    )
    assert figures.attempts.total == 5
    assert figures.attempts.retries == 3
    assert figures.attempts.retries_by_kind == {"server": 2, "rate_limit": 1}


def test_the_last_attempt_of_a_failed_row_counts_once_even_where_the_retries_list_it_too():
    last = Usage(completion_tokens=7)
    figures = summed_up(
        failed("truncated", 2, retries=[retry("server"), retry("truncated", last)], usage=last),
    )
    assert figures.attempts.retries_by_kind == {"server": 1}
    assert figures.failed_attempt_tokens.completion == 7


def test_tokens_of_failed_attempts_stand_apart_from_those_of_answers():
    figures = summed_up(
        ok(attempts=2, retries=[retry("truncated", Usage(prompt_tokens=10, completion_tokens=3))]),
        failed("truncated", usage=Usage(completion_tokens=1)),
        failed("invalid_row", 0),
    )
    assert figures.tokens == TokenSums(prompt=10, completion=20, total=30, cached=4)
    assert figures.failed_attempt_tokens == TokenSums(prompt=10, completion=4, total=13)


def test_what_no_endpoint_said_is_none_and_not_zero():
    figures = summed_up(ok(usage=None), ok(usage=None))
    assert figures.tokens == TokenSums(without_usage=2)
    figures = summed_up(ok(usage=None), ok(), run=Run(elapsed_s=2.0))
    assert (figures.tokens.without_usage, figures.tokens.reasoning, figures.tokens.cached) == (1, None, 4)
    assert summed_up(ok(usage=None), run=Run(elapsed_s=2.0)).throughput.completion_tokens_per_s is None


def test_a_total_that_is_not_said_is_prompt_and_completion():
    assert summed_up(ok(usage=Usage(prompt_tokens=5, completion_tokens=6))).tokens.total == 11
    assert summed_up(ok(usage=Usage(completion_tokens=6))).tokens.total is None


CALL = [ToolCall(id="c", type="function", function=FunctionCall(name="f", arguments="{}"))]


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "x"},
        {"reasoning": "x"},
        {"refusal": "x"},
        {"tool_calls": CALL},
        {"extra": {"choice": {"audio": {"id": "a"}}}},
    ],
)
def test_any_kind_of_output_is_an_answer(answer):
    assert summed_up(ok(**{"text": None, **answer})).suspects.empty == 0


@pytest.mark.parametrize("nothing", [{}, {"text": ""}, {"tool_calls": []}, {"extra": {"usage": {"x": 1}}}])
def test_an_answer_without_any_output_is_a_suspect(nothing):
    assert summed_up(ok(**{"text": None, **nothing})).suspects.empty == 1


def test_odd_endings_are_suspects():
    figures = summed_up(
        ok(finish_reason="length"),
        ok(finish_reason="max_tokens"),
        ok(finish_reason="incomplete:max_output_tokens"),
        ok(finish_reason="content_filter"),
        ok(finish_reason=None),
        ok(),
    )
    suspects = figures.suspects
    assert (suspects.length, suspects.content_filter, suspects.no_finish_reason) == (3, 1, 1)
    assert figures.finish_reasons["stop"] == 1
    assert sum(figures.finish_reasons.values()) == 5


def test_an_answer_in_one_event_is_a_suspect_unless_it_is_one_token():
    one = msgspec.structs.replace(TIMING, chunks=1)
    assert summed_up(ok(timing=one)).suspects.one_event == 1
    assert summed_up(ok(timing=one, usage=Usage(completion_tokens=1))).suspects.one_event == 0
    assert summed_up(ok(timing=one, usage=None)).suspects.one_event == 0


def test_failed_rows_improve_no_percentile():
    quick = msgspec.structs.replace(TIMING, ttft_s=0.0)
    figures = summed_up(ok(), failed("truncated", timing=quick, usage=USAGE))
    assert (figures.metrics["ttft_s"].n, figures.metrics["ttft_s"].min) == (1, 0.2)


def test_each_duration_has_its_figures_and_its_definition():
    figures = summed_up(*(ok() for _ in range(30)))
    assert tuple(figures.metrics) == METRICS
    ttft = figures.metrics["ttft_s"]
    assert (ttft.n, ttft.p50, ttft.p90, ttft.p95, ttft.max, ttft.mean) == (30, 0.2, 0.2, None, 0.2, 0.2)
    assert ttft.refused == {
        "p95": "needs 59 values, has 30",
        "p99": "needs 299 values, has 30",
        "p99_9": "needs 2,995 values, has 30",
    }
    assert set(ttft.intervals) == {"p50", "p90"}
    assert ttft.definition == DEFINITIONS["ttft_s"]
    assert {name: figures.metrics[name].p50 for name in METRICS} == {
        "ttft_s": 0.2,
        "ttfo_s": 0.3,
        "ttfb_s": 0.1,
        "latency_s": 1.0,
        "total_s": 1.1,
        "tpot_s": 0.05,
        "gap_max_s": 0.06,
        "queue_s": 0.001,
    }


def test_throughput_is_of_the_rows_of_this_run():
    earlier = msgspec.structs.replace(TIMING, started_at="2025-03-01T09:59:59.999999Z")
    results = [ok(), failed("server", timing=TIMING), ok(timing=earlier), failed("invalid_row", 0)]
    figures = summed_up(*results, run=Run(elapsed_s=4.0), since="2025-03-01T10:00:05.25Z")
    assert msgspec.to_builtins(figures.throughput) == {
        "rows": 2,
        "ok": 1,
        "rows_per_s": 0.5,
        "completion_tokens_per_s": 5.0,
        "total_tokens_per_s": 7.5,
    }
    assert summed_up(*results, run=Run(elapsed_s=4.0)).throughput.rows == 4
    assert summed_up(*results).throughput.rows_per_s is None
    with pytest.raises(ValueError, match="with its offset"):
        Tally("2025-03-01T10:00:00")


def test_a_whole_second_and_its_fraction_compare_as_times_and_not_as_text():
    assert summed_up(ok(), since="2025-03-01T10:00:05Z").throughput.rows == 1


def test_the_verdict_comes_with_the_evidence_or_not_at_all():
    nothing = summary(Tally(), Run())
    assert (nothing.evidence, nothing.verdict) == (None, None)
    judged = summary(Tally(), Run(), Evidence(elapsed_s=1.0, loop_lag_p99_s=0.5))
    assert judged.verdict == "degraded"
    assert len(judged.verdict_reasons) == 1


def test_an_empty_job_has_a_summary():
    figures = summed_up(run=Run(elapsed_s=0.0))
    assert figures.rows.total == 0
    assert figures.metrics["ttft_s"].p50 is None


def test_a_summary_stays_as_it_was_while_the_tally_goes_on():
    tally = Tally()
    tally.add(msgspec.json.encode(ok()))
    figures = summary(tally, Run())
    before = msgspec.json.encode(figures)
    for more in (ok(), failed("truncated", usage=USAGE)):
        tally.add(msgspec.json.encode(more))
    assert msgspec.json.encode(figures) == before
    assert summary(tally, Run()).metrics["ttft_s"].n == 2


def test_a_summary_survives_its_own_json():
    figures = summed_up(*(ok() for _ in range(300)), failed("server", 2, retries=[retry("server")]))
    assert msgspec.json.decode(msgspec.json.encode(figures), type=Summary) == figures


def test_what_is_no_result_is_refused():
    with pytest.raises(msgspec.DecodeError):
        Tally().add(b'{"row": 1}')
    with pytest.raises(msgspec.DecodeError):
        Tally().add(b'{"row": 1, "sta')


usages = st.none() | st.builds(
    Usage, *(st.none() | st.integers(0, 1000) for _ in range(2)), total_tokens=st.none() | st.integers(0, 2000)
)
durations = st.none() | st.integers(0, 10**7).map(lambda us: us / 1e6)
results = st.builds(
    Result,
    row=st.integers(0, 100),
    id=st.text(max_size=3),
    status=st.sampled_from(["ok", "failed"]),
    text=st.none() | st.text(max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    model=st.sampled_from([None, "a", "b"]),
    usage=usages,
    timing=st.builds(Latencies, **dict.fromkeys(METRICS, durations)),
    attempts=st.just(1),
    error=st.just(RowError("server", 500, "", True)),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(results, max_size=40), st.randoms(use_true_random=False))
def test_any_results_in_any_order_are_counted_as_by_hand(rows, rng):
    figures = summed_up(*rows)
    assert summed_up(*rng.sample(rows, len(rows))) == figures
    answered = [row for row in rows if row.status == "ok"]
    assert (figures.rows.total, figures.rows.ok) == (len(rows), len(answered))
    assert figures.tokens.without_usage == sum(row.usage is None for row in answered)
    prompts = [row.usage.prompt_tokens for row in answered if row.usage and row.usage.prompt_tokens is not None]
    assert figures.tokens.prompt == (sum(prompts) if prompts else None)
    for name in METRICS:
        known = [value for row in answered if (value := getattr(row.timing, name)) is not None]
        assert figures.metrics[name].n == len(known)
        assert figures.metrics[name].max == max(known, default=None)
