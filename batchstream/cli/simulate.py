"""`batchstream simulate`: the simulated endpoint in a process of its own; its flags are `SimulateConfig`'s fields."""

from __future__ import annotations

from typing import Any

import click
import msgspec
from click.core import ParameterSource

from batchstream.cli.voice import Voice
from batchstream.endpoints.sim.settings import SimulateConfig, make_config

TEXTS = {
    "ttft": ("S", "Seconds to the first token: 0.2, 0.1..0.3, exp(0.2) or lognormal(0.2,0.5)."),
    "gap": ("S", "Seconds between two tokens, likewise; 0 = as fast as they go."),
    "jitter": ("S", "Added to each gap: uniform between 0 and S."),
    "role_early": ("BOOL", "Response head and role at once, before the first token."),
    "burst": ("N", "Events in one write when gap and jitter are 0."),
    "seed": ("N", "Answers, delays and random faults derive from it."),
    "tokens": ("N|N..M", "Length of an answer."),
    "context_length": ("N", "Longer requests are refused."),
    "apis": ("API,…", "The APIs to serve."),
    "models": ("NAME=MULTIPLIER", "A model, and what a request costs of the rate limit; repeatable."),
    "only_known": ("BOOL", "Refuse other models with 404."),
    "key": ("TEXT", "The only accepted key (of this simulation; no real one)."),
    "key_statuses": ("KEY=STATUS", "A key that is always refused with this status; repeatable."),
    "plan": ("NAME", "ShuttleAI's plan: free, basic, premium or scale; sets requests a minute."),
    "rpm": ("N", "Requests a minute."),
    "tpm": ("N", "Tokens a minute."),
    "rpd": ("N", "Requests a day."),
    "at_once": ("N", "Requests in flight beyond which the next one gets a 429."),
    "speedup": ("X", "A minute of the rate windows lasts 60/X seconds."),
    "window_phase": ("S", "Rate windows begin S seconds after the wall-clock minute."),
    "retry_after": ("FORM", "What a 429 of the rate windows states: none, seconds, ms or date."),
    "ratelimit_headers": ("BOOL", "x-ratelimit-* headers on every response."),
    "faults": ("FAULT", "What goes wrong, and when: 429=0.05, 500@17, truncate(k=3)=0.1, stall~TEXT; repeatable."),
    "mark_header": ("NAME", "A request header to note in the ledger."),
    "ledger_limit": ("N", "Keep only the latest N requests in the ledger."),
}
"""For each field of `SimulateConfig` its metavar and its line of help."""

REPEATED = ("faults", "apis", "models", "key_statuses")

EXAMPLES = """
batchstream simulate --port 8080
batchstream simulate --ttft 0.3 --gap 0.02 --tokens 32..256
batchstream simulate --plan premium --speedup 60
batchstream simulate --fault 429=0.05 --fault truncate=0.05 --fault reset=0.02 --seed 7
"""


def _options() -> list[click.Parameter]:
    found: list[click.Parameter] = []
    for field in msgspec.structs.fields(SimulateConfig):
        metavar, text = TEXTS[field.name]
        flag = "--fault" if field.name == "faults" else "--" + field.name.replace("_", "-")
        shown = isinstance(field.default, (int, float, str)) and not field.required
        found.append(
            click.Option(
                [flag, field.name],
                metavar=metavar,
                help=text + (f"  [default: {field.default}]" if shown else ""),
                multiple=field.name in REPEATED,
            )
        )
    return found


@click.command(
    "simulate",
    help="""Serve an OpenAI-compatible endpoint on this machine that only pretends: four APIs, seeded answers and
    delays, rate limits like ShuttleAI's, and faults on demand. The first line on stdout is its base URL.

    GET /sim/ledger tells what was asked, GET /sim/stats counts it, POST /sim/reset forgets it. Ends with Ctrl-C.
    """,
    epilog="\b\nExamples:" + EXAMPLES.rstrip().replace("\n", "\n  "),
    params=[
        click.Option(["--host"], default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen."),
        click.Option(
            ["--port"],
            type=click.IntRange(0, 65535),
            default=8080,
            show_default=True,
            metavar="N",
            help="The port; 0 takes a free one.",
        ),
        *_options(),
    ],
)
@click.pass_context
def command(ctx: click.Context, /, host: str, port: int, **values: Any) -> None:
    from batchstream.endpoints.simulate import serve

    given = {
        name: value for name, value in values.items() if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    for name in ("models", "key_statuses"):
        if name in given:
            given[name] = {key: value for key, _, value in (text.rpartition("=") for text in given[name])}
    if "apis" in given:
        given["apis"] = ",".join(given["apis"])
    config = make_config(given)
    voice: Voice = ctx.obj
    voice.note(f"simulating on {host}; Ctrl-C ends it")
    serve(config, host, port)
