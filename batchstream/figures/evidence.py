"""How much of the figures is the client's own doing, and whether they may be trusted.

A client that is late to read a byte reports its own lateness as the endpoint's latency. So each run measures itself,
and the verdict compares that with what the product promises: latencies right to 2 ms or 1 % at the 99th percentile.
Every limit below is a constant with the reason for its size; a run past one of them is `degraded`, which says what to
do.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["trusted", "degraded"]

LOOP_LAG_P99_MAX_S = 0.002
"""An event-loop iteration that starts this late stamps a byte this late: the promised error of a TTFT at p99."""

ERROR_SHARE = 0.01
"""Of the median TTFT: where answers begin after a second, ten milliseconds of lateness say nothing about them."""

STALL_MAX_S = 0.1
"""The longest single stall: all streams in flight wait it out together, and the maxima and p99.9 show it."""

CPU_SHARE_MAX = 0.85
"""Of one core, for the busiest worker. Waiting times grow as 1/(1 - share): beyond this, bursts queue in the client."""

IDLE_BELOW = 0.25
"""Of one core: a client that used less was not late by its own work."""

GC_SHARE_MAX = 0.01
"""Share of the run spent in garbage collection: 1 %, the accuracy that rates and throughput are promised with."""

SLIP_P99_MAX_S = 0.005
"""How late a request may leave against its schedule at p99 before the arrivals are no longer the ones asked for."""


_WORK = ("cpu_s", "reads", "events", "connections")
"""Fields of `Evidence` that add up over workers."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """The client's measurements of itself over one run; None = not measured, never 0.

    `loop_lag_*_s`: how late the event loop woke up, in seconds, over regular samples; `cpu_s`: CPU seconds of all
    workers; `cpu_share`: of one core, the busiest worker; `gc_pause_*_s`: seconds in the garbage collector;
    `reads`, `events`: reads from sockets and data events they brought; `connections`: how many were opened while
    requests waited for them (which is before `sent`, and so in no latency but `queue_s`), `connection_wait_*_s`: how
    long they waited, in seconds; `schedule_slip_p99_s`: due → sent of a fixed
    schedule (bench); `elapsed_s`: wall seconds over which all this was measured.
    """

    elapsed_s: float
    workers: int = 1
    loop_lag_p99_s: float | None = None
    loop_lag_max_s: float | None = None
    cpu_s: float | None = None
    cpu_share: float | None = None
    gc_pause_total_s: float | None = None
    gc_pause_max_s: float | None = None
    reads: int | None = None
    events: int | None = None
    connections: int | None = None
    connection_wait_mean_s: float | None = None
    connection_wait_max_s: float | None = None
    schedule_slip_p99_s: float | None = None


def together(workers: list[Evidence], more_cpu_s: float = 0.0) -> Evidence:
    """Of several processes: the worst lateness, pause and wait, the busiest one's share of a core, the sums of work.
    `more_cpu_s`: what the process that leads them used. Raises ValueError for none."""
    if not workers:
        raise ValueError("expected the evidence of at least one worker")
    found: dict[str, float] = {}
    for name in Evidence.__struct_fields__:
        known = [value for each in workers if (value := getattr(each, name)) is not None]
        if known:
            found[name] = sum(known) if name in _WORK else max(known)
    found["cpu_s"] = found.get("cpu_s", 0.0) + more_cpu_s
    return msgspec.convert({**found, "workers": len(workers)}, Evidence)


def _cure(evidence: Evidence) -> str:
    """A loop that is late although it had little to do was kept waiting by somebody else."""
    if evidence.cpu_share is not None and evidence.cpu_share < IDLE_BELOW:
        return f"look for other load on this machine (this client used {evidence.cpu_share:.0%} of a core)"
    return "use more workers or fewer streams"


def verdict(evidence: Evidence, typical_ttft_s: float | None = None) -> tuple[Verdict, list[str]]:
    """Whether the latencies are the endpoint's, and each reason why not: what was seen, the limit, what to do.

    `typical_ttft_s` is the median of what was measured: lateness of less than 1 % of it changes no conclusion.
    """
    reasons: list[str] = []

    def judge(seen: float | None, limit: float, wording: str) -> None:
        if seen is not None and seen > limit:
            reasons.append(wording.format(seen=seen, seen_ms=seen * 1e3, limit=limit, limit_ms=limit * 1e3))

    if evidence.loop_lag_p99_s is None:
        reasons.append("event-loop lag was not measured: take the latencies as upper bounds")
    judge(
        evidence.loop_lag_p99_s,
        max(LOOP_LAG_P99_MAX_S, ERROR_SHARE * (typical_ttft_s or 0.0)),
        f"event loop {{seen_ms:.1f}} ms late at p99 (limit {{limit_ms:.0f}} ms): {_cure(evidence)}",
    )
    stall = "{what} of {{seen_ms:.0f}} ms (limit {{limit_ms:.0f}} ms): maxima and p99.9 may be the client's; {cure}"
    judge(
        evidence.loop_lag_max_s,
        STALL_MAX_S,
        stall.format(what="event-loop stall", cure="look for other load on this machine"),
    )
    judge(
        evidence.gc_pause_max_s,
        STALL_MAX_S,
        stall.format(what="garbage-collection pause", cure="use more workers or fewer streams"),
    )
    judge(
        evidence.cpu_share,
        CPU_SHARE_MAX,
        "client used {seen:.0%} of a core (limit {limit:.0%}): use more workers or fewer streams",
    )
    if evidence.gc_pause_total_s is not None and evidence.elapsed_s > 0:
        judge(
            evidence.gc_pause_total_s / evidence.elapsed_s,
            GC_SHARE_MAX,
            "{seen:.1%} of the run went into garbage collection (limit {limit:.0%}): use more workers or fewer streams",
        )
    judge(
        evidence.schedule_slip_p99_s,
        SLIP_P99_MAX_S,
        "requests left {seen_ms:.1f} ms late at p99 (limit {limit_ms:.0f} ms): lower the rate",
    )
    return ("degraded" if reasons else "trusted"), reasons
