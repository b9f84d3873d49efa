"""The client's measurements of itself while it runs: loop lag, garbage collection, CPU.

A client that is late makes the endpoint look late; these figures (`figures.evidence`) tell how late it was.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchstream.figures.evidence import Evidence
from batchstream.net.exchange import Traffic

PROBE_S = 0.02
"""A probe this often costs under 0.1 % of a core and catches any stall of the loop longer than itself."""

_KEEP = 200_000  # probes, over an hour; beyond it every second one is dropped and the interval doubles


class Gauges:
    """Start on the loop that serves the streams; `evidence(traffic)` at any time. `gc_*` need no loop."""

    def __init__(self) -> None:
        self._lags = array("d")
        self._lag_max = 0.0
        self._interval = PROBE_S
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._gc_started = 0.0
        self._gc_total = 0.0
        self._gc_max = 0.0
        self._began = 0.0
        self._cpu_began = 0.0

    def start(self) -> None:
        self._began = time.monotonic()
        self._cpu_began = cpu_seconds()
        gc.callbacks.append(self._on_gc)
        self._schedule(asyncio.get_running_loop())

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._on_gc in gc.callbacks:
            gc.callbacks.remove(self._on_gc)

    def evidence(self, traffic: Traffic) -> Evidence:
        elapsed = time.monotonic() - self._began
        cpu = cpu_seconds() - self._cpu_began
        lags = sorted(self._lags)
        return Evidence(
            elapsed_s=elapsed,
            loop_lag_p99_s=lags[int(0.99 * (len(lags) - 1))] if lags else None,
            loop_lag_max_s=self._lag_max if lags else None,
            cpu_s=cpu,
            cpu_share=cpu / elapsed if elapsed > 0 else None,
            gc_pause_total_s=self._gc_total,
            gc_pause_max_s=self._gc_max,
            reads=traffic.reads,
            events=traffic.events,
            connections=traffic.connections,
            connection_wait_mean_s=traffic.opening_s / traffic.connections if traffic.connections else None,
            connection_wait_max_s=traffic.opening_max_s if traffic.connections else None,
        )

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = time.monotonic() + self._interval
        self._handle = loop.call_later(self._interval, self._probe, loop)

    def _probe(self, loop: asyncio.AbstractEventLoop) -> None:
        # The loop's timers tick in whole milliseconds (uvloop), so up to one of them is not lag.
        lag = max(0.0, time.monotonic() - self._due - 0.001)
        self._lags.append(lag)
        self._lag_max = max(self._lag_max, lag)
        if len(self._lags) >= _KEEP:
            self._lags = self._lags[::2]
            self._interval *= 2
        self._schedule(loop)

    def _on_gc(self, phase: str, info: dict[str, Any]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._gc_started = now
        else:
            pause = now - self._gc_started
            self._gc_total += pause
            self._gc_max = max(self._gc_max, pause)


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Rare garbage collections while requests run: what was made before is left alone, and a collection
    waits for 50,000 new objects. Pauses would stand in somebody's TTFT. Restored on leaving."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
