"""What the assemblers are made of: the growing parts of one answer, and how fragments join them.

Identity fields (role, id, type, name, index) are set, never concatenated; text is only ever appended,
never compared or de-duplicated, except that the same reasoning mirrored in two fields counts once.
Texts are kept as lists of pieces and joined once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from batchstream.records import Choice, Completion, Delta, FunctionCall, ToolCall
from batchstream.wire.jsontext import Scanner, dumps, parse, storable, whole
from batchstream.wire.stencil import Stencil
from batchstream.wire.usage import normalise_usage

NOTHING, OUTPUT, VISIBLE = 0, 1, 3
"""What a payload brought: no generated output; generated output; output that is not reasoning."""

NOT_ORDINARY = -1
"""The fast lane declines a payload."""

GROWING_AUDIO = ("data", "transcript")
"""Fields of audio that come in pieces; the others are set."""

INDEX_LIMIT = 1 << 16  # an index beyond this is no index

OnDelta = Callable[[Delta], None]
Kind = Literal["content", "reasoning", "refusal", "tool_call"]


class Assembler(Protocol):
    """Assembles the payloads of one response.

    `error` is the envelope of an error that ended the response, or None; `ended` turns True at the API's
    terminal event; `was_whole` tells whether the last payload was a whole answer rather than a delta.
    `stencil`: the form of events that bring text to choice 0 and nothing else, once it is known; what they bring
    may be given to its `take` instead. It is taken back as soon as such events would bring more.
    """

    error: Any
    ended: bool
    was_whole: bool
    stencil: Stencil | None

    def quick(self, payload: bytes) -> int:
        """Take `payload` if it is an ordinary delta: what it brought, or NOT_ORDINARY and nothing is changed."""
        ...

    def add(self, document: dict[str, Any], name: str) -> int:
        """Take a parsed payload of an event named `name`: what it brought."""
        ...

    def started(self) -> bool:
        """Whether any choice has begun."""
        ...

    def finished(self) -> bool:
        """Whether every choice has a finish reason."""
        ...

    def completion(self) -> Completion | None:
        """What has been assembled so far; None if nothing came."""
        ...


class Emitter:
    """Tells a listener each piece of text, joining surrogate halves that meet across pieces."""

    def __init__(self, listener: OnDelta) -> None:
        self._listener = listener
        self._halves: dict[tuple[int, Kind], str] = {}

    def __call__(self, index: int, kind: Kind, text: str) -> None:
        text = self._halves.pop((index, kind), "") + text
        if text and "\ud800" <= text[-1] <= "\udbff":
            self._halves[index, kind] = text[-1]
            text = text[:-1]
        if text:
            self._listener(Delta(index, kind, whole(text)))


class Reasoning:
    """Reasoning text out of several fields: one buffer a field, and one of all in order of arrival.

    Servers mirror the same text in two fields (it counts once), or move from one field to another (both
    count). Fields that come side by side, or where one holds a beginning of the other, are mirrors: the
    longest is the text. Otherwise the pieces in order of arrival are.
    """

    __slots__ = ("_fields", "_in_order", "_side_by_side")

    def __init__(self) -> None:
        self._fields: dict[str, list[str]] = {}
        self._in_order: list[str] = []
        self._side_by_side = False

    def append(self, field: str, text: str) -> None:
        self._fields.setdefault(field, []).append(text)
        self._in_order.append(text)

    def append_all(self, texts: dict[str, str]) -> str:
        """Append what one payload said in each field; returns the text that counts."""
        for field, text in texts.items():
            self._fields.setdefault(field, []).append(text)
        longest = max(texts.values(), key=len)
        self._in_order.append(longest)
        self._side_by_side |= len(texts) > 1
        return longest

    def text(self) -> str | None:
        if len(self._fields) < 2:
            return joined(self._in_order)
        buffers = sorted(("".join(pieces) for pieces in self._fields.values()), key=len)
        longest = buffers.pop()
        if self._side_by_side or all(longest.startswith(other) for other in buffers):
            return whole(longest)
        return joined(self._in_order)


def joined(pieces: list[str]) -> str | None:
    """The whole text of `pieces`, or None where there is none."""
    return whole("".join(pieces)) if pieces else None


class Call:
    """One tool call as it grows."""

    __slots__ = ("_scanned", "_scanner", "_spoiled", "_whole", "arguments", "id", "index", "name", "type")

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.id = ""
        self.name = ""
        self.type = ""
        self.arguments: list[str] = []
        self._scanner = Scanner()
        self._scanned = 0  # pieces already given to the scanner: each is scanned once
        self._whole = False  # the last bracket has come
        self._spoiled = False  # and all the same it is no JSON: nothing can mend it

    def is_whole(self) -> bool:
        """Whether the arguments so far are a whole JSON object or array."""
        for piece in self.arguments[self._scanned :]:
            self._whole = self._whole or self._scanner.feed(piece.encode("utf-8", "surrogatepass")) >= 0
        self._scanned = len(self.arguments)
        if not self._whole or self._spoiled:
            return False
        try:
            parse("".join(self.arguments))
        except ValueError:
            self._spoiled = True
        return not self._spoiled

    def is_empty(self) -> bool:
        return not any(piece.strip() for piece in self.arguments)

    def record(self) -> ToolCall:
        function = FunctionCall(whole(self.name), whole("".join(self.arguments)))
        return ToolCall(whole(self.id) or None, whole(self.type) or "function", function)


class Calls:
    """The tool calls of one choice, by the rules of identity: see `_find`."""

    __slots__ = ("_by_id", "_by_index", "_calls")

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._by_index: dict[int, Call] = {}
        self._by_id: dict[str, Call] = {}

    def add(self, fragment: dict[str, Any]) -> str | None:
        """Take one entry of a `tool_calls` list. Returns the text it brought (the name, before arguments),
        or None if it brought nothing."""
        kind = fragment.get("type")
        inner = fragment.get("function")
        if not isinstance(inner, dict):
            inner = fragment.get("custom") if isinstance(fragment.get("custom"), dict) else fragment
        assert isinstance(inner, dict)  # noqa: S101
        identity = _text(fragment.get("id"))
        name = _text(inner.get("name"))
        arguments = argument_text(inner.get("arguments", inner.get("input")))
        if not (identity or name or arguments):
            return None
        call = self._find(position(fragment.get("index")), identity, name, arguments)
        if identity:
            call.id = identity
            self._by_id[identity] = call
        if name:
            call.name = name
        if isinstance(kind, str) and kind:
            call.type = kind
        if arguments:
            call.arguments.append(arguments)
        return arguments or name

    def _find(self, index: int | None, identity: str, name: str, arguments: str) -> Call:
        """The call that a fragment belongs to, opened if need be.

        With an index: the call of that index, unless another id comes with a name while the arguments so far
        are whole or empty (gateways give every parallel call index 0). Without: a known id is that call, a new
        id a new one, no id the latest. Where the call so far has no id to differ from, a name with arguments behind
        whole arguments opens another: appended, they would make both useless.
        """
        if index is not None:
            call = self._by_index.get(index)
            if call is None:
                return self.open(index)
            if identity and name and identity != call.id:
                settled = call.is_empty() or call.is_whole() if call.id else arguments and call.name and call.is_whole()
                return self.open(index) if settled else call
            return call
        if identity:
            return self._by_id.get(identity) or self.open(None)
        if not self._calls:
            return self.open(None)
        latest = self._calls[-1]
        return self.open(None) if name and arguments and latest.name and latest.is_whole() else latest

    def open(self, index: int | None) -> Call:
        call = Call(index)
        self._calls.append(call)
        if index is not None:
            self._by_index[index] = call
        return call

    def records(self) -> list[ToolCall] | None:
        """In order of index where all have one, else in order of arrival; None without any."""
        calls = self._calls
        if all(call.index is not None for call in calls):
            calls = sorted(calls, key=lambda call: call.index or 0)
        return [call.record() for call in calls] or None

    def __bool__(self) -> bool:
        return bool(self._calls)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def argument_text(value: Any) -> str:
    """Arguments as text: strings as they are, null as nothing, objects serialised."""
    if value is None:
        return ""
    return value if isinstance(value, str) else dumps(value)


def position(value: Any) -> int | None:
    """An index as servers write it (0, 0.0, "0"), or None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 8:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < INDEX_LIMIT:
        return value
    return None


def merge(extra: dict[str, Any], key: str, value: Any) -> None:
    """Keep what a delta says beyond the named fields: lists grow, objects merge, of scalars the last counts."""
    if value is None or value == [] or value == {}:
        return
    known = extra.get(key)
    if isinstance(value, list) and isinstance(known, list):
        known.extend(value)
    elif isinstance(value, dict) and isinstance(known, dict):
        known.update(value)
    elif isinstance(value, list):
        extra[key] = list(value)
    elif isinstance(value, dict):
        extra[key] = dict(value)
    else:
        extra[key] = value


class Slot:
    """One choice as it grows."""

    __slots__ = (
        "audio",
        "calls",
        "content",
        "extra",
        "finish_reason",
        "function_call",
        "index",
        "logprobs",
        "reasoning",
        "refusal",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.content: list[str] = []
        self.reasoning = Reasoning()
        self.refusal: list[str] = []
        self.calls = Calls()
        self.function_call: Call | None = None
        self.audio: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.logprobs: list[Any] | None = None
        self.extra: dict[str, Any] = {}

    def record(self) -> Choice:
        """The choice as it stands."""
        extra = dict(self.extra) if self.extra else {}
        if self.function_call is not None:
            call = self.function_call.record()
            extra["function_call"] = {"name": call.function.name, "arguments": call.function.arguments}
        if self.audio:
            extra["audio"] = {k: "".join(v) if k in GROWING_AUDIO else v for k, v in self.audio.items()}
        return Choice(
            index=self.index,
            text=joined(self.content),
            reasoning=self.reasoning.text(),
            refusal=joined(self.refusal),
            tool_calls=self.calls.records() if self.calls else None,
            finish_reason=whole(self.finish_reason) if self.finish_reason else None,
            logprobs=storable(self.logprobs) if self.logprobs else None,
            extra=storable(extra) if extra else None,
        )


def extend_logprobs(slot: Slot, logprobs: Any) -> None:
    """Token entries of both APIs as one list of objects; completions send parallel lists, which are zipped."""
    entries: list[Any] = []
    if isinstance(logprobs, list):
        entries = logprobs
    elif isinstance(logprobs, dict):
        if isinstance(logprobs.get("content"), list):
            entries = logprobs["content"]
        elif isinstance(logprobs.get("tokens"), list):
            entries = _zipped(logprobs)
        if isinstance(logprobs.get("refusal"), list) and logprobs["refusal"]:
            merge(slot.extra, "refusal_logprobs", logprobs["refusal"])
    if entries:
        slot.logprobs = slot.logprobs or []
        slot.logprobs.extend(entries)


_PARALLEL = {
    "tokens": "token",
    "token_logprobs": "logprob",
    "top_logprobs": "top_logprobs",
    "text_offset": "text_offset",
}


def _zipped(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {_PARALLEL[k]: v for k, v in logprobs.items() if k in _PARALLEL and isinstance(v, list)}
    return [
        {name: column[place] for name, column in columns.items() if place < len(column)}
        for place in range(len(logprobs["tokens"]))
    ]


def completion_of(
    choices: list[Choice], usage: dict[str, Any] | None, model: str, response_id: str, extra: dict[str, Any]
) -> Completion:
    """The completion of what was assembled, with everything in it fit to be stored."""
    raw = storable(usage) if usage else None
    return Completion(
        choices=choices,
        usage=normalise_usage(raw) if raw else None,
        raw_usage=raw,
        model=whole(model) or None,
        response_id=whole(response_id) or None,
        extra=storable(dict(extra)) if extra else None,
    )
