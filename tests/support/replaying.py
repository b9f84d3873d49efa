"""Plays the wire corpus over real HTTP, and says what differs between a result row and what a case expects."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli import batchstream, rows_of
from scripted import Handler, Wire, serving
from wire_corpus import API, Case, stream_cases

Row = dict[str, Any]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _answer(wire: Wire, case: Case) -> None:
    """The recorded response, each segment a chunk, ended as it ended."""
    own = {"transfer-encoding", "content-length", "connection"}
    fields = "".join(f"{name}: {value}\r\n" for name, value in case.headers if name.lower() not in own)
    head = f"HTTP/1.1 {case.status} Recorded\r\n{fields}Transfer-Encoding: chunked\r\n\r\n"
    await wire.send(head.encode("utf-8"), *(_chunk(segment) for segment in case.segments if segment))
    if case.end == "reset":
        await asyncio.sleep(0.1)  # a reset overtakes what the client has not read yet
        wire.reset()
    elif case.end == "open":
        await asyncio.sleep(60)
    else:
        await wire.send(b"0\r\n\r\n")


@contextmanager
def corpus_server() -> Iterator[str]:
    """Base URL of a server that answers with the case that the request's `metadata.case` names."""
    by_id = {case.id: case for case in stream_cases()}

    async def handler(wire: Wire) -> None:
        while request := await wire.request():
            body = json.loads(request.partition(b"\r\n\r\n")[2])
            await _answer(wire, by_id[body["metadata"]["case"]])

    with _in_thread(handler) as base:
        yield base


@contextmanager
def _in_thread(handler: Handler) -> Iterator[str]:
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    bases: list[str] = []

    async def main() -> None:
        async with serving(handler, backlog=512) as base:
            bases.append(base)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield bases[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def replay_by_cli(api: str, base: str, folder: Path) -> dict[str, Row]:
    """Case id → result row of all cases of `api`, from one run of the command line."""
    # A 429 closes the lane for what comes after it, so those cases stand at the end.
    members = sorted((case for case in stream_cases() if case.api == api), key=lambda case: case.status == 429)
    rows = [
        {"id": case.id, "prompt": "?", "metadata": {"case": case.id}} | ({"n": case.n} if case.n else {})
        for case in members
    ]
    source, out = folder / f"{api}.jsonl", folder / f"{api}.out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = batchstream(
        "run", source, "-o", out, "--api", API[api], "--base-url", f"{base}/v1", "--model", "m", "--concurrency", 200,
        "--max-attempts", 1, "--breaker", "off", "-q", cwd=folder,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    return {row["id"]: row for row in rows_of(out)}


def taken_for_success(case: Case, row: Row) -> bool:
    """Whether a response that is no answer came out as one."""
    return case.expect["state"] != "complete" and row["status"] == "ok"


def differences(case: Case, row: Row) -> list[str]:
    """What differs from the expectation, or from the closest of its alternatives."""
    found = _against(case.expect, row)
    for alternative in case.alternatives:
        if found:
            found = _against({**case.expect, **alternative}, row) and found
    return found


def coarse_differences(case: Case, row: Row) -> list[str]:
    """As `differences`, for clients without kinds of errors: a failure needs only to be one, with whatever partial
    text; an answer must be right in its texts, calls, finish reasons and, in the numbers that were sent, usage."""
    found: list[str] = []
    for expect in (case.expect, *({**case.expect, **other} for other in case.alternatives)):
        ok = expect["state"] == "complete"
        against = [] if (row["status"] == "ok") == ok else [f"status: got {row['status']!r} ({row['error']})"]
        if ok and not against:
            against = _choices(expect, row) + ([] if _holds(_usage(row), expect["usage"]) else ["usage"])
        if not against:
            return []
        found = found or against
    return found


def _holds(got: Any, wanted: Any) -> bool:
    """Whether `got` has all that `wanted` says; what it has besides does not matter."""
    if isinstance(wanted, dict):
        return isinstance(got, dict) and all(_holds(got.get(key), value) for key, value in wanted.items())
    return wanted is None or bool(got == wanted)


def _usage(row: Row) -> Row:
    """Usage under the names and with the details that the endpoint sent."""
    return (row["extra"] or {}).get("usage") or row["usage"] or {}


def _check(wrong: list[str], what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        wrong.append(f"{what}: expected {str(wanted)[:200]!r}, got {str(got)[:200]!r}")


def _against(expect: Row, row: Row) -> list[str]:
    wrong: list[str] = []
    _check(wrong, "status", row["status"], "ok" if expect["state"] == "complete" else "failed")
    error, got_error = expect.get("error"), row["error"]
    if error is None:
        kind = "truncated" if expect["state"] == "truncated" else None
        _check(wrong, "error", got_error and got_error["kind"], kind)
    else:
        _check(wrong, "kind", got_error and got_error["kind"], error["kind"])
        _check(wrong, "retryable", got_error and got_error["retryable"], error["retryable"])
    wrong += _choices(expect, row)
    if expect["usage"] is None:
        _check(wrong, "usage", row["usage"], None)
    else:
        raw = _usage(row)
        _check(wrong, "usage", {key: raw.get(key) for key in expect["usage"]}, expect["usage"])
    return wrong


def _choices(expect: Row, row: Row) -> list[str]:
    wrong: list[str] = []
    choices = row["choices"] or [row]
    for choice, wanted in zip(choices, expect["choices"], strict=False):
        text = choice["text"] or ""
        if "content_len" in wanted:
            _check(wrong, "length", len(text), wanted["content_len"])
        else:
            _check(wrong, "content", text, wanted["content"])
        _check(wrong, "reasoning", choice["reasoning"] or "", wanted["reasoning"] or "")
        _check(wrong, "refusal", choice["refusal"] or "", wanted["refusal"] or "")
        _check(wrong, "finish_reason", choice["finish_reason"], wanted["finish_reason"])
        _check(wrong, "logprobs", len(choice["logprobs"] or []), wanted.get("logprobs_count", 0))
        calls = choice["tool_calls"] or []
        names = [call["function"]["name"] for call in calls]
        _check(wrong, "calls", names, [call["name"] for call in wanted["tool_calls"]])
        for call, expected in zip(calls, wanted["tool_calls"], strict=False):
            if expected.get("id") is not None:
                _check(wrong, "call id", call["id"], expected["id"])
            arguments: Any = call["function"]["arguments"]
            if "arguments_json" in expected:
                _check(wrong, "arguments", _json(arguments), expected["arguments_json"])
            else:
                _check(wrong, "arguments", arguments, expected["arguments"])
    if len(expect["choices"]) > 1:
        _check(wrong, "choices", len(choices), len(expect["choices"]))
    return wrong


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return f"not JSON: {text}"
