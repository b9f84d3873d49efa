"""`check --ping`: does the endpoint answer, take the key, know the model? GET /models, which costs nothing."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import msgspec

from batchstream.connect import opened
from batchstream.errors import InputError, StoppedError

if TYPE_CHECKING:
    from batchstream.connect import Plan
    from batchstream.job import Job

TIMEOUT_S = 30.0
BODY_MAX = 16 << 20


def ping(job: Job, plan: Plan) -> str:
    """Ask, and say what was learnt on one line. Raises StoppedError when a run would not get through."""
    return asyncio.run(_ping(job, plan))


async def _ping(job: Job, plan: Plan) -> str:
    import aiohttp

    try:
        tls: ssl.SSLContext | bool = ssl.create_default_context(cafile=job.ca_file) if job.ca_file else True
    except OSError as error:
        raise InputError(f"{job.ca_file}: cannot read the certificates: {error.strerror or error}") from None
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S, connect=job.connect_timeout)
    async with opened(job, plan) as target:
        url = f"{target.base_url.rstrip('/')}/models"
        headers = {**target.request_headers(plan.api), "Accept": "application/json"}
        del headers["Content-Type"]
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=job.trust_env) as session,
                session.get(url, headers=headers, allow_redirects=False, ssl=tls) as response,
            ):
                status, body = response.status, await response.content.read(BODY_MAX)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise StoppedError(f"GET {url}: {type(error).__name__}: {error}") from None
    return _judged(url, status, body, plan)


def _judged(url: str, status: int, body: bytes, plan: Plan) -> str:
    if status in (404, 405, 501):
        return f"GET {url}: {status}: this endpoint answers, but lists no models"
    if status != 200:
        whose = f"the key is from {plan.key.origin}" if plan.key else "no key was sent"
        raise StoppedError(f"GET {url}: {status}: {_message(body)}; {whose}")
    models = _models(body)
    if models is None:
        raise StoppedError(f"GET {url}: expected a list of models, got {body[:80].decode('utf-8', 'replace')!r}")
    if plan.model is None:
        return f"answers, {len(models)} models"
    known = "it has" if plan.model in models else "but does not list"
    return f"answers, {len(models)} models; {known} {plan.model}"


def _models(body: bytes) -> set[str] | None:
    found = _decoded(body)
    items = found.get("data") if isinstance(found, dict) else found
    if not isinstance(items, list):
        return None
    return {item["id"] for item in items if isinstance(item, dict) and isinstance(item.get("id"), str)}


def _message(body: bytes) -> str:
    """What an error body says, in the shapes that endpoints use."""
    found = _decoded(body)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found[:300] if isinstance(found, str) else body[:300].decode("utf-8", "replace")


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
