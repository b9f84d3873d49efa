"""From a job to an endpoint that answers: provider, key, model; the endpoints that a run starts itself.

A `--base-url` without a `--provider` is a stranger: it gets no key but one that is named, because the
default provider's key must not travel to another host.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import msgspec

from batchstream.endpoints.credentials import Key, find_key, header_secrets
from batchstream.endpoints.providers import DEFAULT, Provider, find
from batchstream.engine.client import Target
from batchstream.errors import UsageError
from batchstream.job import Job
from batchstream.records import Api


class Plan(msgspec.Struct, frozen=True):
    """What a job will talk to, before anything is started. `label` names the endpoint for people and for the
    job's identity; `rpm` is the limit to keep, the user's or the provider's."""

    provider: Provider
    label: str
    api: Api
    model: str | None
    key: Key | None
    rpm: float | None


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
    return Plan(
        provider=provider,
        label=job.base_url or provider.base_url or provider.name,
        api=job.api or provider.api,
        model=job.model or provider.default_model,
        key=find_key(job.api_key_env, job.api_key_file, provider.key_env) if with_key else None,
        rpm=job.rpm or provider.limits.rpm,
    )


def secrets(job: Job, plan: Plan) -> tuple[str, ...]:
    """What must be written nowhere: the key, and what the job's own headers carry of that kind."""
    key = plan.key.secret if plan.key is not None else None
    return (*((key,) if key is not None else ()), *header_secrets(job.header))


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

        server = LocalServer(model_file=job.model_file, parallel=min(job.concurrency, 8))
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
