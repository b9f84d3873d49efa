"""The nouns: what travels between the rooms, and the schema of journal and results.

Every struct here is data. Times are seconds as floats: monotonic-clock instants in `Timing`
(comparable within one process only), durations in `Latencies`. `None` always means
"the other side did not say"; it is never replaced by a zero.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Api = Literal["chat", "completions", "responses", "messages"]
"""Which of the OpenAI-compatible (or Anthropic) APIs a request speaks."""

APIS: tuple[Api, ...] = ("chat", "completions", "responses", "messages")


class Request(msgspec.Struct, frozen=True):
    """One row of the input, ready to be sent.

    `row` is the 0-based ordinal in the input, `digest` the first 8 bytes (as an unsigned integer)
    of a BLAKE2b over api and body: the row's identity in the journal, with the ordinal.
    `keep` holds the columns that are copied through to the result, or None.
    """

    row: int
    id: str
    api: Api
    body: dict[str, Any]
    digest: int
    keep: dict[str, Any] | None = None


class InvalidRow(msgspec.Struct, frozen=True):
    """A row of the input that no request can be made of; nothing is sent for it.

    `where` names the place for a person: ``prompts.jsonl:17`` or ``prompts.parquet:row 17``.
    """

    row: int
    id: str
    message: str
    where: str
    digest: int
    keep: dict[str, Any] | None = None


class Usage(msgspec.Struct, frozen=True):
    """Token counts under one set of names, whatever the API called them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class FunctionCall(msgspec.Struct):
    """`arguments` is the exact text the model produced, JSON or not."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str | None
    type: str
    function: FunctionCall


class Choice(msgspec.Struct):
    """One assembled answer. `extra` keeps what the endpoint sent beyond the named fields
    (audio, annotations, citations, a legacy function_call, provider fields), or None."""

    index: int
    text: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    finish_reason: str | None = None
    logprobs: list[Any] | None = None
    extra: dict[str, Any] | None = None


class Completion(msgspec.Struct):
    """What was assembled from one response, complete or partial (see `Failure`).

    `raw_usage` is the usage object under the API's own names; `extra` keeps top-level fields
    of the response beyond the named ones.
    """

    choices: list[Choice]
    usage: Usage | None = None
    raw_usage: dict[str, Any] | None = None
    model: str | None = None
    response_id: str | None = None
    extra: dict[str, Any] | None = None


class Delta(msgspec.Struct, frozen=True):
    """One piece of an answer as it arrives. For `tool_call` the text is a fragment of the arguments
    (or the function's name, with the first fragment of a call)."""

    index: int
    kind: Literal["content", "reasoning", "refusal", "tool_call"]
    text: str


class Timing(msgspec.Struct):
    """Instants of one attempt, in seconds of the monotonic clock, stamped when bytes arrive.

    `due`: when the attempt was allowed to start; `sent`: just before the request was written;
    `first_event`: first data event; `first_output`: first event with generated output;
    `first_visible`: first with non-reasoning output; `last_output`: the last with generated output;
    `chunks`: number of events with generated output; `gap_max`: longest wait between two of them.
    """

    due: float
    sent: float | None = None
    headers: float | None = None
    first_event: float | None = None
    first_output: float | None = None
    first_visible: float | None = None
    last_output: float | None = None
    ended: float | None = None
    chunks: int = 0
    gap_max: float | None = None


class Failure(msgspec.Struct, frozen=True):
    """Why an attempt gave no answer. Failures of a row are values, not exceptions.

    `kind` is one of the documented kinds (README, "Failures"); `status` the HTTP status or the one
    given inside the stream; `retry_after` the wait in seconds that the server stated, before any cap.
    """

    kind: str
    message: str
    retryable: bool
    status: int | None = None
    retry_after: float | None = None


class RateNews(msgspec.Struct, frozen=True):
    """What a response's headers say about the endpoint's rate limits; None = nothing. `limit_*` and `remaining_*` in
    requests and tokens, `reset_*` in seconds from the response on."""

    limit_requests: float | None = None
    remaining_requests: float | None = None
    reset_requests: float | None = None
    limit_tokens: float | None = None
    remaining_tokens: float | None = None
    reset_tokens: float | None = None


class Attempt(msgspec.Struct):
    """One try of a request: a completion, or a failure with the partial completion that came. `rates`: what the
    endpoint said about its limits, None for nothing."""

    timing: Timing
    completion: Completion | None
    failure: Failure | None
    request_id: str | None = None
    rates: RateNews | None = None


class Latencies(msgspec.Struct, frozen=True):
    """The `timing` column: durations in seconds (definitions: README, "Metrics").

    `started_at` is the wall-clock time (ISO 8601, UTC) at which the request was written.
    """

    started_at: str | None = None
    queue_s: float | None = None
    ttfb_s: float | None = None
    ttfc_s: float | None = None
    ttft_s: float | None = None
    ttfo_s: float | None = None
    latency_s: float | None = None
    total_s: float | None = None
    tpot_s: float | None = None
    chunks: int = 0
    gap_max_s: float | None = None


class Retry(msgspec.Struct, frozen=True):
    """One failed attempt of a row, in the `retries` column; `waited_s` is the wait after it."""

    kind: str
    status: int | None
    message: str
    waited_s: float | None
    latency_s: float | None
    usage: Usage | None
    text: str | None = None


class RowError(msgspec.Struct, frozen=True):
    """The `error` column of a failed row."""

    kind: str
    status: int | None
    message: str
    retryable: bool


class Result(msgspec.Struct):
    """One row of the results: a JSONL object, a Parquet row. The order of fields is the file's order."""

    row: int
    id: str
    status: Literal["ok", "failed"]
    text: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    finish_reason: str | None = None
    choices: list[Choice] | None = None
    logprobs: list[Any] | None = None
    model: str | None = None
    response_id: str | None = None
    request_id: str | None = None
    usage: Usage | None = None
    timing: Latencies = Latencies()
    attempts: int = 0
    retries: list[Retry] = []
    error: RowError | None = None
    input: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None
