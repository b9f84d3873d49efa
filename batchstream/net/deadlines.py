"""When an exchange has lasted too long: pure decisions, and the one timer that asks for them.

A timer for each read costs microseconds a chunk; one coarse sweep over all streams costs nothing
and is off by at most `SWEEP_S`, which no limit here (seconds to minutes) can feel.
"""

from __future__ import annotations

import msgspec

SWEEP_S = 0.1


class Limits(msgspec.Struct, frozen=True):
    """Seconds. `connect` covers DNS, TCP and TLS; `first_output` runs from the request to the first
    generated output; `idle` between two outputs; `total` over the whole attempt. Keep-alive comments
    are life, not progress: none of these is reset by them."""

    connect: float = 10.0
    first_output: float = 300.0
    idle: float = 120.0
    total: float | None = None


def overdue(
    limits: Limits, now: float, sent: float, last_output: float | None, error_since: float | None
) -> str | None:
    """Which limit a running exchange has passed at `now`, as a sentence, or None.

    `error_since` is when the head of a non-200 response came: what follows is an error body, which
    gets the idle limit, not the patience that a queueing model deserves.
    """
    if limits.total is not None and now - sent > limits.total:
        return f"not finished after {limits.total:g} s (--total-timeout)"
    if last_output is not None:
        if now - last_output > limits.idle:
            return f"no output for {limits.idle:g} s (--idle-timeout)"
    elif error_since is not None:
        if now - error_since > limits.idle:
            return f"error response not complete after {limits.idle:g} s (--idle-timeout)"
    elif now - sent > limits.first_output:
        return f"no output within {limits.first_output:g} s (--first-token-timeout)"
    return None
