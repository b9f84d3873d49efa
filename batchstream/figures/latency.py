"""From the instants of one attempt to the durations of the `timing` column.

Each duration is a difference of two instants of one monotonic clock, rounded to the microsecond, and None where one of
the instants was never reached: a duration that is not known is never a zero. The definitions in words, which the
README, the report and ``--help`` print, are `DEFINITIONS`; this module is the same thing as code.
"""

from __future__ import annotations

from batchstream.records import Latencies, Timing, Usage

DEFINITIONS: dict[str, str] = {
    "ttft_s": "sent → first text, reasoning, refusal or tool-call fragment",
    "ttfo_s": "sent → first output that is not reasoning",
    "ttfb_s": "sent → response headers",
    "ttfc_s": "sent → first data event, even one without output",
    "latency_s": "sent → last generated output",
    "total_s": "sent → end of the stream",
    "tpot_s": "(latency − TTFT) / (completion tokens − 1); none without usage",
    "gap_max_s": "longest gap between two events with output (events, not tokens)",
    "queue_s": "due (allowed to start) → sent",
}
"""Field of `Latencies` → what is measured, in the order in which figures are shown.

`sent` is the instant just before the request is written. All are of the attempt that succeeded, in seconds,
stamped when bytes arrive and before they are parsed."""


def latencies(timing: Timing, usage: Usage | None, started_at: str | None) -> Latencies:
    """The durations of one attempt, in seconds.

    `started_at` is the wall-clock time (ISO 8601, UTC) at which the request was written; it is passed through.
    TPOT needs two completion tokens at least, because the first one is TTFT's. With n > 1 its tokens are those of all
    choices together, as the endpoint counts them.
    """
    sent = timing.sent
    ttft = _between(sent, timing.first_output)
    latency = _between(sent, timing.last_output)
    tokens = usage.completion_tokens if usage is not None else None
    tpot = None
    if ttft is not None and latency is not None and tokens is not None and tokens >= 2:
        tpot = round(max(0.0, latency - ttft) / (tokens - 1), 6)
    return Latencies(
        started_at=started_at,
        queue_s=_between(timing.due, sent),
        ttfb_s=_between(sent, timing.headers),
        ttfc_s=_between(sent, timing.first_event),
        ttft_s=ttft,
        ttfo_s=_between(sent, timing.first_visible),
        latency_s=latency,
        total_s=_between(sent, timing.ended),
        tpot_s=tpot,
        chunks=timing.chunks,
        gap_max_s=None if timing.gap_max is None else round(timing.gap_max, 6),
    )


def _between(start: float | None, end: float | None) -> float | None:
    """Rounded, and never negative: an endpoint may answer before the last byte of a request is out, which is 0."""
    if start is None or end is None:
        return None
    return int((end - start) * 1e6 + 0.5) / 1e6 if end > start else 0.0
