"""Chat completions and legacy completions: chunks with choices, `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from batchstream.endpoints.sim.answers import Answer, AnswerChoice, Piece
from batchstream.endpoints.sim.asks import Ask
from batchstream.endpoints.sim.script import Script, escaped, sse

DONE = b"data: [DONE]\n\n"


def usage(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    if answer.reasoning_tokens:
        found["completion_tokens_details"] = {"reasoning_tokens": answer.reasoning_tokens}
    return found


def chat_script(ask: Ask, answer: Answer) -> Script:
    head = _head(ask, answer, "chat.completion.chunk")
    opening = b"".join(
        sse(
            {
                **head,
                "choices": [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
            }
        )
        for index in range(ask.choices)
    )
    ends = [
        sse({**head, "choices": [{"index": index, "delta": {}, "finish_reason": choice.finish}]})
        for index, choice in enumerate(answer.choices)
    ]
    return Script(opening, _events(ask, answer, head), lambda: b"".join(ends) + _ending(ask, answer, head))


def completions_script(ask: Ask, answer: Answer) -> Script:
    head = _head(ask, answer, "text_completion")
    ends = [
        sse({**head, "choices": [{"index": index, "text": "", "logprobs": None, "finish_reason": choice.finish}]})
        for index, choice in enumerate(answer.choices)
    ]
    return Script(b"", _events(ask, answer, head), lambda: b"".join(ends) + _ending(ask, answer, head))


def chat_body(ask: Ask, answer: Answer) -> dict[str, Any]:
    choices = []
    for index, choice in enumerate(answer.choices):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.joined("content") or (None if ask.tools else ""),
        }
        if ask.reasoning:
            message["reasoning_content"] = choice.joined("reasoning")
        if choice.calls:
            message["tool_calls"] = [
                {
                    "id": _call_id(answer, index, call),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for call, (name, arguments) in enumerate(choice.calls)
            ]
        entry: dict[str, Any] = {"index": index, "message": message, "finish_reason": choice.finish}
        if ask.logprobs:
            entry["logprobs"] = {"content": [_logprob(piece) for piece in choice.pieces if piece.kind == "content"]}
        choices.append(entry)
    return {**_head(ask, answer, "chat.completion"), "choices": choices, "usage": usage(answer)}


def completions_body(ask: Ask, answer: Answer) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": choice.joined("content"),
            "logprobs": _legacy_logprobs(choice.pieces) if ask.logprobs else None,
            "finish_reason": choice.finish,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return {**_head(ask, answer, "text_completion"), "choices": choices, "usage": usage(answer)}


def _head(ask: Ask, answer: Answer, kind: str) -> dict[str, Any]:
    prefix = "cmpl-" if ask.api == "completions" else "chatcmpl-"
    return {"id": prefix + answer.identity, "object": kind, "created": answer.created, "model": ask.model}


def _ending(ask: Ask, answer: Answer, head: dict[str, Any]) -> bytes:
    return (sse({**head, "choices": [], "usage": usage(answer)}) if ask.include_usage else b"") + DONE


def _events(ask: Ask, answer: Answer, head: dict[str, Any]) -> Iterator[bytes]:
    """Step by step the next token of every choice."""
    streams = [_choice_events(ask, answer, head, index, choice) for index, choice in enumerate(answer.choices)]
    if len(streams) == 1:
        return streams[0]
    return (b"".join(next(stream, b"") for stream in streams) for _ in range(answer.steps))


def _choice_events(ask: Ask, answer: Answer, head: dict[str, Any], index: int, choice: AnswerChoice) -> Iterator[bytes]:
    opening = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":[{"index":%d,' % index
    tail = b'"finish_reason":null}]}\n\n'
    if ask.api == "completions":
        leads = {"content": opening + b'"text":"'}
        plain = b'",' + (b"" if ask.logprobs else b'"logprobs":null,') + tail
    else:
        leads = {"content": opening + b'"delta":{"content":"', "reasoning": opening + b'"delta":{"reasoning_content":"'}
        plain = b'"},' + tail
    offset = 0
    for piece in choice.pieces:
        kind = piece.kind
        if kind in ("call", "arguments"):
            yield opening + b'"delta":' + msgspec.json.encode(_call_delta(answer, index, piece)) + b"," + tail
        elif ask.logprobs and kind == "content":
            given = _legacy_logprobs((piece,), offset) if ask.api == "completions" else {"content": [_logprob(piece)]}
            offset += len(piece.text)
            close = plain[: -len(tail)] + b'"logprobs":' + msgspec.json.encode(given) + b"," + tail
            yield leads[kind] + escaped(piece.text) + close
        else:
            yield leads[kind] + escaped(piece.text) + plain


def _call_delta(answer: Answer, index: int, piece: Piece) -> dict[str, Any]:
    if piece.kind == "call":
        call = {
            "index": piece.call,
            "id": _call_id(answer, index, piece.call),
            "type": "function",
            "function": {"name": piece.text, "arguments": ""},
        }
    else:
        call = {"index": piece.call, "function": {"arguments": piece.text}}
    return {"tool_calls": [call]}


def _call_id(answer: Answer, choice: int, call: int) -> str:
    return f"call_{answer.identity[:16]}{choice:02x}{call:02x}"


def _chance(piece: Piece) -> float:
    """A log probability that depends on the token alone."""
    return -0.0625 * (1 + len(piece.text))


def _logprob(piece: Piece) -> dict[str, Any]:
    return {"token": piece.text, "logprob": _chance(piece), "bytes": list(piece.text.encode()), "top_logprobs": []}


def _legacy_logprobs(pieces: tuple[Piece, ...], offset: int = 0) -> dict[str, Any]:
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    return {
        "tokens": [piece.text for piece in pieces],
        "token_logprobs": [_chance(piece) for piece in pieces],
        "top_logprobs": None,
        "text_offset": offsets,
    }
