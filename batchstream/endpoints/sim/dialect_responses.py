"""The Responses API: typed, numbered events around items; the terminal event carries everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from batchstream.endpoints.sim.answers import Answer
from batchstream.endpoints.sim.asks import Ask
from batchstream.endpoints.sim.script import Block, Script, blocks, sse


class _Numbered:
    """Spells events with the running `sequence_number`."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, kind: str, **fields: Any) -> bytes:
        event = sse({"type": kind, "sequence_number": self.number, **fields}, kind)
        self.number += 1
        return event


def script(ask: Ask, answer: Answer) -> Script:
    say = _Numbered()
    begun = _response(ask, answer, "in_progress", [])
    opening = say("response.created", response=begun) + say("response.in_progress", response=begun)
    parts = blocks(answer.choices[0])

    def closing() -> bytes:
        whole = body(ask, answer)
        last = _frame(say, _closing, parts, answer, len(parts) - 1) if parts else b""
        return last + say(f"response.{whole['status']}", response=whole)

    return Script(opening, _steps(say, parts, answer), closing)


def body(ask: Ask, answer: Answer) -> dict[str, Any]:
    cut = answer.choices[0].finish == "length"
    items = [_item(block, index, answer, "completed") for index, block in enumerate(blocks(answer.choices[0]))]
    found = _response(ask, answer, "incomplete" if cut else "completed", items)
    found["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
    found["usage"] = {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    return found


def _response(ask: Ask, answer: Answer, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "resp_" + answer.identity,
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "model": ask.model,
        "output": output,
        "error": None,
        "incomplete_details": None,
        "usage": None,
    }


def _steps(say: _Numbered, parts: list[Block], answer: Answer) -> Iterator[bytes]:
    """One piece a step; the events around an item go with its first piece and with the next item's first."""
    before = b""
    for index, block in enumerate(parts):
        before += _frame(say, _opening, parts, answer, index)
        for piece in block.pieces:
            if piece.kind == "call":  # the name stands in the item that has just been opened
                yield before
            else:
                yield before + say(_DELTAS[block.kind], **_place(block, index, answer), delta=piece.text)
            before = b""
        if index < len(parts) - 1:
            before = _frame(say, _closing, parts, answer, index)


_DELTAS = {
    "reasoning": "response.reasoning_summary_text.delta",
    "content": "response.output_text.delta",
    "tool": "response.function_call_arguments.delta",
}


def _opening(block: Block) -> tuple[str, ...]:
    part = {"reasoning": ("response.reasoning_summary_part.added",), "content": ("response.content_part.added",)}
    return ("response.output_item.added", *part.get(block.kind, ()))


def _closing(block: Block) -> tuple[str, ...]:
    part = {"reasoning": ("response.reasoning_summary_part.done",), "content": ("response.content_part.done",)}
    return (_DELTAS[block.kind].replace(".delta", ".done"), *part.get(block.kind, ()), "response.output_item.done")


def _frame(
    say: _Numbered, kinds: Callable[[Block], tuple[str, ...]], parts: list[Block], answer: Answer, index: int
) -> bytes:
    """The events that open or close an item."""
    block, found = parts[index], b""
    for kind in kinds(block):
        done = kind.endswith(".done")
        if "output_item" in kind:
            empty = Block(block.kind, block.call, block.pieces[:1] if block.kind == "tool" else [])
            item = _item(block if done else empty, index, answer, "completed" if done else "in_progress")
            found += say(kind, output_index=index, item=item)
        elif "_part." in kind:
            found += say(kind, **_place(block, index, answer), part=_part(block, block.text if done else ""))
        else:
            text = {"arguments" if block.kind == "tool" else "text": block.text}
            found += say(kind, **_place(block, index, answer), **text)
    return found


def _place(block: Block, index: int, answer: Answer) -> dict[str, Any]:
    place: dict[str, Any] = {"item_id": _item_id(block, index, answer), "output_index": index}
    if block.kind != "tool":
        place["summary_index" if block.kind == "reasoning" else "content_index"] = 0
    return place


def _item_id(block: Block, index: int, answer: Answer) -> str:
    prefix = {"reasoning": "rs_", "content": "msg_", "tool": "fc_"}[block.kind]
    return f"{prefix}{answer.identity}{index:02x}"


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": []}


def _item(block: Block, index: int, answer: Answer, status: str) -> dict[str, Any]:
    identity = _item_id(block, index, answer)
    parts = [_part(block, block.text)] if block.pieces else []
    if block.kind == "reasoning":
        return {"id": identity, "type": "reasoning", "summary": parts}
    if block.kind == "content":
        return {"id": identity, "type": "message", "role": "assistant", "status": status, "content": parts}
    return {
        "id": identity,
        "type": "function_call",
        "status": status,
        "call_id": f"call_{answer.identity[:16]}00{block.call:02x}",
        "name": block.pieces[0].text,
        "arguments": block.text,
    }
