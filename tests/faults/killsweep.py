"""Kill a job at its Nth disk call, for every N, and finish it: `python killsweep.py DIR [double]`.

A process of its own, without threads, so that each trial is one cheap fork. Prints one line: trials and asked twice.
With `torn` each dies after half of its write; with `double` the second start is killed too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import minijob
from disks import CountingDisk, LazyDisk, kill, torn


def trial(directory: Path, points: list[int], act=kill) -> tuple[bool, int]:
    """(was killed at all, rows asked twice)."""
    directory.mkdir()
    source = minijob.source_of(minijob.write_input(directory / "in.jsonl"))
    out, ledger = directory / "out.jsonl", directory / "ledger"
    killed = False
    for point in points:
        child = os.fork()
        if child == 0:
            minijob.run(source, out, CountingDisk(point, act), ledger)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0 or killed
    if len(points) == 1:
        minijob.finish_and_check(source, out, ledger, LazyDisk())
    else:
        told = minijob.run(source, out, LazyDisk(), ledger)
        assert told.code == 0, told.message
        assert out.read_bytes() == minijob.expected()
    twice = minijob.asked_twice(ledger)
    assert twice <= minijob.IN_FLIGHT * len(points)
    final = minijob.run(source, out, LazyDisk(), ledger)
    assert final.code == 0
    assert minijob.asked_twice(ledger) == twice, "a finished job asked again"
    return killed, twice


def main() -> None:
    home = Path(sys.argv[1])
    double, act = "double" in sys.argv, torn if "torn" in sys.argv else kill
    trials = twice = 0
    for point in range(10_000):
        points = [point, point * 7 % 40] if double else [point]
        killed, again = trial(home / f"kill-{point}", points, act)
        trials += 1
        twice += again
        if not killed or (double and point > 120):
            break
    print(trials, twice)  # noqa: T201


if __name__ == "__main__":
    main()
