"""A request body, understood: one shape for the four APIs, and the refusals of a careful endpoint."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from batchstream.endpoints.sim.settings import SimulateConfig
from batchstream.records import Api

PATHS: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
_LIMIT_NAMES: dict[Api, tuple[str, ...]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
}
_PROMPT_NAMES: dict[Api, str] = {
    "chat": "messages",
    "completions": "prompt",
    "responses": "input",
    "messages": "messages",
}
_EFFORTS = {"none": 0, "minimal": 4, "low": 8, "medium": 16, "high": 32, "xhigh": 64}


class Refusal(Exception):  # noqa: N818  (what an endpoint does)
    """The request gets an error response. `headers` go with it."""

    def __init__(
        self, status: int, message: str, kind: str, code: str | int | None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.headers = headers or {}


class Tool(msgspec.Struct, frozen=True):
    """A function that will be called: `schema` is the JSON schema of its arguments."""

    name: str
    schema: dict[str, Any]


class Ask(msgspec.Struct, frozen=True):
    """What one request wants. `choices` counts all of them (prompts × n); `max_tokens` is for each;
    `reasoning` is how many reasoning tokens come first; `tools` the functions to call, in order."""

    api: Api
    model: str
    stream: bool
    choices: int
    prompt_tokens: int
    max_tokens: int | None
    include_usage: bool
    reasoning: int
    tools: tuple[Tool, ...]
    logprobs: bool
    stop: tuple[str, ...]
    ignore_eos: bool


def decoded(raw: bytes) -> Any:
    """The JSON value of a body, or `msgspec.UNSET` when it is not JSON."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return msgspec.UNSET


def understand(api: Api, body: Any, config: SimulateConfig) -> Ask:
    """Read a decoded request body. Raises `Refusal` (400 and 404) as ShuttleAI and OpenAI do."""
    if body is msgspec.UNSET:
        raise _invalid("the body is not JSON")
    if not isinstance(body, dict):
        raise _invalid(f"the body must be an object, not {type(body).__name__}")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _invalid("you must provide a model parameter")
    if config.only_known and model not in config.models:
        raise Refusal(404, f"The model `{model}` does not exist", "invalid_request_error", "model_not_found")
    prompt = body.get(_PROMPT_NAMES[api])
    if not prompt or not isinstance(prompt, (str, list)) or (isinstance(prompt, str) and api in ("chat", "messages")):
        raise _invalid(f"'{_PROMPT_NAMES[api]}' is missing, empty or of the wrong type")
    limit = next((body[name] for name in _LIMIT_NAMES[api] if body.get(name) is not None), None)
    if limit is None and api == "messages":
        raise _invalid("max_tokens: field required")
    if limit is not None:
        limit = _whole(_LIMIT_NAMES[api][-1], limit, 1, 10_000_000)
    n = _whole("n", body.get("n") or 1, 1, 128)
    prompts = len(prompt) if api == "completions" and isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    prompt_tokens = _count(prompt) + _count(body.get("system")) + _count(body.get("instructions"))
    if prompt_tokens + (limit or 0) > config.context_length:
        raise Refusal(
            400,
            f"This model's maximum context length is {config.context_length} tokens. However, you requested "
            f"{prompt_tokens + (limit or 0)} tokens ({prompt_tokens} in the prompt, {limit or 0} in the completion).",
            "invalid_request_error",
            "context_length_exceeded",
        )
    options = body.get("stream_options")
    stop = body.get("stop") or body.get("stop_sequences") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise _invalid(f"'stop' must be a text or a list of texts, got {stop!r}")
    return Ask(
        api=api,
        model=model,
        stream=body.get("stream") is True,
        choices=n * prompts,
        prompt_tokens=prompt_tokens,
        max_tokens=limit,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        reasoning=_reasoning(api, body),
        tools=_tools(body) if api != "completions" else (),
        logprobs=body.get("logprobs") not in (None, False),
        stop=tuple(stop),
        ignore_eos=body.get("ignore_eos") is True,
    )


def _invalid(message: str) -> Refusal:
    return Refusal(400, message, "invalid_request_error", "invalid_request")


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _invalid(f"'{name}' must be an integer between {least} and {most}, got {value!r}")
    return value


def _count(content: Any) -> int:
    """Tokens of a prompt, by a rule of thumb that anybody can check: one for each four bytes of text,
    rounded up for each piece, and three for each message. Token ids count one each."""
    if isinstance(content, str):
        return math.ceil(len(content.encode("utf-8", "surrogatepass")) / 4)
    if isinstance(content, int):
        return 1
    if isinstance(content, list):
        return sum(_count(part) for part in content)
    if isinstance(content, dict):
        overhead = 3 if "role" in content else 0
        return overhead + _count(content.get("content", content.get("text")))
    return 0


def _reasoning(api: Api, body: dict[str, Any]) -> int:
    if api == "messages":
        thinking = body.get("thinking")
        return 16 if isinstance(thinking, dict) and thinking.get("type") == "enabled" else 0
    effort = body.get("reasoning_effort")
    if isinstance(body.get("reasoning"), dict):
        effort = body["reasoning"].get("effort", effort)
    if effort is None or api == "completions":
        return 0
    if not isinstance(effort, str) or effort not in _EFFORTS:
        raise _invalid(f"'reasoning_effort' must be one of {', '.join(_EFFORTS)}, got {effort!r}")
    return _EFFORTS[effort]


def _tools(body: dict[str, Any]) -> tuple[Tool, ...]:
    """The functions to call: the named one, the first when a call is required, all of them when calls
    are required and `parallel_tool_calls` is true; none when the choice is left to the model."""
    choice = body.get("tool_choice")
    entries = body.get("tools") or []
    found: list[Tool] = []
    for entry in entries if isinstance(entries, list) else [None]:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid("'tools' must be a list of functions with a name")
        schema = function.get("parameters") or function.get("input_schema")
        found.append(Tool(function["name"], schema if isinstance(schema, dict) else {}))
    if isinstance(choice, dict) and choice.get("type") != "any":
        function = choice.get("function", choice)
        named = function.get("name") if isinstance(function, dict) else None
        chosen = tuple(tool for tool in found if tool.name == named)
        if not chosen:
            raise _invalid(f"'tool_choice' names {named!r}, which is not among the tools")
        return chosen[:1]
    if choice == "required" or isinstance(choice, dict):
        return tuple(found) if body.get("parallel_tool_calls") is True else tuple(found[:1])
    return ()
