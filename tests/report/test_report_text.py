"""A summary reads well at 80 columns without colour, hides nothing, and is not steered by foreign names."""

import re
from typing import Any

import msgspec
import pytest

from batchstream.figures.evidence import Evidence
from batchstream.figures.summary import Run, Summary, Tally, summary
from batchstream.records import Latencies, Result, Retry, RowError, Usage
from batchstream.report.text import clean, duration, rate, render_markdown, render_summary, summary_json

RUN = Run(
    started_at="2025-03-01T10:00:00Z",
    ended_at="2025-03-01T10:01:04Z",
    elapsed_s=64.25,
    exit_code=4,
    stop="402 three times in a row: the account has no credit",
    endpoint="https://api.example.com/v1",
    output="out/answers of today.jsonl",
    journal="out/answers of today.jsonl.journal",
    pending=880,
    resumed=40,
    asked_again=3,
)
DEGRADED = Evidence(elapsed_s=64.2, loop_lag_p99_s=0.0094, loop_lag_max_s=0.32, cpu_share=0.3,
                    reads=1200, events=2400, connections=64, connection_wait_max_s=0.0031)  # fmt: skip
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def answered(row: int, **fields: Any) -> Result:
    ttft = 0.2 + row / 1000
    timing = Latencies(
        queue_s=0.00004,
        ttfb_s=0.1,
        ttft_s=ttft,
        ttfo_s=ttft,
        latency_s=1.5,
        total_s=1.501,
        tpot_s=0.0123,
        gap_max_s=0.05,
        chunks=20,
    )
    usual = {
        "text": "Hi",
        "finish_reason": "stop",
        "model": "m-1",
        "usage": Usage(1000, 20, 1020),
        "attempts": 1,
        "timing": timing,
    }
    return Result(row=row, id=str(row), status="ok", **(usual | fields))


def job(answers: int = 120, run: Run = RUN, evidence: Evidence | None = DEGRADED, **fields: Any) -> Summary:
    tally = Tally()
    retry = Retry("rate_limit", 429, "slow down", 1.0, 0.1, Usage(1000, 3))
    results = [answered(row, **fields) for row in range(answers)]
    if answers > 100:
        results[0] = answered(0, finish_reason="length", usage=None)
        results[1] = answered(1, text="", attempts=2, retries=[retry])
        results += [
            Result(row=row, id="", status="failed", attempts=n, error=RowError(kind, None, "", True))
            for row, kind, n in ((201, "timeout", 1), (202, "timeout", 1), (203, "invalid_row", 0))
        ]
    for result in results:
        tally.add(msgspec.json.encode(result))
    return summary(tally, run, evidence)


GOLDEN = """\
Rows      123 done · 120 ok · 3 failed (2.4 %)
          880 still to do · 1 of the failed invalid, not sent ·
          40 done by earlier runs · 3 asked again (in flight when a run ended)
Stopped   402 three times in a row: the account has no credit
Failures  2 timeout · 1 invalid_row
Requests  123, of them 1 retries after 1 rate_limit
Suspects  among the answers: 1 empty · 1 cut by the token limit
Finish    119 stop · 1 length
Tokens    119,000 prompt · 2,380 completion · 121,380 total
          answers without usage, not in these sums: 1
          failed attempts, as far as known: 1,000 prompt · 3 completion ·
          1,003 total
Speed     1.91 rows/s · 37 completion tokens/s · 1,889 tokens/s ·
          123 rows in 1 min 04 s
Model     m-1 at https://api.example.com/v1

Durations of the 120 answered rows; the 3 failed are not among them
                 n     p50     p90     p95     p99   p99.9     max    mean
ttft    ms     120     260     307     313       –       –     319     260
ttfo    ms     120     260     307     313       –       –     319     260
ttfb    ms     120     100     100     100       –       –     100     100
latency  s     120    1.50    1.50    1.50       –       –    1.50    1.50
total    s     120    1.50    1.50    1.50       –       –    1.50    1.50
tpot    ms     120    12.3    12.3    12.3       –       –    12.3    12.3
gap_max ms     120    50.0    50.0    50.0       –       –    50.0    50.0
queue   ms     120   0.040   0.040   0.040       –       –   0.040   0.040
– too few values: p99 needs 299, p99.9 needs 2,995
sent      just before the request is written
ttft      sent → first text, reasoning, refusal or tool-call fragment
ttfo      sent → first output that is not reasoning
ttfb      sent → response headers
latency   sent → last generated output
total     sent → end of the stream
tpot      (latency − TTFT) / (completion tokens − 1); none without usage
gap_max   longest gap between two events with output (events, not tokens)
queue     due (allowed to start) → sent

Client    degraded: event loop 9.4 ms late at p99 (limit 3 ms): use more workers
          or fewer streams
          event-loop stall of 320 ms (limit 100 ms): maxima and p99.9 may be the
          client's; look for other load on this machine
          loop 9.4 ms late at p99 · 30% of a core · 2.0 events a read ·
          64 connections (longest wait 3.1 ms)
Journal   out/answers of today.jsonl.journal
"""


def test_a_summary_at_80_columns_is_this():
    assert render_summary(job(), 80) == GOLDEN


def test_colour_changes_nothing_but_colour():
    coloured = render_summary(job(), 80, color=True)
    assert ANSI.sub("", coloured) == GOLDEN
    assert "\x1b[31m2 timeout" in coloured


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width):
    long_path = "/data/" + "x" * 300
    text = render_summary(job(run=msgspec.structs.replace(RUN, journal=long_path)), width)
    too_long = [line for line in text.splitlines() if len(line) > width]
    assert too_long == [f"Journal   {long_path}"]  # a path stays whole, to be copied


def test_a_narrow_terminal_keeps_the_count_the_median_the_tail_and_the_maximum():
    heads = next(line for line in render_summary(job(), 45).splitlines() if "p50" in line)
    assert heads.split() == ["n", "p50", "p99", "max"]


def test_millions_of_rows_stay_in_their_columns():
    figures = job(3000, RUN, None)
    ttft = msgspec.structs.replace(figures.metrics["ttft_s"], n=50_000_000, max=4321.5)
    text = render_summary(msgspec.structs.replace(figures, metrics=figures.metrics | {"ttft_s": ttft}), 100)
    table = [line for line in text.splitlines() if "p99.9" in line or line.startswith("ttft     s")]
    assert len(table) == 2
    assert "50,000,000" in table[1]
    assert "4,321.50" in table[1]
    assert len(table[0]) == len(table[1])


def test_a_job_without_answers_shows_no_table():
    assert (
        render_summary(summary(Tally(), Run()))
        == "Rows      0 done · 0 ok · 0 failed\nRequests  0, of them 0 retries\n"
    )


def test_a_trusted_client_says_so_in_one_line():
    quiet = Evidence(elapsed_s=1.0, loop_lag_p99_s=0.0001)
    assert "Client    trusted: " in render_summary(job(3, RUN, quiet))
    assert "Client" not in render_summary(job(3, RUN, None))


def test_names_from_the_other_side_cannot_steer_the_terminal():
    hostile = "m\x1b[2J\x07\u202e\nRows 0"
    figures = job(3, msgspec.structs.replace(RUN, stop=hostile, endpoint=hostile), None, model=hostile)
    for text in (render_summary(figures), render_markdown(figures)):
        assert not set(text) & set("\x1b\x07\u202e\r")
        assert "\nRows 0" not in text
    assert clean("a\u2028b\x9bc\ud800") == "a\ufffdb\ufffdc\ufffd"


def test_markdown_has_the_same_facts_as_a_list_and_a_table():
    text = render_markdown(job())
    assert "- **Failures**: 2 timeout · 1 invalid\\_row\n" in text
    assert "| | n | p50 | p90 | p95 | p99 | p99.9 | max | mean |\n|---|---:|" in text
    assert "| ttft (ms) | 120 | 260 | 307 | 313 | – | – | 319 | 260 |\n" in text
    assert "- `tpot`: (latency − TTFT) / (completion tokens − 1); none without usage\n" in text
    assert "\N{NO-BREAK SPACE}" not in text


def test_markdown_takes_no_markup_from_names():
    assert "\\<script\\>\\[x\\]" in render_markdown(job(3, model="<script>[x]"))


def test_the_json_is_the_summary_with_its_schema_first():
    figures = job()
    written = summary_json(figures)
    assert written.startswith(b'{\n  "schema": "batchstream.summary/1",\n  "run": {')
    assert written.endswith(b"}\n")
    assert msgspec.json.decode(written, type=Summary) == figures


def test_a_file_name_that_is_no_text_still_makes_json():
    odd = msgspec.structs.replace(RUN, output=b"a\xff.jsonl".decode("utf-8", "surrogateescape"))
    assert b'"output": "a?.jsonl"' in summary_json(job(1, odd))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (8.24, "8.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (12_000, "3 h 20 min"),
        (183_600, "2 d 03 h"),
    ],
)
def test_times_are_told_in_two_units(seconds, text):
    assert duration(seconds) == text


def test_rates_keep_three_digits():
    assert [rate(value) for value in (0.0312, 1.774, 46.88, 2770.4)] == ["0.0312", "1.77", "46.9", "2,770"]
