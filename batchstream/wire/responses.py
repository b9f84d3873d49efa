"""The Responses API: typed events become a Completion with one choice.

The JSON `type` names the event, the SSE event name only where it is missing. Text lives in parts, found by
output index, item and content index. A part's `done` event, and the final snapshot, speak only where no delta
has spoken: they repeat the text. `finish_reason` is the response's status, or "incomplete:<reason>".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from batchstream.records import Completion
from batchstream.wire.parts import (
    NOT_ORDINARY,
    NOTHING,
    OUTPUT,
    VISIBLE,
    Call,
    Emitter,
    OnDelta,
    Slot,
    argument_text,
    completion_of,
    merge,
    position,
)
from batchstream.wire.stencil import Stencil
from batchstream.wire.usage import says_something

_PLAIN_ITEMS = frozenset({"message", "function_call", "custom_tool_call", "reasoning"})
_PartKey = tuple[int, int, str]


class _TextDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    type: Literal["response.output_text.delta"]
    delta: str
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    sequence_number: int | None = None
    logprobs: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    obfuscation: Any = None


_decode = msgspec.json.Decoder(_TextDelta).decode

_TEXT_EVENTS = {
    "response.output_text": "content", "response.text": "content", "response.refusal": "refusal",
    "response.reasoning_text": "reasoning_text", "response.reasoning": "reasoning_text",
    "response.reasoning_summary_text": "summary", "response.reasoning_summary": "summary",
}  # fmt: skip
_CALL_EVENTS = ("response.function_call_arguments", "response.custom_tool_call_input")
_TERMINAL = {"response.completed": "completed", "response.incomplete": "incomplete", "response.done": "completed"}


class ResponsesAssembler:
    """See `parts.Assembler` for what the attributes mean."""

    def __init__(self, n: int | None = None, on_delta: OnDelta | None = None) -> None:
        self.error: Any = None
        self.ended = False
        self.was_whole = False
        self.stencil: Stencil | None = None  # none is sought: events differ in more than their text
        self._emit = Emitter(on_delta) if on_delta is not None else None
        self._slot = Slot(0)
        self._begun = False
        self._parts: dict[str, dict[_PartKey, list[str]]] = {}  # by kind of text, then by part
        self._calls: dict[Any, Call] = {}  # by output index and by item id
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
        key = (position(event.output_index) or 0, position(event.content_index) or 0, event.item_id or "")
        return self._text("content", key, event.delta)

    def add(self, document: dict[str, Any], name: str) -> int:
        self.was_whole = False
        kind = document.get("type")
        if not isinstance(kind, str) or not kind:
            kind = name
        if document.get("object") == "response":
            return self._whole(document)
        stem, _, last = kind.rpartition(".")
        if last in ("delta", "done") and stem in _TEXT_EVENTS:
            return self._text_event(_TEXT_EVENTS[stem], last, document)
        if last in ("delta", "done") and stem in _CALL_EVENTS:
            return self._call_event(last, document)
        if kind in ("response.output_item.added", "response.output_item.done"):
            item = document.get("item")
            return self._item(item, document.get("output_index"), last) if isinstance(item, dict) else NOTHING
        if kind == "response.output_text.annotation.added" and isinstance(document.get("annotation"), dict):
            merge(self._slot.extra, "annotations", [document["annotation"]])
        elif kind in ("response.audio.delta", "response.audio.transcript.delta"):
            return self._audio("transcript" if "transcript" in kind else "data", document.get("delta"))
        elif kind == "response.failed" or kind == "response.cancelled":
            return self._snapshot(document.get("response"), kind.removeprefix("response."))
        elif kind in _TERMINAL:
            return self._snapshot(document.get("response"), _TERMINAL[kind])
        elif isinstance(document.get("response"), dict):
            self._identify(document["response"])
        return NOTHING

    # Text

    def _text_event(self, kind: str, last: str, document: dict[str, Any]) -> int:
        index = document.get("content_index", document.get("summary_index"))
        item = document.get("item_id")
        key = (position(document.get("output_index")) or 0, position(index) or 0, item if isinstance(item, str) else "")
        text = document.get("delta" if last == "delta" else "refusal" if kind == "refusal" else "text")
        if (
            kind == "content"
            and isinstance(document.get("logprobs"), list)
            and document["logprobs"]
            and last == "delta"
        ):
            self._slot.logprobs = (self._slot.logprobs or []) + document["logprobs"]
        if not isinstance(text, str):
            return NOTHING
        if last == "done" and key in self._parts.get(kind, ()):
            return NOTHING
        return self._text(kind, key, text)

    def _text(self, kind: str, key: _PartKey, text: str) -> int:
        self._begun = True
        self._parts.setdefault(kind, {}).setdefault(key, []).append(text)
        if not text:
            return NOTHING
        if self._emit is not None:
            self._emit(0, "content" if kind == "content" else "refusal" if kind == "refusal" else "reasoning", text)
        return VISIBLE if kind in ("content", "refusal") else OUTPUT

    def _audio(self, key: str, delta: Any) -> int:
        if not isinstance(delta, str) or not delta:
            return NOTHING
        self._begun = True
        self._slot.audio.setdefault(key, []).append(delta)
        return VISIBLE

    # Items and calls

    def _item(self, item: dict[str, Any], index: Any, last: str) -> int:
        kind = item.get("type")
        self._begun = True
        if kind in ("function_call", "custom_tool_call"):
            return self._call_item(item, index)
        if last == "done" and isinstance(kind, str) and kind not in _PLAIN_ITEMS:
            merge(self._slot.extra, "output_items", [item])
        return NOTHING

    def _call_item(self, item: dict[str, Any], index: Any) -> int:
        """A call as an item: opened, or told again when done or in the snapshot."""
        call = self._call(index, item.get("id"), item.get("call_id"))
        before = (call.id, call.name, len(call.arguments))
        identity = item.get("call_id") or item.get("id")
        if isinstance(identity, str) and identity:
            call.id = identity
            self._calls[identity] = call
        if isinstance(item.get("name"), str) and item["name"]:
            call.name = item["name"]
        if item.get("type") == "custom_tool_call":
            call.type = "custom"
        arguments = argument_text(item.get("arguments", item.get("input")))
        if arguments and not call.arguments:
            call.arguments.append(arguments)
        if (call.id, call.name, len(call.arguments)) == before:
            return NOTHING
        self._tell_call(arguments or call.name)
        return VISIBLE

    def _call_event(self, last: str, document: dict[str, Any]) -> int:
        call = self._call(document.get("output_index"), document.get("item_id"), None)
        value = document.get("delta") if last == "delta" else document.get("arguments", document.get("input"))
        arguments = argument_text(value)
        if isinstance(document.get("name"), str) and document["name"]:
            call.name = document["name"]
        if not arguments or (last == "done" and call.arguments):
            return NOTHING
        call.arguments.append(arguments)
        self._tell_call(arguments)
        return VISIBLE

    def _call(self, index: Any, item_id: Any, call_id: Any) -> Call:
        """The call of that item id, call id or output index; a new one if none is known."""
        self._begun = True
        keys: list[Any] = [key for key in (item_id, call_id) if isinstance(key, str) and key]
        place = position(index)
        if place is not None:
            keys.append(place)
        for key in keys:
            if key in self._calls:
                call = self._calls[key]
                break
        else:
            call = self._slot.calls.open(None)
            call.index = place
        for key in keys:
            self._calls.setdefault(key, call)
        return call

    def _tell_call(self, text: str) -> None:
        if self._emit is not None and text:
            self._emit(0, "tool_call", text)

    # Snapshots

    def _whole(self, response: dict[str, Any]) -> int:
        """A response outside any event: stream was ignored."""
        self.was_whole = True
        status = response.get("status")
        return self._snapshot(response, status if isinstance(status, str) and status else "completed")

    def _identify(self, response: dict[str, Any]) -> None:
        if not self._id and isinstance(response.get("id"), str):
            self._id = response["id"]
        if not self._model and isinstance(response.get("model"), str):
            self._model = response["model"]
        if says_something(response.get("usage")):
            self._usage = response["usage"]
        for key in ("created_at", "service_tier", "metadata", "incomplete_details"):
            if response.get(key):
                self._extra[key] = response[key]

    def _snapshot(self, response: Any, status: str) -> int:
        """The response as a terminal event tells it. Its text counts where no delta has spoken."""
        brought = NOTHING
        if isinstance(response, dict):
            self._identify(response)
            told = response.get("status")
            if told in ("completed", "incomplete", "failed", "cancelled"):
                status = told
            brought = self._output(response.get("output"))
        if status in ("failed", "cancelled"):
            error = response.get("error") if isinstance(response, dict) else None
            code = "abort" if status == "cancelled" else "error"
            self.error = {"error": error or {"code": code, "message": f"the response ended with status {status!r}"}}
            return brought
        details = response.get("incomplete_details") if isinstance(response, dict) else None
        if status == "incomplete" and isinstance(details, dict) and isinstance(details.get("reason"), str):
            status = f"incomplete:{details['reason']}"
        self._begun = True
        self._slot.finish_reason = status
        self.ended = status.startswith(("completed", "incomplete"))
        return brought

    def _output(self, output: Any) -> int:
        brought = NOTHING
        spoken = {kind for kind, parts in self._parts.items() if any(any(pieces) for pieces in parts.values())}
        heard_items = "output_items" in self._slot.extra
        for place, item in enumerate(output if isinstance(output, list) else []):
            if not isinstance(item, dict):
                continue
            kind = item.get("type")
            if kind in ("function_call", "custom_tool_call"):
                known = any(item.get(key) in self._calls for key in ("id", "call_id") if isinstance(item.get(key), str))
                brought |= self._call_item(item, None if known else place)
            elif kind in ("message", "reasoning"):
                brought |= self._texts(item, place, spoken)
            elif not heard_items:
                merge(self._slot.extra, "output_items", [item])
            if kind == "reasoning" and item.get("encrypted_content"):
                merge(self._slot.extra, "output_items", [item])
        return brought

    def _texts(self, item: dict[str, Any], place: int, spoken: set[str]) -> int:
        brought = NOTHING
        for field in ("content", "summary"):
            parts = item.get(field)
            for number, part in enumerate(parts if isinstance(parts, list) else []):
                if not isinstance(part, dict):
                    continue
                refused = part.get("type") == "refusal"
                kind = "refusal" if refused else "summary" if field == "summary" else "content"
                if kind == "content" and item.get("type") == "reasoning":
                    kind = "reasoning_text"
                text = part.get("refusal" if refused else "text")
                if isinstance(text, str) and kind not in spoken:
                    brought |= self._text(kind, (place, number, ""), text)
                notes = part.get("annotations")
                if isinstance(notes, list) and notes and "annotations" not in self._slot.extra:
                    merge(self._slot.extra, "annotations", notes)
        return brought

    # The end

    def started(self) -> bool:
        return self._begun

    def finished(self) -> bool:
        return self.ended

    def completion(self) -> Completion | None:
        if not (self._begun or self._usage or self._id):
            return None
        slot = self._slot
        slot.content = self._joined("content")
        slot.refusal = self._joined("refusal")
        slot.reasoning = type(slot.reasoning)()
        texts = {kind: "".join(self._joined(kind)) for kind in ("reasoning_text", "summary")}
        texts = {kind: text for kind, text in texts.items() if text}
        if texts:
            slot.reasoning.append_all(texts)
        choices = [slot.record()] if self._begun else []
        return completion_of(choices, self._usage, self._model, self._id, self._extra)

    def _joined(self, kind: str) -> list[str]:
        """The pieces of all parts in the order of the parts; those without indexes in order of arrival."""
        parts = self._parts.get(kind, {})
        ordered = sorted(parts, key=lambda key: key[:2])
        return [piece for key in ordered for piece in parts[key]]
