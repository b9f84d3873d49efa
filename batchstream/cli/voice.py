"""What the command line says: one message, one line, on stderr; text, or JSON with ``--log-format json``.

Three rules hold for every word that leaves here. The key is in none of it: whatever an endpoint echoes is redacted.
A message is one line without control characters. And nobody has to listen: a stderr that is closed, full or gone
silences the voice and ends nothing, for a run that pays for answers must not die of its own chatter.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from batchstream.errors import StorageError

if TYPE_CHECKING:
    from batchstream.figures.summary import Summary

AGAIN = {
    1: "the same command resumes",
    2: "correct it and run the command again",
    3: "the results are complete; the same command sends nothing",
    4: "the same command resumes",
    5: "the same command resumes",
    10: "correct it and run the command again",
    11: "nothing was sent; run the same command again later",
    12: "nothing was sent",
    13: "nothing was sent; the same command does not resume",
    14: "the same command resumes once the storage is in order",
}
"""By exit code: what the same `run` command will do. Above 128 (a signal) it resumes."""

_SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def again(message: str, code: int, command: str | None) -> str:
    """`message` with what follows from it for somebody who runs the same command again. Only `run` and `bench` have
    a state."""
    if command not in ("run", "bench"):
        return message
    return f"{message} (exit {code}; {AGAIN.get(code, 'the same command resumes')})"


class Voice:
    """Speaks on `stream` (None: nobody is there). `log_format` and `quiet` are set once the options are known,
    as are `command`, the name of the command that runs, and `key_origin`, where the key comes from; `hide` adds a
    secret that must never be said."""

    def __init__(self, stream: TextIO | None) -> None:
        self.log_format: Literal["text", "json"] = "text"
        self.quiet = False
        self.command: str | None = None
        self.key_origin: str | None = None
        self._stream = stream
        self._secrets: list[str] = []

    @property
    def stream(self) -> TextIO | None:
        return self._stream

    @property
    def colour(self) -> bool:
        return self._stream is not None and self._stream.isatty() and not os.environ.get("NO_COLOR")

    def hide(self, secret: str) -> None:
        from batchstream.endpoints.credentials import SECRET_LENGTH, spellings

        if len(secret) >= SECRET_LENGTH:
            self._secrets += spellings(secret)

    def redact(self, text: str) -> str:
        """`text` without the secrets, as they are and as JSON spells them."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text

    def veil(self) -> Veil:
        return Veil(self._secrets)

    def blamed(self, message: str) -> str:
        """A refusal for the account's sake, with where the key came from: that is what to look at."""
        return f"{message}; {f'the key is from {self.key_origin}' if self.key_origin else 'no key was sent'}"

    def note(self, message: str) -> None:
        if not self.quiet:
            self._say("message", f"batchstream: {message}", {"message": message})

    def warning(self, message: str) -> None:
        if not self.quiet:
            self._say("warning", f"batchstream: warning: {message}", {"message": message})

    def error(self, message: str, code: int) -> None:
        self._say("error", f"batchstream: error: {message}", {"message": message, "exit_code": code})

    def event(self, name: str, text: str, fields: dict[str, Any]) -> None:
        """Something that happened, as a line of text or as a JSON object with `fields`."""
        if not self.quiet:
            self._say(name, text, fields)

    def summary(self, figures: Summary) -> None:
        if self.quiet or self._stream is None:
            return
        if self.log_format == "json":
            self._say("summary", "", {"summary": figures})
            return
        from batchstream.report.text import render_summary

        self.write(self.redact(render_summary(figures, columns(self._stream), self.colour)))

    def aside(self, text: str) -> None:
        """A piece of running text (a model's reasoning), dimmed on a terminal; nothing in a log of JSON lines."""
        if self.log_format == "text":
            text = "\n".join(one_line(line) for line in text.split("\n"))
            self.write(self.redact(f"\x1b[2m{text}\x1b[0m" if self.colour else text))

    def bug(self, error: BaseException) -> None:
        """A traceback, for it is ours to mend, and the one line that asks for it."""
        for name, value in os.environ.items():
            if len(value) >= 8 and any(part in name.upper() for part in _SECRET_NAMES):
                self.hide(value)
        self.write(self.redact("".join(traceback.format_exception(error))))
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        message = f"this is a bug in batchstream: {what}; please report it with the lines above"
        self.error(again(message, 1, self.command), 1)

    def _say(self, event: str, text: str, fields: dict[str, Any]) -> None:
        if self.log_format == "json":
            import msgspec

            at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            line = msgspec.json.encode({"event": event, "time": at, **fields}).decode()
        else:
            line = one_line(text)
        self.write(self.redact(line) + "\n")

    def write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # Its buffer would fail again at the interpreter's exit and change the exit code: let it run into a hole.
            hole = os.open(os.devnull, os.O_WRONLY)
            os.dup2(hole, self._stream.fileno())
            os.close(hole)
            self._stream = None


class Veil:
    """Running text without the secrets, wherever its pieces are cut: what may be the beginning of one waits for what
    follows. `rest` gives what waits at the end."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = secrets
        self._waiting = ""

    def over(self, piece: str) -> str:
        text = self._waiting + piece
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        held = max((_overlap(text, secret) for secret in self._secrets), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, secret: str) -> int:
    """How much of the end of `text` is the beginning of `secret`."""
    return next((n for n in range(min(len(text), len(secret) - 1), 0, -1) if text.endswith(secret[:n])), 0)


def one_line(text: str) -> str:
    """`text` without line breaks and without characters that could steer a terminal."""
    from batchstream.report.text import clean

    return clean(" ".join(part.strip() for part in text.splitlines()))


def columns(stream: TextIO | None) -> int:
    """Width of the terminal behind `stream`; 80 where there is none."""
    try:
        return max(os.get_terminal_size(stream.fileno()).columns, 40) if stream is not None else 80
    except OSError:
        return 80


def emit(data: bytes) -> None:
    """Data to stdout, as it is and at once. Raises BrokenPipeError, and StorageError for any other refusal."""
    emit_lines((data,), end=b"")
    with _stdout_errors():
        sys.stdout.buffer.flush()


def emit_lines(lines: Iterable[bytes], end: bytes = b"\n") -> None:
    """Lines of data to stdout, in its own time. Raises as `emit` does."""
    for line in lines:
        with _stdout_errors():
            sys.stdout.buffer.write(line + end)


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"stdout: cannot write: {error.strerror}") from None
