"""The verdict is `trusted` up to each limit, and past it says what was seen and what to do."""

import msgspec
import pytest

from batchstream.figures.evidence import (
    CPU_SHARE_MAX,
    GC_SHARE_MAX,
    LOOP_LAG_P99_MAX_S,
    SLIP_P99_MAX_S,
    STALL_MAX_S,
    Evidence,
    together,
    verdict,
)

QUIET = Evidence(
    elapsed_s=100.0,
    loop_lag_p99_s=LOOP_LAG_P99_MAX_S,
    loop_lag_max_s=STALL_MAX_S,
    cpu_s=85.0,
    cpu_share=CPU_SHARE_MAX,
    gc_pause_total_s=100.0 * GC_SHARE_MAX,
    gc_pause_max_s=STALL_MAX_S,
    reads=10,
    events=20,
    schedule_slip_p99_s=SLIP_P99_MAX_S,
)


def test_lateness_is_judged_by_what_was_measured():
    late = msgspec.structs.replace(QUIET, loop_lag_p99_s=0.008)
    assert verdict(late, 0.3)[0] == "degraded"
    assert verdict(late, 0.9)[0] == "trusted"


def test_a_client_within_all_limits_is_trusted():
    assert verdict(QUIET) == ("trusted", [])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("loop_lag_p99_s", 0.0042, "event loop 4.2 ms late at p99 (limit 2 ms): use more workers or fewer streams"),
        ("loop_lag_max_s", 0.25, "event-loop stall of 250 ms (limit 100 ms): maxima and p99.9 may be the client's; "
                                 "look for other load on this machine"),
        ("gc_pause_max_s", 0.12, "garbage-collection pause of 120 ms (limit 100 ms): maxima and p99.9 may be the "
                                 "client's; use more workers or fewer streams"),
        ("cpu_share", 0.97, "client used 97% of a core (limit 85%): use more workers or fewer streams"),
        ("gc_pause_total_s", 2.5, "2.5% of the run went into garbage collection (limit 1%): use more workers or "
                                   "fewer streams"),
        ("schedule_slip_p99_s", 0.05, "requests left 50.0 ms late at p99 (limit 5 ms): lower the rate"),
    ],
)  # fmt: skip
def test_a_client_past_one_limit_is_degraded_for_that_reason(field, value, reason):
    assert verdict(msgspec.structs.replace(QUIET, **{field: value})) == ("degraded", [reason])


def test_a_client_that_was_not_watched_is_not_trusted():
    judged, reasons = verdict(Evidence(elapsed_s=1.0))
    assert judged == "degraded"
    assert reasons == ["event-loop lag was not measured: take the latencies as upper bounds"]


def test_of_several_workers_the_worst_counts_and_the_work_adds_up() -> None:
    one = Evidence(elapsed_s=10.0, loop_lag_p99_s=0.001, cpu_s=5.0, cpu_share=0.5, reads=100, connections=4)
    two = Evidence(elapsed_s=12.0, loop_lag_p99_s=0.004, cpu_s=9.0, cpu_share=0.75, reads=50)
    both = together([one, two], more_cpu_s=1.0)
    assert (both.workers, both.elapsed_s, both.loop_lag_p99_s, both.cpu_share) == (2, 12.0, 0.004, 0.75)
    assert (both.cpu_s, both.reads, both.connections, both.events) == (15.0, 150, 4, None)


def test_an_idle_client_that_is_late_blames_the_machine() -> None:
    lateness = Evidence(elapsed_s=10.0, loop_lag_p99_s=0.02, cpu_share=0.05)
    (reason,) = verdict(lateness)[1]
    assert reason.endswith("look for other load on this machine (this client used 5% of a core)")
