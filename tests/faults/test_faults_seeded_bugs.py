"""Bugs put in on purpose: each must be caught by one of the sweeps, or the sweeps are no evidence.

Every sweep is also run without a bug and has to pass.
"""

from __future__ import annotations

import errno
import os
import random

import minijob
import pytest
from disks import CALLS, CountingDisk, LazyDisk, RecordingDisk, fail, half, power_loss

from batchstream.errors import BatchstreamError, DamagedError
from batchstream.files import fsio, journal, lock, publish, record, recovery, segment

# --- the sweeps


def start(directory, disk, **more):
    directory.mkdir(exist_ok=True)
    source = minijob.source_of(minijob.write_input(directory / "in.jsonl"))
    out, ledger = directory / "out.jsonl", directory / "ledger"
    return source, out, ledger, minijob.run(source, out, disk, ledger, **more)


def one_call_fails(tmp_path, act, wanted):
    probe = CountingDisk()
    start(tmp_path / "probe", probe)
    for number in [number for number, name in enumerate(probe.log) if name == wanted]:
        source, out, ledger, told = start(tmp_path / f"{wanted}-{number}", CountingDisk(number, act))
        assert told.code in (0, 14), told.message
        assert told.code == 14 or out.read_bytes() == minijob.expected()
        minijob.finish_and_check(source, out, ledger, LazyDisk())
        assert journal.load_final(journal.journal_path(out)).duplicates == 0
        if act is half and told.code == 0:
            assert minijob.asked_twice(ledger) == 0


def short_writes(tmp_path):
    one_call_fails(tmp_path, half, "write")


def full_disk(tmp_path):
    one_call_fails(tmp_path, fail(errno.ENOSPC), "write")


def failed_syncs(tmp_path):
    one_call_fails(tmp_path, fail(errno.EIO), "sync_data")


def power_losses(tmp_path):
    disk = RecordingDisk()
    start(tmp_path / "origin", disk, promise=disk.promise)
    for seed in range(1500):
        chance = random.Random(seed)
        target = tmp_path / f"state-{seed}"
        target.mkdir()
        promised = power_loss(disk.log, chance.randrange(len(disk.log) + 1), chance, tmp_path / "origin", target)
        results = target / "out.jsonl"
        assert not results.exists() or results.read_bytes() == minijob.expected()
        _, out, ledger, told = start(target, LazyDisk())
        assert told.code == 0, told.message
        assert out.read_bytes() == minijob.expected()
        assert not {row for kind, row in promised if kind == "row"} & set(minijob.asked(ledger))


class DroppingDisk(RecordingDisk):
    """Its Nth sync fails and drops the pages it was to write; the next one says that all is well, as Linux does."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.seen = 0

    def sync_data(self, fd):
        self.seen += 1
        if self.seen != self.at:
            super().sync_data(fd)
            return
        inode = self.files[fd]
        since = max((i for i, entry in enumerate(self.log) if entry[:2] == ("sync", inode)), default=0)
        for i in range(since, len(self.log)):
            if self.log[i][0] == "write" and self.log[i][1] == inode:
                self.log[i] = ("write", inode, bytes(len(self.log[i][2])))
        raise OSError(errno.EIO, "I/O error")


def pages_dropped_by_a_failed_sync(tmp_path):
    for at in range(1, 6):
        disk = DroppingDisk(at)
        start(tmp_path / f"origin-{at}", disk, promise=disk.promise)
        before_results = next(i for i, entry in enumerate(disk.log) if entry[0] == "name" and ".tmp-" in entry[1][0][0])
        target = tmp_path / f"after-{at}"
        target.mkdir()
        promised = power_loss(disk.log, before_results, random.Random(at), tmp_path / f"origin-{at}", target)
        _, out, ledger, told = start(target, LazyDisk())
        assert told.code == 0, told.message
        assert out.read_bytes() == minijob.expected()
        assert not {row for kind, row in promised if kind == "row"} & set(minijob.asked(ledger))


class Dead(BaseException):
    """The process is gone (without being gone: it shares the test's process)."""


def mortal(disk, at):
    """Let `disk` die at call number `at`: no later call has an effect."""
    calls = iter(range(1_000_000))
    for name in CALLS:
        real = getattr(disk, name)

        def call(*args, real=real, name=name):
            if name != "close" and next(calls) >= at:
                raise Dead
            return real(*args)

        setattr(disk, name, call)
    return disk


def kills(tmp_path):
    for at in range(60):
        with pytest.raises(Dead):
            start(tmp_path / f"kill-{at}", mortal(LazyDisk(), at))
        directory = tmp_path / f"kill-{at}"
        source = minijob.source_of(directory / "in.jsonl")
        minijob.finish_and_check(source, directory / "out.jsonl", directory / "ledger", LazyDisk())


def a_kill_then_a_power_loss(tmp_path):
    """What a second start found and relied on must still be there after the current fails under it."""
    for at in range(20, 60, 3):
        home = tmp_path / f"home-{at}"
        disk = RecordingDisk()
        dying = mortal(disk, at)
        with pytest.raises(Dead):
            start(home, dying)
        for name in CALLS:
            delattr(disk, name)
        source = minijob.source_of(home / "in.jsonl")
        found = journal.JournalDir.acquire(home / "out.jsonl", minijob.manifest_of(source), disk=disk)
        done = {row for row in range(minijob.ROWS) if found.recovered.done(row)}
        found.close()
        for seed in range(5):
            target = tmp_path / f"state-{at}-{seed}"
            target.mkdir()
            power_loss(disk.log, len(disk.log), random.Random(seed), home, target)
            after = journal.JournalDir.acquire(target / "out.jsonl", minijob.manifest_of(source), disk=LazyDisk())
            assert all(after.recovered.done(row) for row in done)
            after.close()


def corrupted_bytes(tmp_path):
    """Never may a different answer be taken for a stored one."""
    _, out, _, _ = start(tmp_path / "whole", LazyDisk())
    state = journal.journal_path(out)
    salt = journal.load_manifest(state).salt
    path = recovery.segment_files(state)[0]
    whole = path.read_bytes()
    answers = set(minijob.expected().splitlines())
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = recovery.recover(state, salt)
        except DamagedError:
            continue
        assert {line for _, line in found.results()} <= answers


def incomplete_journal(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    source = minijob.source_of(minijob.write_input(tmp_path / "in.jsonl"))
    held = journal.JournalDir.acquire(tmp_path / "out.jsonl", minijob.manifest_of(source), disk=LazyDisk())
    try:
        held.publish(rows=minijob.ROWS, exit_code=0, finished="now")
    except DamagedError:
        return
    finally:
        held.close()
    raise AssertionError("rows without an outcome were published")


def lock_file_identity(tmp_path):
    """One process waits on the lock file while its holder ends: a third may not get the lock as well."""
    out = tmp_path / "out.jsonl"
    first = lock.hold(out, started="now")
    waiting = os.open(first.path / "LOCK", os.O_RDWR)
    first.release()
    fsio.RealDisk().lock(waiting)
    try:
        lock.hold(out, started="now").release()
    except BatchstreamError:
        return
    finally:
        os.close(waiting)
    raise AssertionError("two holders")


# --- the bugs


def appends_after_a_torn_record(patch):
    patch.setattr(LazyDisk, "truncate", lambda self, fd, length: None)


def forgets_what_a_full_disk_refused(patch):
    patch.setattr(segment.Segment, "_hold", lambda self, outcomes: None)


def retries_a_failed_sync(patch):
    def distrust(self, error):
        self._failed_syncs = 0

    patch.setattr(segment.Segment, "_distrust", distrust)


def ignores_the_checksum(patch):
    real = record.valid_line

    def valid_line(seed, line):
        return real(seed, line) or (record.OUTCOME.match(line, record.OVERHEAD) is not None and line.endswith(b"}\n"))

    patch.setattr(record, "valid_line", valid_line)


def admits_without_a_note(patch):
    patch.setattr(segment.Segment, "admit", lambda self, rows: True)


def does_not_write_again_what_a_failed_sync_lost(patch):
    patch.setattr(segment.Segment, "_reclaim", lambda self: None)


def counts_what_was_written_again_as_bought_twice(patch):
    real = record.encode_outcome
    patch.setattr(record, "encode_outcome", lambda *args, again: real(*args, again=False))


def relies_on_what_a_killed_run_left_unsynced(patch):
    patch.setattr(journal, "_sync_leftovers", lambda recovered, disk: None)


def counts_before_the_sync(patch):
    def sync_file(self):
        with self._state:
            self._safe += [outcome.row for outcome in self._written]
            self._written.clear()
            self._unsynced_bytes = 0

    patch.setattr(segment.Segment, "_sync_file", sync_file)


def writes_the_results_in_place(patch):
    real = publish.write_lines

    def write_lines(disk, path, lines):
        kept = list(lines)
        real(disk, path.with_name(path.name[1:].partition(".tmp-")[0]), kept)
        real(disk, path, kept)

    patch.setattr(publish, "write_lines", write_lines)


def renames_before_the_sync(patch):
    real = publish.write_lines

    def write_lines(disk, path, lines):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(disk), "sync", lambda self, fd: None)
            real(disk, path, lines)

    patch.setattr(publish, "write_lines", write_lines)


def replaces_documents_in_place(patch):
    def replace_file(on, path, data, mode=0o600):
        fd = on.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        fsio.write_all(on, fd, data)
        on.close(fd)

    patch.setattr(fsio, "replace_file", replace_file)


def forgets_the_directory(patch):
    patch.setattr(RecordingDisk, "sync_dir", lambda self, path: None)


def publishes_what_there_is(patch):
    uncounted = lambda recovered, *_: (line for _, line in recovered.results())  # noqa: E731
    patch.setattr(publish, "_counted", uncounted)


def unlinks_the_lock(patch):
    real = lock.Lock.release

    def release(self):
        os.unlink(self.path / "LOCK")
        real(self)

    patch.setattr(lock.Lock, "release", release)


BUGS = [
    (appends_after_a_torn_record, short_writes),
    (forgets_what_a_full_disk_refused, full_disk),
    (retries_a_failed_sync, pages_dropped_by_a_failed_sync),
    (does_not_write_again_what_a_failed_sync_lost, pages_dropped_by_a_failed_sync),
    (counts_what_was_written_again_as_bought_twice, failed_syncs),
    (ignores_the_checksum, corrupted_bytes),
    (admits_without_a_note, kills),
    (relies_on_what_a_killed_run_left_unsynced, a_kill_then_a_power_loss),
    (counts_before_the_sync, power_losses),
    (writes_the_results_in_place, power_losses),
    (renames_before_the_sync, power_losses),
    (replaces_documents_in_place, power_losses),
    (forgets_the_directory, power_losses),
    (publishes_what_there_is, incomplete_journal),
    (unlinks_the_lock, lock_file_identity),
]


@pytest.mark.parametrize("sweep", list(dict.fromkeys(sweep for _, sweep in BUGS)), ids=lambda f: f.__name__)
def test_the_sweep_passes_without_a_bug(sweep, tmp_path):
    sweep(tmp_path)


@pytest.mark.parametrize(("bug", "sweep"), BUGS, ids=lambda f: f.__name__)
def test_the_sweep_catches_the_bug(bug, sweep, tmp_path, monkeypatch):
    bug(monkeypatch)
    # Any of these is a catch: a broken promise, an error that only the bug explains.
    with pytest.raises((AssertionError, BatchstreamError)):
        sweep(tmp_path)
