"""When the next bytes of each stream go out: one heap and one timer for all streams.

A stream is a generator that yields the instant (monotonic seconds) at which it wants to go on; an
instant that has passed means "after the others had their turn", infinity means never. A task and a
sleep for each token would cost ten times as much, and a timer for each stream five times.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Generator
from typing import Protocol

Steps = Generator[float, None, None]


class Stream(Protocol):
    """What the wheel turns. `blocked`: the peer reads too slowly; `Wheel.resume` goes on."""

    steps: Steps

    @property
    def blocked(self) -> bool: ...


class Wheel:
    """Turns streams within the running event loop. Not thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Stream]] = []
        self._ready: deque[Stream] = deque()
        self._parked: set[Stream] = set()  # due, but blocked
        self._serial = 0  # keeps the heap from comparing streams, and equal instants in order
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf
        self._pass_asked = False

    def start(self, stream: Stream) -> None:
        """Take the first step now."""
        self._turn(stream, time.monotonic())
        self._arm()

    def resume(self, stream: Stream) -> None:
        """The peer reads again: a stream that was due meanwhile goes on, after those that are ready already."""
        if stream in self._parked:
            self._parked.discard(stream)
            self._ready.append(stream)
            self._arm()

    def drop(self, stream: Stream) -> None:
        """The stream is over before its end."""
        stream.steps.close()
        self._parked.discard(stream)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._heap.clear()
        self._ready.clear()
        self._parked.clear()

    def _turn(self, stream: Stream, now: float) -> None:
        if stream.blocked:
            self._parked.add(stream)
            return
        due = next(stream.steps, None)
        if due is None or due == math.inf:
            return
        if due > now:
            self._serial += 1
            heapq.heappush(self._heap, (due, self._serial, stream))
        else:
            self._ready.append(stream)

    def _pass(self) -> None:
        """One turn for everything that is due."""
        self._pass_asked = False
        now = time.monotonic()
        heap = self._heap
        try:
            for _ in range(len(self._ready)):
                self._turn(self._ready.popleft(), now)
            while heap and heap[0][0] <= now:
                self._turn(heapq.heappop(heap)[2], now)
        finally:  # an error in one stream must not stop the others' clock
            self._arm()

    def _fire(self) -> None:
        self._timer, self._timer_due = None, math.inf
        self._pass()

    def _arm(self) -> None:
        if self._ready:
            if not self._pass_asked:
                self._pass_asked = True
                self._loop.call_soon(self._pass)
        elif self._heap and self._heap[0][0] < self._timer_due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_due = self._heap[0][0]
            # Not call_at: uvloop's loop.time() is a cached millisecond, not the monotonic clock. Its timers
            # round to whole milliseconds; rounding up here makes one wake-up serve all that is due by
            # then, where rounding down would spin through the rest of the millisecond.
            wait = math.ceil((self._timer_due - time.monotonic()) * 1000) / 1000
            self._timer = self._loop.call_later(max(0.0, wait), self._fire)
