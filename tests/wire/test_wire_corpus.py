"""Every case of the wire corpus comes out as expected, however its bytes are cut and whichever lane they take."""

from __future__ import annotations

import random

import pytest
from wire_corpus import Case, cases, differences, replay, seen, stream_cases

from batchstream.wire.sse import SSEDecoder

LANES = ("auto", "full")
MOST_CUTS = 400


def ids(case: Case) -> str:
    return case.id


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", stream_cases(), ids=ids)
def test_a_case_comes_out_as_expected(case: Case, lane: str) -> None:
    assert differences(case, replay(case, case.segments, lane), segments=True) == []


@pytest.mark.parametrize("case", stream_cases(), ids=ids)
def test_both_lanes_agree(case: Case) -> None:
    assert seen(replay(case, case.segments, "auto")) == seen(replay(case, case.segments, "full"))


@pytest.mark.parametrize("case", stream_cases(), ids=ids)
def test_the_cuts_do_not_matter(case: Case) -> None:
    body = case.body
    whole = seen(replay(case, [body]))
    if len(body) < 20_000:
        assert seen(replay(case, [body[i : i + 1] for i in range(len(body))])) == whole
    cuts = range(1, len(body))
    if len(cuts) > MOST_CUTS:
        cuts = sorted(random.Random(case.id).sample(cuts, MOST_CUTS if len(body) < 20_000 else 20))
    for cut in cuts:
        assert seen(replay(case, [body[:cut], body[cut:]])) == whole, f"cut at {cut}"


@pytest.mark.parametrize("case", [case for case in cases() if case.api == "sse"], ids=ids)
def test_events_follow_the_standard_at_every_cut(case: Case) -> None:
    body = case.body
    for segments in (
        case.segments,
        [body[i : i + 1] for i in range(len(body))],
        *([body[:cut], body[cut:]] for cut in range(len(body) + 1)),
    ):
        decoder = SSEDecoder()
        events = [event for segment in segments for event in decoder.feed(segment)]
        assert [[e.type, e.data.decode("utf-8", "replace"), e.id] for e in events] == case.expect["events"]
        assert decoder.retry == case.expect.get("retry")
        pending = [event.data.decode() for event in decoder.end()]
        assert pending == ([case.expect["eof_pending"]] if "eof_pending" in case.expect else [])
