"""The endpoints we know by name: where they are, which variable holds the key, what they allow.

Pure data from the providers' public documentation. A limit that depends on the account's plan is
not guessed: `limits` then lists the plans, and the user says `--rpm`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from batchstream.errors import UsageError
from batchstream.records import Api


class Limits(msgspec.Struct, frozen=True):
    """`rpm`: requests a minute that hold for every account, or None. `plans`: requests a minute by
    plan, where the provider publishes them. `fixed_minute`: the window is the wall-clock minute,
    so a refused request may be asked again when the next minute begins. `together`: all models share
    the account's limits. `multipliers`: GET /models/verbose says how many requests one of a model counts for."""

    rpm: float | None = None
    plans: Mapping[str, float] = {}
    fixed_minute: bool = False
    together: bool = False
    multipliers: bool = False


class Provider(msgspec.Struct, frozen=True):
    """One endpoint. `base_url` is None when the endpoint is started by the run (`local`, `sim`);
    `key_env` is None when it takes no key; `default_model` is None when the user must name one."""

    name: str
    base_url: str | None
    key_env: str | None
    default_model: str | None
    api: Api = "chat"
    limits: Limits = Limits()
    notes: str = ""


SHUTTLEAI_PLANS: Mapping[str, float] = MappingProxyType({"free": 2, "basic": 10, "premium": 30, "scale": 80})
"""Requests a minute (docs.shuttleai.com); a call costs the model's `request_multiplier` of them."""

_ALL = (
    Provider(
        "shuttleai",
        "https://api.shuttleai.com/v1",
        "SHUTTLEAI_API_KEY",
        "shuttleai/auto",
        limits=Limits(plans=SHUTTLEAI_PLANS, fixed_minute=True, together=True, multipliers=True),
        notes="Requests a minute by plan: free 2, basic 10, premium 30, scale 80, divided by the model's"
        " request_multiplier (GET /models/verbose). shuttleai/auto needs the plan basic."
        " A 429 states no wait: the next wall-clock minute opens the window again.",
    ),
    Provider(
        "openai", "https://api.openai.com/v1", "OPENAI_API_KEY", "gpt-4o-mini", notes="Limits depend on the tier."
    ),
    Provider(
        "openrouter",
        "https://openrouter.ai/api/v1",
        "OPENROUTER_API_KEY",
        "openrouter/auto",
        notes="Sends keep-alive comments while a model queues; limits depend on model and credit.",
    ),
    Provider(
        "groq",
        "https://api.groq.com/openai/v1",
        "GROQ_API_KEY",
        "openai/gpt-oss-20b",
        notes="Limits depend on plan and model; they are stated in x-ratelimit-* headers.",
    ),
    Provider(
        "deepseek",
        "https://api.deepseek.com/v1",
        "DEEPSEEK_API_KEY",
        "deepseek-v4-flash",
        notes="No stated rate limit; keep-alive comments for as long as a request queues.",
    ),
    Provider(
        "local",
        None,
        None,
        "smollm2-135m-instruct",
        notes="A real small model served by llama.cpp on this machine (extra `local`); --model-file for other weights.",
    ),
    Provider(
        "sim",
        None,
        None,
        "sim",
        limits=Limits(together=True, multipliers=True),
        notes="The simulated endpoint, started inside the run (`batchstream simulate`).",
    ),
)

PROVIDERS: Mapping[str, Provider] = MappingProxyType({provider.name: provider for provider in _ALL})
DEFAULT = "shuttleai"


def find(name: str) -> Provider:
    """The provider called `name`. Raises `UsageError` naming the nearest one."""
    provider = PROVIDERS.get(name)
    if provider is None:
        close = difflib.get_close_matches(name.lower(), PROVIDERS, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(
            f"provider: expected one of {', '.join(PROVIDERS)}, got {name!r}{hint}; for others give --base-url"
        )
    return provider
