"""What goes wrong on purpose, seen from the socket: each fault does what the grammar says, no more."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

FULL = 20
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "sim", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "sim", "prompt": "hi"},
    "/v1/responses": {"model": "sim", "input": "hi"},
    "/v1/messages": {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 99},
}
TERMINALS = ("[DONE]", "message_stop", "response.completed")


def contents(body: bytes) -> int:
    """How many whole chat events with content a body holds, and no more than whole ones."""
    events = [event[6:] for event in body.split(b"\n\n")[:-1] if event.startswith(b"data: {")]
    return sum(bool(json.loads(event)["choices"][0]["delta"].get("content")) for event in events)


@pytest.mark.parametrize("status", [400, 402, 408, 429, 500, 503, 529])
def test_a_status_fault_is_an_error_body_that_bills_nothing(simulated, status: int) -> None:
    sim = simulated(faults=f"{status}=1")
    refused = sim.chat()
    assert (refused.status, refused.end) == (status, "complete")
    assert refused.json["error"]["code"] == status
    assert refused.json["error"]["message"]
    (entry,) = sim.ledger()
    assert (entry["status"], entry["fault"], entry["billed_tokens"], entry["finished"]) == (
        status,
        str(status),
        0,
        False,
    )


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("", "retry-after", None),
        ("(retry-after=2)", "retry-after", "2"),
        ("(retry-after-ms=1500)", "retry-after-ms", "1500"),
    ],
)
def test_a_429_states_a_wait_only_when_told_to(simulated, options: str, name: str, value: str | None) -> None:
    assert simulated(faults=f"429{options}=1").chat().headers.get(name) == value


def test_a_429_may_state_a_date_against_its_own_date_header(simulated) -> None:
    from email.utils import parsedate_to_datetime

    headers = simulated(faults="429(retry-date=90)=1").chat().headers
    wait = parsedate_to_datetime(headers["retry-after"]) - parsedate_to_datetime(headers["date"])
    assert 89 <= wait.total_seconds() <= 91


def test_texts_of_an_error_can_be_chosen(simulated) -> None:
    error = simulated(faults="429(message=Daily limit exceeded,type=quota,code=daily)=1").chat().json["error"]
    assert error == {"message": "Daily limit exceeded", "type": "quota", "code": "daily"}


def test_the_messages_api_gets_errors_in_its_own_envelope(simulated) -> None:
    refused = simulated(faults="529=1").request("POST", "/v1/messages", BODIES["/v1/messages"])
    assert refused.json == {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded."}}


def test_reset_early_gives_not_a_byte(simulated) -> None:
    sim = simulated(faults="reset-early=1")
    answer = sim.chat()
    assert (answer.raw, answer.end) == (b"", "reset")
    assert sim.ledger()[0]["status"] == 0


def test_html_and_json_errors_come_with_status_200(simulated) -> None:
    page = simulated(faults="html=1").chat()
    assert (page.status, page.headers["content-type"]) == (200, "text/html")
    assert page.body.startswith(b"<!DOCTYPE html>")
    error = simulated(faults="json-error=1").chat()
    assert (error.status, error.headers["content-type"]) == (200, "application/json")
    assert error.json["error"]["code"] == 500


def test_a_redirect_points_back_to_this_server_where_following_it_would_show(simulated) -> None:
    sim = simulated(faults="redirect=1")
    answer = sim.chat()
    assert (answer.status, answer.headers["location"]) == (302, "/v1/elsewhere")
    sim.request("POST", "/v1/elsewhere", {})
    assert [entry["path"] for entry in sim.ledger()] == ["/v1/chat/completions", "/v1/elsewhere"]


def test_whole_answers_with_json_although_a_stream_was_asked(simulated) -> None:
    answer = simulated(faults="whole=1").chat()
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["object"] == "chat.completion"


@pytest.mark.parametrize("stream", [True, False])
def test_slow_headers_come_late_and_then_all_is_well(simulated, stream: bool) -> None:
    sim = simulated(faults="slow-headers(s=0.3)=1")
    assert sim.chat(stream=stream).end == "complete"
    (entry,) = sim.ledger()
    assert entry["head_at"] - entry["received_at"] >= 0.3
    assert entry["finished"]


@pytest.mark.parametrize("kind", ["reset", "close", "truncate", "stall", "comments", "error"])
@pytest.mark.parametrize("k", [0, 1, 7, FULL])
def test_a_cut_comes_after_exactly_k_events_and_bills_them(simulated, kind: str, k: int) -> None:
    sim = simulated(tokens=FULL, faults=f"{kind}(k={k},every=0.01)=1")
    client = sim.client(timeout=0.3 if kind == "stall" else 10)
    client.send("POST", "/v1/chat/completions", {**BODIES["/v1/chat/completions"], "stream": True})
    enough = (lambda raw: raw.count(b": keep-alive\n\n") >= 3) if kind == "comments" else None
    answer = client.read(enough)
    expected = {
        "reset": "reset",
        "close": "eof",
        "truncate": "complete",
        "stall": "timeout",
        "comments": "wanted",
        "error": "complete",
    }
    assert answer.end == expected[kind]
    assert b"[DONE]" not in answer.raw
    assert b'finish_reason":"stop' not in answer.raw
    if kind == "reset":
        # A reset may throw away what had arrived and was not read yet: at most k can be seen.
        assert answer.raw == b"" or contents(answer.body) <= k
    elif kind == "error":
        assert contents(answer.body.rpartition(b"data:")[0]) == k
        assert answer.payloads[-1]["error"]["code"] == 500
    else:
        assert contents(answer.body) == k
    client.close()
    entry = wait_for_end(sim)
    assert (entry["events"], entry["completion_tokens"]) == (k, k)
    assert entry["billed_tokens"] == (k + entry["prompt_tokens"])
    assert entry["closed_early"] is (kind in ("stall", "comments"))
    assert not entry["finished"]


def wait_for_end(sim: Any) -> dict[str, Any]:
    """The first ledger entry, once its exchange is over."""
    for _ in range(1000):
        entry = sim.ledger()[0]
        if entry["ended_at"] is not None:
            return dict(entry)
        time.sleep(0.01)
    raise AssertionError("the exchange never ended")


@pytest.mark.parametrize("path", BODIES)
def test_a_truncated_stream_of_any_api_ends_cleanly_and_lacks_its_end(simulated, path: str) -> None:
    whole = simulated(tokens=FULL).request("POST", path, {**BODIES[path], "stream": True})
    cut = simulated(tokens=FULL, faults="truncate=1").request("POST", path, {**BODIES[path], "stream": True})
    assert whole.end == cut.end == "complete"
    assert whole.body.startswith(cut.body)
    assert any(terminal.encode() in whole.body for terminal in TERMINALS)
    assert not any(terminal.encode() in cut.body for terminal in TERMINALS)


def test_truncation_can_fall_inside_an_event_and_inside_a_character(simulated) -> None:
    inside = simulated(tokens=FULL, faults="truncate-event(k=3)=1").chat()
    assert inside.end == "complete"
    assert contents(inside.body) == 3
    assert not inside.body.endswith(b"\n\n")
    sim = simulated(tokens=FULL, faults="truncate-utf8=1")
    cuts = [sim.chat(f"row {row}").body[-1] >= 0xC0 for row in range(40)]
    assert any(cuts), "some cut events hold a character of several bytes"
    assert not all(cuts), "those without one are cut in the middle"


def test_a_body_shorter_than_announced_ends_with_the_socket(simulated) -> None:
    answer = simulated(tokens=FULL, faults="length(k=4)=1").chat()
    assert answer.end == "eof"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(answer.body) == int(answer.headers["content-length"]) - 1000
    assert contents(answer.body) == 4


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/chat/completions", "error"),
        ("/v1/completions", "error"),
        ("/v1/responses", "type"),
        ("/v1/messages", "type"),
    ],
)
def test_an_error_inside_the_stream_has_the_shape_of_its_api(simulated, path: str, shape: str) -> None:
    sim = simulated(tokens=FULL, faults="error(k=2,status=503,message=upstream gone)=1")
    answer = sim.request("POST", path, {**BODIES[path], "stream": True})
    last = answer.payloads[-1]
    assert (last["type"] == "error") if shape == "type" else last["error"]["code"] == 503
    assert "upstream gone" in json.dumps(last)


def test_garbage_is_one_event_that_is_no_json_among_good_ones(simulated) -> None:
    answer = simulated(tokens=FULL, faults="garbage(k=5)=1").chat()
    events = [event for event in answer.body.split(b"\n\n") if event.startswith(b"data: {")]
    broken = []
    for place, event in enumerate(events):
        try:
            json.loads(event[6:])
        except json.JSONDecodeError:
            broken.append(place)
    assert broken == [1 + 5], "after the role and five tokens"
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_drip_is_the_same_answer_byte_by_byte(simulated, stream: bool) -> None:
    sim = simulated(tokens=5, faults="drip=1")
    dripped, whole = sim.chat(stream=stream), simulated(tokens=5).chat(stream=stream)
    assert dripped.body == whole.body
    assert dripped.end == "complete"
    assert sim.ledger()[0]["finished"]


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("reset", "reset"),
        ("close", "eof"),
        ("truncate", "eof"),
        ("length", "eof"),
        ("stall", "timeout"),
        ("comments", "timeout"),
    ],
)
def test_without_a_stream_a_cut_is_a_body_shorter_than_announced(simulated, kind: str, end: str) -> None:
    answer = simulated(faults=f"{kind}=1").chat(stream=False, timeout=0.3 if end == "timeout" else 10)
    assert answer.end == end
    assert answer.raw == b"" or len(answer.body) < int(answer.headers["content-length"])


def test_without_a_stream_an_error_is_a_status_and_garbage_is_no_json(simulated) -> None:
    assert simulated(faults="error(status=503)=1").chat(stream=False).status == 503
    garbage = simulated(faults="garbage=1").chat(stream=False)
    assert garbage.end == "complete"
    with pytest.raises(json.JSONDecodeError):
        _ = garbage.json


def test_a_fault_can_be_scripted_by_request_and_by_text_and_stop_after_its_times(simulated) -> None:
    sim = simulated(faults="500@2;503(times=2)~poison")
    assert [sim.chat(f"{row}").status for row in range(3)] == [200, 500, 200]
    assert [sim.chat("the poison row").status for _ in range(3)] == [503, 503, 200]


def test_random_faults_strike_as_often_as_they_should_and_the_same_rows_in_any_order(simulated) -> None:
    def statuses(rows: list[int]) -> dict[int, list[int]]:
        sim = simulated(tokens=1, faults="429=0.2;500=0.1", seed=5)
        client, found = sim.client(), {}
        for row in rows:
            for _ in range(3):
                client.send("POST", "/v1/chat/completions", {**BODIES["/v1/chat/completions"], "user": str(row)})
                found.setdefault(row, []).append(client.read().status)
        return found

    rows = list(range(200))
    forward, backward = statuses(rows), statuses(rows[::-1])
    assert forward == backward
    every = [status for row in forward.values() for status in row]
    assert every.count(429) == pytest.approx(120, abs=40)
    assert every.count(500) == pytest.approx(60, abs=30)
    assert any(len(set(row)) > 1 for row in forward.values()), "another attempt, another draw"
