"""The durations of a row follow the definitions word for word."""

from hypothesis import given
from hypothesis import strategies as st

from batchstream.figures.latency import DEFINITIONS, latencies
from batchstream.records import Latencies, Timing, Usage

WHOLE = Timing(
    due=100.0, sent=100.5, headers=100.6, first_event=100.7, first_output=101.0, first_visible=102.0,
    last_output=105.0, ended=105.25, chunks=9, gap_max=0.75,
)  # fmt: skip


def test_every_duration_starts_when_the_request_was_written():
    assert latencies(WHOLE, Usage(completion_tokens=11), "2025-03-01T10:00:00Z") == Latencies(
        started_at="2025-03-01T10:00:00Z",
        queue_s=0.5,
        ttfb_s=0.1,
        ttfc_s=0.2,
        ttft_s=0.5,
        ttfo_s=1.5,
        latency_s=4.5,
        total_s=4.75,
        tpot_s=0.4,
        chunks=9,
        gap_max_s=0.75,
    )


def test_what_was_never_reached_is_none_and_not_zero():
    refused = latencies(Timing(due=1.0), None, None)
    assert refused == Latencies()
    cut = latencies(Timing(due=1.0, sent=1.25, headers=1.5), Usage(completion_tokens=5), None)
    assert (cut.ttfb_s, cut.ttft_s, cut.latency_s, cut.total_s, cut.tpot_s) == (0.25, None, None, None, None)


def test_time_per_token_needs_usage_and_two_tokens():
    assert latencies(WHOLE, None, None).tpot_s is None
    assert latencies(WHOLE, Usage(), None).tpot_s is None
    assert latencies(WHOLE, Usage(completion_tokens=0), None).tpot_s is None
    assert latencies(WHOLE, Usage(completion_tokens=1), None).tpot_s is None
    assert latencies(WHOLE, Usage(completion_tokens=2), None).tpot_s == 4.0


def test_a_zero_is_kept_as_a_zero():
    at_once = Timing(due=5.0, sent=5.0, headers=5.0, first_output=5.0, last_output=5.0, ended=5.0, gap_max=0.0)
    figures = latencies(at_once, Usage(completion_tokens=3), None)
    assert (figures.queue_s, figures.ttft_s, figures.tpot_s, figures.gap_max_s) == (0.0, 0.0, 0.0, 0.0)


instants = st.one_of(st.none(), st.floats(0, 1e6))


@given(instants, instants, instants, instants, instants, st.integers(0, 5))
def test_no_order_of_instants_gives_a_negative_or_overlong_number(sent, headers, first, last, ended, tokens):
    timing = Timing(due=3.0, sent=sent, headers=headers, first_output=first, last_output=last, ended=ended)
    figures = latencies(timing, Usage(completion_tokens=tokens), None)
    for name in DEFINITIONS:
        value = getattr(figures, name)
        assert value is None or (value >= 0 and value == round(value, 6)), name


def test_every_duration_of_the_column_has_a_definition():
    assert set(DEFINITIONS) == {name for name in Latencies.__struct_fields__ if name.endswith("_s")}
