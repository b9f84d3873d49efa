"""Bugs put into whole runs on purpose, each with the sweep of runsweeps.py that has to catch it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from batchstream.cli import main as cli_main
from batchstream.engine import runner, store
from batchstream.files import lock, publish, recovery, segment
from batchstream.launch import conclusion, opening
from batchstream.policy.retry import RetryPolicy
from batchstream.wire import reception


def asks_before_the_row_is_noted() -> None:
    """The request leaves without a word in the journal."""

    store.Store.admit = lambda self, request: True  # type: ignore[method-assign]


def notes_a_row_when_its_turn_comes() -> None:
    """Long before its request can leave: what is printed after a kill is then more than what was asked."""
    real = runner.Runner._leave

    def leave(self: Any, course: Any) -> bool:
        if course.turn is None:
            self._admit(course)
        return real(self, course)

    runner.Runner._leave = leave  # type: ignore[method-assign]


def asks_before_the_segment_is_durable() -> None:
    real = segment.Segment._begin_file

    def begin(self: Any) -> None:
        disk = self._disk

        class Hasty:
            sync = sync_dir = staticmethod(lambda *_: None)

            def __getattr__(self, name: str) -> Any:
                return getattr(disk, name)

        self._disk = Hasty()
        real(self)
        self._disk = disk

    segment.Segment._begin_file = begin  # type: ignore[method-assign]


def keeps_answers_for_a_while_before_it_writes_them() -> None:
    """Answers wait in memory for a group of them, and die there."""
    real_done, real_close = store.Store.done, store.Store.close
    late: list[tuple[Any, ...]] = []

    def done(self: Any, *answer: Any) -> None:
        late.append(answer)
        if len(late) == 20:
            flush(self)

    def flush(self: Any) -> None:
        while late:
            real_done(self, *late.pop(0))

    async def close(self: Any, **how: Any) -> None:
        flush(self)
        await real_close(self, **how)

    store.Store.done, store.Store.close = done, close  # type: ignore[method-assign]


def counts_before_the_sync() -> None:
    """A row is done for its user as soon as it is written."""
    real = store.Store.done

    def done(self: Any, row: Any, result: Any) -> None:
        real(self, row, result)
        self._count([row.row])

    store.Store.done = done  # type: ignore[method-assign]


def asks_what_is_stored_again() -> None:
    recovery.Recovered.done = lambda self, row: False  # type: ignore[method-assign]


def says_nothing_of_what_is_asked_again() -> None:
    real = recovery.Recovered.settle

    def settle(self: Any) -> None:
        real(self)
        self.asked_again = 0

    recovery.Recovered.settle = settle  # type: ignore[method-assign]


def cleans_up_a_stale_lock() -> None:
    """What every pid file does: unlink what is there and make a new one."""
    real = lock.hold

    def hold(out: Any, **more: Any) -> Any:
        path = lock.journal_path(out) / "LOCK"
        if path.exists():
            os.unlink(path)
        return real(out, **more)

    lock.hold = hold
    from batchstream.files import journal

    journal.hold = opening.hold = hold  # type: ignore[attr-defined]


def writes_the_results_in_place() -> None:
    real = publish.write_lines

    def write_lines(disk: Any, path: Any, lines: Any) -> None:
        kept = list(lines)
        real(disk, path.with_name(path.name[1:].partition(".tmp-")[0]), kept)
        real(disk, path, kept)

    publish.write_lines = write_lines


def publishes_what_there_is() -> None:
    """A run that was stopped takes what it has for all there is."""
    real = conclusion.Conclusion.after

    def after(self: Any, journal: Any, progress: Any, serving: Any, stop: Any) -> Any:
        serving.exhausted, serving.taken = True, progress.done
        return real(self, journal, progress, serving, None)

    conclusion.Conclusion.after = after  # type: ignore[method-assign]


def takes_the_end_of_a_connection_for_success() -> None:
    real = reception.Reception.end

    def end(self: Any, clean: bool, now: float, reason: str = "") -> None:
        real(self, clean, now, reason)
        if self.state == "truncated" and self.chunks:
            self.state, self.failure = "complete", None

    reception.Reception.end = end  # type: ignore[method-assign]
    outcome = reception.Reception.outcome

    def decided(self: Any) -> Any:
        completion, failure = outcome(self)
        return completion, None if failure is not None and failure.kind == "truncated" else failure

    reception.Reception.outcome = decided  # type: ignore[method-assign]


def joins_attempts() -> None:
    """The partial text of a failed attempt is put before the next one's."""
    real = runner.result_of

    def result_of(request: Any, attempt: Any, earlier: Any, epoch: Any) -> Any:
        result = real(request, attempt, earlier, epoch)
        partial = "".join(retry.text or "" for retry in earlier)
        return msgspec.structs.replace(result, text=partial + (result.text or ""))

    runner.result_of = result_of


def never_retries() -> None:
    RetryPolicy.may_retry = lambda self, failures, waited, excused=0: False  # type: ignore[method-assign]


def cuts_instead_of_draining() -> None:
    real = runner.Runner.stop

    def stop(self: Any, reason: Any) -> None:
        real(self, reason)
        self.abort()

    runner.Runner.stop = stop  # type: ignore[method-assign]


def forgets_that_what_was_cut_may_be_billed() -> None:
    real = segment.Segment.gave_up
    segment.Segment.gave_up = lambda self, rows, maybe_billed: real(self, rows, maybe_billed=False)  # type: ignore[method-assign]


def tells_a_signal_as_success() -> None:
    cli_main._die_of = lambda number: os._exit(0)


def loses_what_it_could_not_write() -> None:
    async def last_resort(self: Any, error: Any) -> str:
        return str(error)

    store.Store._last_resort = last_resort  # type: ignore[method-assign]


def gives_up_at_the_first_refusal() -> None:
    """A disk that was full for a moment ends the run, and with it what is in memory."""

    def append(self: Any, row: int, digest: int, ok: bool, result_json: bytes) -> bool:
        with self._state:
            return self._write_outcome(segment._Outcome(row, digest, ok, result_json, False, 0))

    segment.Segment.append = append  # type: ignore[method-assign]


BUGS: dict[str, tuple[Callable[[], None], tuple[object, ...], str]] = {
    bug.__name__: (bug, sweep, because)
    for bug, sweep, because in (
        (asks_before_the_row_is_noted, ("killed_everywhere", "--every", 20, "--first", 40), "twice, printed 0"),
        (notes_a_row_when_its_turn_comes, ("killed_everywhere", "--every", 3, "--first", 20), "twice, printed"),
        (asks_before_the_segment_is_durable, ("killed_everywhere",), "a request left before"),
        (
            keeps_answers_for_a_while_before_it_writes_them,
            ("killed_everywhere", "--every", 20, "--first", 40),
            "rows asked twice",
        ),
        (
            asks_what_is_stored_again,
            ("killed_everywhere", "--every", 20, "--first", 80),
            "got 64; nothing was published",
        ),
        (
            says_nothing_of_what_is_asked_again,
            ("killed_everywhere", "--every", 20, "--first", 60),
            "printed 0, sent again",
        ),
        (writes_the_results_in_place, ("torn_everywhere", "--first", -50), "not the uninterrupted run's"),
        (counts_before_the_sync, ("power_losses", "--trials", 60), "counted as done, then sent again"),
        (cleans_up_a_stale_lock, ("started_at_once", "--trials", 10), "of those started at once"),
        (publishes_what_there_is, ("signalled", "--trials", 2), "not the uninterrupted run's"),
        (cuts_instead_of_draining, ("signalled", "--trials", 2), "answers were cut by the first signal"),
        (forgets_that_what_was_cut_may_be_billed, ("signalled", "--trials", 4), "twice, printed 0"),
        (tells_a_signal_as_success, ("signalled", "--trials", 2), "AssertionError: exit 0"),
        (takes_the_end_of_a_connection_for_success, ("broken_streams",), "a row that is not the unbroken one"),
        (joins_attempts, ("broken_streams",), "a row that is not the unbroken one"),
        (never_retries, ("broken_streams",), "AssertionError: exit 3"),
        (gives_up_at_the_first_refusal, ("failing_everywhere", "--every", 9, "--first", 60), "AssertionError: fail-"),
        (loses_what_it_could_not_write, ("disk_full", "--every", 2), "rows asked twice"),
    )
}
"""Each with the sweep and the words it is caught with: a sweep that breaks over the patch itself has caught nothing."""
