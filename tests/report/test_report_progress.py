"""The display tells what a run does, suits where it is written, and cannot harm the run."""

import io
import os
import re
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

import batchstream
from batchstream.engine.progress import Progress
from batchstream.report.progress import LiveDisplay, Meter, Quiet, Reading, StatusLines, display_for, status_line

HERE = Path(batchstream.__file__).parents[1]

# What every child process below does: a run of 200 rows (60 done before), of which it has done half.
CHILD = """
import os, sys, time
from batchstream.engine.progress import Progress
from batchstream.report.progress import LiveDisplay, StatusLines, display_for

progress = Progress(time.monotonic(), total=200, resumed=60)
progress.done, progress.ok, progress.failed, progress.in_flight = 40, 38, 2, 7
progress.failures.update(timeout=2)
progress.gate_until = time.monotonic() + 3600
progress.message = "held at 7 streams"
"""


def child(code: str, **streams: object) -> "subprocess.Popen[bytes]":
    environ = {**os.environ, "PYTHONPATH": str(HERE), "TERM": "xterm-256color", "PYTHONWARNINGS": "error"}
    environ.pop("NO_COLOR", None)
    return subprocess.Popen([sys.executable, "-c", CHILD + textwrap.dedent(code)], env=environ, **streams)  # type: ignore[call-overload]


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def half_done(clock: Callable[[], float]) -> Progress:
    progress = Progress(clock(), total=200, resumed=60)
    progress.done, progress.ok, progress.failed, progress.in_flight, progress.waiting = 40, 38, 2, 7, 1
    progress.tokens = 4000
    progress.failures.update(server=1, timeout=3)
    progress.retries = 5
    progress.retry_kinds.update(rate_limit=5)
    return progress


def test_rates_and_time_left_come_from_what_happened_between_two_looks():
    clock = Clock()
    progress = half_done(clock)
    meter = Meter(progress, clock)
    clock.now += 10
    progress.done += 20
    progress.tokens += 500
    reading = meter.read()
    assert (reading.elapsed_s, reading.rows_per_s, reading.tokens_per_s) == (10.0, 2.0, 50.0)
    assert (reading.done, reading.total, reading.eta_s) == (120, 200, 40.0)


def test_rates_look_back_over_half_a_minute_only():
    clock = Clock()
    progress = half_done(clock)
    meter = Meter(progress, clock)
    for _ in range(60):  # a minute at one row a second
        clock.now += 1
        progress.done += 1
        meter.read()
    for _ in range(30):  # then nothing comes any more
        clock.now += 1
        reading = meter.read()
    assert (reading.rows_per_s, reading.eta_s) == (0.0, None)


def test_nothing_is_claimed_before_it_is_known():
    clock = Clock()
    reading = Meter(Progress(clock()), clock).read()
    assert (reading.rows_per_s, reading.eta_s, reading.total, reading.ttft_p50_s, reading.gate_s) == (None,) * 5
    assert status_line(reading) == "0 rows, 0 ok, 0 failed, 0 in flight, 0.0 s so far"


def test_p99_waits_for_its_299_values():
    clock = Clock()
    progress = Progress(clock())
    progress.ttft.extend(n / 1000 for n in range(298))
    meter = Meter(progress, clock)
    assert (meter.read().ttft_p50_s, meter.read().ttft_p99_s) == (0.1485, None)
    progress.ttft.append(0.298)
    assert meter.read().ttft_p99_s == pytest.approx(0.29502)


def test_only_the_newest_ttfts_are_looked_at():
    progress = Progress(0.0)
    progress.ttft.extend([9.0] * 2000 + [1.0] * 2000)
    reading = Meter(progress, Clock()).read()
    assert (reading.ttft_n, reading.ttft_p50_s, reading.ttft_p99_s) == (2000, 1.0, 1.0)


def test_a_status_line_says_all_of_it_in_one_line():
    clock = Clock()
    progress = half_done(clock)
    meter = Meter(progress, clock)
    clock.now += 65
    progress.done += 26
    progress.ttft.extend([0.2123] * 300)
    progress.gate_until = clock.now + 12
    progress.message = "first line\nsecond \x1b[2J"
    assert status_line(meter.read()) == (
        "126/200 rows (63 %), 38 ok, 2 failed (3 timeout · 1 server), 7 in flight, 1 waiting, 0.4 rows/s, "
        "TTFT p50 212 ms, p99 212 ms, 5 retries (5 rate_limit), 1 min 05 s so far, about 3 min 05 s left, "
        "rate limit: nothing is sent for 12.0 s, first line\ufffdsecond \ufffd[2J"
    )


def test_a_gate_that_has_opened_is_not_mentioned():
    clock = Clock()
    progress = half_done(clock)
    progress.gate_until = clock.now + 5
    meter = Meter(progress, clock)
    assert meter.read().gate_s == 5.0
    clock.now += 5
    assert meter.read().gate_s is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_place_gets_the_display_that_suits_it():
    def chosen(stream: io.StringIO | None, environ: dict[str, str] | None = None, **wishes: object) -> type:
        environ = {"TERM": "xterm"} if environ is None else environ
        return type(display_for(Progress(0.0), stream, environ=environ, **wishes))  # type: ignore[arg-type]

    assert chosen(Terminal()) is LiveDisplay
    assert chosen(io.StringIO()) is StatusLines
    assert chosen(Terminal(), live=False) is StatusLines
    assert chosen(Terminal(), log_format="json") is StatusLines
    assert chosen(Terminal(), {"TERM": "dumb"}) is StatusLines
    assert chosen(Terminal(), {}) is StatusLines
    assert chosen(Terminal(), quiet=True) is Quiet
    assert chosen(None) is Quiet


def test_quiet_shows_nothing_even_of_messages(capfd):
    with display_for(Progress(0.0), sys.stderr, environ={}, quiet=True) as display:
        display.note("hello")
    assert capfd.readouterr() == ("", "")


def test_a_log_gets_a_line_at_every_interval_and_messages_in_between():
    process = child(
        """
        with StatusLines(progress, sys.stderr, every_s=0.05) as display:
            display.note("prompts.jsonl:17: expected a prompt, got 3")
            time.sleep(0.5)
        """,
        stderr=subprocess.PIPE,
    )
    _, written = process.communicate(timeout=60)
    first, *lines = written.decode().splitlines()
    assert first == "prompts.jsonl:17: expected a prompt, got 3"
    assert len(lines) >= 2
    assert all(line.startswith("100/200 rows (50 %), 38 ok, 2 failed (2 timeout), 7 in flight") for line in lines)
    assert process.returncode == 0


def test_no_status_line_is_written_before_its_time():
    written = io.StringIO()
    with StatusLines(half_done(Clock()), written):
        pass
    assert written.getvalue() == ""


def test_a_json_log_is_one_object_a_line():
    process = child(
        """
        with StatusLines(progress, sys.stderr, log_format="json", every_s=0.05) as display:
            display.note("a message")
            time.sleep(0.3)
        """,
        stderr=subprocess.PIPE,
    )
    _, written = process.communicate(timeout=60)
    note, *statuses = (msgspec.json.decode(line) for line in written.splitlines())
    assert (note["event"], note["message"]) == ("message", "a message")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(note["time"])).total_seconds()) < 60
    assert statuses
    for status in statuses:
        assert list(status) == ["event", "time", *Reading.__struct_fields__]
        assert (status["event"], status["done"], status["failures"]) == ("status", 100, {"timeout": 2})


def on_a_terminal(code: str) -> str:
    """What a child writes to its stderr, a real terminal of 24 × 80."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = child(code, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    written = b""
    try:
        while piece := os.read(master, 65536):
            written += piece
    except OSError:  # the way Linux says that the last writer has left the terminal
        pass
    finally:
        os.close(master)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"data\n")
    return written.decode()


LIVE = """
with display_for(progress, sys.stderr, environ=os.environ) as display:
    display.note("a message that stays")
    print("data", flush=True)
    time.sleep(1.2)
"""


def test_the_live_display_draws_on_a_real_terminal_and_cleans_up_after_itself():
    written = on_a_terminal(LIVE)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert frames.count("100/200 rows (50 %)") >= 3  # the first, two a second, the last
    assert "━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌  100/200" in frames
    assert "38 ok · 2 failed · 7 in flight · 0 waiting · 0 retries" in frames
    assert "failures: 2 timeout" in frames
    assert "rate limit: nothing is sent for 1 h 00 min" in frames or "nothing is sent for 59 min" in frames
    assert "held at 7 streams" in frames
    assert frames.count("a message that stays") == 1
    assert "\x1b[31m" in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0  # the cursor is back
    assert written.rfind("\x1b[2K") > written.rfind("held at")  # and the display is wiped away


def test_no_color_is_honoured():
    written = on_a_terminal("os.environ['NO_COLOR'] = '1'\n" + LIVE)
    assert "100/200" in written
    assert re.findall(r"\x1b\[[0-9;]*3[0-7]m", written) == []


def test_no_line_of_the_live_display_is_wider_than_the_terminal():
    written = on_a_terminal("progress.message = 'long ' * 50\n" + LIVE)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written))
    assert max(map(len, lines)) == 80
    assert any(line.startswith("long long") and line.endswith("…") for line in lines)


@pytest.mark.parametrize(
    "display",
    ["StatusLines(progress, sys.stderr, every_s=0.05)", "LiveDisplay(progress, sys.stderr, every_s=0.05)"],
)
def test_a_closed_pipe_never_ends_a_run(display):
    reader, writer = os.pipe()
    process = child(
        f"""
        with {display} as display:
            sys.stdin.readline()  # until the reader has gone
            for _ in range(5):
                display.note("nobody reads this " * 1000)
                time.sleep(0.05)
        print("finished", file=sys.stderr)  # what a command does afterwards must not fail either
        print("finished")
        """,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
    )
    os.close(writer)
    os.close(reader)
    out, _ = process.communicate(b"\n", timeout=60)
    assert out == b"finished\n"
    assert process.returncode == 0


def test_a_full_disk_under_the_log_never_ends_a_run():
    with open("/dev/full", "w") as full:
        process = child(
            """
            with StatusLines(progress, sys.stderr, every_s=0.02) as display:
                display.note("no room")
                time.sleep(0.2)
            print("finished")
            """,
            stdout=subprocess.PIPE,
            stderr=full,
        )
        out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"finished\n", 0)


def test_a_slow_reader_loses_lines_and_not_the_display():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as stream, open(reader, "rb") as log:
        display = StatusLines(Progress(0.0), stream)
        for _ in range(20):
            display.note("x" * 65_536)
        assert log.read(65_536)
        os.set_blocking(writer, True)
        display.note("back again")
        stream.close()
        assert log.read().endswith(b"back again\n")
