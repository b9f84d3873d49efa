"""How each API spells an answer and an error: one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from batchstream.endpoints.sim import dialect_chat, dialect_messages, dialect_responses
from batchstream.endpoints.sim.answers import Answer
from batchstream.endpoints.sim.asks import Ask
from batchstream.endpoints.sim.script import Script, sse
from batchstream.records import Api

SCRIPTS: dict[Api, Callable[[Ask, Answer], Script]] = {
    "chat": dialect_chat.chat_script,
    "completions": dialect_chat.completions_script,
    "responses": dialect_responses.script,
    "messages": dialect_messages.script,
}
BODIES: dict[Api, Callable[[Ask, Answer], dict[str, Any]]] = {
    "chat": dialect_chat.chat_body,
    "completions": dialect_chat.completions_body,
    "responses": dialect_responses.body,
    "messages": dialect_messages.body,
}

# Type and text of an error by status, in ShuttleAI's words where its documentation has them.
_ERRORS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "The request is malformed."),
    401: ("authentication_error", "Incorrect API key provided."),
    402: ("payment_required", "No active plan, or the last payment failed."),
    403: ("permission_error", "This model is not in your plan."),
    404: ("not_found_error", "There is nothing at this path."),
    408: ("timeout_error", "The request took too long."),
    423: ("account_suspended", "This account is suspended."),
    429: ("rate_limit_error", "Rate limit exceeded."),
    500: ("server_error", "The server had an error while processing your request."),
    503: ("server_error", "The model is under maintenance or its upstream is down."),
    504: ("timeout_error", "The upstream did not answer in time."),
    529: ("overloaded_error", "Overloaded."),
}


def default_error(status: int) -> tuple[str, str]:
    """Type and message of an error with this status."""
    return _ERRORS.get(status, ("server_error" if status >= 500 else "invalid_request_error", f"Error {status}."))


def error_payload(api: Api | None, message: str, kind: str, code: str | int | None) -> dict[str, Any]:
    """The envelope: OpenAI's and ShuttleAI's, or Anthropic's for the Messages API."""
    if api == "messages":
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "code": code}}


def error_event(api: Api, message: str, kind: str, code: str | int | None) -> bytes:
    """An error inside a stream that began with status 200."""
    if api == "responses":
        return sse({"type": "error", "code": str(code), "message": message, "param": None}, "error")
    return sse(error_payload(api, message, kind, code), "error" if api == "messages" else None)


def json_bytes(payload: Any) -> bytes:
    return msgspec.json.encode(payload)
