"""From a job to an endpoint that answers: provider, key, model; the endpoints that a run starts itself.

A `--base-url` without a `--provider` is a stranger: it gets no key but one that is named, because the
default provider's key must not travel to another host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import msgspec

from batchstream.endpoints import multipliers
from batchstream.endpoints.credentials import Key, find_key, header_secrets
from batchstream.endpoints.providers import DEFAULT, SHUTTLEAI_PLANS, Provider, find
from batchstream.engine.client import Target
from batchstream.errors import UsageError
from batchstream.job import Job
from batchstream.policy.budget import Prices, parse_prices
from batchstream.policy.limits import Rates
from batchstream.policy.windows import MINUTE_S
from batchstream.records import Api

LOCAL_SLOTS = 8
"""Requests that the local model's server serves at once, at most."""


class Plan(msgspec.Struct, frozen=True):
    """What a job will talk to, before anything is started. `label` names the endpoint for people and for the
    job's identity; `rates` are the limits to keep, the user's or the provider's (`rates_of` knows more, once the
    endpoint can be asked); `prices` are the user's."""

    provider: Provider
    label: str
    api: Api
    model: str | None
    key: Key | None
    rates: Rates
    prices: Prices

    @property
    def rpm(self) -> float | None:
        """Requests a minute over all models, as far as known."""
        return self.rates.rpm if isinstance(self.rates.rpm, float | int) else None


def plan(job: Job, *, with_key: bool = True) -> Plan:
    """Raises UsageError for what makes no sense, StoppedError when the key is not there (`with_key` False: looks for
    none, for those who only want to check the rest)."""
    if job.base_url is not None:
        _check_url(job.base_url)
    provider = find(job.provider or DEFAULT) if job.base_url is None or job.provider else _stranger(job.base_url)
    if job.base_url is not None and provider.name in ("local", "sim"):
        raise UsageError(f"--provider {provider.name} is started by the run itself; leave --base-url out")
    if job.sim and provider.name != "sim":
        raise UsageError("--sim sets up the provider sim; add --provider sim")
    if job.model_file is not None and provider.name != "local":
        raise UsageError("--model-file is for the provider local; add --provider local")
    if job.plan is not None and not provider.limits.plans and provider.name != "sim" and job.base_url is None:
        raise UsageError(f"--plan is about ShuttleAI's plans, not {provider.name}'s; give --rpm")
    return Plan(
        provider=provider,
        label=job.base_url or provider.base_url or provider.name,
        api=job.api or provider.api,
        model=job.model or provider.default_model,
        key=find_key(job.api_key_env, job.api_key_file, provider.key_env) if with_key else None,
        rates=_rates(job, provider),
        prices=parse_prices(job.price),
    )


def secrets(job: Job, plan: Plan) -> tuple[str, ...]:
    """What must be written nowhere: the key, and what the job's own headers carry of that kind."""
    key = plan.key.secret if plan.key is not None else None
    return (*((key,) if key is not None else ()), *header_secrets(job.header))


def _rates(job: Job, provider: Provider) -> Rates:
    """What is known before the endpoint is asked."""
    weight = job.request_weight
    speedup = _speedup(job) if provider.name == "sim" else 1.0
    return Rates(
        rpm=job.rpm or (SHUTTLEAI_PLANS[job.plan] if job.plan else provider.limits.rpm),
        tpm=job.tpm,
        tpm_counts=job.tpm_counts,
        weights=weight if isinstance(weight, dict) else {"": weight} if weight else {},
        fixed=job.window == "fixed" if job.window else provider.limits.fixed_minute or job.plan is not None,
        minute=MINUTE_S / speedup,
        together=provider.limits.together or job.plan is not None,
    )


def _speedup(job: Job) -> float:
    """How fast the simulated endpoint's clock runs."""
    from batchstream.endpoints.simulate import make_config

    return make_config(job.sim).speedup


def known_rates(job: Job, plan: Plan) -> Rates:
    """The limits as far as they are known without asking anybody: with the models' weights that an earlier run kept."""
    limits, base_url = plan.provider.limits, plan.provider.base_url
    table = multipliers.cached(base_url) if limits.multipliers and base_url and job.request_weight is None else None
    return msgspec.structs.replace(plan.rates, weights=table) if table else plan.rates


async def rates_of(job: Job, plan: Plan, target: Target, note: Callable[[str], None]) -> Rates:
    """The limits to keep, with the models' weights where the endpoint tells them, and the minute's phase. `note` hears
    of what could not be learnt."""
    rates = msgspec.structs.replace(plan.rates, phase=(time.monotonic() - time.time()) % plan.rates.minute)
    if not plan.provider.limits.multipliers or job.request_weight is not None or not rates.known:
        return rates
    kept = plan.provider.base_url is not None
    table = await asyncio.to_thread(multipliers.cached, target.base_url) if kept else None
    if table is None:
        headers = {**target.request_headers(plan.api), "Accept": "application/json"}
        del headers["Content-Type"]
        try:
            table = await multipliers.ask(target.base_url, headers, ca_file=job.ca_file, trust_env=job.trust_env)
        except (OSError, ValueError) as error:
            note(
                f"GET /models/verbose: {error}; each request is taken to count as one (--request-weight says otherwise)"
            )
            return rates
        if kept:
            await asyncio.to_thread(multipliers.keep, target.base_url, table)
    return msgspec.structs.replace(rates, weights=table)


def slots_of(job: Job, plan: Plan) -> int | None:
    """Requests at once, where that is known: the user's number, or what the local model's server serves. None: to be
    found out."""
    if job.concurrency != "auto":
        return job.concurrency
    return LOCAL_SLOTS if plan.provider.name == "local" else None


@asynccontextmanager
async def opened(job: Job, plan: Plan) -> AsyncIterator[Target]:
    """The endpoint, running for as long as the context lasts."""
    headers = dict(job.header)
    key = plan.key.value if plan.key is not None else None
    base_url = job.base_url or plan.provider.base_url
    if base_url is not None:
        yield Target(base_url, key, headers)
    elif plan.provider.name == "sim":
        from batchstream.endpoints.simulate import Simulator, make_config

        simulator = Simulator(make_config(job.sim))
        base_url = await simulator.start()
        try:
            yield Target(base_url, key, headers)
        finally:
            await simulator.stop()
    else:
        from batchstream.endpoints.local import LocalServer

        server = LocalServer(model_file=job.model_file, parallel=min(slots_of(job, plan) or LOCAL_SLOTS, LOCAL_SLOTS))
        base_url = await asyncio.to_thread(server.start)
        try:
            yield Target(base_url, key, headers)
        finally:
            await asyncio.to_thread(server.stop)


def _stranger(base_url: str) -> Provider:
    return Provider(urlsplit(base_url).hostname or base_url, base_url, None, None)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--base-url: expected http(s)://HOST[:PORT]/v1, got {url!r}")
    if parts.username or parts.password:
        raise UsageError("--base-url holds a user or password; give credentials with --api-key-env or --header")
    if parts.query or parts.fragment:
        raise UsageError(f"--base-url: expected no ? or # part, got {url!r}")
