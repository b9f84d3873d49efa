"""Endpoints that exist only in virtual time: what a closed loop of rows meets of capacities, walls and knees."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

from batchstream.policy.concurrency import Concurrency

REFUSED_AFTER_S = 0.02


class Shape(NamedTuple):
    """`slots`: requests served at once, the others queue; `wall`: more in flight are refused; `knee`: above so many in
    flight every one takes longer, by `slope` of the base for each time the knee; `seconds`: of one service."""

    slots: float = float("inf")
    wall: float = float("inf")
    knee: float = float("inf")
    slope: float = 0.0
    seconds: Callable[[random.Random], float] = lambda chance: chance.lognormvariate(0.0, 0.4)
    refused_anyway: float = 0.0


class Outcome(NamedTuple):
    rows_per_s: float
    requests: int
    refused: int
    level: int


def closed_loop(shape: Shape, rows: int, control: Concurrency | int, seed: int = 1) -> Outcome:
    """Ask `rows` rows, as many at once as `control` allows; a refused row comes back after a second."""
    chance, number = random.Random(seed), itertools.count()
    now, waiting, done, requests, refused, on_wire = 0.0, rows, 0, 0, 0, 0
    events: list[tuple[float, int, str, float]] = []
    queue: list[float] = []  # instants of sending
    serving = 0

    def serve(sent: float) -> None:
        nonlocal serving
        serving += 1
        stretch = 1.0 + shape.slope * max(0.0, on_wire / shape.knee - 1.0)
        heapq.heappush(events, (now + shape.seconds(chance) * stretch, next(number), "served", sent))

    while done < rows:
        level = control if isinstance(control, int) else control.level
        while waiting and on_wire < level:
            waiting -= 1
            requests += 1
            on_wire += 1
            if on_wire > shape.wall or chance.random() < shape.refused_anyway:
                heapq.heappush(events, (now + REFUSED_AFTER_S, next(number), "refused", now))
            elif serving < shape.slots:
                serve(now)
            else:
                queue.append(now)
        now, _, what, sent = heapq.heappop(events)
        if what == "again":
            waiting += 1
            continue
        if what == "refused":
            refused += 1
            if isinstance(control, Concurrency):
                control.refused(now, sent)
            heapq.heappush(events, (now + 1.0, next(number), "again", 0.0))
        else:
            serving -= 1
            done += 1
            if isinstance(control, Concurrency):
                control.ended(now, sent, 1.0, busy=on_wire >= control.level)
            if queue:
                serve(queue.pop(0))
        on_wire -= 1
    return Outcome(rows / now, requests, refused, control if isinstance(control, int) else control.level)
