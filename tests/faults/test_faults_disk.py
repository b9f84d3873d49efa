"""The journal against disks that fail, processes that are killed, and current that is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import minijob
import pytest
from disks import ERRORS, CountingDisk, LazyDisk, RecordingDisk, fail, half, power_loss, short

from batchstream.files.segment import Segment

HERE = Path(__file__).parent
KILLS = int(os.environ.get("BATCHSTREAM_KILLS", "20"))
STATES = int(os.environ.get("BATCHSTREAM_POWER_LOSSES", "400"))


def place(tmp_path: Path, name: str):
    directory = tmp_path / name
    directory.mkdir()
    source = minijob.source_of(minijob.write_input(directory / "in.jsonl"))
    return source, directory / "out.jsonl", directory / "ledger"


@pytest.mark.parametrize("how", [[], ["torn"], ["double"], ["double", "torn"]], ids="-".join)
def test_killed_at_every_disk_call_the_next_start_completes_the_job(tmp_path, how):
    command = [sys.executable, str(HERE / "killsweep.py"), str(tmp_path), *how]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr
    trials, twice = map(int, done.stdout.split())
    assert trials > 70
    assert twice > 0, "no kill hit a row in flight: the sweep proves nothing"


def test_killed_at_random_moments_on_the_real_disk_every_answer_counts_once(tmp_path):
    """A chain of starts, each killed from outside after it asked some more rows, until one gets through."""
    rows = 40 * KILLS
    path = minijob.write_input(tmp_path / "in.jsonl", rows)
    out, ledger = tmp_path / "out.jsonl", tmp_path / "ledger"
    program = (
        "import sys, minijob\nfrom pathlib import Path\nfrom batchstream.files.fsio import RealDisk\n"
        "path, out, ledger = map(Path, sys.argv[1:])\n"
        "source = minijob.source_of(path)\n"
        "print('go', flush=True)\n"
        "sys.exit(minijob.run(source, out, RealDisk(), ledger).code)\n"
    )
    entries = [str(HERE), *(entry for entry in sys.path if entry)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entries)}
    command = [sys.executable, "-c", program, str(path), str(out), str(ledger)]
    chance = random.Random(7)
    kills = done = 0
    while done == 0:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as start:
            assert start.stdout.readline() == "go\n"
            if kills < KILLS:
                enough = len(minijob.asked(ledger)) + chance.randrange(-1, 20)
                while len(minijob.asked(ledger)) <= enough and start.poll() is None:
                    time.sleep(chance.uniform(0, 0.003))
                start.kill()
        done = start.returncode == 0
        assert done or start.returncode == -signal.SIGKILL
        kills += not done
    assert kills >= KILLS // 2
    assert out.read_bytes() == minijob.expected(rows)
    assert set(minijob.asked(ledger)) == set(range(rows))
    assert minijob.asked_twice(ledger) <= minijob.IN_FLIGHT * kills


def the_calls(tmp_path: Path) -> list[str]:
    source, out, ledger = place(tmp_path, "count")
    disk = CountingDisk()
    assert minijob.run(source, out, disk, ledger).code == 0
    assert out.read_bytes() == minijob.expected()
    return disk.log


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
def test_each_disk_call_failing_costs_no_stored_answer(tmp_path, lasting):
    trials = 0
    for number, name in enumerate(the_calls(tmp_path)):
        for code in ERRORS[name]:
            trials += 1
            source, out, ledger = place(tmp_path, f"{number}-{code}")
            spill = tmp_path / f"spill-{number}-{code}"
            disk = CountingDisk(number, fail(code), lasting=name if lasting and name != "open" else "")
            told = minijob.run(source, out, disk, ledger, spill_dir=spill if not lasting else None)
            assert told.code in (0, 14), (number, name, code, told.message)
            assert told.code == 0 or str(out.parent) in told.message or "spill" in told.message
            if told.code:
                assert not out.exists() or out.read_bytes() == minijob.expected()
            minijob.finish_and_check(source, out, ledger, LazyDisk(), spill_dir=spill)
    assert trials > 100


@pytest.mark.parametrize("how", [short, half], ids=["and the rest later", "and no room"])
def test_half_a_write_is_never_followed_by_another_record(tmp_path, how):
    for number, name in enumerate(the_calls(tmp_path)):
        if name == "write":
            source, out, ledger = place(tmp_path, f"short-{number}")
            told = minijob.run(source, out, CountingDisk(number, how), ledger)
            assert told.code in (0, 14), told.message
            minijob.finish_and_check(source, out, ledger, LazyDisk())
            assert minijob.asked_twice(ledger) == 0


def test_a_disk_that_stays_full_spills_and_the_next_start_takes_the_spill_in(tmp_path):
    spilled = 0
    for number, name in enumerate(the_calls(tmp_path)):
        if name != "write":
            continue
        source, out, ledger = place(tmp_path, f"full-{number}")
        spill = tmp_path / f"spill-{number}"

        class FullDisk(CountingDisk):
            def __getattr__(self, name):
                call = super().__getattr__(name)
                # The spill directory is on another disk, which is not full.
                return call if name != "open" else lambda path, *rest: self.opened(call(path, *rest), path)

            def opened(self, fd, path):
                self.lasting = "" if "spill" in path else "write"
                return fd

        told = minijob.run(source, out, FullDisk(number, fail(28)), ledger, spill_dir=spill)
        assert told.code in (0, 14)
        if told.spilled:
            spilled += 1
            before = minijob.asked(ledger)
            after = minijob.run(source, out, LazyDisk(), ledger, spill_dir=spill)
            assert after.code == 0
            assert after.done_before == len(set(before)), "what was spilled must not be asked again"
            assert minijob.asked_twice(ledger) == 0
            assert not list(spill.iterdir()), "a spill that was taken in is removed"
        assert minijob.run(source, out, LazyDisk(), ledger, spill_dir=spill).code == 0
        assert out.read_bytes() == minijob.expected()
    assert spilled > 10


def recorded(tmp_path: Path, ignore=()) -> tuple[RecordingDisk, Path]:
    source, out, ledger = place(tmp_path, "origin")
    disk = RecordingDisk(ignore)
    told = minijob.run(source, out, disk, ledger, promise=disk.promise)
    assert told.code == 0, told.message
    return disk, out.parent


def survive(disk: RecordingDisk, origin: Path, tmp_path: Path, seed: int) -> None:
    """One power loss, and what has to hold after it."""
    chance = random.Random(seed)
    at = chance.randrange(len(disk.log) + 1)
    target = tmp_path / f"state-{seed}"
    target.mkdir()
    promised = power_loss(disk.log, at, chance, origin, target)
    source = minijob.source_of(minijob.write_input(target / "in.jsonl"))
    stamp = (origin / "in.jsonl").stat().st_mtime_ns
    os.utime(target / "in.jsonl", ns=(stamp, stamp))
    out, ledger = target / "out.jsonl", target / "ledger"
    if ("published", None) in promised:
        assert out.exists(), "published, then gone"
    if out.exists():
        assert out.read_bytes() == minijob.expected(), "a results file that is not whole"
    told = minijob.run(source, out, LazyDisk(), ledger)
    assert told.code == 0, told.message
    assert out.read_bytes() == minijob.expected()
    safe = {row for kind, row in promised if kind == "row"}
    assert not safe & set(minijob.asked(ledger)), "an answer that was counted as stored was asked for again"


def survive_all(disk: RecordingDisk, origin: Path, tmp_path: Path, states: int) -> None:
    for seed in range(states):
        survive(disk, origin, tmp_path, seed)


def test_after_any_power_loss_what_was_counted_as_stored_is_stored(tmp_path):
    disk, origin = recorded(tmp_path)
    survive_all(disk, origin, tmp_path, STATES)


def count_before_sync(monkeypatch) -> None:
    """The bug: rows are reported as durable when they are written."""
    real = Segment.sync

    def sync(self):
        early = [outcome.row for outcome in self._written]
        real_sync_data, self._disk.sync_data = self._disk.sync_data, lambda fd: None
        rows = real(self)
        self._disk.sync_data = real_sync_data
        return rows or early

    monkeypatch.setattr(Segment, "sync", sync)


@pytest.mark.parametrize("forgotten", ["sync_data", "sync_dir", "sync", "order"])
def test_the_power_loss_sweep_catches_a_forgotten_sync(tmp_path, monkeypatch, forgotten):
    if forgotten == "order":
        count_before_sync(monkeypatch)
    disk, origin = recorded(tmp_path, ignore=(forgotten,))
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        survive_all(disk, origin, tmp_path, 3000)
