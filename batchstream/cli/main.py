"""The group of commands, and the one border where errors become a line on stderr and an exit code.

A command is imported when it is called: `batchstream --help` needs click and nothing else. A command returns its exit
code (None is 0; 128 + N means: die of signal N) or raises; nothing else in the package ends the process.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

import batchstream
from batchstream.cli.voice import Voice, again
from batchstream.errors import BatchstreamError

COMMANDS = {
    "run": "Ask every row of a prompt file, keep every answer.",
    "check": "Check input, key and output without sending a prompt.",
    "ask": "Ask one prompt and show the answer as it comes.",
    "bench": "Measure an endpoint under a load: TTFT, TPOT, latency, throughput.",
    "report": "Show the figures of finished, stopped or running jobs.",
    "merge": "Make one results file of the shards of a job.",
    "export": "Write the results in another format.",
    "simulate": "Serve a simulated endpoint on this machine.",
}
"""The commands, the most important first, with the line that the help shows."""

HELP = """Stream a file of prompts through an OpenAI-compatible endpoint: every answer is kept, none is paid for twice,
and the latency figures are the endpoint's own.

\b
Examples:
  batchstream ask "Why is the sky blue?" --provider local
  batchstream check prompts.jsonl
  batchstream run prompts.jsonl -o results.jsonl --param temperature=0
  batchstream run job.toml
  batchstream report results.jsonl

The same command again resumes a run that was stopped. Exit codes: 0 all answered, 1 a bug, 2 usage, 3 some rows failed,
4 key, payment or endpoint, 5 a limit was reached, 10 input, 11 locked, 12 input or job changed, 13 journal damaged,
14 storage, 128+N signal N.
"""


class Commands(click.Group):
    """The group; it knows its commands by name and imports one when it is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"batchstream.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            ctx.fail(f"expected one of the commands {', '.join(COMMANDS)}, got {args[0]!r}{hint}")
        found = super().resolve_command(ctx, args)
        ctx.obj.command = found[0]
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


group = Commands(
    "batchstream",
    help=HELP,
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=lambda ctx, _, given: _version(ctx) if given else None,
            help="Show the version and exit.",
        )
    ],
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run the command line of this process and end the process."""
    _fill_standard_descriptors()
    voice = Voice(sys.stderr)
    code = _settled(sys.argv[1:], voice)
    code = _flushed(code, voice)
    if code > 128:
        _die_of(code - 128)
    sys.exit(code)


def invoke(args: list[str], voice: Voice) -> int:
    """Parse and call. Returns the exit code, or raises."""
    if completing := os.environ.get("_BATCHSTREAM_COMPLETE"):  # the shell asks, as click's documentation sets it up
        from click.shell_completion import shell_complete

        return shell_complete(group, {}, "batchstream", "_BATCHSTREAM_COMPLETE", completing)
    with group.make_context("batchstream", args or ["--help"], obj=voice) as ctx:
        code: int | None = group.invoke(ctx)
    return code or 0


def _settled(args: list[str], voice: Voice) -> int:
    """The exit code, whatever happens; every failure has been told in one line."""
    try:
        return invoke(args, voice)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        voice.error(_usage(error), 2)
        return 2
    except BatchstreamError as error:
        voice.error(again(str(error), error.exit_code, voice.command), error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our stdout has enough (`export … | head`). Filters die of SIGPIPE then, without a word.
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, click.Abort):
        voice.error(again("interrupted", 130, voice.command), 130)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EBADF:  # click's help for a closed stdout
            voice.error("stdout: cannot write: it is closed", 14)
            return 14
        voice.bug(error)
        return 1


def _usage(error: click.ClickException) -> str:
    """click's message as one line of ours."""
    if isinstance(error, click.NoSuchOption):
        close = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
        text = f"no such option {error.option_name}" + (f" (did you mean {close[0]}?)" if close else "")
    else:
        text = error.format_message().rstrip(".")
    text = text[:1].lower() + text[1:]
    ctx = getattr(error, "ctx", None)
    return f"{text}; see {ctx.command_path} --help" if ctx is not None else text


def _fill_standard_descriptors() -> None:
    """Put /dev/null where a standard stream was closed by whoever started us. Else the next file or socket would get
    its number: journal and chatter would mix, and libuv aborts over a socket called 0, 1 or 2.
    Opened for reading only: data that was to go to a closed stdout is an error, not a success."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (as long as the process)


def _flushed(code: int, voice: Voice) -> int:
    """Empty stdout before the interpreter does: its own complaint would be two lines and exit code 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code:
            return code  # the reason has been told
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        voice.error(f"stdout: cannot write: {error.strerror}", 14)
        return 14
    return code


def _die_of(number: int) -> NoReturn:
    """End by the signal itself, so that whoever waits for this process knows (a shell shows 128 + N)."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pause()
    raise AssertionError  # a default action of these signals ends the process


def _version(ctx: click.Context) -> Any:
    click.echo(f"batchstream {batchstream.__version__}")
    ctx.exit()
