"""Token counts: what counts as a snapshot of usage, and one set of names for all APIs.

Servers send usage once at the end, cumulatively in every chunk, zeros first, or zeros last. So the last
snapshot that says anything wins, and nothing is ever summed.
"""

from __future__ import annotations

from typing import Any

from batchstream.records import Usage

_ORDINARY = {
    "prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details",
}  # fmt: skip
_MOST = 10**15  # a count beyond this is nonsense


def says_something(usage: Any) -> bool:
    """Whether `usage` is a snapshot with a number that is not zero."""
    if not isinstance(usage, dict):
        return False
    return any(_nonzero(value) for value in usage.values())


def _nonzero(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_nonzero(item) for item in value.values() if not isinstance(item, dict))
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


def merged(known: dict[str, Any] | None, news: Any) -> dict[str, Any] | None:
    """Anthropic's way: each key on its own; counters only grow, so a zero never replaces a number."""
    if not isinstance(news, dict):
        return known
    result = dict(known or {})
    for key, value in news.items():
        if value is not None and (value != 0 or not result.get(key)):
            result[key] = value
    return result


def normalise_usage(raw: dict[str, Any]) -> Usage:
    """`raw` under our names (records.Usage). A missing total is the sum of its parts; nonsense is None.

    Anthropic's `input_tokens` leave out what was read from its cache (`cached_tokens` here); OpenAI's
    `prompt_tokens` contain it. The counts are passed on as they were sent.
    """
    if raw.keys() <= _ORDINARY:
        prompt, completion, total = raw.get("prompt_tokens"), raw.get("completion_tokens"), raw.get("total_tokens")
        if (
            (type(prompt) is int and 0 <= prompt <= _MOST)
            and (type(completion) is int and 0 <= completion <= _MOST)
            and (type(total) is int and 0 < total <= _MOST)
        ):
            cached = _details(raw, "cached_tokens", "prompt_tokens_details")
            reasoning = _details(raw, "reasoning_tokens", "completion_tokens_details")
            return Usage(prompt, completion, total, cached, reasoning)
    prompt = _first(raw, "prompt_tokens", "input_tokens")
    completion = _first(raw, "completion_tokens", "output_tokens")
    cached = _details(raw, "cached_tokens", "prompt_tokens_details", "input_tokens_details")
    if cached is None:
        cached = _first(raw, "cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens")
    reasoning = _details(raw, "reasoning_tokens", "completion_tokens_details", "output_tokens_details")
    if reasoning is None:
        reasoning = _count(raw.get("reasoning_tokens"))
    total = _count(raw.get("total_tokens"))
    if not total and prompt is not None and completion is not None:
        total = prompt + completion
    return Usage(prompt, completion, total, cached, reasoning)


def _first(raw: dict[str, Any], *names: str) -> int | None:
    for name in names:
        count = _count(raw.get(name))
        if count is not None:
            return count
    return None


def _details(raw: dict[str, Any], name: str, *holders: str) -> int | None:
    for holder in holders:
        details = raw.get(holder)
        if isinstance(details, dict):
            count = _count(details.get(name))
            if count is not None:
                return count
    return None


def _count(value: Any) -> int | None:
    """A number of tokens, or None for anything that cannot be one. Floats are rounded down."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int | float)):
        return None
    return int(value) if 0 <= value <= _MOST else None  # NaN and infinities fail the comparison
