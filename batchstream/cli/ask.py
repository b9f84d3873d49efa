"""`batchstream ask`: one prompt, its answer as it comes; the quickest way to try an endpoint."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec

from batchstream.cli.options import JobCommand, attune, given, job_params
from batchstream.cli.voice import Voice, emit, one_line
from batchstream.errors import InputError
from batchstream.job import Option, make_job

if TYPE_CHECKING:
    from batchstream.records import Delta, Result

HELP = """Ask PROMPT once and show the answer on stdout as it comes.

Usage, time to first token and finish reason go to stderr; -v shows the model's reasoning there as well, -q nothing.
PROMPT - reads the prompt from stdin. Exit codes: 0 answered, 3 no answer, 4 key, payment or endpoint.
"""

EXAMPLES = """
batchstream ask "Why is the sky blue?"
batchstream ask "Why is the sky blue?" --provider local
batchstream ask "Name three colours" --provider openai --model gpt-4o-mini --param max_tokens=50
batchstream ask "Say hello" --base-url http://127.0.0.1:8080/v1 --model sim
cat letter.txt | batchstream ask - --system "Translate into French."
"""

_NO_ENDPOINT = frozenset({"connect", "tls", "redirect"})
"""Failures that say: there is nobody to ask."""

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _of_one_request(option: Option) -> bool:
    timeout = option.section == "limits" and option.name.endswith("_timeout")
    named = option.name in ("max_attempts", "max_wait", "log_format", "quiet", "verbose")
    return timeout or named or option.section in ("endpoint", "request")


def _ask(ctx: click.Context, prompt: str) -> int:
    options = given(ctx)
    attune(ctx, make_job({"input": "-", **options}))
    text = _from_stdin() if prompt == "-" else prompt
    result = asyncio.run(_relay(text, options, ctx.obj))
    return _conclude(result, ctx.obj)


command = JobCommand(
    "ask",
    help=HELP,
    examples=EXAMPLES,
    params=[click.Argument(["prompt"]), *job_params(_of_one_request)],
    callback=click.pass_context(lambda ctx, prompt, **_: _ask(ctx, prompt)),
)


async def _relay(prompt: str, options: dict[str, Any], voice: Voice) -> Result:
    """Pass the answer on as it comes; returns the result that ends it."""
    from batchstream.api import stream
    from batchstream.records import Result

    stage = _Stage(voice, show_reasoning=bool(options.get("verbose")) and not voice.quiet)
    async for item in stream(prompt, **options):
        if isinstance(item, Result):
            stage.end(item)
            return item
        stage.show(item)
    raise AssertionError("stream ends with a result")


class _Stage:
    """Lays the deltas of the first choice out over stdout and stderr."""

    def __init__(self, voice: Voice, *, show_reasoning: bool) -> None:
        self._voice = voice
        self._show_reasoning = show_reasoning
        self._on_terminal = sys.stdout.isatty()
        self._column = 0
        self._thinking = False
        self._text, self._thoughts = voice.veil(), voice.veil()

    def show(self, delta: Delta) -> None:
        if delta.index != 0 or delta.kind == "tool_call":
            return
        if delta.kind == "reasoning":
            if self._show_reasoning:
                self._thinking = True
                self._voice.aside(self._thoughts.over(delta.text))
            return
        self._stop_thinking()
        self._out(self._text.over(delta.text))

    def end(self, result: Result) -> None:
        """Tool calls, which are of no use in pieces, and the end of the last line."""
        self._stop_thinking()
        self._out(self._text.rest())
        for call in result.tool_calls or ():
            self._new_line()
            self._out(self._voice.redact(msgspec.json.encode(call.function).decode()))
        self._new_line()

    def _stop_thinking(self) -> None:
        if self._thinking:
            self._voice.aside(self._thoughts.rest() + "\n")
            self._thinking = False

    def _new_line(self) -> None:
        if self._column:
            self._out("\n")

    def _out(self, text: str) -> None:
        if self._on_terminal:  # where an escape sequence would be obeyed
            text = _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)
        if text:
            emit(text.encode("utf-8", "replace"))
            self._column = 0 if text.endswith("\n") else 1


def _conclude(result: Result, voice: Voice) -> int:
    """What the answer cost and how long it took, or why there is none. Returns the exit code."""
    from batchstream.policy.retry import ACCOUNT_KINDS

    if result.error is not None:
        error = result.error
        code = 4 if error.kind in ACCOUNT_KINDS | _NO_ENDPOINT else 3
        message = f"{error.kind}: {error.message}" + (
            f" (after {result.attempts} attempts)" if result.attempts > 1 else ""
        )
        voice.error(voice.blamed(message) if error.kind in ACCOUNT_KINDS else message, code)
        return code
    voice.event("answer", " · ".join(_figures(result)), {"result": result})
    return 0


def _figures(result: Result) -> list[str]:
    usage, timing = result.usage, result.timing
    parts = [one_line(result.model)] if result.model else []
    if usage is None:
        parts.append("usage not sent")
    else:
        counts = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
        parts.append(" + ".join(f"{n:,} {name}" for name, n in counts.items() if n is not None) + " tokens")
        if usage.reasoning_tokens:
            parts.append(f"{usage.reasoning_tokens:,} of them reasoning")
    if timing.ttft_s is not None:
        parts.append(f"TTFT {timing.ttft_s:.3f} s")
    if timing.total_s is not None:
        parts.append(f"total {timing.total_s:.3f} s")
    parts.append(f"finish: {result.finish_reason or 'not said'}")
    if result.attempts > 1:
        parts.append(f"{result.attempts} attempts")
    return parts


def _from_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: expected a prompt in UTF-8, got something else at byte {error.start}") from None
