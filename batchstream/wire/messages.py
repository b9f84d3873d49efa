"""The Messages API (Anthropic): content blocks become a Completion with one choice.

Gateways omit the `event:` lines, so the JSON `type` names the event. Unknown events and deltas are ignored.
Usage comes in two halves, input with `message_start`, output with `message_delta`, and is merged per key.
Where the answer is more than text and tool calls, `Choice.extra["content"]` keeps the content list as the
endpoint returns it without streaming (signatures, redacted thinking, citations, server tools).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from batchstream.records import Completion
from batchstream.wire.jsontext import dumps, parse
from batchstream.wire.parts import (
    NOT_ORDINARY,
    NOTHING,
    OUTPUT,
    VISIBLE,
    Call,
    Emitter,
    Kind,
    OnDelta,
    Slot,
    completion_of,
    merge,
    position,
)
from batchstream.wire.stencil import Stencil
from batchstream.wire.usage import merged


class _TextPiece(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    type: Literal["text_delta"]
    text: str


class _BlockDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    type: Literal["content_block_delta"]
    delta: _TextPiece
    index: int | None = None


_decode = msgspec.json.Decoder(_BlockDelta).decode


class _Block:
    """One content block as it grows: `head` as it was opened, `pieces` of its text, thinking or input."""

    __slots__ = ("call", "citations", "head", "pieces", "signature", "stopped")

    def __init__(self, head: dict[str, Any], call: Call | None) -> None:
        self.head = head
        self.call = call
        self.pieces: list[str] = []
        self.signature: list[str] = []
        self.citations: list[Any] = []
        self.stopped = False

    def settle(self) -> None:
        """The block's end: a tool's input that never came in pieces is what the block was opened with."""
        if self.call is not None and not self.stopped and not self.call.arguments:
            given = self.head.get("input")
            self.call.arguments.append(given if isinstance(given, str) and given else dumps(given or {}))
        self.stopped = True

    def body(self) -> dict[str, Any]:
        """The block as the endpoint returns it without streaming."""
        kind = self.head.get("type")
        block = dict(self.head)
        if kind in ("text", "thinking"):
            block[kind] = "".join(self.pieces)
        if self.signature:
            block["signature"] = "".join(self.signature)
        if self.citations:
            block["citations"] = list(self.citations)
        given = "".join(self.call.arguments if self.call is not None else self.pieces if "input" in block else ())
        if given:
            try:
                block["input"] = parse(given)
            except ValueError:
                block["input"] = given
        return block


class MessagesAssembler:
    """See `parts.Assembler` for what the attributes mean."""

    def __init__(self, n: int | None = None, on_delta: OnDelta | None = None) -> None:
        self.error: Any = None
        self.ended = False
        self.was_whole = False
        self.stencil: Stencil | None = None  # none is sought: events differ in more than their text
        self._emit = Emitter(on_delta) if on_delta is not None else None
        self._slot = Slot(0)
        self._begun = False
        self._opened = False  # message_start was seen
        self._blocks: list[_Block] = []
        self._by_index: dict[int, _Block] = {}
        self._id = ""
        self._model = ""
        self._usage: dict[str, Any] | None = None
        self._extra: dict[str, Any] = {}

    def quick(self, payload: bytes) -> int:
        try:
            event = _decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return NOT_ORDINARY
        self.was_whole = False
        return self._text("content", self._block(event.index, "text"), event.delta.text)

    def add(self, document: dict[str, Any], name: str) -> int:
        self.was_whole = False
        kind = document.get("type")
        if not isinstance(kind, str) or not kind:
            kind = name
        brought = NOTHING
        if kind == "message_start":
            message = document.get("message")
            self._opened = True
            if isinstance(message, dict):
                brought = self._message(message)
        elif kind == "message" and isinstance(document.get("content"), list):
            self.was_whole = True
            brought = self._message(document)
            self._settle()
            self.ended = self._begun = True
        elif kind == "content_block_start":
            block = document.get("content_block")
            if isinstance(block, dict):
                brought = self._open(document.get("index"), block)
        elif kind == "content_block_delta":
            delta = document.get("delta")
            if isinstance(delta, dict):
                brought = self._delta(document.get("index"), delta)
        elif kind == "content_block_stop":
            place = position(document.get("index"))
            block = self._by_index.get(place) if place is not None else (self._blocks[-1] if self._blocks else None)
            if block is not None:
                block.settle()
        elif kind == "message_delta":
            self._message_delta(document)
        elif kind == "message_stop":
            self._settle()
            self._begun |= self._opened
            self.ended = self._begun
        return brought

    def _message(self, message: dict[str, Any]) -> int:
        """`message_start`, or a whole message."""
        if not self._id and isinstance(message.get("id"), str):
            self._id = message["id"]
        if not self._model and isinstance(message.get("model"), str):
            self._model = message["model"]
        self._usage = merged(self._usage, message.get("usage"))
        self._stop(message)
        brought = NOTHING
        content = message.get("content")
        for block in content if isinstance(content, list) else []:
            if isinstance(block, dict):
                brought |= self._open(None, block)
        return brought

    def _message_delta(self, document: dict[str, Any]) -> None:
        self._usage = merged(self._usage, document.get("usage"))
        delta = document.get("delta")
        if isinstance(delta, dict):
            self._stop(delta)
            usage = delta.get("usage")
            self._usage = merged(self._usage, usage)

    def _stop(self, holder: dict[str, Any]) -> None:
        reason = holder.get("stop_reason")
        if isinstance(reason, str) and reason not in ("", "null"):
            self._begun = True
            self._slot.finish_reason = reason
            if reason in ("error", "abort"):
                self.error = {"code": reason, "message": f"stop_reason is {reason!r}"}
        if holder.get("stop_sequence") is not None:
            self._extra["stop_sequence"] = holder["stop_sequence"]

    # Blocks

    def _open(self, index: Any, head: dict[str, Any]) -> int:
        self._begun = True
        kind = head.get("type")
        call = None
        brought = NOTHING
        if kind == "tool_use":
            call = self._slot.calls.open(None)
            call.id = head["id"] if isinstance(head.get("id"), str) else ""
            call.name = head["name"] if isinstance(head.get("name"), str) else ""
            if call.id or call.name:
                brought = VISIBLE
                self._tell("tool_call", call.name)
        block = _Block(head, call)
        self._blocks.append(block)
        place = position(index)
        if place is not None:
            self._by_index[place] = block
        if kind == "text" and isinstance(head.get("text"), str):
            brought = self._text("content", block, head["text"])
            if isinstance(head.get("citations"), list):
                block.citations.extend(head["citations"])
        elif kind == "thinking" and isinstance(head.get("thinking"), str):
            brought = self._text("reasoning", block, head["thinking"])
        return brought

    def _block(self, index: Any, kind: str) -> _Block:
        """The block of that index, or the latest where there is none; opened if its start was lost."""
        place = position(index)
        block = self._by_index.get(place) if place is not None else (self._blocks[-1] if self._blocks else None)
        if block is None:
            self._open(index, {"type": kind})
            block = self._blocks[-1]
        return block

    def _delta(self, index: Any, delta: dict[str, Any]) -> int:
        kind = delta.get("type")
        if kind == "text_delta" and isinstance(delta.get("text"), str):
            return self._text("content", self._block(index, "text"), delta["text"])
        if kind == "thinking_delta" and isinstance(delta.get("thinking"), str):
            return self._text("reasoning", self._block(index, "thinking"), delta["thinking"])
        if kind == "input_json_delta" and isinstance(delta.get("partial_json"), str):
            return self._input(self._block(index, "tool_use"), delta["partial_json"])
        if kind == "signature_delta" and isinstance(delta.get("signature"), str):
            self._block(index, "thinking").signature.append(delta["signature"])
        elif kind == "citations_delta" and delta.get("citation") is not None:
            self._block(index, "text").citations.append(delta["citation"])
        return NOTHING

    def _text(self, kind: Kind, block: _Block, text: str) -> int:
        self._begun = True
        block.pieces.append(text)
        if not text:
            return NOTHING
        self._tell(kind, text)
        return VISIBLE if kind == "content" else OUTPUT

    def _input(self, block: _Block, text: str) -> int:
        if not text:
            return NOTHING
        if block.call is None:
            block.pieces.append(text)
            return NOTHING
        block.call.arguments.append(text)
        self._tell("tool_call", text)
        return VISIBLE

    def _tell(self, kind: Kind, text: str) -> None:
        if self._emit is not None and text:
            self._emit(0, kind, text)

    def _settle(self) -> None:
        for block in self._blocks:
            block.settle()

    # The end

    def started(self) -> bool:
        return self._begun

    def finished(self) -> bool:
        return self.ended or self._slot.finish_reason is not None

    def completion(self) -> Completion | None:
        if not (self._begun or self._usage or self._id):
            return None
        slot = self._slot
        slot.content = [piece for block in self._blocks if block.head.get("type") == "text" for piece in block.pieces]
        slot.reasoning = type(slot.reasoning)()
        for block in self._blocks:
            if block.head.get("type") == "thinking":
                for piece in block.pieces:
                    slot.reasoning.append("thinking", piece)
        slot.extra.pop("content", None)
        if any(self._is_more(block) for block in self._blocks):
            merge(slot.extra, "content", [block.body() for block in self._blocks])
        choices = [slot.record()] if self._begun else []
        return completion_of(choices, self._usage, self._model, self._id, self._extra)

    def _is_more(self, block: _Block) -> bool:
        return bool(block.head.get("type") not in ("text", "tool_use") or block.signature or block.citations)
