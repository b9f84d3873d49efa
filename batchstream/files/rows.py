"""From a raw row to a request: the row shapes, their validation, the identity of a row.

The shapes, told apart row by row in this order:
    template or prompt column given in the job: any columns, the prompt is made of them;
    `body` with `url`, `method` or `custom_id`: an OpenAI Batch line; the url picks the API from a list, nothing else;
    `messages`: a conversation;  `prompt`: one user message, with `system` if given.

In the shapes without a `body`, keys that are request parameters (PARAMETERS) are sent, everything else is data: it can
be kept or used in a template, and never leaves the machine. A row can choose neither host nor header nor file.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from batchstream.errors import InputError, UsageError
from batchstream.files.formats import RawRow, too_deep
from batchstream.records import Api, InvalidRow, Request

if TYPE_CHECKING:
    from batchstream.files.source import SourceSpec

REQUEST_COLUMNS = ("prompt", "messages", "body")
"""One of these holds the request, where no template or prompt column is given."""

Row = Request | InvalidRow
Build = Callable[[Api, dict[str, Any]], dict[str, Any]]
"""`build(api, common) -> body`: `common` holds `prompt` or `messages`, optional `system`, and request parameters."""

_NUMBER = ((int, float), "a number")
_INTEGER = ((int,), "an integer")
_TEXT = ((str,), "a string")
_OBJECT = ((dict,), "an object")
_LIST = ((list,), "an array")
_FLAG = ((bool,), "true or false")
_ANY = ((object,), "anything")

PARAMETERS: dict[str, tuple[tuple[type, ...], str]] = {
    "model": _TEXT,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INTEGER,
    "min_p": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "repeat_penalty": _NUMBER,
    "max_tokens": _INTEGER,
    "max_completion_tokens": _INTEGER,
    "max_output_tokens": _INTEGER,
    "min_tokens": _INTEGER,
    "n": _INTEGER,
    "seed": _INTEGER,
    "stop": ((str, list), "a string or an array"),
    "stop_token_ids": _LIST,
    "stop_sequences": _LIST,
    "logprobs": ((bool, int), "true, false or an integer"),
    "top_logprobs": _INTEGER,
    "logit_bias": _OBJECT,
    "tools": _LIST,
    "tool_choice": ((str, dict), "a string or an object"),
    "parallel_tool_calls": _FLAG,
    "response_format": _OBJECT,
    "reasoning_effort": _TEXT,
    "thinking": _OBJECT,
    "verbosity": _TEXT,
    "modalities": _LIST,
    "web_search_options": _OBJECT,
    "service_tier": _TEXT,
    "metadata": _OBJECT,
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
    "stream_options": _OBJECT,
    "guided_json": ((str, dict), "a string or an object"),
    "guided_regex": _TEXT,
    "guided_choice": _LIST,
    "guided_grammar": _TEXT,
    "chat_template_kwargs": _OBJECT,
    "ignore_eos": _FLAG,
    "extra_body": _OBJECT,
}
"""Keys of a row that are sent as request parameters, with what they must be."""

URLS: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/completions": "completions",
    "/completions": "completions",
    "/v1/responses": "responses",
    "/responses": "responses",
    "/v1/messages": "messages",
    "/messages": "messages",
}
"""What `url` of a Batch line may be, and the API that it picks."""

_BODY_NEEDS: dict[Api, tuple[str, tuple[type, ...], str]] = {
    "chat": ("messages", (list,), "an array"),
    "completions": ("prompt", (str, list), "a string or an array"),
    "responses": ("input", (str, list), "a string or an array"),
    "messages": ("messages", (list,), "an array"),
}

_NEVER_EXTRA = ("prompt", "messages", "system", "stream")

_encoder = msgspec.json.Encoder(order="deterministic")


class RowReader:
    """Makes requests of the rows of one file."""

    def __init__(self, spec: SourceSpec, build: Build) -> None:
        """Raises UsageError for a template or a default that cannot work."""
        self._spec = spec
        self._build = build
        self._template, self._data = None, frozenset[str]()
        if spec.template is not None:
            self._template, self._data = compile_template(spec.template)
        elif spec.prompt_column is not None:
            self._data = frozenset([spec.prompt_column])
        try:
            for name, item in spec.defaults.items():
                _check_parameter(name, item)
        except _RowError as error:
            raise UsageError(str(error)) from None
        self._first_columns: set[str] | None = set()
        self._shaped = False
        self._first_problem: str | None = None

    def needed(self) -> list[str]:
        """Columns without which no row can be read (or which the job wants to keep)."""
        keep = self._spec.keep if isinstance(self._spec.keep, tuple) else ()
        return [*sorted(self._data), *([self._spec.id_column] if self._spec.id_column else []), *keep]

    def used(self) -> frozenset[str] | None:
        """Every column that may matter, None for all."""
        if self._spec.keep == "all":
            return None
        return frozenset(("id", "custom_id", "system", "url", "method", *REQUEST_COLUMNS, *PARAMETERS, *self.needed()))

    def read(self, row: int, name: str, raw: RawRow) -> Row:
        """The request of a raw row, or why there is none. `name` is the file, for messages."""
        value = raw.value
        if value is None:
            return _invalid(row, str(row), raw.problem or "", raw, name, None)
        if self._first_columns is not None:
            self._first_columns.update(value)
        if raw.columnar:
            value = {key: _without_nulls(item) for key, item in value.items()}
        identity, keep = str(row), None
        try:
            keep = self._kept(raw.value or {})
            identity = self._id(row, value)
            api, body = self._request(value, raw.columnar)
            return Request(row, identity, api, body, _digest(api, body), keep)
        except (_RowError, ValueError, TypeError, RecursionError, OverflowError) as error:
            if self._first_problem is None:
                self._first_problem = f"{raw.where(name)}: {error}"
            return _invalid(row, identity, str(error), raw, name, keep)

    def check_shape(self, name: str) -> None:
        """After the first batch: raises InputError when no row of it holds a request, or a kept column is nowhere.

        One such row is a bad row; a whole batch of them is the wrong file or a forgotten option, and better said once.
        """
        columns, self._first_columns = self._first_columns, None
        if not columns:
            return
        if not self._shaped and self._first_problem is not None:
            raise InputError(f"{self._first_problem}; got the columns {', '.join(sorted(columns)[:20])}")
        for column in self._spec.keep if isinstance(self._spec.keep, tuple) else ():
            if column not in columns:
                near = difflib.get_close_matches(column, columns, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(columns)[:20])}"
                raise InputError(f"{name}: --keep {column}: no such column in the first rows; {hint}")

    def _request(self, value: dict[str, Any], columnar: bool) -> tuple[Api, dict[str, Any]]:
        spec = self._spec
        common = dict(spec.defaults)
        if self._template is not None:
            common["prompt"] = self._template(value)
        elif spec.prompt_column is not None:
            common["prompt"] = _text(value, spec.prompt_column)
        elif value.get("body") is not None and ("url" in value or "method" in value or "custom_id" in value):
            self._shaped = True
            return self._batch_line(value, columnar)
        elif value.get("messages") is not None:
            self._shaped = True
            if value.get("prompt") is not None:
                raise _RowError("expected 'prompt' or 'messages', got both")
            common["messages"] = _messages(_structured(value, "messages", columnar), "messages")
        elif value.get("prompt") is not None:
            self._shaped = True
            common["prompt"] = _text(value, "prompt")
        else:
            raise _RowError(
                "expected 'prompt', 'messages' or a Batch line ('custom_id', 'method', 'url', 'body'), "
                "or --template or --prompt-column"
            )
        self._shaped = True
        system = _text(value, "system") if value.get("system") is not None else spec.system
        if system is not None:
            common["system"] = system
        self._take_parameters(value, common, columnar)
        return spec.api, self._build(spec.api, common)

    def _take_parameters(self, value: dict[str, Any], common: dict[str, Any], columnar: bool) -> None:
        # A column that the prompt is made of is data, whatever its name.
        for name in (value.keys() & PARAMETERS.keys()) - self._data:
            if value[name] is not None:
                item = _structured(value, name, columnar)
                _check_parameter(name, item)
                common[name] = item
        extra = common.pop("extra_body", {})
        common.update({name: item for name, item in extra.items() if name not in _NEVER_EXTRA})

    def _batch_line(self, value: dict[str, Any], columnar: bool) -> tuple[Api, dict[str, Any]]:
        """Shape 3: the body is sent as it is, plus the job's defaults, as a stream."""
        method, url = value.get("method"), value.get("url")
        if method != "POST":
            raise _RowError(f"method: expected 'POST', got {method!r}")
        if not isinstance(url, str) or url not in URLS:
            raise _RowError(f"url: expected one of {', '.join(list(URLS)[::2])} (a path, no host), got {url!r}")
        api = URLS[url]
        body = _structured(value, "body", columnar)
        if not isinstance(body, dict):
            raise _RowError(f"body: expected an object, got {_name(body)}")
        body = {**self._spec.defaults, **{key: item for key, item in body.items() if item is not None}}
        field, kinds, wanted = _BODY_NEEDS[api]
        if not isinstance(body.get(field), kinds):
            raise _RowError(f"body.{field}: expected {wanted}, got {_name(body.get(field))}")
        if field == "messages":
            _messages(body[field], "body.messages")
        for name in body.keys() & PARAMETERS.keys():
            _check_parameter(name, body[name], "body.")
        body["stream"] = True
        if api in ("chat", "completions") and self._spec.include_usage:
            body["stream_options"] = {"include_usage": True, **body.get("stream_options", {})}
        return api, body

    def _id(self, row: int, value: dict[str, Any]) -> str:
        column = self._spec.id_column
        if column is not None and value.get(column) is None:
            raise _RowError(f"{column}: expected the row's id, got {'null' if column in value else 'no such column'}")
        for name in (column,) if column is not None else ("id", "custom_id"):
            found = value.get(name)
            if found is not None:
                if isinstance(found, str):
                    return found
                if isinstance(found, int) and not isinstance(found, bool):
                    return str(found)
                raise _RowError(f"{name}: expected a string or an integer, got {_name(found)}")
        return str(row)

    def _kept(self, value: dict[str, Any]) -> dict[str, Any] | None:
        keep = self._spec.keep
        if keep is None:
            return None
        kept = dict(value) if keep == "all" else {name: value.get(name) for name in keep}
        # Through JSON, so that dates, decimals and bytes of a Parquet file become what the result will hold.
        return msgspec.to_builtins(kept, str_keys=True)  # type: ignore[no-any-return]


class _RowError(Exception):
    """What is wrong with one row: field, expected, got."""


def _check_parameter(name: str, item: Any, prefix: str = "") -> None:
    kinds, wanted = PARAMETERS.get(name, _ANY)
    # In Python a boolean is an integer; in JSON it is not.
    if not isinstance(item, kinds) or (isinstance(item, bool) and not {bool, object} & set(kinds)):
        raise _RowError(f"{prefix}{name}: expected {wanted}, got {_name(item)}")
    if isinstance(item, float) and not math.isfinite(item):
        raise _RowError(f"{prefix}{name}: expected a finite number, got {item}")


def _structured(value: dict[str, Any], name: str, columnar: bool) -> Any:
    """A column that may hold JSON text where a Parquet file has no better type for it."""
    item = value[name]
    if columnar and isinstance(item, str) and PARAMETERS.get(name, _LIST)[0] not in (_TEXT[0], _NUMBER[0], _INTEGER[0]):
        text = item.lstrip()
        if text.startswith(("{", "[")):
            if too_deep(text.encode()):
                raise _RowError(f"{name}: expected less nesting")
            try:
                return msgspec.json.decode(text)
            except msgspec.MsgspecError as error:
                raise _RowError(f"{name}: expected JSON text, got {error}") from None
    return item


def _messages(messages: Any, field: str) -> Any:
    if not isinstance(messages, list) or not messages:
        raise _RowError(f"{field}: expected a non-empty array, got {_name(messages)}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _RowError(f"{field}[{index}]: expected an object, got {_name(message)}")
        if not isinstance(message.get("role"), str):
            raise _RowError(f"{field}[{index}].role: expected a string, got {_name(message.get('role'))}")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise _RowError(f"{field}[{index}].content: expected a string or an array, got {_name(message['content'])}")
    return messages


def _text(value: dict[str, Any], name: str) -> str:
    item = value.get(name)
    if not isinstance(item, str):
        raise _RowError(f"{name}: expected a string, got {_name(item) if name in value else 'no such column'}")
    return item


def compile_template(template: str) -> tuple[Callable[[dict[str, Any]], str], frozenset[str]]:
    """A function from a row to its prompt, and the columns it uses.

    Fields are names of columns, no expressions: `{text}`; a brace is doubled to be text. Strings go in as they
    are, other values as JSON. Raises UsageError.
    """
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, field, form, conversion in string.Formatter().parse(template):
            if field is not None and (form or conversion or not field or any(sign in field for sign in ".[]")):
                raise UsageError(
                    f"template: expected named columns such as {{text}}, got {{{field}}} with more than a name"
                )
            parts.append((literal, field))
    except ValueError as error:
        raise UsageError(f"template: {error}; double a brace that is meant as text") from None
    if not any(field for _, field in parts):
        raise UsageError("template: expected at least one column such as {text}, got none")

    def render(value: dict[str, Any]) -> str:
        out = []
        for literal, field in parts:
            out.append(literal)
            if field is not None:
                item = value.get(field)
                if item is None:
                    raise _RowError(
                        f"{field}: the template needs it, got {'null' if field in value else 'no such column'}"
                    )
                out.append(item if isinstance(item, str) else msgspec.json.encode(item).decode())
        return "".join(out)

    return render, frozenset(field for _, field in parts if field is not None)


def _without_nulls(value: Any) -> Any:
    """Parquet gives every member of a struct, null where the row has none: that is "not given"."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _digest(api: str, body: dict[str, Any]) -> int:
    """BLAKE2b-64 over api and canonical JSON (sorted keys): the identity of what would be sent."""
    text = b"%b\0%b" % (api.encode(), _encoder.encode(body))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _invalid(row: int, identity: str, message: str, raw: RawRow, name: str, keep: dict[str, Any] | None) -> InvalidRow:
    where = raw.where(name)
    digest = hashlib.blake2b(
        b"invalid\0" + (raw.raw or repr(raw.value).encode("utf-8", "replace")), digest_size=8
    ).digest()
    return InvalidRow(row, identity, f"{where}: {message}", where, int.from_bytes(digest, "little"), keep)


def _name(item: Any) -> str:
    """What a value is, for a message: short, whatever the value's size."""
    if item is None:
        return "nothing"
    if isinstance(item, (dict, list)):
        return f"{'an object' if isinstance(item, dict) else 'an array'} of {len(item)}"
    text = repr(item)
    return text if len(text) <= 60 else text[:57] + "..."
