"""Replays corpus cases and recordings through a Reception, and says what differs from what is expected."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from batchstream.records import Api, Choice
from batchstream.wire.reception import Reception

CASES = Path(__file__).parent.parent / "corpus" / "wire" / "cases"
RECORDINGS = Path(__file__).parent.parent / "corpus" / "streams"
API: dict[str, Api] = {"chat": "chat", "completions": "completions", "responses": "responses", "anthropic": "messages"}


@dataclass
class Case:
    id: str
    api: str
    n: int | None
    status: int
    headers: list[tuple[str, str]]
    segments: list[bytes]
    end: str
    expect: dict[str, Any]
    alternatives: list[dict[str, Any]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.segments)


@cache
def cases() -> tuple[Case, ...]:
    found = []
    for path in sorted(CASES.glob("*.json")):
        case = json.loads(path.read_text())
        segments: list[bytes] = []
        for segment in case["response"]["body"]:
            if isinstance(segment, str):
                segments.append(base64.b64decode(segment))
            else:
                segments += [base64.b64decode(segment["b64"])] * segment["repeat"]
        expect = case["expect"]
        found.append(
            Case(
                id=path.stem,
                api=case["api"],
                n=case.get("request", {}).get("n"),
                status=case["response"]["status"],
                headers=[(name, value) for name, value in case["response"]["headers"]],
                segments=segments,
                end=case["response"]["end"],
                expect=expect,
                alternatives=case.get("alternatives") or expect.get("alternatives") or [],
            )
        )
    return tuple(found)


def stream_cases() -> list[Case]:
    return [case for case in cases() if case.api != "sse"]


def replay(case: Case, segments: list[bytes], lane: Any = "auto") -> Reception:
    """The reception after `segments`; the clock is the number of the segment."""
    reception = Reception(API[case.api], n=case.n, lane=lane)
    reception.head(case.status, case.headers, -1.0)
    for number, segment in enumerate(segments):
        if reception.feed(segment, float(number)):
            break
    if case.end == "open":
        assert reception.final, "an open connection must not be needed to end the response"
    else:
        reception.end(case.end == "close", float(len(segments)), "" if case.end == "close" else "reset")
    return reception


def seen(reception: Reception) -> dict[str, Any]:
    """Everything that must not depend on cuts or lanes."""
    completion, failure = reception.outcome()
    return {
        "state": reception.state,
        "failure": failure,
        "completion": completion,
        "ttft_event": reception.ttft_event,
        "ttfo_event": reception.ttfo_event,
        "saw_done": reception.saw_done,
        "chunks": reception.chunks,
    }


def differences(case: Case, reception: Reception, *, segments: bool = False) -> list[str]:
    """What differs from the expectation, or from the closest of its alternatives."""
    found = _differences(case.expect, reception, segments)
    for alternative in case.alternatives:
        if found:
            found = _differences({**case.expect, **alternative}, reception, segments) and found
    return found


def _differences(expect: dict[str, Any], reception: Reception, segments: bool) -> list[str]:
    completion, failure = reception.outcome()
    wrong: list[str] = []

    def check(what: str, got: Any, wanted: Any) -> None:
        if got != wanted:
            wrong.append(f"{what}: expected {wanted!r}, got {got!r}")

    check("state", reception.state, expect["state"])
    error = expect.get("error")
    if error is None:
        check("failure", failure, None)
    elif failure is None:
        wrong.append(f"failure: expected {error}, got none")
    else:
        check("kind", failure.kind, error["kind"])
        check("retryable", failure.retryable, error["retryable"])
        check("retry_after", failure.retry_after, error["retry_after_s"])
        if "http_status" in error:
            check("status", failure.status, error["http_status"])
    choices = completion.choices if completion else []
    check("indexes", [choice.index for choice in choices], [choice["index"] for choice in expect["choices"]])
    for choice, wanted in zip(choices, expect["choices"], strict=False):
        wrong += _choice_differences(choice, wanted)
    raw = completion.raw_usage if completion else None
    if expect["usage"] is None:
        check("usage", raw, None)
    else:
        check("usage", {key: (raw or {}).get(key) for key in expect["usage"]}, expect["usage"])
    check("ttft_event", reception.ttft_event, expect["ttft_event"])
    check("ttfo_event", reception.ttfo_event, expect["ttfo_event"])
    if expect["state"] == "complete":
        check("saw_done", reception.saw_done, expect["saw_done"])
    if segments and expect.get("ttft_segment") is not None:
        check("ttft_segment", reception.first_output_at, float(expect["ttft_segment"]))
    return wrong


def _choice_differences(choice: Choice, wanted: dict[str, Any]) -> list[str]:
    wrong: list[str] = []

    def check(what: str, got: Any, expected: Any) -> None:
        if got != expected:
            wrong.append(f"choice {choice.index} {what}: expected {expected!r}, got {got!r}")

    text = choice.text or ""
    if "content_sha256" in wanted:
        check("length", len(text), wanted["content_len"])
        check("hash", hashlib.sha256(text.encode()).hexdigest(), wanted["content_sha256"])
    else:
        check("content", text, wanted["content"])
    check("reasoning", choice.reasoning or "", wanted["reasoning"] or "")
    check("refusal", choice.refusal or "", wanted["refusal"] or "")
    check("finish_reason", choice.finish_reason, wanted["finish_reason"])
    check("logprobs", len(choice.logprobs or []), wanted.get("logprobs_count", 0))
    calls = choice.tool_calls or []
    check("calls", len(calls), len(wanted["tool_calls"]))
    for call, expected in zip(calls, wanted["tool_calls"], strict=False):
        if expected.get("id") is not None:
            check("call id", call.id, expected["id"])
        check("call name", call.function.name, expected["name"])
        if "arguments_json" in expected:
            check("arguments", json.loads(call.function.arguments), expected["arguments_json"])
        else:
            check("arguments", call.function.arguments, expected["arguments"])
    for key in ("function_call", "audio"):
        if key in wanted:
            got = (choice.extra or {}).get(key) or {}
            check(key, {name: got.get(name) for name in wanted[key]}, wanted[key])
    return wrong
