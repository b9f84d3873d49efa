"""The chat cases of the wire corpus through several clients over real HTTP: who reads them right. Not a test.

    pip install -e . openai litellm httpx
    python tests/conformance/compare.py [-v]        -v names the cases each client gets wrong

Each client meets the same server, asks each case once (no retries, no time limits shorter than 10 s) and is judged by
the same comparison, which for all of them is the coarse one: a failure needs no kind and no partial text. The loops
over the others are careful ones: they collect text, reasoning under both of its usual names, refusals, tool calls by
index, logprobs, the finish reason of each choice and usage; an exception is a failure, and so is a stream that ends
with a choice that has no finish reason, or without any choice. "unchecked" counts the silent false successes without
that last check, as most loops are written.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "wire"), str(TESTS.parent)]

from replaying import Row, coarse_differences, corpus_server, replay_by_cli, taken_for_success  # noqa: E402
from wire_corpus import Case, stream_cases  # noqa: E402

NEEDED = ("openai", "litellm", "httpx")
TIMEOUT = 10.0
"""Seconds; the connections that stay open stay so for 60."""

Chunks = Callable[[str, Case], Iterable[dict[str, Any]]]


def body_of(case: Case) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"n": case.n} if case.n else {}),
    }


def openai_chunks(base: str, case: Case) -> Iterator[dict[str, Any]]:
    import openai

    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        extra = {"metadata": {"case": case.id}}
        for chunk in client.chat.completions.create(model="m", extra_body=extra, **body_of(case)):
            yield chunk.model_dump()


def litellm_chunks(base: str, case: Case) -> Iterator[dict[str, Any]]:
    import litellm

    response = litellm.completion(
        model="openai/m", api_base=f"{base}/v1", api_key="none", max_retries=0, timeout=TIMEOUT,
        extra_body={"metadata": {"case": case.id}}, **body_of(case),
    )  # fmt: skip
    for chunk in response:
        yield chunk.model_dump()


def httpx_chunks(base: str, case: Case) -> Iterator[dict[str, Any]]:
    import httpx

    body = {"model": "m", "metadata": {"case": case.id}, **body_of(case)}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=TIMEOUT) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return
            yield json.loads(line.removeprefix("data: "))


def accumulate(chunks: Iterable[dict[str, Any]]) -> Row:
    """What a careful loop over `chunks` has at their end, in the shape of a result row."""
    choices: dict[int, Row] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for part in chunk.get("choices") or []:
            choice = choices.setdefault(part["index"], {
                "text": "", "reasoning": "", "refusal": "", "tool_calls": [], "finish_reason": None, "logprobs": [],
            })  # fmt: skip
            delta = part.get("delta") or {}
            choice["text"] += delta.get("content") or ""
            choice["reasoning"] += delta.get("reasoning_content") or delta.get("reasoning") or ""
            choice["refusal"] += delta.get("refusal") or ""
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            choice["logprobs"] += (part.get("logprobs") or {}).get("content") or []
            for fragment in delta.get("tool_calls") or []:
                add_fragment(choice["tool_calls"], fragment)
    found = [choices[index] for index in sorted(choices)]
    finished = bool(found) and all(choice["finish_reason"] for choice in found)
    nothing = {"text": None, "reasoning": None, "refusal": None, "tool_calls": None, "logprobs": None}
    return {
        **(found[0] if found else {**nothing, "finish_reason": None}),
        "choices": found, "usage": usage, "extra": None,
        "status": "ok" if finished else "failed", "error": None if finished else "not finished",
    }  # fmt: skip


def add_fragment(calls: list[Row], fragment: dict[str, Any]) -> None:
    call = next((call for call in calls if call["index"] == fragment["index"]), None)
    if call is None:
        call = {"index": fragment["index"], "id": None, "function": {"name": "", "arguments": ""}}
        calls.append(call)
    function = fragment.get("function") or {}
    call["id"] = fragment.get("id") or call["id"]
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    call["function"]["arguments"] += function.get("arguments") or ""


def ask(chunks: Chunks, base: str, case: Case) -> Row:
    try:
        return accumulate(chunks(base, case))
    except Exception as error:  # whatever a client raises is its way to say that it failed
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}


def measure(chunks: Chunks, base: str, cases: list[Case]) -> dict[str, Row]:
    with ThreadPoolExecutor(8) as pool:
        return dict(
            zip([case.id for case in cases], pool.map(lambda case: ask(chunks, base, case), cases), strict=True)
        )


def row_of_table(name: str, cases: list[Case], rows: dict[str, Row], *, verbose: bool) -> str:
    wrong = {case.id: found for case in cases if (found := coarse_differences(case, rows[case.id]))}
    false = {case.id for case in cases if taken_for_success(case, rows[case.id])}
    unchecked = false | {
        case.id for case in cases if case.expect["state"] != "complete" and rows[case.id]["error"] == "not finished"
    }
    if verbose:
        for case, found in sorted(wrong.items()):
            sys.stderr.write(f"{name}: {case}: {'; '.join(found)[:300]}\n")
    return f"| {name} | {len(cases)} | {len(cases) - len(wrong)} | {len(wrong)} | {len(false)} | {len(unchecked)} |\n"


def main() -> int:
    verbose = "-v" in sys.argv[1:]
    try:
        versions = {name: version(name) for name in NEEDED}
    except PackageNotFoundError as error:
        sys.stderr.write(f"{error.name} is not installed: pip install -e . {' '.join(NEEDED)}\n")
        return 2
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing but the replay goes over the network
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # pydantic's, about what the cases are there to send
    import litellm

    litellm.suppress_debug_info = True
    litellm.telemetry = False
    cases = [case for case in stream_cases() if case.api == "chat"]
    clients: dict[str, Chunks] = {
        f"openai-python {versions['openai']}": openai_chunks,
        f"litellm {versions['litellm']}": litellm_chunks,
        f"lines of httpx {versions['httpx']}": httpx_chunks,
    }
    with corpus_server() as base, tempfile.TemporaryDirectory() as folder:
        tables = {"batchstream": replay_by_cli("chat", base, Path(folder))}
        tables |= {name: measure(chunks, base, cases) for name, chunks in clients.items()}
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m}\n\n")
    sys.stdout.write(
        "| client | cases | right | wrong | silent false successes | … unchecked |\n|---|--:|--:|--:|--:|--:|\n"
    )
    for name, rows in tables.items():
        sys.stdout.write(row_of_table(name, cases, rows, verbose=verbose))
    return 0


if __name__ == "__main__":
    sys.exit(main())
