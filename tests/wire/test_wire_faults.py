"""Errors in our words: kinds by code, status and wording, and the wait the server states."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchstream.wire.faults import RETRYABLE, classify, is_error
from batchstream.wire.reception import Reception
from batchstream.wire.waits import duration, stated_wait

DATE = ("Date", "Sun, 23 Nov 2025 10:00:00 GMT")


def kind(status: int | None = None, envelope: Any = None, text: str = "") -> str:
    return classify(status, [], envelope, text).kind


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, "invalid_request"),
        (401, "auth"),
        (402, "quota"),
        (403, "permission"),
        (404, "not_found"),
        (405, "invalid_request"),
        (408, "timeout"),
        (409, "conflict"),
        (413, "invalid_request"),
        (418, "invalid_request"),
        (422, "invalid_request"),
        (423, "permission"),
        (425, "too_early"),
        (429, "rate_limit"),
        (500, "server"),
        (501, "server"),
        (502, "server"),
        (503, "overloaded"),
        (504, "timeout"),
        (520, "server"),
        (522, "server"),
        (523, "server"),
        (524, "timeout"),
        (525, "server"),
        (527, "server"),
        (529, "overloaded"),
        (599, "server"),
        (302, "redirect"),
        (100, "stream_error"),
        (999, "stream_error"),
    ],
)
def test_the_status_alone_gives_the_kind(status: int, expected: str) -> None:
    found = classify(status, [], None, "")
    assert (found.kind, found.retryable, found.status) == (expected, RETRYABLE[expected], status)
    if 400 <= status < 600:
        assert kind(None, {"error": {"code": str(status)}}) == expected
        assert kind(None, {"error": {"status_code": float(status)}}) == expected


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (429, {"code": "insufficient_quota", "message": "m"}, "quota"),
        (429, {"type": "insufficient_quota"}, "quota"),
        (403, {"code": "insufficient_user_quota"}, "quota"),
        (400, {"code": "billing_hard_limit_reached"}, "quota"),
        (429, {"message": "INSUFFICIENT QUOTA for your tier"}, "rate_limit"),
        (429, {"message": "You exceeded your quota per minute"}, "rate_limit"),
        (429, {"message": "Daily limit exceeded", "type": "rate_limit_error"}, "quota"),
        (429, {"message": "Your daily request quota is used up"}, "quota"),
        (429, {"message": "free-models-per-day", "code": 429}, "quota"),
        (429, {"message": "tokens per day (TPD): try again in 7m12s", "code": "rate_limit_exceeded"}, "rate_limit"),
        (
            429,
            {
                "code": 429,
                "status": "RESOURCE_EXHAUSTED",
                "details": [{"quotaId": "RequestsPerDayPerProject-FreeTier"}],
            },
            "quota",
        ),
        (
            429,
            {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"quotaId": "RequestsPerMinute"}]},
            "rate_limit",
        ),
        (413, {"code": "rate_limit_exceeded", "message": "tokens per minute"}, "rate_limit"),
        (400, {"code": "context_length_exceeded"}, "context_length"),
        (400, {"type": "exceed_context_size_error", "code": 400}, "context_length"),
        (400, {"message": "This model's maximum context length is 8 tokens."}, "context_length"),
        (
            400,
            {"message": "prompt is too long: 9 tokens > 8 maximum", "type": "invalid_request_error"},
            "context_length",
        ),
        (400, {"message": "litellm.ContextWindowExceededError: x", "code": "400"}, "context_length"),
        (400, {"message": "Input is too long for requested model."}, "context_length"),
        (500, {"message": "Context size has been exceeded.", "type": "server_error", "code": 500}, "server"),
        (400, {"code": "content_filter"}, "content_filter"),
        (400, {"message": "triggering Azure OpenAI's content management policy"}, "content_filter"),
        (400, {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}, "content_filter"),
        (401, {"type": "invalid_request_error", "code": None}, "auth"),
        (404, {"type": "invalid_request_error", "code": "model_not_found"}, "not_found"),
        (400, {"type": "authentication_error"}, "auth"),
        (429, {"type": "api_error"}, "rate_limit"),
        (500, {"type": "invalid_request_error"}, "server"),
        (503, {"type": "overloaded_error"}, "overloaded"),
        (500, {"type": "rate_limit_error"}, "rate_limit"),
        (500, {"code": "server_is_overloaded"}, "overloaded"),
        (500, {"type": "ServiceUnavailableError"}, "overloaded"),
    ],
)
def test_codes_beat_the_status_and_wording_only_refines_it(status: int, error: dict[str, Any], expected: str) -> None:
    for envelope in ({"error": error}, {"type": "error", "error": error}, [{"error": error}], error):
        assert kind(status, envelope) == expected, envelope


@pytest.mark.parametrize(
    ("envelope", "expected", "status"),
    [
        ({"error": {"code": 502, "message": "x", "metadata": {"error_type": "provider_unavailable"}}}, "server", 502),
        ({"error": {"code": "500", "message": "error 404 upstream"}}, "server", 500),
        ({"error": {"code": "INTERNAL_SERVER_ERROR", "status": 500}}, "server", 500),
        ({"error": {"raw_status_code": 429, "code": 500}}, "rate_limit", 429),
        ({"error": {"code": " 503\x1f"}}, "overloaded", 503),
        ({"error": {"type": "NotFoundError"}}, "not_found", None),
        ({"error": {"type": "api_error"}}, "server", None),
        ({"error": "Model is overloaded", "error_type": "overloaded"}, "overloaded", None),
        ({"error": "overloaded"}, "overloaded", None),
        ({"error": "the model is overloaded, error 400"}, "stream_error", None),
        ({"error": {"message": "quota reached, 429"}}, "stream_error", None),
        ({"error": {"code": 1234}}, "stream_error", None),
        ({"error": {"code": 200}}, "stream_error", None),
        ({"error": True, "message": "x"}, "stream_error", None),
        ({"object": "error", "type": "BadRequestError", "code": 400}, "invalid_request", 400),
        ({"error": {"message": "the prompt is too long: reduce the length of the messages"}}, "context_length", None),
        ({"error": {"type": "invalid_request_error", "message": "bad"}}, "invalid_request", None),
    ],
)
def test_errors_inside_a_stream(envelope: Any, expected: str, status: int | None) -> None:
    found = classify(None, [], envelope)
    assert (found.kind, found.status) == (expected, status)


@pytest.mark.parametrize(
    ("envelope", "text", "message"),
    [
        ({"error": {"message": "two\nlines"}}, "", "HTTP 400: two lines"),
        ({"error": "plain"}, "", "HTTP 400: plain"),
        ({"detail": "not so"}, "", "HTTP 400: not so"),
        ({"detail": [{"msg": "Field required"}, {"msg": "Too short"}]}, "", "HTTP 400: Field required; Too short"),
        (None, "<html><head><title>400 Bad\nRequest</title></head><body>x</body></html>", "HTTP 400: 400 Bad Request"),
        (None, "", "HTTP 400"),
        ({"x": 1}, "", 'HTTP 400: {"x":1}'),
        ({"error": {"message": "\ud83d"}}, "", "HTTP 400: \ufffd"),
    ],
)
def test_messages_are_one_line_for_people(envelope: Any, text: str, message: str) -> None:
    assert classify(400, [], envelope, text).message == message


def test_long_messages_are_cut() -> None:
    assert len(classify(500, [], {"error": {"message": "x" * 10_000}}).message) < 600


@pytest.mark.parametrize(
    ("value", "retryable"), [("true", True), ("FALSE", False), (" false ", False), ("maybe", True), ("", True)]
)
def test_x_should_retry_overrides(value: str, retryable: bool) -> None:
    assert classify(429, [("X-Should-Retry", value)], None).retryable is retryable


@pytest.mark.parametrize("envelope", [{"error": {"a": 1}}, {"error": "x"}, {"object": "error"}, {"type": "error"}])
def test_what_is_an_error(envelope: Any) -> None:
    assert is_error(envelope)
    assert is_error({}, "error")


@pytest.mark.parametrize(
    "envelope", [{"error": None}, {"error": {}}, {"error": ""}, {"error": 0}, {"type": "error", "choices": []}, 5, None]
)
def test_what_is_none(envelope: Any) -> None:
    assert not is_error(envelope)


# Waits


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("retry-after", "7")], 7.0),
        ([("Retry-After", " 0.5 ")], 0.5),
        ([("retry-after", "0")], 0.0),
        ([("retry-after-ms", "1250"), ("retry-after", "2")], 1.25),
        ([("retry-after-ms", "soon"), ("retry-after", "2")], 2.0),
        ([("retry-after", "Sun, 23 Nov 2025 10:00:42 GMT"), DATE], 42.0),
        ([("retry-after", "Sunday, 23-Nov-25 10:00:42 GMT"), DATE], 42.0),
        ([("retry-after", "Sun Nov 23 10:00:42 2025"), DATE], 42.0),
        ([("retry-after", "Sun, 23 Nov 2025 09:00:00 GMT"), DATE], 0.0),
        ([("retry-after", "Sun, 23 Nov 2025 10:00:42 GMT")], None),
        *[
            ([("retry-after", bad)], None)
            for bad in ("soon", "-5", "NaN", "inf", "1e999", "", "1_0", "٣", "5 s", "0x10", "--")
        ],
        (
            [("retry-after", "nan"), ("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "12ms")],
            0.012,
        ),
        ([("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "6m0s")], 360.0),
        ([("x-ratelimit-remaining-requests", "3"), ("x-ratelimit-reset-requests", "6m0s")], None),
        ([("x-ratelimit-remaining-requests", "0")], None),
        (
            [
                ("x-ratelimit-remaining-tokens", "0"),
                ("x-ratelimit-reset-tokens", "1h2m3.5s"),
                ("x-ratelimit-remaining-requests", "0"),
                ("x-ratelimit-reset-requests", "1s"),
            ],
            3723.5,
        ),
        (
            [
                ("anthropic-ratelimit-requests-remaining", "0"),
                ("anthropic-ratelimit-requests-reset", "2025-11-23T10:01:00Z"),
                DATE,
            ],
            60.0,
        ),
        ([("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "1763892030"), DATE], 30.0),
        ([("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "1763892030000"), DATE], 30.0),
        ([("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "1763892030")], None),
        ([("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "30")], 30.0),
        ([("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "2025-11-23T09:00:00+00:00"), DATE], 0.0),
        ([("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "whenever"), DATE], None),
        ([("llm_provider-retry-after", "60")], 60.0),
        ([("llm_provider-retry-after", "60"), ("retry-after", "7")], 7.0),
        (
            [
                ("llm_provider-x-ratelimit-reset-requests", "9s"),
                ("x-ratelimit-remaining-requests", "0"),
            ],
            9.0,
        ),
        ([], None),
    ],
)
def test_waits_stated_in_headers(headers: list[tuple[str, str]], expected: float | None) -> None:
    assert stated_wait(headers, None, "") == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Please try again in 1.5s.", 1.5),
        ("Please try again in 6m0s. Visit", 360.0),
        ("try again in 20ms", 0.02),
        ("Retry in 2 minutes and 5 seconds", 125.0),
        ("please retry after 6 seconds", 6.0),
        ("Try again in 1h2m", 3720.0),
        ("try again in 30", 30.0),
        ("try again in 30.", 30.0),
        ("try again in about 1 minute", 60.0),
        ("try again in 3 days", 259_200.0),
        ("try again in a moment", None),
        ("try again in 5 apples", None),
        ("wait 5 seconds", None),
        ("try again in 2025-11-23", None),
    ],
)
def test_waits_stated_in_messages(message: str, expected: float | None) -> None:
    assert stated_wait([], None, message) == expected


def test_the_order_of_the_sources() -> None:
    body = {"error": {"details": [{"@type": "RetryInfo", "retryDelay": "34.5s"}]}}
    bucket = [("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1s")]
    assert stated_wait([("retry-after", "3"), *bucket], body, "try again in 9s") == 3.0
    assert stated_wait(bucket, body, "try again in 9s") == 34.5
    assert stated_wait(bucket, None, "try again in 9s") == 9.0
    assert stated_wait(bucket, None, "") == 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m30s", 90.0), ("90s", 90.0), ("1.5h", 5400.0), ("2 hours", 7200.0), ("x", None), ("", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert duration(text) == seconds


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["retry-after", "retry-after-ms", "date", "x-ratelimit-remaining", "x-ratelimit-reset"]),
            st.text(max_size=30) | st.sampled_from(["0", "9" * 400, "1e308", "1e308h", "0000-00-00T00:00:00Z"]),
        )
    ),
    st.text(max_size=60).map(lambda tail: "try again in 9" + tail),
)
def test_no_header_or_message_raises_or_gives_a_nonsense_wait(headers: list[tuple[str, str]], message: str) -> None:
    wait = stated_wait(headers, {"retryDelay": message}, message)
    assert wait is None or 0 <= wait < float("inf")


# Responses with another status


def refused(body: str, status: int = 429, end: str = "close", size: int = 5) -> Reception:
    reception = Reception("chat")
    reception.head(status, [], 0.0)
    raw = body.encode()
    for place in range(0, len(raw), size):
        if reception.feed(raw[place : place + size], 1.0):
            break
    if end != "open":
        reception.end(True, 2.0)
    return reception


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"error": {"code": "insufficient_quota", "message": "m"}}),
        json.dumps({"error": {"code": "insufficient_quota", "message": "m"}}, indent=2),
        json.dumps([{"error": {"code": "insufficient_quota", "message": "m"}}]),
        'data: {"error":{"code":"insufficient_quota","message":"m"}}\n\n',
        'event: error\ndata: {"code":"insufficient_quota","message":"m"}\n\n',
        '{}\n[]\n{"error":{"code":"insufficient_quota","message":"m"}}',
        'data: {"id":1}\n\ndata: {"error":{"code":"insufficient_quota","message":"m"}}\n\n',
        'error: {"code":"insufficient_quota","message":"m"}\n',
    ],
)
def test_bodies_of_refusals_are_read_in_every_form_without_waiting_for_the_end(body: str) -> None:
    for size in (1, 5, 10_000):
        reception = refused(body, end="open", size=size)
        assert reception.final
        completion, failure = reception.outcome()
        assert completion is None
        assert failure is not None
        assert (failure.kind, failure.status, failure.message) == ("quota", 429, "HTTP 429: m")


@pytest.mark.parametrize(
    "body", ["", "slow down", "<h1>slow down</h1>", '"slow down"', '{"error": {"mess', "[oops", "data: slow\n\n"]
)
def test_bodies_that_say_nothing_leave_the_status(body: str) -> None:
    _, failure = refused(body).outcome()
    assert failure is not None
    assert (failure.kind, failure.status) == ("rate_limit", 429)


def test_an_endless_refusal_is_read_no_further_than_needed() -> None:
    reception = Reception("chat")
    reception.head(500, [], 0.0)
    assert any(reception.feed(b"x" * 65_536, 1.0) for _ in range(40))
    _, failure = reception.outcome()
    assert failure is not None
    assert failure.kind == "server"
