"""What a person sees while a run works: a live display on a terminal, a plain line now and then elsewhere, or nothing.

All three poll the run's `Progress` from a thread of their own and never the other way round: drawing takes
milliseconds, and a terminal behind a slow line may block a write for seconds, which in the event loop would show up as
somebody's TTFT. A `Meter` turns the counters into a `Reading` (rates, percentiles, time left); the displays only lay
that out. Each is a context manager: entered when the first request may leave, left after the last one.

Whatever happens to the stream they write to, the run goes on: see `_Outlet`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

import msgspec

from batchstream.engine.progress import Progress
from batchstream.figures.percentiles import needed_for, quantile
from batchstream.report.text import clean, counted, duration, rate

if TYPE_CHECKING:
    from rich.text import Text

STATUS_EVERY_S = 30.0
"""Seconds between two status lines: a night's log stays readable, a dead run is noticed within a minute."""

LIVE_EVERY_S = 0.5

WINDOW_S = 30.0
"""Seconds that the shown rates look back: long enough for slow rows, short enough to show a stall."""

CLOCK_FROM_S = 30.0
"""A wait of so many seconds is also told as a time of day."""

_BAR = 20

Clock = Callable[[], float]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a run; the fields of a JSON status line. Seconds and rates per second; None = not known (yet).

    `done`: rows with a result, those of earlier runs included; `eta_s`: at the present rate, or at the limit that holds
    the run up; `ttft_*`: over the newest `ttft_n` answers; `gate_s`: for so long nothing will be sent, `gate_at`: until
    this local time; `binding`: what holds up the next row (`engine.departures`); `slots`: requests at once, `adaptive`
    when their number is being found out; `per_minute`: requests that the known limits allow; `refused`: 429s;
    `cost`: money spent, by the prices given.
    """

    elapsed_s: float
    done: int
    total: int | None
    ok: int
    failed: int
    in_flight: int
    waiting: int
    retries: int
    rows_per_s: float | None
    tokens_per_s: float | None
    eta_s: float | None
    ttft_n: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    failures: dict[str, int]
    retries_by_kind: dict[str, int]
    gate_s: float | None
    message: str
    gate_at: str | None = None
    binding: str = "input"
    slots: int = 0
    adaptive: bool = False
    per_minute: float | None = None
    refused: int = 0
    cost: float | None = None


class Meter:
    """Reads a `Progress` again and again, and remembers enough to tell the rates between."""

    def __init__(self, progress: Progress, clock: Clock) -> None:
        self._progress = progress
        self._clock = clock
        self._past: deque[tuple[float, int, int]] = deque([(clock(), progress.done, progress.tokens)])

    def read(self) -> Reading:
        progress, now = self._progress, self._clock()
        past = self._past
        while len(past) > 1 and past[1][0] <= now - WINDOW_S:
            past.popleft()
        since, done_then, tokens_then = past[0]
        done, tokens = progress.done, progress.tokens
        past.append((now, done, tokens))
        span = now - since
        rows_per_s = round((done - done_then) / span, 3) if span > 0 else None
        recent = sorted(progress.ttft.copy())  # copied at once: the run appends meanwhile
        gate = progress.gate_until
        gate_s = round(gate - now, 3) if gate is not None and gate > now else None
        return Reading(
            elapsed_s=round(now - progress.started, 3),
            done=progress.resumed + done,
            total=progress.total,
            ok=progress.ok,
            failed=progress.failed,
            in_flight=progress.in_flight,
            waiting=progress.waiting,
            retries=progress.retries,
            rows_per_s=rows_per_s,
            tokens_per_s=round((tokens - tokens_then) / span, 3) if span > 0 else None,
            eta_s=self._eta(done, rows_per_s, gate_s or 0.0),
            ttft_n=len(recent),
            ttft_p50_s=round(quantile(recent, 0.5), 6) if recent else None,
            ttft_p99_s=round(quantile(recent, 0.99), 6) if len(recent) >= needed_for(0.99) else None,
            failures=_largest_first(progress.failures.copy()),
            retries_by_kind=_largest_first(progress.retry_kinds.copy()),
            gate_s=gate_s,
            message=progress.message,
            gate_at=None if gate_s is None else f"{datetime.now().astimezone() + timedelta(seconds=gate_s):%H:%M:%S}",
            binding=progress.binding,
            slots=progress.slots,
            adaptive=progress.adaptive,
            per_minute=progress.per_minute,
            refused=progress.limited,
            cost=None if progress.cost is None else round(progress.cost, 6),
        )

    def _eta(self, done: int, rows_per_s: float | None, gate_s: float) -> float | None:
        """Where a known limit holds the run up, that limit tells; else the present rate does."""
        progress = self._progress
        if progress.total is None:
            return None
        left = max(0, progress.total - progress.resumed - done)
        if progress.per_minute and progress.binding in ("rpm", "tpm", "gate"):
            return round(left / progress.per_minute * 60 + gate_s, 1)
        return round(left / rows_per_s, 1) if rows_per_s else None


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, message: str) -> None:
        """Drop a message."""


class StatusLines:
    """One line every `every_s` seconds, for logs: text, or a JSON object with ``"event": "status"``."""

    def __init__(
        self,
        progress: Progress,
        stream: TextIO,
        *,
        log_format: Literal["text", "json"] = "text",
        every_s: float = STATUS_EVERY_S,
        clock: Clock = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._outlet = _Outlet(stream)
        self._json = log_format == "json"
        self._wall = wall
        self._meter = Meter(progress, clock)
        self._pulse = _Pulse(self._status, every_s)

    def __enter__(self) -> StatusLines:
        self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pulse.stop()

    def note(self, message: str) -> None:
        """One message as a line of its own."""
        self._write("message", {"message": message}, clean(message))

    def _status(self) -> None:
        reading = self._meter.read()
        self._write("status", msgspec.structs.asdict(reading), status_line(reading))

    def _write(self, event: str, fields: dict[str, Any], text: str) -> None:
        if self._json:
            at = self._wall().isoformat(timespec="milliseconds").replace("+00:00", "Z")
            text = msgspec.json.encode({"event": event, "time": at, **fields}).decode()
        self._outlet.write(text + "\n")
        self._outlet.flush()


class LiveDisplay:
    """A few lines at the bottom of the terminal, drawn anew twice a second and wiped away at the end.

    rich moves the cursor and knows terminals; the two standard streams stay untouched, for stdout may carry data.
    """

    def __init__(
        self,
        progress: Progress,
        stream: TextIO,
        *,
        color: bool = True,
        every_s: float = LIVE_EVERY_S,
        clock: Clock = time.monotonic,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._meter = Meter(progress, clock)
        # The outlet is a file as far as rich asks; it swallows the broken pipe on which rich would end the process.
        file: Any = _Outlet(stream)
        self._console = Console(file=file, force_terminal=True, no_color=not color, highlight=False, markup=False)
        self._live = Live(
            console=self._console,
            get_renderable=lambda: live_text(self._meter.read()),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._pulse = _Pulse(self._live.refresh, every_s)

    def __enter__(self) -> LiveDisplay:
        self._live.start(refresh=True)
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pulse.stop()
        self._live.stop()

    def note(self, message: str) -> None:
        """One message above the display, where it stays."""
        self._console.print(clean(message), soft_wrap=True)


Display = Quiet | StatusLines | LiveDisplay


def display_for(
    progress: Progress,
    stream: TextIO | None,
    *,
    environ: Mapping[str, str],
    quiet: bool = False,
    live: bool = True,
    log_format: Literal["text", "json"] = "text",
) -> Display:
    """The display that suits `stream` (stderr; None where the process has none) and what the user asked for.

    Live on a terminal that can move its cursor, unless `live` is False (``--no-progress``) or the log is JSON.
    `environ`: NO_COLOR and TERM are read.
    """
    if stream is None or quiet:
        return Quiet()
    if live and log_format == "text" and stream.isatty() and environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return LiveDisplay(progress, stream, color=not environ.get("NO_COLOR"))
    return StatusLines(progress, stream, log_format=log_format)


def status_line(reading: Reading) -> str:
    """A reading as one line of text, without its end."""
    parts = [_rows(reading), f"{reading.ok:,} ok", f"{reading.failed:,} failed"]
    if reading.failures:
        parts[-1] += f" ({counted(reading.failures)})"
    parts.append(f"{reading.in_flight:,} in flight")
    if reading.waiting:
        parts.append(f"{reading.waiting:,} waiting")
    parts += _rates(reading)
    if reading.retries:
        parts.append(f"{reading.retries:,} retries ({counted(reading.retries_by_kind)})")
    parts.append(_left(reading))
    return ", ".join(part for part in [*parts, *_binding(reading)] if part)


def live_text(reading: Reading) -> Text:
    """A reading as the lines of the live display, to be cut where the terminal ends."""
    from rich.text import Text

    bar = Text()
    if reading.total:
        full = min(_BAR, _BAR * reading.done // reading.total)
        bar.append("━" * full, "green").append("╌" * (_BAR - full), "dim").append("  ")
    bar.append(_rows(reading), "bold").append(f"  {_left(reading)}")

    counts = Text(f"{reading.ok:,} ok").append(" · ")
    counts.append(f"{reading.failed:,} failed", "red" if reading.failed else "")
    counts.append(f" · {reading.in_flight:,} in flight · {reading.waiting:,} waiting · ")
    counts.append(f"{reading.retries:,} retries", "yellow" if reading.retries else "")

    lines = [bar, counts, Text(" · ".join(_rates(reading)))]
    for label, counters in (("failures", reading.failures), ("retries", reading.retries_by_kind)):
        if counters:
            lines.append(Text(f"{label}: {counted(counters)}", "dim"))
    lines += [Text(line, "yellow") for line in _binding(reading)]
    return Text("\n", no_wrap=True, overflow="ellipsis").join(line for line in lines if line.plain)


def _rows(reading: Reading) -> str:
    if not reading.total:
        return f"{reading.done:,} rows"
    return f"{reading.done:,}/{reading.total:,} rows ({100 * reading.done // reading.total} %)"


def _left(reading: Reading) -> str:
    return f"{duration(reading.elapsed_s)} so far" + (
        f", about {duration(reading.eta_s)} left" if reading.eta_s is not None else ""
    )


def _rates(reading: Reading) -> list[str]:
    rates = [] if reading.rows_per_s is None else [f"{rate(reading.rows_per_s)} rows/s"]
    if reading.tokens_per_s:
        rates.append(f"{rate(reading.tokens_per_s)} tokens/s")
    if reading.ttft_p50_s is not None:
        p99 = "" if reading.ttft_p99_s is None else f", p99 {_short(reading.ttft_p99_s)}"
        rates.append(f"TTFT p50 {_short(reading.ttft_p50_s)}{p99}")
    return rates


def _binding(reading: Reading) -> list[str]:
    """What holds the run up just now, what it has cost, and what else is to be said."""
    parts = []
    if reading.gate_s is not None:
        until = f" (until {reading.gate_at})" if reading.gate_s >= CLOCK_FROM_S else ""
        parts.append(f"rate limit: nothing is sent for {duration(reading.gate_s)}{until}")
    elif (limit := _limit(reading)) is not None:
        parts.append(f"limit: {limit}")
    if reading.cost is not None:
        parts.append(f"cost so far: {reading.cost:.4g}")
    return parts + ([clean(reading.message)] if reading.message else [])


def _limit(reading: Reading) -> str | None:
    if reading.binding == "slots":
        return f"concurrency, adaptive at {reading.slots:,}" if reading.adaptive else f"{reading.slots:,} at once"
    allowed = "" if reading.per_minute is None else f", {reading.per_minute:.4g} allowed"
    return {
        "rpm": f"requests a minute{allowed}",
        "tpm": "tokens a minute",
        "gate": "a gate that opens by and by",
        "outage": "the endpoint is down, one request at a time asks whether it is back",
        "held": "the rest of the budget is on the wire",
        "retry": "who waits does so for a retry",
    }.get(reading.binding)


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class _Pulse:
    """Calls `beat` every `every_s` seconds from a thread that does not outlive the process."""

    def __init__(self, beat: Callable[[], object], every_s: float) -> None:
        self._beat = beat
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._beat()


class _Outlet:
    """The stream, as long as somebody reads it; a hole afterwards.

    A display is a courtesy: `batchstream run … 2>&1 | head`, a closed terminal or a full disk under a log must not end
    a run that pays for answers. So the first error is taken as the last word and the stream is not written to again.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._gone = False

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            call()
        except BlockingIOError:
            pass  # a slow reader of a non-blocking pipe: this line is lost, the next may pass
        except OSError:
            self._gone = True
            # What is left in the stream's buffer would fail again when the interpreter flushes it at exit, and turn
            # the exit code into 120: give it somewhere to go (Python's documentation of SIGPIPE, "Note on SIGPIPE").
            hole = os.open(os.devnull, os.O_WRONLY)
            os.dup2(hole, self._stream.fileno())
            os.close(hole)
