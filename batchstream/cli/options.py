"""The options of `Job` as click sees them: every flag of `run`, `check` and `ask` is made from `job.options()`.

Only flags that were really given count: a job file's value is overridden by what stands on the command line, never by a
default. click checks single words; what an option means, and what it means beside another, `Job` checks.
"""

from __future__ import annotations

import functools
import operator
import os
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import click
import msgspec
from click.core import ParameterSource

from batchstream.cli.voice import Voice
from batchstream.errors import BatchstreamError
from batchstream.job import SECTIONS, Job, Option, choices, load_job, make_job, options

if TYPE_CHECKING:
    from batchstream.endpoints.credentials import Key

TITLES = {
    "input": "Input",
    "endpoint": "Endpoint",
    "request": "Request",
    "limits": "Limits",
    "retry": "Retry",
    "output": "Output",
    "report": "Messages",
}


def _pairs(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """``K=V`` words as a dictionary; V is JSON where it parses (0.5, true, ["a"]), else text."""
    found: dict[str, Any] = {}
    for word in texts:
        name, equals, text = word.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"expected NAME=VALUE, got {word!r}", ctx, param)
        try:
            found[name.strip()] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            found[name.strip()] = text
    return found


def _headers(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """``NAME: VALUE`` words as a dictionary. A value may be secret and is never repeated."""
    from batchstream.endpoints.credentials import carries_secret

    found = {}
    for word in texts:
        name, colon, text = word.partition(":")
        if not colon or not name.strip():
            raise click.BadParameter("expected 'NAME: VALUE'", ctx, param)
        if carries_secret(name):
            raise click.BadParameter(
                f"{name.strip()} carries a secret, and every user of this machine can read command lines: name the key "
                "with --api-key-env, or put the header into a job file, [endpoint] header",
                ctx,
                param,
            )
        found[name.strip()] = text.strip()
    return found


def _words(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> list[str]:
    """Words with commas, the option repeated or not, as one list."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _count(ctx: click.Context, param: click.Parameter, text: str | None) -> int | str | None:
    """A whole number, or the word auto."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a valid integer, nor auto", ctx, param) from None


def _numbers(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> float | dict[str, float] | None:
    """One number, or ``NAME=N`` words as a dictionary."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise click.BadParameter(f"expected N or MODEL=N, got {text!r}", ctx, param) from None
    if "" in found and len(found) > 1:
        raise click.BadParameter("expected one number for all models, or MODEL=N for each, got both", ctx, param)
    return found.get("", found or None)


def _prices(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, float | dict[str, float]]:
    """``[MODEL:]in=N,out=N[,cached=N]`` as a table."""
    found: dict[str, float | dict[str, float]] = {}
    for text in texts:
        model, _, parts = text.rpartition(":")
        price = {}
        for part in parts.split(","):
            name, _, number = part.partition("=")
            try:
                price[name.strip()] = float(number)
            except ValueError:
                raise click.BadParameter(f"expected in=N,out=N[,cached=N], got {text!r}", ctx, param) from None
        found.update({model: price} if model else price)
    return found


class JobOption(click.Option):
    """A flag made of one field of `Job`."""

    def __init__(self, option: Option) -> None:
        self.section = option.section
        super().__init__(**_declaration(option))


class JobCommand(click.Command):
    """A command with the job's options, its help in the job file's sections, its examples last."""

    def __init__(self, name: str, *, examples: str, params: list[click.Parameter], **rest: Any) -> None:
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())
        super().__init__(name, params=params, epilog=epilog, **rest)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {"": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                records.setdefault(getattr(param, "section", ""), []).append(record)
        for section in (*SECTIONS, ""):
            if records.get(section):
                with formatter.section(f"{TITLES[section]} options" if section else "Other options"):
                    formatter.write_dl(records[section])


def job_params(chosen: Callable[[Option], bool] = lambda option: True) -> list[click.Parameter]:
    """click's parameters for the options of `Job` that are `chosen`, without the input."""
    return [JobOption(option) for option in options().values() if option.name != "input" and chosen(option)]


def given(ctx: click.Context) -> dict[str, Any]:
    """The values of the job's options that stand on the command line, by field name."""
    known = options()
    return {
        name: value
        for name, value in ctx.params.items()
        if name in known and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def job_of(ctx: click.Context, source: str) -> Job:
    """The job that the command line describes: a job file with flags over it, or prompts with flags.

    Sets up the voice by it as well. Raises `InputError` and `UsageError`.
    """
    values = given(ctx)
    job = load_job(source, values) if source.endswith(".toml") else make_job({"input": source, **values})
    attune(ctx, job)
    return job


def attune(ctx: click.Context, job: Job) -> None:
    """Let the voice speak as the job says, and never say its key."""
    voice: Voice = ctx.obj
    from batchstream.endpoints.credentials import header_secrets

    voice.log_format, voice.quiet = job.log_format, job.quiet
    for secret in header_secrets(job.header):
        voice.hide(secret)
    if (key := key_of(job)) is not None:
        voice.hide(key.value)
        voice.key_origin = key.origin


def key_of(job: Job) -> Key | None:
    """The key that `job` would use; None where there is none that can be used (who needs it will say so)."""
    from batchstream.endpoints.credentials import find_key
    from batchstream.endpoints.providers import DEFAULT, PROVIDERS

    # A base URL without a provider gets no provider's key (connect.py).
    provider = PROVIDERS.get(job.provider or DEFAULT) if job.base_url is None or job.provider else None
    try:
        return find_key(job.api_key_env, job.api_key_file, provider.key_env if provider else None, os.environ)
    except BatchstreamError:
        return None


def _declaration(option: Option) -> dict[str, Any]:
    """The arguments of click.Option for one field."""
    declaration: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    kind = _bare(option.type)
    words = choices(option)
    flags = option.flag.split("/")
    if kind is bool:
        declaration |= {"default": option.default, "metavar": None}
        flags = _with_opposite(flags)
    elif words is not None:
        declaration |= {"type": click.Choice(words), "metavar": None}
    elif "price" in option.name:
        declaration |= {"callback": _prices, "multiple": True}
    elif get_origin(kind) in (Union, types.UnionType) and float in get_args(kind):
        declaration |= {"callback": _numbers, "multiple": True}
    elif get_origin(kind) in (Union, types.UnionType) and int in get_args(kind):
        declaration |= {"callback": _count}
    elif get_origin(kind) is dict:
        declaration |= {"callback": _headers if get_args(kind)[1] is str else _pairs, "multiple": True}
    elif get_origin(kind) is tuple:
        declaration |= {"callback": _words, "multiple": True}
    elif kind in (int, float, str):
        declaration |= {"type": kind}
    else:
        raise TypeError(f"no flag can be made of {option.name}: {option.type}")
    if kind is not bool and not declaration.get("multiple") and option.default is not None:
        declaration |= {"default": option.default, "show_default": True}
    return {**declaration, "param_decls": [*flags, option.name]}


def _with_opposite(flags: list[str]) -> list[str]:
    """The flag as ``--x/--no-x``, so that the command line can also take back what a job file says."""
    short = [flag for flag in flags if not flag.startswith("--")]
    long = next(flag for flag in flags if flag.startswith("--"))
    opposite = "--" + long.removeprefix("--no-") if long.startswith("--no-") else "--no-" + long.removeprefix("--")
    return [*short, f"{long}/{opposite}"]


def _bare(annotation: Any) -> Any:
    """The annotation without its ``| None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else functools.reduce(operator.or_, kinds)
    return annotation
