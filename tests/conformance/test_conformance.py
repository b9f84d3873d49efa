"""The whole wire corpus over real HTTP, through the command line: every case right, no cut stream taken for a success.

pytest tests/conformance -s          prints right / wrong / silent false successes
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cli import batchstream, rows_of
from scripted import Wire, serving
from wire_corpus import API, Case, stream_cases

PER_API = {api: [case for case in stream_cases() if case.api == api] for api in API}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answer(wire: Wire, case: Case) -> None:
    """The recorded response, each segment a chunk, ended as it ended."""
    own = {"transfer-encoding", "content-length", "connection"}
    fields = "".join(f"{name}: {value}\r\n" for name, value in case.headers if name.lower() not in own)
    head = f"HTTP/1.1 {case.status} Recorded\r\n{fields}Transfer-Encoding: chunked\r\n\r\n"
    await wire.send(head.encode("utf-8"), *(chunk(segment) for segment in case.segments if segment))
    if case.end == "reset":
        await asyncio.sleep(0.1)  # a reset overtakes what the client has not read yet
        wire.reset()
    elif case.end == "open":
        await asyncio.sleep(60)
    else:
        await wire.send(b"0\r\n\r\n")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case id → result row; one run of the command line for each API."""
    folder = tmp_path_factory.mktemp("conformance")
    by_id = {case.id: case for case in stream_cases()}

    async def handler(wire: Wire) -> None:
        while request := await wire.request():
            body = json.loads(request.partition(b"\r\n\r\n")[2])
            await answer(wire, by_id[body["metadata"]["case"]])

    found: dict[str, dict[str, Any]] = {}
    with in_thread(handler) as base:
        for api, members in PER_API.items():
            # A 429 closes the lane for what comes after it, so those cases stand at the end.
            rows = [
                {"id": case.id, "prompt": "?", "metadata": {"case": case.id}} | ({"n": case.n} if case.n else {})
                for case in sorted(members, key=lambda case: case.status == 429)
            ]
            source = folder / f"{api}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
            done = batchstream(
                "run", source, "-o", folder / f"{api}.out.jsonl", "--api", API[api], "--base-url", f"{base}/v1",
                "--model", "m", "--param", "max_tokens=100", "--concurrency", 200, "--max-attempts", 1, "--breaker", "off", "-q", cwd=folder,
            )  # fmt: skip
            assert done.returncode in (0, 3), done.stderr
            found.update({row["id"]: row for row in rows_of(folder / f"{api}.out.jsonl")})
    return found


def in_thread(handler: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def manage() -> Iterator[str]:
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

    return manage()


def differences(case: Case, row: dict[str, Any]) -> list[str]:
    """What differs from the expectation, or from the closest of its alternatives."""
    found = against(case.expect, row)
    for alternative in case.alternatives:
        if found:
            found = against({**case.expect, **alternative}, row) and found
    return found


def against(expect: dict[str, Any], row: dict[str, Any]) -> list[str]:
    wrong: list[str] = []

    def check(what: str, got: Any, wanted: Any) -> None:
        if got != wanted:
            wrong.append(f"{what}: expected {str(wanted)[:200]!r}, got {str(got)[:200]!r}")

    check("status", row["status"], "ok" if expect["state"] == "complete" else "failed")
    error, got_error = expect.get("error"), row["error"]
    if error is None:
        check("error", got_error and got_error["kind"], "truncated" if expect["state"] == "truncated" else None)
    else:
        check("kind", got_error and got_error["kind"], error["kind"])
        check("retryable", got_error and got_error["retryable"], error["retryable"])
    choices = row["choices"] or [row]
    for choice, wanted in zip(choices, expect["choices"], strict=False):
        text = choice["text"] or ""
        if "content_len" in wanted:
            check("length", len(text), wanted["content_len"])
        else:
            check("content", text, wanted["content"])
        check("reasoning", choice["reasoning"] or "", wanted["reasoning"] or "")
        check("refusal", choice["refusal"] or "", wanted["refusal"] or "")
        check("finish_reason", choice["finish_reason"], wanted["finish_reason"])
        check("logprobs", len(choice["logprobs"] or []), wanted.get("logprobs_count", 0))
        calls = choice["tool_calls"] or []
        check("calls", [call["function"]["name"] for call in calls], [call["name"] for call in wanted["tool_calls"]])
        for call, expected in zip(calls, wanted["tool_calls"], strict=False):
            if expected.get("id") is not None:
                check("call id", call["id"], expected["id"])
            if "arguments_json" in expected:
                check("arguments", json.loads(call["function"]["arguments"]), expected["arguments_json"])
            else:
                check("arguments", call["function"]["arguments"], expected["arguments"])
    if len(expect["choices"]) > 1:
        check("choices", len(choices), len(expect["choices"]))
    if expect["usage"] is None:
        check("usage", row["usage"], None)
    else:
        raw = (row["extra"] or {}).get("usage") or row["usage"] or {}
        check("usage", {key: raw.get(key) for key in expect["usage"]}, expect["usage"])
    return wrong


@pytest.mark.parametrize("case", stream_cases(), ids=lambda case: case.id)
def test_a_case_comes_out_right_over_http(case: Case, replayed: dict[str, dict[str, Any]]) -> None:
    assert differences(case, replayed[case.id]) == []


def test_no_broken_stream_is_taken_for_a_success(
    replayed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = stream_cases()
    right = sum(not differences(case, replayed[case.id]) for case in cases)
    false = [case.id for case in cases if case.expect["state"] != "complete" and replayed[case.id]["status"] == "ok"]
    said = f"{len(cases)} cases, {right} right, {len(cases) - right} wrong, {len(false)} silent false successes"
    with capsys.disabled():
        sys.stdout.write(f"\nconformance: {said}\n")
    assert false == []
