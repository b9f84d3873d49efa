"""JSON bodies: of requests, from what a row says; and of responses, as the endpoint sends them without streaming.

`to_response_body` obeys a law: what it makes of an assembled stream equals what the endpoint returns with
`stream: false`, as far as the stream carries it. It cannot bring back what streams leave out (the ids of output
items of the Responses API, null fields an endpoint happens to spell out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchstream.errors import UsageError
from batchstream.records import Api, Choice, Completion, ToolCall, Usage
from batchstream.wire.jsontext import parse

Json = dict[str, Any]

MESSAGES_MAX_TOKENS = 4096
"""`max_tokens` of a request to the messages API that names no limit, in tokens. That API refuses a request without
one, and 4096 is the most that every model of Anthropic's may be asked for. A longer answer is cut there, and its
stop reason `max_tokens` says so."""


class BodyError(UsageError, ValueError):
    """A row (or a job's parameters) of which no request body can be made."""


def build_body(api: Api, common: Json, *, include_usage: bool = True) -> Json:
    """The body of a streamed request.

    `common` holds `prompt` (text) or `messages` (a list), perhaps `system`, and request parameters, which are
    copied; `extra_body` is merged in. `include_usage` asks chat and completions for token counts, unless `common`
    says itself what `stream_options` shall be. Raises BodyError, in one line, for what the API cannot take.
    """
    parameters = {
        key: value for key, value in common.items() if key not in ("prompt", "messages", "system", "extra_body")
    }
    if isinstance(common.get("extra_body"), dict):
        parameters.update(common["extra_body"])
    if common.get("prompt") is None and common.get("messages") is None:
        raise BodyError("expected 'prompt' or 'messages', got neither")
    body = _BUILDERS[api](common, parameters)
    body.setdefault("stream", True)
    if api in ("chat", "completions") and include_usage and body["stream"]:
        body.setdefault("stream_options", {"include_usage": True})
    return {key: value for key, value in body.items() if value is not None}


def _messages_of(common: Json) -> list[Any]:
    messages = common.get("messages")
    if messages is None:
        return [{"role": "user", "content": common["prompt"]}]
    if not isinstance(messages, list):
        raise BodyError(f"messages: expected a list, got {type(messages).__name__}")
    return list(messages)


def _chat(common: Json, parameters: Json) -> Json:
    messages = _messages_of(common)
    if common.get("system") is not None:
        messages.insert(0, {"role": "system", "content": common["system"]})
    return {**parameters, "messages": messages}


def _completions(common: Json, parameters: Json) -> Json:
    prompt = common.get("prompt")
    if prompt is None:
        raise BodyError("the completions API takes a 'prompt', got 'messages'; use --api chat")
    if common.get("system") is not None:
        if not isinstance(prompt, str):
            raise BodyError("'system' goes before one prompt of text, got a list of prompts; use --api chat")
        prompt = f"{common['system']}\n\n{prompt}"
    return {**parameters, "prompt": prompt}


def _responses(common: Json, parameters: Json) -> Json:
    body = dict(parameters)
    body["input"] = common["prompt"] if common.get("messages") is None else [_input(m) for m in _messages_of(common)]
    if common.get("system") is not None:
        body["instructions"] = common["system"]
    _rename(body, "max_output_tokens", "max_completion_tokens", "max_tokens")
    effort = body.pop("reasoning_effort", None)
    if effort is not None:
        body["reasoning"] = {"effort": effort, **body.get("reasoning", {})}
    return body


def _input(message: Any) -> Any:
    """A chat message as an input item: parts of text have another type there."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    kind = "output_text" if message.get("role") == "assistant" else "input_text"
    parts = [
        {**part, "type": kind} if isinstance(part, dict) and part.get("type") == "text" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _messages(common: Json, parameters: Json) -> Json:
    """Anthropic takes system texts apart from the messages, and must have `max_tokens`."""
    systems = [common["system"]] if common.get("system") is not None else []
    messages = []
    for message in _messages_of(common):
        if isinstance(message, dict) and message.get("role") in ("system", "developer"):
            systems.append(message.get("content"))
        else:
            messages.append(message)
    body = {**parameters, "messages": messages}
    if len(systems) == 1:
        body["system"] = systems[0]
    elif systems:
        if not all(isinstance(text, str) for text in systems):
            raise BodyError("expected one system text, or several that are plain text")
        body["system"] = "\n\n".join(systems)
    _rename(body, "max_tokens", "max_completion_tokens", "max_output_tokens")
    stop = body.pop("stop", None)
    if stop is not None:
        body.setdefault("stop_sequences", stop if isinstance(stop, list) else [stop])
    if body.get("max_tokens") is None:
        body["max_tokens"] = MESSAGES_MAX_TOKENS
    return body


def _rename(body: Json, wanted: str, *others: str) -> None:
    for name in others:
        value = body.pop(name, None)
        if value is not None:
            body.setdefault(wanted, value)


_BUILDERS: dict[Api, Callable[[Json, Json], Json]] = {
    "chat": _chat, "completions": _completions, "responses": _responses, "messages": _messages,
}  # fmt: skip


# Responses

_OF_THE_CHOICE = frozenset({
    "content_filter_results", "content_filter_offsets", "native_finish_reason", "stop_reason", "matched_stop",
    "token_ids",
})  # fmt: skip


def to_response_body(completion: Completion, api: Api) -> Json:
    """The body that `api` returns without streaming for what was assembled."""
    if api == "chat":
        return _choices_body(completion, "chat.completion", _chat_choice)
    if api == "completions":
        return _choices_body(completion, "text_completion", _text_choice)
    return _response(completion) if api == "responses" else _message(completion)


def _choices_body(completion: Completion, kind: str, choice: Callable[[Choice], Json]) -> Json:
    extra = dict(completion.extra or {})
    body: Json = {
        "id": completion.response_id,
        "object": kind,
        "created": extra.pop("created", None),
        "model": completion.model,
        "choices": [choice(item) for item in completion.choices],
        "usage": _usage(completion, "prompt", "completion"),
    }
    return {**_without_none(body), **extra}


def _chat_choice(choice: Choice) -> Json:
    extra = dict(choice.extra or {})
    refusals = extra.pop("refusal_logprobs", None)
    content = None if choice.tool_calls and not choice.text else choice.text  # as endpoints put it, whatever deltas say
    message: Json = {"role": extra.pop("role", "assistant"), "content": content}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if choice.refusal is not None:
        message["refusal"] = choice.refusal
    if choice.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
    message.update({key: value for key, value in extra.items() if key not in _OF_THE_CHOICE})
    body: Json = {"index": choice.index, "message": message, "finish_reason": choice.finish_reason}
    if choice.logprobs is not None or refusals is not None:
        body["logprobs"] = {"content": choice.logprobs, "refusal": refusals}
    body.update({key: value for key, value in extra.items() if key in _OF_THE_CHOICE})
    return body


def _tool_call(call: ToolCall) -> Json:
    text = call.function.arguments
    if call.type == "custom":
        return {"id": call.id, "type": "custom", "custom": {"name": call.function.name, "input": text}}
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": text}}


_COLUMNS = {
    "token": "tokens",
    "logprob": "token_logprobs",
    "top_logprobs": "top_logprobs",
    "text_offset": "text_offset",
}


def _text_choice(choice: Choice) -> Json:
    logprobs = None
    if choice.logprobs:
        rows = [row for row in choice.logprobs if isinstance(row, dict)]
        logprobs = {
            many: [row[one] for row in rows] for one, many in _COLUMNS.items() if all(one in row for row in rows)
        }
    return {
        "index": choice.index,
        "text": choice.text or "",
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        **(choice.extra or {}),
    }


def _response(completion: Completion) -> Json:
    """Reasoning, then the message, then calls: the order in which models give them."""
    choice = completion.choices[0] if completion.choices else Choice(index=0)
    extra = dict(choice.extra or {})
    status, _, reason = (choice.finish_reason or "in_progress").partition(":")
    items = extra.pop("output_items", [])
    encrypted = [item for item in items if isinstance(item, dict) and item.get("type") == "reasoning"]
    output: list[Any] = list(items)
    if choice.reasoning and not encrypted:
        output.append({"type": "reasoning", "summary": [{"type": "summary_text", "text": choice.reasoning}]})
    parts: list[Json] = []
    if choice.text is not None:
        parts.append({"type": "output_text", "text": choice.text, "annotations": extra.get("annotations", [])})
    if choice.refusal is not None:
        parts.append({"type": "refusal", "refusal": choice.refusal})
    if parts:
        output.append({"type": "message", "role": "assistant", "status": status, "content": parts})
    for call in choice.tool_calls or []:
        custom = call.type == "custom"
        output.append({
            "type": "custom_tool_call" if custom else "function_call",
            "call_id": call.id,
            "name": call.function.name,
            "input" if custom else "arguments": call.function.arguments,
        })  # fmt: skip
    body: Json = {
        "id": completion.response_id,
        "object": "response",
        "status": status,
        "model": completion.model,
        "output": output,
        "usage": _usage(completion, "input", "output"),
    }
    if reason:
        body["incomplete_details"] = {"reason": reason}
    return {**_without_none(body), **(completion.extra or {})}


def _message(completion: Completion) -> Json:
    choice = completion.choices[0] if completion.choices else Choice(index=0)
    content = (choice.extra or {}).get("content")
    if not isinstance(content, list):
        content = [{"type": "text", "text": choice.text}] if choice.text else []
        for call in choice.tool_calls or []:
            block = {"type": "tool_use", "id": call.id, "name": call.function.name}
            content.append({**block, "input": _parsed(call.function.arguments)})
    return {
        "id": completion.response_id,
        "type": "message",
        "role": "assistant",
        "model": completion.model,
        "content": content,
        "stop_reason": choice.finish_reason,
        "stop_sequence": (completion.extra or {}).get("stop_sequence"),
        "usage": _usage(completion, "input", "output") or {},
    }


def _parsed(arguments: str) -> Any:
    try:
        return parse(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments


def _usage(completion: Completion, prompt: str, output: str) -> Json | None:
    """Usage under the API's own names: as it was sent, or rebuilt from ours."""
    if completion.raw_usage is not None:
        return completion.raw_usage
    usage: Usage | None = completion.usage
    if usage is None:
        return None
    body: Json = {
        f"{prompt}_tokens": usage.prompt_tokens,
        f"{output}_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if usage.cached_tokens is not None:
        body[f"{prompt}_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        body[f"{output}_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return _without_none(body)


def _without_none(body: Json) -> Json:
    return {key: value for key, value in body.items() if value is not None}
