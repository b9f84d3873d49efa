"""Chat completions and completions: chunks with `choices` become a Completion.

Two lanes share one state. The fast lane takes the ordinary chunk, one choice with nothing but text, through
a typed decoder that builds no dictionaries; the decoder itself refuses whatever is not ordinary (an unknown
key, usage, tool calls, logprobs, an error), because dropping a field silently would lose part of an answer.
What it refuses goes down the full lane. Both give the same result; a test replays the corpus through each.

The rules (identity set, text appended, finish reasons that are none, usage from wherever it stands) are in
tests/corpus/wire/README.md. The two lanes stand in one module, longer than most, so that they are read side by side.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from batchstream.records import Completion
from batchstream.wire.parts import (
    GROWING_AUDIO,
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
    extend_logprobs,
    merge,
    position,
)
from batchstream.wire.stencil import Stencil, learn
from batchstream.wire.usage import says_something

PADDING = frozenset({"obfuscation", "nonce", "x-sai", "x_sai", "timings", "padding", "p"})
"""Keys that carry no part of an answer: padding against traffic analysis, server timings."""

_EmptyList = Annotated[list[Any], msgspec.Meta(max_length=0)]


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: str | None = None
    role: Literal["assistant", ""] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    tool_calls: _EmptyList | None = None
    function_call: None = None


class _Choice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    index: int | None = None
    finish_reason: str | None = None
    logprobs: None = None
    token_ids: None = None
    stop_reason: None = None
    native_finish_reason: None = None
    matched_stop: None = None


class _Chunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    choices: list[_Choice]
    id: str | None = None
    object: Literal["chat.completion.chunk", "text_completion", ""] | None = None
    created: int | float | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    provider: str | None = None
    usage: dict[str, Any] | None = None
    error: None = None
    x_groq: None = None
    prompt_token_ids: None = None
    prompt_text: None = None
    obfuscation: Any = None
    nonce: Any = None
    timings: Any = None
    p: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode

_NO_ORDINARY_END = frozenset({"null", "error", "abort"})
_TRIES = 20  # a stencil is not sought for ever: some servers pad each event with other bytes

_DELTA_KEYS = frozenset({
    "role", "content", "reasoning_content", "reasoning", "reasoning_details", "thinking", "refusal",
    "tool_calls", "function_call", "audio",
})  # fmt: skip
_CHOICE_KEYS = frozenset({"index", "delta", "message", "text", "finish_reason", "logprobs", "usage", "error"})
_TOP_KEYS = frozenset({"id", "object", "created", "model", "choices", "usage", "error"})
_LATEST = 1e11  # an instant beyond this is no epoch in seconds
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class ChoicesAssembler:
    """Assembles `choices`. `n` is the number of choices asked for, None if unknown.

    See `parts.Assembler` for what the attributes mean.
    """

    def __init__(self, n: int | None = None, on_delta: OnDelta | None = None) -> None:
        self.error: Any = None
        self.ended = False
        self.was_whole = False
        self.stencil: Stencil | None = None
        self._n = n
        self._emit = Emitter(on_delta) if on_delta is not None else None
        self._slots: dict[int, Slot] = {}
        self._first: Slot | None = None  # the slot of index 0
        self._id = ""
        self._model = ""
        self._identified = False
        self._usage: dict[str, Any] | None = None
        self._extra: dict[str, Any] = {}
        self._all_whole = False
        self._said: tuple[str | None, ...] = (None, None, None)  # by the last chunk that was noted
        self._sought = 0  # how often a stencil was sought

    # The fast lane

    def quick(self, payload: bytes) -> int:
        try:
            chunk = _decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return NOT_ORDINARY
        choices = chunk.choices
        if len(choices) != 1:
            return NOT_ORDINARY if choices else self._without_choice(chunk)
        choice = choices[0]
        if choice.index or choice.finish_reason in _NO_ORDINARY_END:
            return NOT_ORDINARY
        delta = choice.delta
        if delta is None:
            content, reasoning = choice.text, None
        else:
            content, reasoning = delta.content, delta.reasoning_content or delta.reasoning
            if reasoning and (content or (delta.reasoning_content and delta.reasoning)):
                return NOT_ORDINARY
            if choice.text is not None:
                return NOT_ORDINARY
        slot = self._first or self._slot(0)
        if not self._identified:
            self._identify(chunk.id, chunk.model, chunk.created)
        if (chunk.system_fingerprint, chunk.service_tier, chunk.provider) != self._said:
            self._note(chunk)
        if chunk.usage is not None and says_something(chunk.usage):
            self._usage = chunk.usage
        self.was_whole = False
        if choice.finish_reason:
            slot.finish_reason = choice.finish_reason
        if content is not None:
            slot.content.append(content)
            if content:
                if self._emit is not None:
                    self._emit(0, "content", content)
                elif self.stencil is None and self._sought < _TRIES and not (choice.finish_reason or chunk.usage):
                    self._sought += 1
                    self.stencil = learn(
                        payload, b'"text"' if delta is None else b'"content"', content, slot.content.append
                    )
                return VISIBLE
        if reasoning and delta is not None:
            slot.reasoning.append("reasoning_content" if delta.reasoning_content else "reasoning", reasoning)
            if self._emit is not None:
                self._emit(0, "reasoning", reasoning)
            return OUTPUT
        return NOTHING

    def _without_choice(self, chunk: _Chunk) -> int:
        """The chunk with the usage, as it comes last."""
        if not self._identified:
            self._identify(chunk.id, chunk.model, chunk.created)
        if (chunk.system_fingerprint, chunk.service_tier, chunk.provider) != self._said:
            self._note(chunk)
        if chunk.usage is not None and says_something(chunk.usage):
            self._usage = chunk.usage
        self.was_whole = False
        return NOTHING

    def _note(self, chunk: _Chunk) -> None:
        """What a chunk says of the whole response, the last of it counts. Events of a stencil repeat what was said
        in them, so none may be known that says something else."""
        extra = self._extra
        self._said = chunk.system_fingerprint, chunk.service_tier, chunk.provider
        for name in ("system_fingerprint", "service_tier", "provider"):
            value = getattr(chunk, name)
            if value is not None and extra.get(name) != value:
                extra[name] = value
                self.stencil = None

    # The full lane

    def add(self, document: dict[str, Any], name: str) -> int:
        brought = NOTHING
        self.was_whole = False
        self.stencil = None
        self._said = ()
        choices = document.get("choices")
        if isinstance(choices, dict):
            choices = [choices]
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    brought |= self._choice(choice)
        self._top(document)
        return brought

    def _top(self, document: dict[str, Any]) -> None:
        if not self._identified:
            self._identify(document.get("id"), document.get("model"), document.get("created"))
        for key, value in document.items():
            if key not in _TOP_KEYS and key not in PADDING and value is not None:
                self._extra[key] = value
        groq = document.get("x_groq")
        for usage in (groq.get("usage") if isinstance(groq, dict) else None, document.get("usage")):
            if says_something(usage):
                self._usage = usage

    def _identify(self, identity: Any, model: Any, created: Any) -> None:
        """The first that are not empty count: routers change them mid-stream."""
        if not self._id and isinstance(identity, str):
            self._id = identity
        if not self._model and isinstance(model, str):
            self._model = model
        if isinstance(created, int | float) and 0 < created < _LATEST:
            self._extra.setdefault("created", created)
        self._identified = bool(self._id and self._model and "created" in self._extra)

    def _slot(self, index: Any) -> Slot:
        place = 0 if self._n == 1 else position(index) or 0
        slot = self._slots.get(place)
        if slot is None:
            slot = self._slots[place] = Slot(place)
            if place == 0:
                self._first = slot
        return slot

    def _choice(self, choice: dict[str, Any]) -> int:
        slot = self._slot(choice.get("index"))
        brought = NOTHING
        delta, message, text = choice.get("delta"), choice.get("message"), choice.get("text")
        if isinstance(delta, dict):
            brought = self._delta(slot, delta)
        elif isinstance(message, dict):
            self.was_whole = self._all_whole = True
            brought = self._delta(slot, _unheard(slot, message))
        if isinstance(text, str):
            brought |= self._content(slot, text)
        if choice.get("logprobs") is not None:
            extend_logprobs(slot, choice["logprobs"])
        if says_something(choice.get("usage")):
            self._usage = choice["usage"]
        for key, value in choice.items():
            if key not in _CHOICE_KEYS and key not in PADDING:
                merge(slot.extra, key, value)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason not in ("", "null"):
            slot.finish_reason = reason
            if reason in ("error", "abort") and self.error is None:
                self.error = {"code": reason, "message": f"finish_reason is {reason!r}"}
        if choice.get("error"):
            self.error = {"error": choice["error"]}
        return brought

    def _delta(self, slot: Slot, delta: dict[str, Any]) -> int:
        brought = NOTHING
        reasoning = {f: delta[f] for f in _REASONING_FIELDS if isinstance(delta.get(f), str) and delta[f]}
        content = delta.get("content")
        if isinstance(content, dict):
            content = [content]
        if isinstance(content, list):
            brought |= self._content_parts(slot, content, reasoning)
        details = delta.get("reasoning_details")
        if isinstance(details, list):
            _take_details(slot, details, reasoning)
        if reasoning:
            text = slot.reasoning.append_all(reasoning)
            self._tell(slot, "reasoning", text)
            brought |= OUTPUT
        if isinstance(content, str):
            brought |= self._content(slot, content)
        refusal = delta.get("refusal")
        if isinstance(refusal, str) and refusal:
            slot.refusal.append(refusal)
            self._tell(slot, "refusal", refusal)
            brought |= VISIBLE
        brought |= self._calls(slot, delta)
        if isinstance(delta.get("audio"), dict):
            brought |= _take_audio(slot, delta["audio"])
        for key, value in delta.items():
            if key not in _DELTA_KEYS and key not in PADDING:
                merge(slot.extra, key, value)
        role = delta.get("role")
        if isinstance(role, str) and role not in ("", "assistant"):
            slot.extra["role"] = role
        return brought

    def _content(self, slot: Slot, text: str) -> int:
        slot.content.append(text)
        self._tell(slot, "content", text)
        return VISIBLE if text else NOTHING

    def _content_parts(self, slot: Slot, parts: list[Any], reasoning: dict[str, str]) -> int:
        """Content as a list: text is content, thinking is reasoning, what else there is is kept aside."""
        brought = NOTHING
        for part in parts:
            if isinstance(part, str):
                brought |= self._content(slot, part)
            elif isinstance(part, dict):
                thought = _nested_text(part.get("thinking", part.get("reasoning")))
                if thought:
                    reasoning["parts"] = reasoning.get("parts", "") + thought
                elif isinstance(part.get("text"), str):
                    if str(part.get("type")) in ("thinking", "reasoning"):
                        reasoning["parts"] = reasoning.get("parts", "") + part["text"]
                    else:
                        brought |= self._content(slot, part["text"])
                elif isinstance(part.get("refusal"), str) and part["refusal"]:
                    slot.refusal.append(part["refusal"])
                    brought |= VISIBLE
                elif part.get("type") not in ("thinking", "reasoning"):
                    merge(slot.extra, "content_parts", [part])
        return brought

    def _calls(self, slot: Slot, delta: dict[str, Any]) -> int:
        brought = NOTHING
        fragments = delta.get("tool_calls")
        if isinstance(fragments, dict):
            fragments = [fragments]
        if isinstance(fragments, list):
            for fragment in fragments:
                text = slot.calls.add(fragment) if isinstance(fragment, dict) else None
                if text is not None:
                    self._tell(slot, "tool_call", text)
                    brought = VISIBLE
        legacy = delta.get("function_call")
        if isinstance(legacy, dict):
            name, arguments = legacy.get("name"), argument_text(legacy.get("arguments"))
            call = slot.function_call = slot.function_call or Call(None)
            if isinstance(name, str) and name:
                call.name = name
                brought = VISIBLE
            if arguments:
                call.arguments.append(arguments)
                brought = VISIBLE
            self._tell(slot, "tool_call", arguments or name if isinstance(name, str) else arguments)
        return brought

    def _tell(self, slot: Slot, kind: Any, text: str) -> None:
        if self._emit is not None and text:
            self._emit(slot.index, kind, text)

    # The end

    def started(self) -> bool:
        return bool(self._slots)

    def finished(self) -> bool:
        """A whole answer (no deltas) is finished although it may lack finish reasons."""
        if not self._slots or (self._n is not None and len(self._slots) < self._n):
            return False
        return self._all_whole or all(slot.finish_reason for slot in self._slots.values())

    def completion(self) -> Completion | None:
        if not (self._slots or self._usage or self._id):
            return None
        choices = [self._slots[index].record() for index in sorted(self._slots)]
        return completion_of(choices, self._usage, self._model, self._id, self._extra)


def _unheard(slot: Slot, message: dict[str, Any]) -> dict[str, Any]:
    """Of a whole message, what deltas have not said already: a snapshot must not double the text."""
    heard = {
        "content": bool(slot.content),
        "refusal": bool(slot.refusal),
        "tool_calls": bool(slot.calls),
        "function_call": slot.function_call is not None,
        "audio": bool(slot.audio),
        **dict.fromkeys((*_REASONING_FIELDS, "reasoning_details"), slot.reasoning.text() is not None),
    }
    return {key: value for key, value in message.items() if not heard.get(key) and key not in slot.extra}


def _nested_text(value: Any) -> str:
    """Text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def _take_details(slot: Slot, details: list[Any], reasoning: dict[str, str]) -> None:
    """OpenRouter's reasoning_details: text or summary is reasoning; signed or encrypted entries are kept."""
    for detail in details:
        if not isinstance(detail, dict):
            continue
        text = _nested_text(detail.get("text")) or _nested_text(detail.get("summary"))
        if text:
            reasoning["details"] = reasoning.get("details", "") + text
        if detail.get("data") or detail.get("signature"):
            merge(slot.extra, "reasoning_details", [detail])


def _take_audio(slot: Slot, audio: dict[str, Any]) -> int:
    """Audio comes in pieces: data and transcript grow, id and expiry are set."""
    brought = NOTHING
    for key, value in audio.items():
        if key in GROWING_AUDIO and isinstance(value, str):
            slot.audio.setdefault(key, []).append(value)
            brought |= VISIBLE if value else NOTHING
        elif value is not None and key not in GROWING_AUDIO:
            slot.audio[key] = value
    return brought
