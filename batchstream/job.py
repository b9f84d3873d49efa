"""`Job`: every option once, whoever sets it: a flag, a job file or a keyword of the Python API.

Each field carries its section of the job file, its help text and (where it is not the obvious one)
its flag as metadata, so that the command line, the job-file reader, `check` and the documentation
are all made from this one table. Unknown keys are errors, with the nearest right one named.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from batchstream.errors import InputError, UsageError
from batchstream.records import Api

SECTIONS = ("input", "endpoint", "request", "limits", "retry", "output", "report")


def _opt(section: str, help: str, *, flag: str | None = None, metavar: str | None = None) -> Any:  # noqa: A002  (what click calls it)
    return msgspec.Meta(description=help, extra={"section": section, "flag": flag, "metavar": metavar})


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to ask, whom, how hard, and where the answers go. Durations are seconds.

    Build one with keywords (`Job(input="prompts.jsonl", model="…")`) or from a file (`load_job`).
    Raises `UsageError` when an option makes no sense, alone or beside another.
    """

    # --- input
    input: Annotated[
        str, _opt("input", "The prompts: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, a folder or glob, or -.")
    ]
    template: Annotated[
        str | None, _opt("input", "Make each prompt from the row's columns: 'Summarise: {text}'.", metavar="TEXT")
    ] = None
    prompt_column: Annotated[str | None, _opt("input", "The column that holds the prompt.", metavar="NAME")] = None
    id_column: Annotated[
        str | None,
        _opt("input", "The column that identifies a row (default: id or custom_id, else the ordinal).", metavar="NAME"),
    ] = None
    keep: Annotated[
        tuple[str, ...],
        _opt("input", "Columns to copy through to the result: names with commas, or 'all'.", metavar="COL,…|all"),
    ] = ()
    limit: Annotated[int | None, _opt("input", "Take only the first N rows.", metavar="N")] = None
    sample: Annotated[int | None, _opt("input", "Take N rows at random (see --seed).", metavar="N")] = None
    seed: Annotated[int, _opt("input", "Seed of --sample.", metavar="S")] = 0
    invalid: Annotated[
        Literal["fail", "record", "skip"],
        _opt("input", "A malformed row: stop before sending anything, record it as failed, or skip it."),
    ] = "record"
    # --- endpoint
    provider: Annotated[
        str | None,
        _opt(
            "endpoint",
            "Whose endpoint: shuttleai (the default), openai, openrouter, groq, deepseek, local or sim.",
            metavar="NAME",
        ),
    ] = None
    base_url: Annotated[str | None, _opt("endpoint", "Base URL of the endpoint, with its /v1.", metavar="URL")] = None
    model: Annotated[str | None, _opt("endpoint", "The model; a row's own 'model' wins.", metavar="NAME")] = None
    api: Annotated[
        Api | None, _opt("endpoint", "Which API to speak (default: chat, or what a batch line's url says).")
    ] = None
    api_key_env: Annotated[
        str | None,
        _opt(
            "endpoint",
            "NAME of the environment variable that holds the key. No option takes the key itself.",
            metavar="NAME",
        ),
    ] = None
    api_key_file: Annotated[
        str | None, _opt("endpoint", "File that holds the key; readable by its owner only.", metavar="FILE")
    ] = None
    header: Annotated[dict[str, str], _opt("endpoint", "An extra request header.", metavar="'NAME: VALUE'")] = {}
    ca_file: Annotated[
        str | None, _opt("endpoint", "PEM file of the certificate authorities to trust.", metavar="FILE")
    ] = None
    trust_env: Annotated[
        bool, _opt("endpoint", "Use the proxy that HTTP_PROXY/HTTPS_PROXY name.", flag="--trust-env")
    ] = False
    model_file: Annotated[str | None, _opt("endpoint", "GGUF weights for the provider local.", metavar="FILE")] = None
    sim: Annotated[
        dict[str, Any], _opt("endpoint", "A setting of the provider sim, as in `batchstream simulate`.", metavar="K=V")
    ] = {}
    # --- request
    param: Annotated[
        dict[str, Any],
        _opt("request", "A request parameter for every row that does not set it: temperature=0.", metavar="K=V"),
    ] = {}
    system: Annotated[str | None, _opt("request", "System prompt for every row that has none.", metavar="TEXT")] = None
    include_usage: Annotated[
        bool,
        _opt(
            "request",
            "Ask the endpoint for token counts (stream_options.include_usage).",
            flag="--include-usage/--no-include-usage",
        ),
    ] = True
    # --- limits
    concurrency: Annotated[int, _opt("limits", "Requests in flight at once.", metavar="N")] = 16
    rpm: Annotated[
        float | None,
        _opt("limits", "Requests a minute, evenly spaced (default: the provider's known limit, if any).", metavar="N"),
    ] = None
    connect_timeout: Annotated[float, _opt("limits", "Seconds to look up, connect and shake hands.", metavar="S")] = (
        10.0
    )
    first_token_timeout: Annotated[
        float,
        _opt(
            "limits",
            "Seconds from the request to the first generated output; keep-alive comments do not count.",
            metavar="S",
        ),
    ] = 300.0
    idle_timeout: Annotated[float, _opt("limits", "Seconds between two pieces of output.", metavar="S")] = 120.0
    total_timeout: Annotated[
        float | None, _opt("limits", "Seconds for one attempt altogether (default: no limit).", metavar="S")
    ] = None
    max_time: Annotated[
        float | None, _opt("limits", "Stop admitting rows after this many seconds; exit 5.", metavar="S")
    ] = None
    max_requests: Annotated[
        int | None, _opt("limits", "Stop after this many requests of this run, retries included; exit 5.", metavar="N")
    ] = None
    max_tokens_total: Annotated[
        int | None, _opt("limits", "Stop admitting rows once this run has used so many tokens; exit 5.", metavar="N")
    ] = None
    max_failures: Annotated[
        int, _opt("limits", "So many failed rows are still a success (exit 0 instead of 3).", metavar="N")
    ] = 0
    # --- retry
    max_attempts: Annotated[
        int, _opt("retry", "Attempts for a row; waits for a rate limit do not count.", metavar="N")
    ] = 5
    max_wait: Annotated[
        float, _opt("retry", "Longest wait a server may ask for; beyond it the run stops with exit 5.", metavar="S")
    ] = 300.0
    breaker: Annotated[Literal["on", "off"], _opt("retry", "off: record every failure, stop for none.")] = "on"
    # --- output
    output: Annotated[
        str | None,
        _opt(
            "output", "The results: .jsonl or .parquet (default: beside the input).", flag="-o/--output", metavar="OUT"
        ),
    ] = None
    overwrite: Annotated[bool, _opt("output", "Replace a results file that this job did not make.")] = False
    new_job: Annotated[bool, _opt("output", "Start over: put the journal of the earlier job aside.")] = False
    retry_failed: Annotated[bool, _opt("output", "Ask the failed rows again.")] = False
    allow_append: Annotated[bool, _opt("output", "Accept an input that has grown at its end.")] = False
    durability: Annotated[
        Literal["row", "batch", "os"],
        _opt("output", "Sync each result, groups of them (at most 100 ms), or leave it to the system."),
    ] = "batch"
    drain_timeout: Annotated[
        float, _opt("output", "Seconds that rows in flight may take after a stop.", metavar="S")
    ] = 30.0
    if_locked: Annotated[Literal["fail", "skip"], _opt("output", "Another run holds the job: exit 11, or 0.")] = "fail"
    lock_wait: Annotated[float, _opt("output", "Wait so many seconds for the other run to end.", metavar="S")] = 0.0
    spill_dir: Annotated[
        str | None, _opt("output", "Where unsaved results go when the disk of the journal is full.", metavar="DIR")
    ] = None
    # --- report
    summary_json: Annotated[
        str | None, _opt("report", "Write the summary here as well, or to - (stdout).", metavar="PATH|-")
    ] = None
    log_format: Annotated[
        Literal["text", "json"], _opt("report", "Messages and status lines as text or as JSON lines.")
    ] = "text"
    quiet: Annotated[bool, _opt("report", "Errors only.", flag="-q/--quiet")] = False
    verbose: Annotated[bool, _opt("report", "Say more: each retry and each failure.", flag="-v/--verbose")] = False
    no_progress: Annotated[bool, _opt("report", "No live display; plain status lines.")] = False

    def __post_init__(self) -> None:
        for option in options().values():
            check_type(option, getattr(self, option.name))
        positive = ("concurrency", "connect_timeout", "first_token_timeout", "idle_timeout", "max_attempts",
                    "limit", "sample", "rpm", "total_timeout", "max_time", "max_requests", "max_tokens_total")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}: expected a number above 0, got {value!r}")
        for name in ("max_wait", "drain_timeout", "lock_wait", "max_failures"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")
        if self.template is not None and self.prompt_column is not None:
            raise UsageError("template and prompt_column both say how to make the prompt; give one of them")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise UsageError("api_key_env and api_key_file both name the key; give one of them")
        if self.api_key_env is not None and not _is_variable_name(self.api_key_env):
            # Somebody pasted the key where its name belongs: never repeat it back.
            raise UsageError(
                "api_key_env: expected the name of an environment variable, such as SHUTTLEAI_API_KEY, not a key"
            )
        if self.limit is not None and self.sample is not None:
            raise UsageError("limit and sample both choose rows; give one of them")
        for name, value in self.header.items():
            if not name or any(c in name for c in " :\r\n\t") or any(c in value for c in "\r\n\0"):
                raise UsageError(f"header: expected 'Name: value' on one line, got the name {name!r}")


class Option(msgspec.Struct, frozen=True):
    """One field of `Job`, as the command line and the documentation see it."""

    name: str
    section: str
    help: str
    flag: str
    metavar: str | None
    type: Any
    default: Any


@functools.cache
def options() -> dict[str, Option]:
    """All options by field name, in the order of `Job`."""
    hints = get_type_hints(Job, include_extras=True)
    found: dict[str, Option] = {}
    for field in msgspec.structs.fields(Job):
        base, meta = get_args(hints[field.name])[:2]
        extra = meta.extra
        default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        flag = extra["flag"] or "--" + field.name.replace("_", "-")
        found[field.name] = Option(
            field.name, extra["section"], meta.description, flag, extra["metavar"], base, default
        )
    return found


def nearest(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


PATHS = ("input", "output", "api_key_file", "ca_file", "model_file", "spill_dir", "summary_json")
"""Options that are paths: in a job file they are relative to that file."""


RIVALS = (("template", "prompt_column"), ("api_key_env", "api_key_file"), ("limit", "sample"))
"""Options that exclude each other: one that overrides a job file puts out its rival there."""


def load_job(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read a job file (TOML); `overrides` (by field name) win over what it says.

    Raises `InputError` when the file cannot be read, `UsageError` when a key or a value is wrong:
    one line with file, key, what was expected and what came.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the job file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from None
    values: dict[str, Any] = {}
    known = options()
    for section, table in tables.items():
        if section not in SECTIONS:
            raise UsageError(
                f"{path}: unknown section [{section}]{nearest(section, list(SECTIONS))}; sections are {', '.join(SECTIONS)}"
            )
        if not isinstance(table, dict):
            raise UsageError(f"{path}: expected a section [{section}], got {section} = {table!r}")
        names = {_key(option): option for option in known.values() if option.section == section}
        for key, value in table.items():
            if key not in names:
                elsewhere = [f"[{o.section}] {_key(o)}" for o in known.values() if _key(o) == key]
                hint = f" (it belongs to {elsewhere[0]})" if elsewhere else nearest(key, list(names))
                raise UsageError(f"{path}: [{section}] has no key {key!r}{hint}")
            values[names[key].name] = _relative(path, names[key].name, value)
    overrides = overrides or {}
    for pair in RIVALS:
        if not overrides.keys().isdisjoint(pair):
            values = {name: value for name, value in values.items() if name not in pair}
    for name, value in overrides.items():
        mine = values.get(name)
        # A table is overridden key by key: --param seed=1 leaves the file's temperature alone.
        values[name] = {**mine, **value} if isinstance(mine, dict) and isinstance(value, dict) else value
    return make_job(values, where=str(path))


def make_job(values: Mapping[str, Any], where: str = "") -> Job:
    """A `Job` from plain values by field name, types checked. Raises `UsageError`."""
    prefix = f"{where}: " if where else ""
    known = options()
    for name in values:
        if name not in known:
            raise UsageError(f"{prefix}unknown option {name!r}{nearest(name, list(known))}")
    if "input" not in values:
        raise UsageError(f"{prefix}no input: name the prompts in [input] path, or on the command line")
    values = dict(values)
    if isinstance(values.get("keep"), str):
        values["keep"] = tuple(part.strip() for part in values["keep"].split(",") if part.strip())
    for name, value in values.items():
        try:
            values[name] = check_type(known[name], value)
        except UsageError as error:
            raise UsageError(f"{prefix}[{known[name].section}] {error}") from None
    try:
        return Job(**values)
    except UsageError as error:
        raise UsageError(f"{prefix}{error}") from None


def check_type(option: Option, value: Any) -> Any:
    """`value` as the option's type (a whole number is a float as well). Raises `UsageError`."""
    words = choices(option)
    if words is not None and value is not None and value not in words:
        raise UsageError(f"{_key(option)}: expected one of {', '.join(words)}, got {value!r}")
    try:
        return msgspec.convert(value, option.type, strict=True)
    except msgspec.ValidationError as error:
        said = str(error).replace("`", "")
        shown = "" if option.name in ("header", "sim", "param") else f": {value!r}"
        raise UsageError(f"{_key(option)}: {said[0].lower()}{said[1:]}{shown}") from None


def choices(option: Option) -> tuple[str, ...] | None:
    """The words an option takes, or None when it is free."""
    for kind in (option.type, *get_args(option.type)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return None


def _is_variable_name(word: str) -> bool:
    """A name for a variable, and not by its looks a key (long, with digits among small letters)."""
    looks_secret = len(word) >= 20 and any(c.isdigit() for c in word) and any(c.islower() for c in word)
    return word.isidentifier() and word.isascii() and not looks_secret


def _key(option: Option) -> str:
    return "path" if option.name in ("input", "output") else option.name


def _relative(path: Path, name: str, value: Any) -> Any:
    if name not in PATHS or not isinstance(value, str) or value == "-" or "://" in value:
        return value
    return str(path.parent / value)
