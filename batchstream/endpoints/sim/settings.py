"""Every setting of the simulated endpoint, once: for the command line, for job files and for tests."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from batchstream.endpoints.providers import SHUTTLEAI_PLANS
from batchstream.endpoints.sim.faultplan import parse_faults
from batchstream.endpoints.sim.latency import parse_distribution
from batchstream.errors import UsageError
from batchstream.records import APIS, Api

_TOKENS = re.compile(r"(\d+)(?:\.\.(\d+))?")

MODELS: Mapping[str, float] = MappingProxyType({"sim": 1.0, "sim/double": 2.0, "shuttleai/auto": 1.0})
KEY_STATUSES: Mapping[str, int] = MappingProxyType(
    {"shuttle-nofunds": 402, "shuttle-plan": 403, "shuttle-suspended": 423}
)


class SimulateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the simulated endpoint answers, how fast, what it allows and what goes wrong.

    Latency (texts as in `latency`, or seconds):
        ttft          from the request to the first generated token
        gap           between two tokens of a stream; 0 = as fast as they go
        jitter        added to each gap, uniform between 0 and this many seconds
        role_early    the response head and the events before the first token go out at once (True),
                      or together with the first token
        burst         events in one write when gap and jitter are 0
    Answers:
        seed          answers, delays and random faults all derive from it
        tokens        natural length of an answer: "64" or "16..128"; a smaller max_tokens cuts it
        context_length  tokens of prompt and max_tokens together beyond which a request is refused
        apis          the APIs that are served; others answer 404
        models        known models and their request multipliers
        only_known    refuse other models with 404
    Account:
        key           the only accepted key; None = any key, or none
        key_statuses  keys that are always refused, and the status they get
        plan          ShuttleAI's plans: sets requests a minute, `free` may not use shuttleai/auto
        rpm, tpm, rpd requests and tokens a minute, requests a day; rpm wins over the plan's
        at_once       requests in flight beyond which the next one gets a 429 without a stated wait
        speedup       a minute of the rate windows lasts 60/speedup seconds
        window_phase  None: windows begin with the wall-clock minute; else seconds they begin after it
        retry_after   what a 429 of the rate windows states: none, seconds, ms (retry-after-ms) or date
        ratelimit_headers  x-ratelimit-{limit,remaining,reset}-requests on every response
    Trouble:
        faults        see `faultplan`
    Ledger:
        mark_header   a request header to note, for telling rows apart
        ledger_limit  keep only so many latest entries (totals go on counting); None = all
    """

    ttft: float | str = 0.0
    gap: float | str = 0.0
    jitter: float = 0.0
    role_early: bool = True
    burst: int = 32
    seed: int = 0
    tokens: int | str = 64
    context_length: int = 131_072
    apis: tuple[Api, ...] = APIS
    models: dict[str, float] = msgspec.field(default_factory=lambda: dict(MODELS))
    only_known: bool = False
    key: str | None = None
    key_statuses: dict[str, int] = msgspec.field(default_factory=lambda: dict(KEY_STATUSES))
    plan: Literal["free", "basic", "premium", "scale"] | None = None
    rpm: float | None = None
    tpm: float | None = None
    rpd: float | None = None
    at_once: int | None = None
    speedup: float = 1.0
    window_phase: float | None = None
    retry_after: Literal["none", "seconds", "ms", "date"] = "none"
    ratelimit_headers: bool = False
    faults: tuple[str, ...] = ()
    mark_header: str = "x-client-request-id"
    ledger_limit: int | None = None

    def __post_init__(self) -> None:
        parse_distribution(self.ttft, "ttft")
        parse_distribution(self.gap, "gap")
        _ = self.token_range
        parse_faults(self.faults)
        for name in ("burst", "speedup", "context_length", "rpm", "tpm", "rpd", "at_once", "ledger_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}: expected a number above 0, got {value!r}")
        for name in ("jitter", "window_phase"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name}: expected 0 or more seconds, got {value!r}")

    @property
    def token_range(self) -> tuple[int, int]:
        """Least and greatest natural length of an answer, in tokens."""
        match = _TOKENS.fullmatch(str(self.tokens).strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise UsageError(f"tokens: expected a number as 64 or a range as 16..128, at least 1, got {self.tokens!r}")
        return low, high

    @property
    def requests_per_minute(self) -> float | None:
        if self.rpm is None and self.plan is not None:
            return SHUTTLEAI_PLANS[self.plan]
        return self.rpm


def make_config(values: Mapping[str, Any]) -> SimulateConfig:
    """Settings from plain values, as a job file or `K=V` on a command line gives them: numbers may be
    texts, `faults` may be one text with `;` between the faults. Raises `UsageError`."""
    fields = {field.name: field.type for field in msgspec.structs.fields(SimulateConfig)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UsageError(f"simulate: unknown setting {name!r}{hint}; settings are {', '.join(fields)}")
        if name in ("faults", "apis") and isinstance(value, str):
            value = [part.strip() for part in value.split(";" if name == "faults" else ",") if part.strip()]
        try:
            found[name] = msgspec.convert(value, fields[name], strict=False)
        except msgspec.ValidationError as error:
            reason = str(error)
            raise UsageError(f"simulate: {name}: {reason[0].lower()}{reason[1:]}, got {value!r}") from None
    return SimulateConfig(**found)
