"""Who leaves next: the slots of a runner, its lanes, and the rows that wait for both.

A fresh row waits in the queue of its lane; a retry waits in a heap until its time has come, and then goes before the
fresh rows of its lane. Neither holds a slot. A row leaves when a slot is free *and* its lane lets it, both at the same
instant: a slot is never held by a row that waits for its rate, and a lane's rate is never spent on a row that then
waits for a slot (late departures would come in bunches and be too many for the endpoint's window). Lanes take turns,
so that a narrow one holds up nobody else.

All decisions are the policy's (`policy.limits`, `policy.breaker.Outage`); here are only the queues, the clock, one
timer, and the account of what was waited for.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable

from batchstream.engine.course import Course
from batchstream.engine.progress import Progress
from batchstream.policy.breaker import Outage
from batchstream.policy.limits import Lane

UNDER_WAY_PER_SLOT = 4
"""Rows under way for each slot: one on the wire, the others waiting for their retry. It bounds what a crash costs."""


class Queue:
    """The rows that wait for one lane."""

    __slots__ = ("again", "fresh", "lane")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.fresh: deque[Course] = deque()
        self.again: deque[Course] = deque()

    def __bool__(self) -> bool:
        return bool(self.again or self.fresh)


class Departures:
    """`lane_of` gives the lane of a key (the model's name); `leave(course)` sends a row off, or says False: not just
    now, `look` again. Both are called on the event loop of the one who uses this.

    What holds up the next row is noted in `progress`: "slots", "rpm", "tpm", "gate", "outage", "retry" (who waits does
    so for a retry), "held" (disk or budget), or "input" (there is nobody).
    """

    def __init__(
        self,
        lane_of: Callable[[str], Lane],
        leave: Callable[[Course], bool],
        slots: int,
        outage: Outage,
        progress: Progress,
    ) -> None:
        self.slots = slots
        self._progress = progress
        self._outage = outage
        self.on_wire = 0
        self.under_way = 0
        self._lane_of = lane_of
        self._leave = leave
        self._queues: dict[str, Queue] = {}
        self._turns: deque[Queue] = deque()
        self._later: list[tuple[float, int, Course]] = []
        self._number = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._looking = False
        self._closed = False

    @property
    def several(self) -> bool:
        """Whether rows for more than one lane have come."""
        return len(self._queues) > 1

    def lane(self, key: str) -> Lane:
        return self._queue(key).lane

    def lanes(self) -> list[Lane]:
        """Those that have been asked for."""
        return list({id(queue.lane): queue.lane for queue in self._queues.values()}.values())

    def add(self, course: Course, due: float | None = None) -> None:
        """A row wants to leave: at once, or not before the instant `due` of the monotonic clock."""
        if due is not None:
            heapq.heappush(self._later, (due, next(self._number), course))
        else:
            self._enqueue(course)
        self.look()

    def came_back(self) -> None:
        """A row that had left is off the wire: its slot is free."""
        self.on_wire -= 1
        self.look()

    def close(self) -> None:
        """Nobody leaves any more; who waits is forgotten."""
        self._closed = True
        self._later.clear()
        self._turns.clear()
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        """Let leave who may, and see to it that the next one does."""
        if self._looking or self._closed:  # `leave` may end in here again
            return
        self._looking = True
        now = time.monotonic()
        try:
            wake = self._let_leave(now)
            self._account(now)
        finally:
            self._looking = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake < math.inf and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, wake - time.monotonic()), self.look)

    def _let_leave(self, now: float) -> float:
        """The instant at which to look again; infinity when only news can change anything."""
        while self._later and self._later[0][0] <= now:
            self._enqueue(heapq.heappop(self._later)[2])
        wake = self._later[0][0] if self._later else math.inf
        if (down := self._outage.wait(now)) > 0.0:
            return min(wake, now + down)
        held = 0  # lanes in a row that let nobody leave
        while self._turns and held < len(self._turns) and self.on_wire < self.slots:
            queue = self._turns[0]
            wait = self._one(queue, now)
            if self._closed:
                return math.inf
            if wait == 0.0:
                held = 0
                if not queue:
                    self._turns.popleft()
                    continue
            else:
                held += 1
                wake = min(wake, now + wait)
            self._turns.rotate(-1)
        return wake

    def _one(self, queue: Queue, now: float) -> float:
        """Let the first of `queue` leave: 0.0, or the seconds after which it may (infinity: news must come first)."""
        if self._outage.wait(now) > 0.0:
            return math.inf
        wait = math.inf
        if queue.again:
            course = queue.again[0]
            wait = 0.0 if course.limited else queue.lane.retries.wait(now)
            if wait == 0.0:
                return self._send_off(queue, queue.again, now)
        if queue.fresh and self.under_way < self.slots * UNDER_WAY_PER_SLOT:
            return min(wait, self._send_off(queue, queue.fresh, now))
        return wait

    def _send_off(self, queue: Queue, waiting: deque[Course], now: float) -> float:
        course = waiting[0]
        wait = queue.lane.wait(now, course.cost)
        if wait > 0.0:
            return wait
        if not self._leave(course):
            return math.inf
        course.reserved = queue.lane.take(now, course.cost)
        self._outage.take()
        if course.retries and not course.limited:
            course.retry_tokens += queue.lane.retries.take(now, course.retries[-1].kind)
        waiting.popleft()
        self.on_wire += 1
        return 0.0

    def _account(self, now: float) -> None:
        """Note what holds up the next row from now on."""
        progress, binding = self._progress, self._what_binds(now)
        if binding != progress.binding:
            progress.held = progress.held_until(now)
            progress.binding, progress.binding_since = binding, now

    def _what_binds(self, now: float) -> str:
        if self._outage.down:
            return "outage"
        if self._turns:
            if self.on_wire >= self.slots:
                return "slots"
            queue = self._turns[0]
            course = queue.again[0] if queue.again else queue.fresh[0]
            return queue.lane.binding(now, course.cost) or "held"
        return "retry" if self._later else "input"

    def _enqueue(self, course: Course) -> None:
        queue = self._queue(course.lane_key)
        if not queue:
            self._turns.append(queue)
        (queue.again if course.under_way else queue.fresh).append(course)

    def _queue(self, key: str) -> Queue:
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = Queue(self._lane_of(key))
        return queue
