"""`Job`: every option once, whoever sets it: a flag, a job file or a keyword of the Python API.

Each field carries its section of the job file, its help text and (where it is not the obvious one)
its flag as metadata, so that the command line, the job-file reader, `check` and the documentation
are all made from this one table. Unknown keys are errors, with the nearest right one named.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from batchstream.errors import InputError, UsageError
from batchstream.policy.breaker import parse_breaker
from batchstream.policy.budget import parse_prices
from batchstream.policy.sharding import parse_shard
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
    shard: Annotated[
        str | None,
        _opt(
            "input",
            "Only the I-th of N shards, or the one that Slurm or Kubernetes says; see merge.",
            metavar="I/N|auto",
        ),
    ] = None
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
    concurrency: Annotated[
        int | Literal["auto"],
        _opt("limits", "Requests in flight at once; auto finds out how many bring throughput.", metavar="N|auto"),
    ] = "auto"
    workers: Annotated[
        int | Literal["auto"],
        _opt(
            "limits",
            "Worker processes that share the limits; auto: one for every 64 slots, by the cores.",
            metavar="N|auto",
        ),
    ] = 1
    plan: Annotated[
        Literal["free", "basic", "premium", "scale"] | None,
        _opt("limits", "ShuttleAI's plan: sets --rpm and --window fixed."),
    ] = None
    rpm: Annotated[
        float | dict[str, float] | None,
        _opt("limits", "Requests a minute over all models, or of one model.", metavar="N|MODEL=N"),
    ] = None
    tpm: Annotated[
        float | dict[str, float] | None,
        _opt(
            "limits",
            "Tokens a minute over all models, or of one; estimated first, then corrected.",
            metavar="N|MODEL=N",
        ),
    ] = None
    tpm_counts: Annotated[Literal["both", "input", "output"], _opt("limits", "The tokens that --tpm is about.")] = (
        "both"
    )
    request_weight: Annotated[
        float | dict[str, float] | None,
        _opt(
            "limits",
            "Requests that one counts for (default: as shuttleai lists its models, else 1).",
            metavar="N|MODEL=N",
        ),
    ] = None
    window: Annotated[
        Literal["rolling", "fixed"] | None,
        _opt(
            "limits",
            "How limits count: any minute, evenly spaced, or the provider's minutes (default: as known, else rolling).",
        ),
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
    deadline: Annotated[
        str | None,
        _opt(
            "limits", "Stop admitting rows at this time: the next 06:00, or 2026-01-31T06:00; exit 5.", metavar="TIME"
        ),
    ] = None
    max_cost: Annotated[
        float | None,
        _opt(
            "limits", "Stop once the job, earlier runs included, has cost so much by --price; exit 5.", metavar="MONEY"
        ),
    ] = None
    price: Annotated[
        dict[str, float | dict[str, float]],
        _opt("limits", "Money for a million tokens, of all models or of one.", metavar="[MODEL:]in=N,out=N[,cached=N]"),
    ] = {}
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
    max_outage: Annotated[
        float, _opt("retry", "Seconds to wait for an endpoint that was there and is down; then exit 4.", metavar="S")
    ] = 300.0
    breaker: Annotated[
        str,
        _opt(
            "retry",
            "When to stop for failures in a row: failures=20,refusals=3 (on), or never (off).",
            metavar="on|off|SPEC",
        ),
    ] = "on"
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
        positive = ("connect_timeout", "first_token_timeout", "idle_timeout", "max_attempts",
                    "limit", "sample", "total_timeout", "max_time", "max_cost", "max_requests", "max_tokens_total")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}: expected a number above 0, got {value!r}")
        for name in ("concurrency", "workers", "rpm", "tpm", "request_weight"):
            value = getattr(self, name)
            for number in value.values() if isinstance(value, dict) else (value,):
                if number not in (None, "auto") and not number > 0:
                    raise UsageError(f"{name}: expected a number above 0, got {number!r}")
        for name in ("max_wait", "max_outage", "drain_timeout", "lock_wait", "max_failures"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")
        if self.plan is not None and self.rpm is not None:
            raise UsageError("plan and rpm both set the requests a minute; give one of them")
        if self.max_time is not None and self.deadline is not None:
            raise UsageError("max_time and deadline both say when to stop; give one of them")
        _check(self.breaker, "breaker", parse_breaker)
        _check(self.price, "price", parse_prices)
        if self.shard is not None:
            _check(self.shard, "shard", parse_shard)
            if self.input == "-":
                raise UsageError("shard: every shard reads the whole input, and stdin can be read once; give a file")
        if self.deadline is not None:
            _check(self.deadline, "deadline", parse_deadline)
        if self.max_cost is not None and not self.price:
            raise UsageError("max_cost needs to know what tokens cost; give --price in=…,out=…")
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


def _check(value: Any, name: str, parse: Callable[[Any], object]) -> None:
    try:
        parse(value)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def parse_deadline(text: str) -> time | datetime:
    """ "06:00" as a time of day, an ISO date and time as that (local where it names no offset). Raises ValueError."""
    with suppress(ValueError):
        if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text):
            return time.fromisoformat(text.zfill(5 if text.count(":") == 1 else 8))
        if "-" in text and ":" in text:
            return datetime.fromisoformat(text).astimezone()
    raise ValueError(f"expected a time as 06:00 or 2026-01-31T06:00, got {text!r}")


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


RIVALS = (
    ("template", "prompt_column"),
    ("api_key_env", "api_key_file"),
    ("limit", "sample"),
    ("plan", "rpm"),
    ("max_time", "deadline"),
)
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
        if said.startswith("Invalid enum value"):  # of a number that may also be a word
            raise UsageError(f"{_key(option)}: expected int, got str: {value!r} (a number, or auto)") from None
        shown = "" if option.name in ("header", "sim", "param") else f": {value!r}"
        raise UsageError(f"{_key(option)}: {said[0].lower()}{said[1:]}{shown}") from None


def choices(option: Option) -> tuple[str, ...] | None:
    """The words an option takes, or None when it is free (or takes other values beside them)."""
    kinds = [kind for kind in get_args(option.type) or (option.type,) if kind is not type(None)]
    if get_origin(option.type) is Literal:
        return get_args(option.type)
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else None


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
