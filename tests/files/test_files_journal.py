"""The journal: lock, identity, recovery, damage, the disk that is full for real."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import minijob
import pytest
from disks import LazyDisk
from hypothesis import given
from hypothesis import strategies as st

from batchstream.errors import DamagedError, IdentityError, LockedError, StorageError, UsageError
from batchstream.files import fsio, lock, record
from batchstream.files.journal import GroupSync, JournalDir, journal_path, load_final, load_manifest
from batchstream.files.recovery import Recovered, recover, segment_files
from batchstream.files.results import read_journal, read_results
from batchstream.files.segment import Segment

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


@pytest.fixture
def job(tmp_path):
    """A source, OUT and the ledger of a small job."""
    return minijob.source_of(minijob.write_input(tmp_path / "in.jsonl")), tmp_path / "out.jsonl", tmp_path / "ledger"


def acquire(source, out: Path, manifest=None, **options) -> JournalDir:
    return JournalDir.acquire(out, manifest or minijob.manifest_of(source), disk=LazyDisk(), **options)


def answer_some(journal: JournalDir, source, wanted, *, clean=True) -> None:
    segment = journal.segment()
    for batch in journal.proven(source):
        for row in batch:
            if row.row in wanted:
                segment.admit([row.row])
                segment.append(row.row, row.digest, row.row != 3, minijob.answer(row))
    segment.close(clean=clean)


# --- the lock


HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from batchstream.files.lock import hold\n"
    "from batchstream.errors import LockedError\n"
    "try: held = hold(Path(sys.argv[1]), started='2026-01-01T00:00:00Z')\n"
    "except LockedError as error: print(error, flush=True); sys.exit(11)\n"
    "print('held', flush=True); sys.stdin.read()\n"
)


def holder(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(out)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)


def test_a_second_start_is_refused_naming_the_holder_and_works_once_that_is_killed(job):
    source, out, ledger = job
    with holder(out) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"another run holds this job \(pid {first.pid} on .* since 2026"):
            acquire(source, out)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (journal_path(out) / "LOCK").exists()
    assert minijob.run(source, out, LazyDisk(), ledger).code == 0


def test_of_many_simultaneous_starts_one_holds_the_job(tmp_path):
    """Real processes, a hundred starts: ten processes at once, ten times."""
    for turn in range(10):
        starts = [holder(tmp_path / f"out{turn}.jsonl") for _ in range(10)]
        said = [start.stdout.readline() for start in starts]
        for start in starts:
            start.communicate()
        assert sorted(start.returncode for start in starts) == [0] + [11] * 9
        assert said.count("held\n") == 1


class WatchedDisk(LazyDisk):
    """Somebody looks who holds the lock at the moment of the first two tries."""

    looks = 2

    def lock(self, fd):
        watcher = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            if self.looks:
                fcntl.flock(watcher, fcntl.LOCK_SH)
                self.looks -= 1
            super().lock(fd)
        finally:
            os.close(watcher)


def test_looking_for_the_holder_tells_its_name_and_never_turns_a_start_away(job):
    _, out, _ = job
    held = lock.hold(out, started="now", disk=WatchedDisk())
    assert lock.holder(journal_path(out)).startswith(f"pid {os.getpid()} on ")
    held.release()
    assert lock.holder(journal_path(out)) is None


def test_a_child_that_inherits_the_lock_keeps_it(job):
    source, out, _ = job
    journal = acquire(source, out)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=journal.lock_fds) as child:
        journal.close()
        with pytest.raises(LockedError):
            acquire(source, out)
        child.communicate()
    acquire(source, out).close()


def test_the_state_is_readable_by_its_owner_only(job):
    source, out, ledger = job
    minijob.run(source, out, LazyDisk(), ledger)
    state = journal_path(out)
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in state.iterdir()} == {0}


# --- identity


def answered(journal):
    """The journal with one answer in it: something to protect."""
    segment = journal.segment()
    segment.append(0, 7, True, b'{"row":0,"status":"ok"}')
    segment.close(clean=True)
    journal.close()


def test_a_changed_job_is_refused_naming_each_difference(job):
    source, out, _ = job
    answered(acquire(source, out, minijob.manifest_of(source, params={"temperature": 0, "seed": 1})))
    other = minijob.manifest_of(source, params={"temperature": 1, "seed": 1}, api="chat")
    with pytest.raises(IdentityError, match=r"api: was absent, is 'chat'; params.temperature: was 0, is 1"):
        acquire(source, out, other)
    assert minijob.manifest_of(source).job != other.job
    acquire(source, out, other, new_job=True).close()


def test_a_refused_start_gives_the_lock_back(job):
    source, out, _ = job
    answered(acquire(source, out))
    with pytest.raises(IdentityError):
        acquire(source, out, minijob.manifest_of(source, model="other"))
    acquire(source, out).close()


def test_an_input_of_another_size_is_refused_and_a_grown_one_taken_on_request(job):
    source, out, ledger = job
    minijob.run(source, out, LazyDisk(), ledger)
    path = Path(source.files[0].path)
    with open(path, "a") as file:
        file.write('{"prompt": "row 24", "id": "r24"}\n')
    with pytest.raises(IdentityError, match=r"in.jsonl: was \d+ bytes, is \d+.*--allow-append"):
        acquire(source, out)
    journal = acquire(source, out, allow_append=True)
    assert journal.final is None
    assert [row.row for batch in journal.proven(source) for row in batch] == [24]
    answer_some(journal, source, {24})
    final = journal.publish(rows=25, exit_code=0, finished="later")
    journal.close()
    assert (final.rows, out.read_bytes()) == (25, minijob.expected(25))
    journal = acquire(source, out)
    assert journal.final == final
    journal.close()


def test_a_touched_input_is_proven_by_its_content(job):
    source, out, ledger = job
    minijob.run(source, out, LazyDisk(), ledger)
    path = Path(source.files[0].path)
    os.utime(path, ns=(1, 1))
    told = minijob.run(source, out, LazyDisk(), ledger)
    assert told.code == 0
    assert minijob.asked_twice(ledger) == 0
    path.write_text(path.read_text().replace("row 17", "row xx"))
    told = minijob.run(source, out, LazyDisk(), ledger)
    assert told.code == 12
    assert "row 17 (id 'r17')" in told.message


def test_a_changed_row_without_an_answer_is_caught_by_its_blocks_hash(job):
    source, out, _ = job
    journal = acquire(source, out)
    segment = journal.segment()
    rows = journal.proven(source)
    for batch in rows:
        for row in batch:
            if row.row != 20:
                segment.append(row.row, row.digest, True, minijob.answer(row))
    for block in rows.take_blocks():
        segment.block(*block)
    segment.close(clean=True)
    journal.close()
    path = Path(source.files[0].path)
    text = path.read_text()
    path.write_text(text.replace("row 20", "row xx"))
    journal = acquire(source, out)
    with pytest.raises(IdentityError, match="differs from what the journal was begun with"):
        next(iter(journal.proven(source)))
    journal.close()
    path.write_text(text)
    journal = acquire(source, out)
    assert [row.row for batch in journal.proven(source) for row in batch] == [20]
    journal.close()


def test_a_shorter_input_is_refused_even_when_its_size_is_the_same(job):
    source, out, ledger = job
    minijob.run(source, out, LazyDisk(), ledger)
    path = Path(source.files[0].path)
    size = path.stat().st_size
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]).ljust(size, "\n"))
    told = minijob.run(source, out, LazyDisk(), ledger)
    assert (told.code, "ends after row 22" in told.message) == (12, True)


def test_a_new_job_puts_the_old_answers_aside_and_does_not_use_them(job):
    source, out, ledger = job
    minijob.run(source, out, LazyDisk(), ledger)
    old = load_manifest(journal_path(out))
    journal = acquire(source, out, minijob.manifest_of(source, model="b"), new_job=True)
    assert journal.recovered.ok == 0
    assert journal.final is None
    answer_some(journal, source, {0, 1})
    journal.close()
    journal = acquire(source, out, minijob.manifest_of(source, model="b"))
    assert journal.recovered.ok == 2
    journal.close()
    aside = journal_path(out) / f"before-{old.job_id}"
    assert len(list(read_journal(aside).results())) == minijob.ROWS


def test_a_foreign_results_file_is_refused_before_anything_is_sent(job):
    source, out, ledger = job
    out.write_text("precious\n")
    told = minijob.run(source, out, LazyDisk(), ledger)
    assert (told.code, "--overwrite" in told.message, minijob.asked(ledger)) == (2, True, [])
    assert out.read_text() == "precious\n"
    acquire(source, out, overwrite=True).close()
    with pytest.raises(UsageError, match="something else"):
        acquire(source, out.parent)


# --- the course of a job


def test_failed_rows_are_asked_again_only_on_request_and_a_success_beats_them(job):
    source, out, ledger = job
    minijob.run(source, out, LazyDisk(), ledger)
    journal = acquire(source, out)
    assert journal.final is not None
    assert journal.recovered.failed == 1
    journal.close()
    journal = acquire(source, out, retry_failed=True)
    assert journal.final is None
    assert load_final(journal.path).reopened
    (batch,) = list(journal.proven(source))
    (row,) = batch
    assert row.row == 3
    segment = journal.segment()
    segment.append(3, row.digest, True, b'{"row":3,"status":"ok"}')
    segment.close(clean=True)
    final = journal.publish(rows=minijob.ROWS, exit_code=0, finished="later")
    assert (final.ok, final.failed, final.duplicates) == (minijob.ROWS, 0, 0)
    assert b'{"row":3,"status":"ok"}\n' in out.read_bytes()
    journal.close()


def test_rows_cut_off_count_as_asked_again_and_rows_not_sent_do_not(job):
    source, out, _ = job
    journal = acquire(source, out)
    segment = journal.segment()
    segment.admit([0, 1, 2, 3])
    segment.append(0, journal.recovered.digest(0) or 0, True, b'{"row":0}')
    segment.gave_up([1], maybe_billed=True)
    segment.gave_up([2], maybe_billed=False)
    segment.close(clean=False)
    journal.close()
    assert recover(journal.path, journal.manifest.salt).asked_again == 2


def test_workers_write_segments_of_their_own_and_the_journal_is_their_union(job):
    source, out, _ = job
    journal = acquire(source, out)
    rows = [row for batch in journal.proven(source) for row in batch]
    for worker in range(3):
        segment = JournalDir.join(out, disk=LazyDisk()).segment(worker)
        for row in rows[worker::3]:
            segment.append(row.row, row.digest, True, minijob.answer(row))
        segment.close(clean=True)
    assert len(segment_files(journal.path)) == 3
    journal.publish(rows=minijob.ROWS, exit_code=0, finished="now")
    assert out.read_bytes() == minijob.expected()
    journal.close()


def test_a_segment_is_changed_when_it_is_large_and_nothing_is_lost(tmp_path):
    segment = Segment(
        tmp_path, job_id="j", salt="s", worker=0, number=0, after={}, disk=LazyDisk(), max_bytes=2000
    )  # fmt: skip
    done = []
    for row in range(100):
        segment.append(row, row, True, b'{"row":%d,"text":"%s"}' % (row, b"x" * 100))
        if row % 7 == 0:
            done += segment.sync()
    done += segment.close(clean=True)
    assert done == list(range(100))
    assert len(segment_files(tmp_path)) > 4
    assert [row for row, _ in recover(tmp_path, "s").results()] == list(range(100))


def test_appending_and_syncing_from_two_threads_loses_nothing(tmp_path):
    segment = Segment(tmp_path, job_id="j", salt="s", worker=0, number=0, after={}, max_bytes=100_000)
    done: list[int] = []
    stop = threading.Event()

    def sync():
        while not stop.is_set():
            done.extend(segment.sync())

    helper = threading.Thread(target=sync)
    helper.start()
    for row in range(5000):
        segment.append(row, row, True, b'{"row":%d,"text":"%s"}' % (row, b"x" * 100))
    time.sleep(0.01)
    stop.set()
    helper.join()
    done += segment.close(clean=True)
    assert sorted(done) == list(range(5000))
    found = recover(tmp_path, "s")
    assert [row for row, _ in found.results()] == list(range(5000))
    assert found.duplicates == 0


def test_the_earliest_success_counts_and_later_ones_were_bought_twice(tmp_path):
    segment = Segment(tmp_path, job_id="j", salt="s", worker=0, number=0, after={}, disk=LazyDisk())
    for ok, text in ((0, b"1"), (0, b"2"), (1, b"3"), (1, b"4"), (0, b"5"), (1, b"6")):
        segment.append(0, 7, bool(ok), b'{"row":0,"n":%s}' % text)
    segment.append(1, 7, False, b'{"row":1,"n":1}')
    segment.append(1, 7, False, b'{"row":1,"n":2}')
    segment.close(clean=True)
    found = recover(tmp_path, "s")
    assert [line for _, line in found.results()] == [b'{"row":0,"n":3}', b'{"row":1,"n":2}']
    assert (found.ok, found.failed, found.duplicates) == (1, 1, 2)


# --- damage


@pytest.fixture
def finished(job):
    source, out, ledger = job
    assert minijob.run(source, out, LazyDisk(), ledger).code == 0
    state = journal_path(out)
    (path,) = segment_files(state)
    return state, load_manifest(state).salt, path, path.read_bytes()


def outcomes_before(whole: bytes, cut: int) -> set[int]:
    found, offset = set(), 0
    for line in whole.splitlines(keepends=True):
        result = record.result_of(line)
        offset += len(line)
        if result and offset <= cut:
            found.add(result[0])
    return found


def test_cut_at_every_byte_the_whole_records_before_the_cut_are_there(finished):
    state, salt, path, whole = finished
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = recover(state, salt)
        assert {row for row, _ in found.results()} == outcomes_before(whole, cut), cut
        assert found.skipped_records == 0


def test_every_byte_corrupted_is_refused_before_the_mark_and_skipped_past_it(finished):
    state, salt, path, whole = finished
    lines = set(minijob.expected().splitlines())
    mark = recover(state, salt).segments[0].mark
    refused = skipped = torn = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        try:
            found = recover(state, salt)
        except DamagedError:
            refused += 1
            assert place < mark
            found = recover(state, salt, strict=False)
        else:
            torn += found.segments[0].torn
            skipped += bool(found.skipped_records)
        assert {line for _, line in found.results()} <= lines
        assert found.ok + found.failed >= minijob.ROWS - 2
    assert refused > mark * 0.9
    assert refused + skipped + torn == len(whole), "each corruption is one of the three"


@given(st.binary(min_size=1, max_size=300), st.integers(0, 10_000))
def test_no_inserted_bytes_are_taken_for_a_record(junk, place):
    seed = record.segment_seed("salt", "seg-0-0.bsj")
    line = record.encode_line(seed, record.encode_outcome(5, 7, True, b'{"row":5}'))
    place %= len(line)
    spoilt = line[:place] + junk + line[place:]
    taken = [piece for piece in spoilt.splitlines(keepends=True) if record.valid_line(seed, piece)]
    assert taken in ([], [line])


def test_a_record_of_another_segment_or_job_is_not_valid(finished):
    state, salt, path, _ = finished
    path.rename(path.with_name("seg-1-0.bsj"))
    assert recover(state, salt).ok == 0
    path.with_name("seg-1-0.bsj").rename(path)
    assert recover(state, "another salt").ok == 0
    assert recover(state, salt).ok == minijob.ROWS - 1


def test_a_lost_or_cut_segment_is_noticed_by_the_next_ones_header(job):
    source, out, _ = job
    journal = acquire(source, out)
    answer_some(journal, source, range(10))
    journal.close()
    journal = acquire(source, out)
    answer_some(journal, source, range(10, 20))
    journal.close()
    first = segment_files(journal.path)[0]
    whole = first.read_bytes()
    for damage in (whole[:-1], b""):
        first.write_bytes(damage)
        with pytest.raises(DamagedError, match=f"expected at least {len(whole)} bytes"):
            acquire(source, out)
    first.unlink()
    with pytest.raises(DamagedError, match="got 0"):
        acquire(source, out)
    assert read_journal(out, salvage=True).ok == 10
    (journal.path / "MANIFEST.json").unlink()
    with pytest.raises(DamagedError, match=r"no MANIFEST.json"):
        acquire(source, out)


def test_reading_a_running_journal_takes_no_lock_and_sees_whole_records_only(job):
    source, out, _ = job
    journal = acquire(source, out)
    segment = journal.segment()
    row = next(iter(journal.proven(source)))[0]
    segment.append(0, row.digest, True, minijob.answer(row))
    path = segment_files(journal.path)[-1]
    with open(path, "ab") as file:
        file.write(b'01234567 {"t":"o","row":1,')
    before = path.read_bytes()
    assert list(read_results(out)) == [minijob.answer(row)]
    assert path.read_bytes() == before
    journal.close()


# --- a disk that is full for real


def test_a_file_size_limit_stops_the_job_and_the_next_start_completes_it(job):
    source, out, ledger = job
    program = (
        "import sys, minijob\nfrom pathlib import Path\nfrom batchstream.files.fsio import RealDisk\n"
        "path, out, ledger = map(Path, sys.argv[1:])\n"
        "told = minijob.run(minijob.source_of(path), out, RealDisk(), ledger)\n"
        "print(told.message); sys.exit(told.code)\n"
    )
    command = [sys.executable, "-c", program, source.files[0].path, str(out), str(ledger)]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    full = subprocess.run(command, env=ENV, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert full.returncode == 14, full.stderr
    assert "cannot write: File too large" in full.stdout
    assert not out.exists()
    minijob.finish_and_check(source, out, ledger, LazyDisk())


@pytest.fixture
def tiny_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "tiny"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_spills_and_after_the_cure_nothing_stored_is_asked_again(tiny_disk, tmp_path):
    source = minijob.source_of(minijob.write_input(tmp_path / "in.jsonl", 600))
    out, ledger, spill = tiny_disk / "out.jsonl", tmp_path / "ledger", tmp_path / "spill"
    told = minijob.run(source, out, fsio.RealDisk(), ledger, spill_dir=spill)
    assert told.code == 14
    assert "free some space" in told.message
    before = set(minijob.asked(ledger))
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    told = minijob.run(source, out, fsio.RealDisk(), ledger, spill_dir=spill)
    assert told.code == 0, told.message
    assert told.done_before == len(before)
    assert minijob.asked_twice(ledger) == 0
    assert out.read_bytes() == minijob.expected(600)


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path):
    source = minijob.source_of(minijob.write_input(tmp_path / "in.jsonl"))
    for out, says in ((tmp_path / "no" / "out.jsonl", "does not exist"), (Path("/proc/out.jsonl"), "/proc/out.jsonl")):
        with pytest.raises(StorageError, match=says):
            acquire(source, out)


# --- memory and timing rules


def test_recovery_keeps_less_than_24_bytes_a_row():
    found = Recovered("salt")
    for row in range(200_000):
        found._outcome(0, row * 100, False, row, row, 1)
    size = sum(array.buffer_info()[1] * array.itemsize for array in (found._where, found._digest)) + len(found._open)
    assert size <= 24 * 200_000
    assert found.done(199_999)
    assert not found.done(200_000)


@pytest.mark.parametrize(
    ("durability", "pending", "oldest", "now", "wait"),
    [
        ("batch", 0, None, 5.0, None),
        ("batch", 10, 5.0, 5.0, 0.1),
        ("batch", 10, 5.0, 5.075, 0.025),
        ("batch", 10, 5.0, 9.0, 0.0),
        ("batch", 1 << 20, 5.0, 5.0, 0.0),
        ("row", 1, 5.0, 5.0, 0.0),
        ("os", 10, 5.0, 5.0, 0.1),
    ],
)
def test_a_sync_is_due_after_100_ms_or_a_mebibyte(durability, pending, oldest, now, wait):
    assert GroupSync(durability).wait(pending, oldest, now) == (None if wait is None else pytest.approx(wait))
