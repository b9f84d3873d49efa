"""How many requests one of a model counts for: `request_multiplier` of GET /models/verbose, kept in the user's cache.

Only ShuttleAI (and the simulated endpoint) tell it. It changes rarely, so an answer is good for a day. Not to get it is
no reason not to run: the caller says so and goes on with 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import ssl
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

FRESH_S = 86_400.0
TIMEOUT_S = 10.0
BODY_MAX = 16 << 20


def cache_file(base_url: str) -> Path:
    """$XDG_CACHE_HOME/batchstream/multipliers-….json, else below ~/.cache; one for each endpoint."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    name = f"multipliers-{hashlib.sha256(base_url.encode()).hexdigest()[:12]}.json"
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "batchstream" / name


def cached(base_url: str) -> dict[str, float] | None:
    """What an earlier run was told, unless that is too long ago."""
    path = cache_file(base_url)
    try:
        if not 0 <= time.time() - path.stat().st_mtime < FRESH_S:
            return None
        return msgspec.json.decode(path.read_bytes(), type=dict[str, float])
    except (OSError, msgspec.DecodeError):
        return None


async def ask(
    base_url: str, headers: dict[str, str], *, ca_file: str | None = None, trust_env: bool = False
) -> dict[str, float]:
    """Ask the endpoint. Raises OSError or ValueError, saying why it could not be learnt."""
    import aiohttp

    tls: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca_file) if ca_file else True
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=trust_env) as session,
            session.get(
                f"{base_url.rstrip('/')}/models/verbose", headers=headers, allow_redirects=False, ssl=tls
            ) as said,
        ):
            status, body = said.status, await said.content.read(BODY_MAX)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    if status != 200:
        raise ValueError(f"HTTP {status}")
    return multipliers(body)


def multipliers(body: bytes) -> dict[str, float]:
    """By model, from the body of GET /models/verbose. Raises ValueError for anything else."""
    try:
        found: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        raise ValueError("no JSON") from None
    items = found.get("data") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise ValueError("no list of models")
    table = {}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("id"), str):
            factor = item.get("request_multiplier")
            if isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < 1000:
                table[item["id"]] = float(factor)
    return table


def keep(base_url: str, table: dict[str, float]) -> None:
    """Into the cache; a cache that cannot be written costs a request next time, no more."""
    path = cache_file(base_url)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
            scratch.write(msgspec.json.encode(table))
        os.replace(scratch.name, path)
