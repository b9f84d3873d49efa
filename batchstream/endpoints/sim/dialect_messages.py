"""Anthropic's Messages API: content blocks between message_start and message_stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from batchstream.endpoints.sim.answers import Answer
from batchstream.endpoints.sim.asks import Ask
from batchstream.endpoints.sim.script import Block, Script, blocks, escaped, sse

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_SIGNATURE = "c2lt"  # "sim": thinking must carry one


def script(ask: Ask, answer: Answer) -> Script:
    message = {
        **_message(ask, answer),
        "content": [],
        "stop_reason": None,
        "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": 1},
    }
    opening = _say("message_start", message=message) + _say("ping")
    parts = blocks(answer.choices[0])
    end = _stop(parts[-1], len(parts) - 1) if parts else b""
    end += _say(
        "message_delta",
        delta={"stop_reason": _reason(answer), "stop_sequence": None},
        usage={"output_tokens": answer.completion_tokens},
    )
    return Script(opening, _steps(parts, answer), lambda: end + _say("message_stop"))


def body(ask: Ask, answer: Answer) -> dict[str, Any]:
    content = []
    for block in blocks(answer.choices[0]):
        found = _block(block, answer)
        if block.kind == "reasoning":
            found |= {"thinking": block.text, "signature": _SIGNATURE}
        elif block.kind == "content":
            found |= {"text": block.text}
        else:
            found |= {"input": _arguments(block.text)}
        content.append(found)
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.completion_tokens}
    return {**_message(ask, answer), "content": content, "stop_reason": _reason(answer), "usage": usage}


def _arguments(text: str) -> Any:
    """Parsed arguments; those that max_tokens has cut cannot be, and the field must hold an object."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}


def _reason(answer: Answer) -> str:
    return _REASONS[answer.choices[0].finish]


def _message(ask: Ask, answer: Answer) -> dict[str, Any]:
    return {
        "id": "msg_" + answer.identity,
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "stop_sequence": None,
    }


def _say(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _block(block: Block, answer: Answer) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind == "content":
        return {"type": "text", "text": ""}
    identity = f"toolu_{answer.identity[:16]}{block.call:02x}"
    return {"type": "tool_use", "id": identity, "name": block.pieces[0].text, "input": {}}


_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "content": ("text_delta", "text"),
    "tool": ("input_json_delta", "partial_json"),
}


def _steps(parts: list[Block], answer: Answer) -> Iterator[bytes]:
    before = b""
    for index, block in enumerate(parts):
        before += _say("content_block_start", index=index, content_block=_block(block, answer))
        kind, field = _DELTAS[block.kind]
        lead = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":"'
            % (
                index,
                kind.encode(),
                field.encode(),
            )
        )
        for piece in block.pieces:
            if piece.kind == "call":  # the name stands in content_block_start
                yield before
            else:
                yield before + lead + escaped(piece.text) + b'"}}\n\n'
            before = b""
        if index < len(parts) - 1:
            before = _stop(block, index)


def _stop(block: Block, index: int) -> bytes:
    sign = b""
    if block.kind == "reasoning":
        sign = _say("content_block_delta", index=index, delta={"type": "signature_delta", "signature": _SIGNATURE})
    return sign + _say("content_block_stop", index=index)
