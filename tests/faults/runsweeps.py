"""Sweeps over whole runs: `python runsweeps.py SWEEP DIR [--every N] [--first N] [--trials N] [--seed N] [--bug NAME]`.

Each prints its figures as one line of JSON and fails with an AssertionError where a promise is broken.
With `--bug` one of the bugs of `runbugs.py` is put in before: then it has to fail.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runbugs
from disks import CALLS, ERRORS, CountingDisk, LazyDisk, RecordingDisk, fail, kill, power_loss, torn
from wholerun import (
    ROWS,
    STREAMS,
    Child,
    Ended,
    Endpoint,
    admitted_again,
    notes,
    put_disk,
    results,
    run_args,
    write_prompts,
)

from batchstream.engine import store
from batchstream.job import Job
from batchstream.launch.here import run
from batchstream.shard import Hooks

PACE = ("--ttft", "0.004", "--gap", "0.001")
"""A little slower than the client, so that all eight streams are under way at any moment."""


class TracingDisk:
    """Writes the name and the instant of each call to a file, for whoever forked this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.real = LazyDisk()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            with open(self.path, "a") as file:
                file.write(f"{name} {time.monotonic()}\n")
            return getattr(self.real, name)(*args)

        return call if name in CALLS else object.__getattribute__(self, name)


class Site:
    """One endpoint, one input, what an uninterrupted run makes of it, and a directory for each trial."""

    def __init__(self, home: Path, endpoint: Endpoint, rows: int = ROWS, *options: object) -> None:
        self.home, self.endpoint, self.rows, self.options = home, endpoint, rows, options
        self.source = write_prompts(home / "in.jsonl", rows)
        trace = home / "calls"
        ended = self.run("whole", "1", disk=TracingDisk(trace))
        assert ended.code == 0, ended
        self.expected = results(home / "whole" / "out.jsonl")
        assert [row["row"] for row in self.expected] == list(range(rows))
        assert {row["status"] for row in self.expected} == {"ok"}
        traced = [line.split() for line in trace.read_text().splitlines()]
        self.calls = [name for name, _ in traced]
        # Monotonic clocks of one machine: what was called before the first request arrived?
        first = min(entry["received_at"] for entry in endpoint.entries())
        before = [name for name, at in traced if float(at) < first]
        segment = ["open", "write", "sync", "sync_dir"]
        begun = next((i for i in range(len(before)) if before[i : i + 4] == segment and "replace" in before[:i]), None)
        assert begun is not None, f"a request left before lock, manifest and segment were durable: {before}"
        assert before[:begun].index("lock") < before[:begun].index("replace")

    def child(
        self, trial: str, start: str, *more: object, disk: Any = None, before: Callable[[], object] | None = None
    ) -> Child:
        def prepare() -> None:
            put_disk(disk or LazyDisk())()
            if before is not None:
                before()

        directory = self.home / trial
        directory.mkdir(exist_ok=True)
        args = run_args(self.endpoint, self.source, f"{trial}.{start}", *self.options, *more)
        return Child(args, directory, start, before=prepare)

    def run(self, trial: str, start: str, *more: object, **how: Any) -> Ended:
        return self.child(trial, start, *more, **how).wait()

    def published(self, trial: str) -> bool:
        """P4: there is no results file, or the whole one."""
        out = self.home / trial / "out.jsonl"
        if not out.exists():
            return False
        assert results(out) == self.expected, f"{trial}: a results file that is not the uninterrupted run's"
        return True

    def printed(self, trial: str, start: str) -> int:
        """The number of rows asked again that this start told its user."""
        summary = json.loads((self.home / trial / f"{trial}.{start}.json").read_text())
        return summary["run"]["asked_again"]

    def finish(self, trial: str, start: str, *more: object) -> int:
        """The same command again, and nothing in its way: everything is there, nothing is asked after that.
        Returns the number of rows asked again that it told."""
        ended = self.run(trial, start, *more)
        assert ended.code == 0, f"{trial}: {ended}"
        assert self.published(trial)
        printed = self.printed(trial, start)
        told = f"{printed}" in ended.err and "asked again" in ended.err
        assert told == (printed > 0), f"{trial}: asked {printed} again, said:\n{ended.err}"
        leftovers = [name for name in os.listdir(self.home / trial) if ".tmp" in name and "out.jsonl" in name]
        assert not leftovers, f"{trial}: {leftovers}"
        again = self.run(trial, "again", *more)
        assert again.code == 0, again
        assert not self.endpoint.asked(f"{trial}.again"), f"{trial}: a finished job asked again"
        return printed

    def twice(self, trial: str) -> int:
        """Requests beyond the first of their row, by the endpoint's ledger."""
        asked = self.endpoint.asked(f"{trial}.")
        return len(asked) - len(set(asked))

    def done_with(self, trial: str) -> None:
        self.endpoint.forget()
        shutil.rmtree(self.home / trial)


def kills(
    site: Site, *, every: int, first: int, act: Callable[[str], object] = kill, second: int | None = None
) -> dict[str, Any]:
    """SIGKILL at disk call number `first`, `first + every`, ... (a negative one counts from the end of an uninterrupted
    run) until a start gets through; with `second` an earlier
    start has been killed at that call before, so that recovery is what is killed."""
    trials = twice = printed_in_all = 0
    for point in itertools.count(first if first >= 0 else len(site.calls) + first, every):
        trial = f"kill-{point}"
        starts = 1
        if second is not None:
            assert site.run(trial, "0", disk=CountingDisk(second, kill)).code == -9
            starts = 2
        ended = site.run(trial, "1", disk=CountingDisk(point, act))
        assert ended.code in (0, -9), ended
        site.published(trial)
        printed = site.finish(trial, "2")
        asked = site.twice(trial)
        journal = site.home / trial / "out.jsonl.journal"
        assert asked <= STREAMS * starts, f"{trial}: {asked} rows asked twice"
        if second is None:
            assert printed == admitted_again(journal), (
                f"{trial}: printed {printed}, sent again {admitted_again(journal)}"
            )
            # A kill between two disk calls could come after the note and before the request: none does at one.
            assert asked == printed, f"{trial}: asked {asked} twice, printed {printed}"
        else:
            assert asked <= admitted_again(journal)
        site.done_with(trial)
        trials, twice, printed_in_all = trials + 1, twice + asked, printed_in_all + printed
        if ended.code == 0:
            break
    assert twice > 0, "no kill hit a row in flight: the sweep proves nothing"
    return {"trials": trials, "asked_twice": twice, "printed": printed_in_all}


def killed_everywhere(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    with Endpoint(*PACE) as endpoint:
        return kills(Site(home, endpoint), every=options.every, first=options.first)


def torn_everywhere(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """As above, but the write at which the process dies is half done."""
    with Endpoint(*PACE) as endpoint:
        return kills(Site(home, endpoint), every=options.every, first=options.first, act=torn)


def killed_in_recovery(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    with Endpoint(*PACE) as endpoint:
        site = Site(home, endpoint)
        return kills(site, every=options.every, first=options.first, second=len(site.calls) // 2)


def fitting(code: int) -> Callable[[str], object]:
    """Fail with `code`, or where the call of that number is another one this time, with an error of its own."""

    def act(name: str) -> object:
        return fail(code if code in ERRORS[name] else ERRORS[name][0])(name) if ERRORS[name] else None

    return act


def failing_everywhere(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Each disk call fails once, with each of its errors: no answer may be asked for twice, whatever the exit."""
    codes: dict[int, int] = {}
    trials = 0
    with Endpoint(*PACE) as endpoint:
        site = Site(home, endpoint)
        points = [(number, code) for number, name in enumerate(site.calls) for code in ERRORS[name]]
        for number, code in points[options.first :: options.every]:
            trial = f"fail-{number}-{errno.errorcode[code]}"
            ended = site.run(trial, "1", "--spill-dir", "spill", disk=CountingDisk(number, fitting(code)))
            assert ended.code in (0, 14), f"{trial}: {ended}"
            if ended.code:
                assert ended.err.splitlines()[-1].startswith("batchstream: error: "), ended
            site.published(trial)
            site.finish(trial, "2", "--spill-dir", "spill")
            assert site.twice(trial) == 0, f"{trial}: rows were asked twice because of one error: {ended}"
            site.done_with(trial)
            codes[ended.code] = codes.get(ended.code, 0) + 1
            trials += 1
    return {"trials": trials, "exit_codes": codes, "asked_twice": 0}


def killed_at_random(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs killed from outside at any moment, one, two or three in a chain, until a start is left alone."""
    chance = random.Random(options.seed)
    starts = hits = twice = printed = chain = 0
    with Endpoint(*PACE) as endpoint:
        site = Site(home, endpoint)
        began = time.monotonic()
        assert site.run("timed", "1").code == 0
        whole = time.monotonic() - began
        while hits < options.trials:
            chain += 1
            trial = f"chain-{chain}"
            durability = ("--durability", chance.choice(("row", "batch", "batch", "os")))
            killed = 0
            for start in range(chance.choice((1, 1, 2, 3))):
                child = site.child(trial, str(start), *durability)
                time.sleep(chance.uniform(0, whole))
                child.kill()
                killed += child.wait().code == -9
                starts += 1
                site.published(trial)
            printed += site.finish(trial, "last", *durability)
            asked = site.twice(trial)
            assert asked <= STREAMS * killed, f"{trial}: {asked} rows asked twice after {killed} kills"
            assert asked <= admitted_again(home / trial / "out.jsonl.journal"), f"{trial}: asked twice without a note"
            site.done_with(trial)
            hits += killed
            twice += asked
    assert twice > 0, "no kill hit a row in flight: the sweep proves nothing"
    return {"starts": starts, "kills_of_a_live_run": hits, "chains": chain, "asked_twice": twice,
            "printed_by_the_last": printed, "failures": 0, "upper_bound_95": round(3 / hits, 5)}  # fmt: skip


def started_at_once(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """So many starts of one job at the same moment: one works. When that is killed, the next start works at once."""
    with Endpoint("--fault", f"stall(k=0)@1..{STREAMS}") as endpoint:
        source = write_prompts(home / "in.jsonl")
        gate, release = os.pipe()

        def wait_for_the_gate() -> None:
            os.close(release)
            os.read(gate, 1)

        children = {}
        for number in range(options.trials):
            child = Child(run_args(endpoint, source, f"at-once.{number}"), home, str(number), before=wait_for_the_gate)
            children[child.pid] = child
        os.close(gate)
        time.sleep(0.5)
        began = time.monotonic()
        os.close(release)
        refused = []
        try:
            while len(children) > 1:
                time.sleep(0.005)
                for child in [child for child in children.values() if child.poll()]:
                    del children[child.pid]
                    refused.append((time.monotonic() - began, child.wait()))
                    assert refused[-1][1].code == 11, f"of those started at once one got further: {refused[-1][1]}"
                    assert children, "of those started at once nobody works"
                working = {entry["mark"] for entry in endpoint.ledger()}
                assert len(working) <= 1, f"of those started at once {len(working)} work"
        except AssertionError:
            for child in children.values():
                child.kill()
                child.wait()
            raise
        (holder,) = children.values()
        for _, ended in refused:
            assert f"pid {holder.pid}" in ended.err, ended
            assert "Traceback" not in ended.err
        deadline = time.monotonic() + 30
        while len(endpoint.ledger()) < STREAMS and time.monotonic() < deadline:
            time.sleep(0.01)
        holder.kill()
        assert holder.wait().code == -9
        assert {entry["mark"] for entry in endpoint.entries()} == {f"at-once.{holder.name}"}
        after = Child(run_args(endpoint, source, "after"), home, "after").wait()
        assert after.code == 0, after
        assert len(endpoint.asked("after")) == ROWS
        assert json.loads((home / "after.json").read_text())["run"]["asked_again"] == STREAMS
    return {"starts": options.trials, "refused": len(refused), "last_refusal_s": round(max(at for at, _ in refused), 2)}


def disk_full(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A file system that is really full (HOME/disk, which is a small one) in the middle of a run, and its cure."""
    small = home / "disk"
    ballast = small / "ballast"
    size = os.statvfs(small)
    assert size.f_blocks * size.f_frsize <= 1 << 20, f"{small} is not a small file system: it would really be filled"
    figures: dict[str, Any] = {}
    with Endpoint("--ttft", "0.02", "--gap", "0.001") as endpoint:
        site = Site(home, endpoint)

        def fill(room: int) -> None:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            os.truncate(ballast, max(0, ballast.stat().st_size - room))

        for way in ("spill", "lost", "cured"):
            fill(24 << 10)
            args = ("-o", "../disk/out.jsonl", *(("--spill-dir", "spill") if way == "spill" else ()))
            patience = 60.0 if way == "cured" or options.every == 1 else 1.0
            child = site.child(way, "1", *args, before=lambda seconds=patience: setattr(store, "PATIENCE_S", seconds))
            if way == "cured":
                time.sleep(2)
                assert not child.poll(), child.wait()
                ballast.unlink()
            ended = child.wait()
            assert ended.code == (0 if way == "cured" else 14), ended
            if way != "cured":
                assert "No space left" in ended.err.splitlines()[-1], ended
                assert not (small / "out.jsonl").exists()
                before = len(endpoint.asked(f"{way}.1"))
                assert STREAMS < before < ROWS, f"{before} requests: the disk did not fill in the middle of the run"
                still_full = site.run(way, "2", *args, before=lambda: setattr(store, "PATIENCE_S", 0.5))
                assert still_full.code == 14, still_full
                ballast.unlink()
                cured = site.run(way, "3", *args)
                assert cured.code == 0, cured
            assert results(small / "out.jsonl") == site.expected
            figures[way] = site.twice(way)
            assert figures[way] <= (2 * STREAMS if way == "lost" else 0), f"{way}: {figures[way]} rows asked twice"
            endpoint.forget()
            for path in (small / "out.jsonl", small / "out.jsonl.summary.json"):
                path.unlink()
            shutil.rmtree(small / "out.jsonl.journal")
    return {"asked_twice": figures}


def signalled(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A first signal drains, a second one cuts; the results appear when all is done, and nothing is bought in vain."""
    twice = cut = late = 0
    with Endpoint("--ttft", "0.06", "--gap", "0.01") as endpoint:
        site = Site(home, endpoint)
        for number in range(options.trials):
            trial, hard = f"signal-{number}", number % 2 == 1
            sent = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3]
            child = site.child(trial, "1")
            deadline = time.monotonic() + 20
            while (
                sum(entry["mark"] == f"{trial}.1" for entry in endpoint.ledger()) < 20 and time.monotonic() < deadline
            ):
                time.sleep(0.005)
            child.kill(sent)
            if hard:
                time.sleep(0.01)
                child.kill(sent)
            ended = child.wait()
            if site.published(trial):
                late += 1  # this machine was too busy: the run was over before the signal came
                assert ended.code in (0, -sent), ended
                site.done_with(trial)
                continue
            assert ended.code == -sent, ended
            early = sum(entry["closed_early"] for entry in endpoint.entries())
            assert hard or not early, f"{early} answers were cut by the first signal"
            printed = site.finish(trial, "2")
            asked = site.twice(trial)
            assert asked <= printed <= (STREAMS if hard else 0), f"{trial}: asked {asked} twice, printed {printed}"
            site.done_with(trial)
            twice, cut = twice + asked, cut + early
    assert options.trials < 2 or twice > 0, "no second signal cut anything: the sweep proves nothing"
    assert late <= options.trials // 2, "most runs were over before the signal came: the sweep proves nothing"
    return {"trials": options.trials - late, "cut": cut, "asked_twice": twice}


def broken_streams(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every second answer breaks off, each in its own way, at its first attempt: what is published is whole."""
    ways = ("truncate", "truncate-event", "truncate-utf8", "close", "reset", "length", "error", "garbage")
    faults = [part for way in ways for part in ("--fault", f"{way}(times=1)={0.5 / len(ways)}")]
    with Endpoint(*PACE) as unbroken:
        expected = Site(home, unbroken).expected
    with Endpoint(*PACE, *faults) as endpoint:
        args = run_args(endpoint, home / "in.jsonl", "broken")
        place = home / "broken"
        place.mkdir()
        ended = Child(args, place).wait()
        assert ended.code == 0, ended
        rows = results(place / "out.jsonl")
        for row, right in zip(rows, expected, strict=True):
            whole = {**row, "attempts": 1, "retries": []}
            assert whole == right, f"a row that is not the unbroken one: {row}, expected {right}"
            assert row["attempts"] == len(row["retries"]) + 1
        retried = sum(row["attempts"] > 1 for row in rows)
        assert retried > ROWS // 4
        assert len(endpoint.asked("broken")) == sum(row["attempts"] for row in rows)
    return {"rows": len(rows), "retried": retried}


def power_losses(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run on a recording disk, told of each row as it counts as done; then the current fails at any call, and the
    same command runs on what may be left: no row that counted is sent again (P1, P2)."""
    with Endpoint(*PACE) as endpoint:
        source = write_prompts(home / "in.jsonl")
        origin = home / "origin"
        origin.mkdir()

        def recorded() -> None:
            disk = RecordingDisk()
            put_disk(disk)()
            job = Job(input=str(source), output=str(origin / "out.jsonl"), base_url=endpoint.base_url, model="sim",
                      concurrency=STREAMS)  # fmt: skip
            report = run(job, hooks=Hooks(on_durable=lambda result: disk.promise(result.row)))
            disk.promise("published")
            (home / "log").write_bytes(pickle.dumps(disk.log))
            os._exit(report.exit_code)

        ended = Child([], origin, before=recorded).wait()
        assert ended.code == 0, ended
        log = pickle.loads((home / "log").read_bytes())  # noqa: S301  (our own child's)
        assert sum(entry[0] == "promise" for entry in log) == ROWS + 1
        expected = results(origin / "out.jsonl")
        kept = 0
        for number in range(options.trials):
            chance = random.Random(options.seed + number)
            place = home / f"state-{number}"
            place.mkdir()
            promised = power_loss(log, chance.randrange(len(log) + 1), chance, origin, place)
            out = place / "out.jsonl"
            assert "published" not in promised or out.exists(), "published, then gone"
            assert not out.exists() or results(out) == expected, "a results file that is not whole"
            old = set(place.glob("out.jsonl.journal/seg-*"))
            ended = Child(run_args(endpoint, source, f"state-{number}"), place, before=put_disk(LazyDisk())).wait()
            assert ended.code == 0, ended
            assert results(out) == expected
            for path in old:
                path.unlink()
            asked = {row for note in notes(place / "out.jsonl.journal") if note["t"] == "a" for row in note["rows"]}
            assert not asked & set(promised), f"counted as done, then sent again: {asked & set(promised)}"
            kept += len(promised)
            shutil.rmtree(place)
    return {"states": options.trials, "promises_kept": kept}


SWEEPS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        killed_everywhere, torn_everywhere, killed_in_recovery, failing_everywhere, killed_at_random, started_at_once,
        disk_full, signalled, broken_streams, power_losses,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("home", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bug", choices=runbugs.BUGS)
    options = parser.parse_args()
    if options.bug:
        runbugs.BUGS[options.bug][0]()
    began = time.monotonic()
    figures = SWEEPS[options.sweep](options.home.resolve(), options)
    print(json.dumps({"sweep": options.sweep, **figures, "seconds": round(time.monotonic() - began, 1)}))  # noqa: T201


if __name__ == "__main__":
    main()
