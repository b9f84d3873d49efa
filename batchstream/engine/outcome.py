"""From the attempts at a row to its one `Result`: pure folding, no clock."""

from __future__ import annotations

import functools
from datetime import UTC, datetime

from batchstream.figures.latency import latencies
from batchstream.records import Attempt, Choice, Completion, Failure, InvalidRow, Request, Result, Retry, RowError

_MESSAGE_LIMIT = 2000


def result_of(request: Request, attempt: Attempt, earlier: list[Retry], epoch: float) -> Result:
    """The result of a row whose last attempt is `attempt`; `earlier` are the failed ones before it.

    A failed row keeps the partial text and usage of its last attempt; attempts are never joined. `epoch` is the date,
    in seconds, at which the monotonic clock stood at 0: instants become dates by it.
    """
    completion = attempt.completion or Completion(choices=[])
    first = completion.choices[0] if completion.choices else Choice(index=0)
    failure = attempt.failure
    return Result(
        row=request.row,
        id=request.id,
        status="ok" if failure is None else "failed",
        text=first.text,
        reasoning=first.reasoning,
        refusal=first.refusal,
        tool_calls=first.tool_calls,
        finish_reason=first.finish_reason,
        choices=completion.choices if len(completion.choices) > 1 else None,
        logprobs=first.logprobs,
        model=completion.model,
        response_id=completion.response_id,
        request_id=attempt.request_id,
        usage=completion.usage,
        timing=latencies(attempt.timing, completion.usage, _date(attempt.timing.sent, epoch)),
        attempts=len(earlier) + 1,
        retries=earlier,
        error=None if failure is None else _row_error(failure),
        input=request.keep,
        extra=_extra(completion, first),
    )


def retry_of(attempt: Attempt, waited_s: float) -> Retry:
    """One entry of the `retries` column: an attempt that failed, and the wait after it."""
    failure, timing = attempt.failure, attempt.timing
    assert failure is not None  # noqa: S101  (only failed attempts are retried)
    completion = attempt.completion
    lasted = None if timing.sent is None or timing.ended is None else round(timing.ended - timing.sent, 6)
    return Retry(
        kind=failure.kind,
        status=failure.status,
        message=failure.message[:_MESSAGE_LIMIT],
        waited_s=round(waited_s, 3),
        latency_s=lasted,
        usage=completion.usage if completion else None,
        text=completion.choices[0].text if completion and completion.choices else None,
    )


def invalid_result(row: InvalidRow) -> Result:
    """A malformed row's result: failed, nothing was sent."""
    return Result(row=row.row, id=row.id, status="failed", attempts=0, input=row.keep,
                  error=RowError("invalid_row", None, row.message[:_MESSAGE_LIMIT], retryable=False))  # fmt: skip


def _date(instant: float | None, epoch: float) -> str | None:
    """ISO 8601 in UTC, to the microsecond, of an instant of the monotonic clock."""
    if instant is None:
        return None
    second, micros = divmod(int((epoch + instant) * 1e6 + 0.5), 1_000_000)
    return f"{_second(second)}.{micros:06d}Z"


@functools.lru_cache(maxsize=64)  # rows of the same second are many
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _row_error(failure: Failure) -> RowError:
    return RowError(failure.kind, failure.status, failure.message[:_MESSAGE_LIMIT], failure.retryable)


def _extra(completion: Completion, first: Choice) -> dict[str, object] | None:
    """What the endpoint said beyond the named columns, so that nothing of the answer is dropped.

    `usage` keeps the raw object under the endpoint's own names when it says more than ours.
    """
    extra: dict[str, object] = {}
    if completion.extra:
        extra["response"] = completion.extra
    if first.extra:
        extra["choice"] = first.extra
    if completion.raw_usage and not set(completion.raw_usage) <= {"prompt_tokens", "completion_tokens", "total_tokens"}:
        extra["usage"] = completion.raw_usage
    return extra or None
