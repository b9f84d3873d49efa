"""`batchstream bench`: measure an endpoint under a load, or a sweep of loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from batchstream.cli.options import JobCommand, attune, given, job_params
from batchstream.cli.run import Watch, summary_path
from batchstream.cli.voice import Voice, again, columns, emit
from batchstream.errors import UsageError
from batchstream.job import Job, Option, load_job, make_job

if TYPE_CHECKING:
    from batchstream.bench import Bench, Outcome

HELP = """Measure an endpoint: ask PROMPTS under a load, or under several, and show TTFT, TPOT, latency and throughput.

A closed loop (--concurrency) keeps so many requests in flight; an open loop (--rate, --ramp, --replay) sends each
request when its schedule, fixed in advance, says so, whatever comes back. A list of levels is a sweep, a stage each.
Every latency is given from `sent` (the request is written) and from `due`. Failed requests are not tried again and
improve no percentile. Results and journal are kept as by `run`; a stage that was interrupted is measured again.
"""

EXAMPLES = """
batchstream bench prompts.jsonl --concurrency 1,2,4,8 --duration 30 --warmup 5
batchstream bench prompts.jsonl --rate 5,10,20 --arrival poisson --duration 60 --slo ttft=500ms,tpot=50ms
batchstream bench prompts.jsonl --find rate --rate 2 --duration 30 --slo ttft=1s
batchstream bench prompts.jsonl --ramp 1..50 --duration 120 --base-url http://127.0.0.1:8000/v1 --model NAME
batchstream bench prompts.jsonl --provider sim --sim ttft=0.2 --sim gap=0.02 --rate 20 --requests 500
"""

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


def seconds(text: str) -> float:
    """ "500ms", "30", "2m" as seconds. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"expected a duration such as 500ms, 30s or 2m, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _list(kind: type) -> Any:
    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(",")) if text else ()
        except ValueError:
            raise click.BadParameter(f"expected numbers with commas, as 1,2,4, got {text!r}", ctx, param) from None

    return parse


def _seconds(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    try:
        return None if text is None else seconds(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _ramp(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    begin, dots, end = text.partition("..")
    try:
        return float(begin), float(end if dots else "")
    except ValueError:
        raise click.BadParameter(f"expected FROM..TO requests a second, as 1..50, got {text!r}", ctx, param) from None


def _slo(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in (part for text in texts for part in text.split(",") if part.strip()):
        name, equals, limit = word.partition("=")
        try:
            if not equals:
                raise ValueError(f"expected METRIC=DURATION, as ttft=500ms, got {word!r}")
            found[name.strip().removesuffix("_s")] = seconds(limit)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return found


OPTIONS: list[click.Parameter] = [
    click.Option(["--concurrency"], callback=_list(int), metavar="N,…", help="Closed loop: requests at once (1)."),
    click.Option(["--rate"], callback=_list(float), metavar="R,…", help="Open loop: requests a second."),
    click.Option(["--arrival"], type=click.Choice(["constant", "poisson", "gamma"]), default="poisson",
                 show_default=True, help="How the requests of --rate are spread."),
    click.Option(["--burstiness"], type=float, default=1.0, help="Shape of gamma arrivals: less is burstier."),
    click.Option(["--ramp"], callback=_ramp, metavar="FROM..TO", help="Open loop: a rate that grows over --duration."),
    click.Option(["--replay"], metavar="COLUMN", help="Open loop: the instants in this column (seconds or ISO times)."),
    click.Option(["--duration"], callback=_seconds, metavar="S", help="How long a stage admits requests: 30, 2m."),
    click.Option(["--requests"], type=int, metavar="N", help="Requests of a stage (default: each prompt once)."),
    click.Option(["--warmup"], type=int, default=0, metavar="N", help="First requests of a stage, in no figure."),
    click.Option(["--repeat"], type=int, default=1, metavar="N", help="Measure the whole list of loads so many times."),
    click.Option(["--slo"], callback=_slo, multiple=True, metavar="M=S,…",
                 help="Objectives for goodput: ttft=500ms,tpot=50ms (ttft, ttfo, tpot, latency, total, gap_max)."),
    click.Option(["--attainment"], type=float, default=0.95, show_default=True, metavar="SHARE",
                 help="Share of the requests that must meet --slo, for --find and --fail-on-slo."),
    click.Option(["--find"], type=click.Choice(["rate", "concurrency"]),
                 help="Look for the highest level that still meets --slo."),
    click.Option(["--fail-on-slo"], is_flag=True, help="Exit 3 when a stage does not meet --slo."),
]  # fmt: skip

_LEFT_OUT = ("max_failures", "retry_failed", "allow_append", "invalid", "spill_dir", "if_locked", "seed")


def _of_a_measurement(option: Option) -> bool:
    if option.section in ("limits", "retry"):
        return option.name.endswith("_timeout")
    return option.name not in _LEFT_OUT


def _bench(ctx: click.Context, prompts: str, fail_on_slo: bool) -> int:
    from batchstream.bench import run_bench
    from batchstream.shard import Hooks

    voice: Voice = ctx.obj
    job, bench = _job(ctx, prompts), _asked(ctx)
    if bench.replay is not None and job.keep != ("all",):
        job = msgspec.structs.replace(job, keep=(*job.keep, bench.replay))
    if fail_on_slo and not bench.slo:
        raise UsageError("--fail-on-slo fails where --slo is not met; give an objective")
    attune(ctx, job)
    watch = Watch(job, voice)
    outcome = run_bench(job, bench, watch=watch.during, hooks=Hooks(on_note=watch.say), handle_signals=True)
    return _conclude(job, bench, outcome, voice, fail_on_slo=fail_on_slo)


def _job(ctx: click.Context, prompts: str) -> Job:
    values = {name: value for name, value in given(ctx).items() if name != "concurrency"}
    seed = ctx.params["bench_seed"]
    values |= {"seed": seed} if seed else {}
    return load_job(prompts, values) if prompts.endswith(".toml") else make_job({"input": prompts, **values})


def _asked(ctx: click.Context) -> Bench:
    from batchstream.bench import Bench

    asked = {name: ctx.params[name] for name in Bench.__struct_fields__ if name != "seed"}
    return Bench(**asked, seed=ctx.params["bench_seed"])


def _conclude(job: Job, bench: Bench, outcome: Outcome, voice: Voice, *, fail_on_slo: bool) -> int:
    from batchstream.files import fsio
    from batchstream.report.stages import bench_json, render_bench

    code, message = outcome.exit_code, outcome.message
    if outcome.summary is not None:
        if not voice.quiet and voice.stream is not None and voice.log_format == "text":
            voice.write(render_bench(outcome.summary, columns(voice.stream)))
        elif not voice.quiet:
            voice.event("bench", "", {"summary": outcome.summary})
        data = bench_json(outcome.summary)
        fsio.replace_file(fsio.disk, summary_path(outcome.output), data, mode=0o666)
        if job.summary_json == "-":
            emit(data)
        elif job.summary_json is not None:
            fsio.replace_file(fsio.disk, Path(job.summary_json), data, mode=0o666)
        if code == 0 and fail_on_slo:
            missed = [s.name for s in outcome.summary.stages if s.goodput and s.goodput.attainment < bench.attainment]
            if missed:
                code, message = 3, f"--slo was not met at {', '.join(missed)}"
    if code:
        voice.error(again(message, code, "bench"), code)
    elif message != "finished":
        voice.note(message)
    return code


command = JobCommand(
    "bench",
    help=HELP,
    examples=EXAMPLES,
    params=[
        click.Argument(["prompts"]),
        *OPTIONS,
        click.Option(["--seed", "bench_seed"], type=int, default=0, metavar="S", help="Of schedules and of --sample."),
        *job_params(_of_a_measurement),
    ],
    callback=click.pass_context(lambda ctx, prompts, fail_on_slo, **_: _bench(ctx, prompts, fail_on_slo)),
)
