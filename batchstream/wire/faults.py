"""What went wrong, in our words: from status, headers and body (or an error inside a stream) to a Failure.

Order of judgement: exact codes and types, then the numeric status, then wording about the context length or
a content filter, then `stream_error`. Structured codes are trusted, free text hardly: "quota" in a message
is no billing wall (Scaleway words a passing limit so), a number in a message is no status.

Two families of codes are weak, because servers put them on everything: `invalid_request_error` and its kin,
and `api_error` / `server_error`. A more specific status beats them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from batchstream.records import Failure
from batchstream.wire.jsontext import dumps, whole
from batchstream.wire.waits import hinted_in_text, stated_wait

Headers = Sequence[tuple[str, str]]

RETRYABLE: dict[str, bool] = {
    "rate_limit": True, "quota": False, "overloaded": True, "server": True, "timeout": True,
    "conflict": True, "too_early": True, "auth": False, "permission": False, "not_found": False,
    "context_length": False, "content_filter": False, "invalid_request": False,
    "truncated": True, "empty_stream": True, "decode": True, "abort": True, "stream_error": True,
    "not_sse": False, "redirect": False,
}  # fmt: skip
"""Every kind this room gives, and whether another attempt may succeed."""

_STRONG: dict[str, tuple[str, ...]] = {
    "quota": (
        "insufficient_quota", "insufficient_user_quota", "insufficient_credits", "insufficient_balance",
        "insufficient_funds", "payment_required", "exceeded_current_quota_error", "arrearage",
        "credit_balance_too_low", "pre_consume_token_quota_failed",
    ),
    "rate_limit": (
        "rate_limited", "ratelimited", "ratelimit", "too_many_requests", "throttling_error", "throttling",
        "throttling_exception", "throttled", "resource_exhausted",
    ),
    "overloaded": (
        "overloaded", "overloaded_error", "server_is_overloaded", "server_overloaded", "engine_overloaded",
        "engine_overloaded_error", "model_overloaded", "service_unavailable", "service_unavailable_error",
        "unavailable", "server_busy",
    ),
    "timeout": ("timeout", "timeout_error", "request_timeout", "gateway_timeout", "deadline_exceeded"),
    "auth": (
        "invalid_api_key", "incorrect_api_key", "authentication_error", "invalid_authentication",
        "invalid_authentication_error", "unauthorized", "unauthenticated",
    ),
    "permission": (
        "permission_error", "permission_denied", "permission_denied_error", "forbidden", "access_denied",
        "account_suspended", "locked", "unsupported_country_region_territory",
    ),
    "not_found": ("not_found", "not_found_error", "model_not_found", "deployment_not_found"),
    "context_length": (
        "context_length_exceeded", "exceed_context_size_error", "context_window_exceeded",
        "context_window_exceeded_error", "prompt_too_long", "string_above_max_length",
        "model_max_prompt_tokens_exceeded",
    ),
    "content_filter": (
        "content_filter", "content_filtered", "content_policy_violation", "content_policy_violation_error",
        "responsible_ai_policy_violation", "data_inspection_failed", "moderation_blocked",
    ),
    "conflict": ("conflict", "conflict_error"),
    "abort": ("abort", "aborted"),
}  # fmt: skip
_WEAK: dict[str, tuple[str, ...]] = {
    "server": ("server_error", "api_error", "internal_server_error", "internal_error", "internal", "bad_gateway"),
    "invalid_request": (
        "invalid_request_error", "bad_request", "bad_request_error", "invalid_request", "invalid_argument",
        "unprocessable_entity", "unprocessable_entity_error", "validation_error", "request_too_large",
    ),
}  # fmt: skip
_KIND_OF = {code: kind for table in (_STRONG, _WEAK) for kind, codes in table.items() for code in codes}

_STATUS_KIND = {
    401: "auth", 402: "quota", 403: "permission", 404: "not_found", 408: "timeout", 409: "conflict",
    423: "permission", 425: "too_early", 429: "rate_limit", 503: "overloaded", 504: "timeout",
    524: "timeout", 529: "overloaded",
}  # fmt: skip

_CONTEXT = re.compile(
    r"context[ _-]?(?:length|window|size|limit)|maximum context|prompt is too long|input is too long"
    r"|prompt (?:length|tokens?) .{0,60}exceed|reduce the length of|too many (?:input |prompt )?tokens"
    r"|exceeds? the (?:model'?s? )?(?:maximum|max|available) (?:number of )?"
    r"(?:input |prompt )?(?:context|tokens?|length)",
    re.IGNORECASE,
)
_FILTER = re.compile(
    r"content[ _](?:management policy|filter|policy)|responsible ?ai|safety system|data inspection|flagged",
    re.IGNORECASE,
)
_DAILY = re.compile(r"\bdaily\b.{0,40}\b(?:limit|quota|cap|allowance)\b|PerDay\b|PerDayPer", re.IGNORECASE | re.DOTALL)
_PER_DAY = re.compile(r"\bper[ _-]day\b", re.IGNORECASE)
_TITLE = re.compile(r"<(title|h1)[^>]*>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

_MESSAGE_LIMIT = 500
_TEXT_SEARCHED = 20_000  # characters of a body that are searched for wording


def failure(kind: str, message: str, *, status: int | None = None, retry_after: float | None = None) -> Failure:
    """A Failure of `kind` with its documented retryability."""
    return Failure(kind, message, RETRYABLE[kind], status, retry_after)


def is_error(document: Any, event: str = "") -> bool:
    """Whether a payload inside a stream is an error: a truthy `error`, `object` or `type` "error", `event: error`."""
    if event == "error":
        return True
    if not isinstance(document, dict):
        return False
    if document.get("error") or document.get("object") == "error":
        return True
    return document.get("type") == "error" and "choices" not in document


def classify(http_status: int | None, headers: Headers, envelope: Any, text: str = "") -> Failure:
    """The Failure for an error: of a response with `http_status`, or inside a stream (None).

    `envelope` is the parsed JSON that carries it (object, array or string; None if there is none), `text` the
    body when it is no JSON. `Failure.status` is the HTTP status, else the one the envelope states.
    """
    envelope = _unwrapped(envelope)
    status = http_status if http_status is not None else _stated_status(envelope)
    message = _message(envelope) if envelope else _plain(text)
    words = message if envelope is None else f"{message} {dumps(envelope)[:_TEXT_SEARCHED]}"
    kind = _kind(list(_codes(envelope)), status, message, words)
    wait = stated_wait(headers, envelope, message)
    retryable = RETRYABLE[kind]
    told = next((value.strip().lower() for name, value in headers if name.lower() == "x-should-retry"), "")
    if told in ("true", "false"):
        retryable = told == "true"
    if http_status is not None:
        message = f"HTTP {http_status}: {message}" if message else f"HTTP {http_status}"
    return Failure(kind, message or "the server reported an error without a message", retryable, status, wait)


def _kind(codes: list[str], status: int | None, message: str, words: str) -> str:
    strong, weak = _by_code(codes)
    by_status = _by_status(status)
    if strong is not None:
        kind = strong
    elif weak == "server" and (by_status is None or (status or 0) >= 500):
        kind = weak
    elif by_status is not None:
        kind = by_status
    else:
        kind = weak or "stream_error"
    if kind in ("invalid_request", "stream_error"):
        if _CONTEXT.search(message) or _CONTEXT.search(" ".join(codes)):
            return "context_length"
        if _FILTER.search(message):
            return "content_filter"
    if kind == "rate_limit" and (
        _DAILY.search(words) or (_PER_DAY.search(message) and hinted_in_text(message) is None)
    ):
        return "quota"
    return kind


def _by_code(codes: list[str]) -> tuple[str | None, str | None]:
    """The first strong and the first weak kind that the codes name."""
    strong = weak = None
    for code in codes:
        if code.startswith("rate_limit"):
            kind = "rate_limit"
        elif code.startswith("billing"):
            kind = "quota"
        else:
            kind = _KIND_OF.get(code, "")
        if kind in _WEAK:
            weak = weak or kind
        elif kind:
            strong = strong or kind
    return strong, weak


def _by_status(status: int | None) -> str | None:
    if status is None:
        return None
    if status in _STATUS_KIND:
        return _STATUS_KIND[status]
    if 300 <= status < 400:
        return "redirect"
    if 400 <= status < 500:
        return "invalid_request"
    return "server" if 500 <= status < 600 else None


def _unwrapped(envelope: Any) -> Any:
    """The object that carries the error: of an array (Gemini) its first error."""
    if isinstance(envelope, list):
        objects = [item for item in envelope if isinstance(item, dict) and item]
        return next((item for item in objects if is_error(item)), objects[0] if objects else None)
    return envelope


def _layers(envelope: Any) -> Iterator[dict[str, Any]]:
    """Objects that may hold codes, the most telling first: the error, what it wraps, the envelope."""
    if not isinstance(envelope, dict):
        return
    error = envelope.get("error")
    if isinstance(error, dict):
        yield error
        for key in ("error", "innererror", "metadata"):
            if isinstance(error.get(key), dict):
                yield error[key]
    yield envelope


def _codes(envelope: Any) -> Iterator[str]:
    for layer in _layers(envelope):
        for key in ("code", "type", "error_type", "status", "error"):
            value = layer.get(key)
            if isinstance(value, str) and 0 < len(value) < 80:
                yield _CAMEL.sub("_", value.strip()).replace("-", "_").lower()


def _stated_status(envelope: Any) -> int | None:
    for layer in _layers(envelope):
        for key in ("raw_status_code", "status_code", "code", "status"):
            value = layer.get(key)
            if isinstance(value, str) and (digits := value.strip()).isascii() and digits.isdigit() and len(digits) < 10:
                value = int(digits)
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and 300 <= value < 600:
                return value
    return None


def _message(envelope: Any) -> str:
    """What the envelope says for people, on one line."""
    if isinstance(envelope, str):
        return _plain(envelope)
    for layer in _layers(envelope):
        for key in ("message", "msg", "detail", "error", "error_message", "title"):
            value = layer.get(key)
            if isinstance(value, list) and value:
                value = "; ".join(str(item.get("msg", item)) if isinstance(item, dict) else str(item) for item in value)
            if isinstance(value, str) and value.strip():
                return _plain(value)
    return _plain(dumps(envelope)) if envelope else ""


def _plain(text: str) -> str:
    """Text on one line, short; of an HTML page its title."""
    text = text[:_TEXT_SEARCHED]
    title = _TITLE.search(text) if "<" in text else None
    return whole(" ".join((title.group(2) if title else text).split())[:_MESSAGE_LIMIT])
