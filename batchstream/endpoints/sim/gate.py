"""Who may ask, and how often: key, plan, rate windows. Every refusal is a `Refusal`."""

from __future__ import annotations

from email.utils import formatdate

from batchstream.endpoints.sim.asks import Ask, Refusal
from batchstream.endpoints.sim.dialects import default_error
from batchstream.endpoints.sim.settings import SimulateConfig
from batchstream.endpoints.sim.windows import Window

NEEDS_PLAN = "shuttleai/auto"  # needs at least the plan basic (docs.shuttleai.com)


class Gate:
    """The account. `now` is wall-clock seconds: rate windows begin with the clock's minute."""

    def __init__(self, config: SimulateConfig) -> None:
        self._config = config
        minute, phase = 60.0 / config.speedup, config.window_phase or 0.0
        self._requests = _window(config.requests_per_minute, minute, phase)
        self._tokens = _window(config.tpm, minute, phase)
        self._day = _window(config.rpd, 1440 * minute, phase)

    def check_key(self, headers: dict[str, str]) -> None:
        """`Authorization: Bearer KEY`, or Anthropic's `x-api-key: KEY`."""
        given = headers.get("authorization")
        scheme, _, key = (given or "").partition(" ")
        if given is None and "x-api-key" in headers:
            scheme, key = "Bearer", headers["x-api-key"]
        key = key.strip()
        status = self._config.key_statuses.get(key)
        if status is not None:
            raise Refusal(status, default_error(status)[1], default_error(status)[0], status)
        if self._config.key is None:
            return
        if scheme.lower() != "bearer" or not key:
            raise Refusal(
                401, "API key missing or malformed; send 'Authorization: Bearer <key>'.", "authentication_error", 401
            )
        if key != self._config.key:
            raise Refusal(401, default_error(401)[1], "authentication_error", 401)

    def admit(self, ask: Ask, now: float) -> None:
        """Count the request against the windows, or refuse it. A refused one counts nothing."""
        if self._config.plan == "free" and ask.model == NEEDS_PLAN:
            raise Refusal(403, f"{ask.model} needs the plan basic.", "permission_error", 403)
        cost = self._config.models.get(ask.model, 1.0)
        tokens = ask.prompt_tokens + (ask.max_tokens or self._config.token_range[1]) * ask.choices
        bills = [
            (self._day, cost, "Daily limit exceeded"),
            (self._requests, cost, "requests per minute"),
            (self._tokens, tokens, "tokens per minute"),
        ]
        for window, price, name in bills:
            if window is not None and not window.fits(now, price):
                message = (
                    f"{name}."
                    if window is self._day
                    else f"Rate limit exceeded: {window.limit:g} {name}. Please wait until the next minute window."
                )
                raise Refusal(429, message, "rate_limit_error", 429, self._waiting(window.reset_in(now), now))
        for window, price, _ in bills:
            if window is not None:
                window.take(now, price)

    def headers(self, now: float) -> dict[str, str]:
        """The x-ratelimit headers, when they are asked for and there is a limit."""
        window = self._requests
        if window is None or not self._config.ratelimit_headers:
            return {}
        return {
            "x-ratelimit-limit-requests": f"{window.limit:g}",
            "x-ratelimit-remaining-requests": f"{int(window.remaining(now))}",
            "x-ratelimit-reset-requests": f"{window.reset_in(now):.3f}s",
        }

    def _waiting(self, seconds: float, now: float) -> dict[str, str]:
        style = self._config.retry_after
        if style == "seconds":
            return {"retry-after": f"{seconds:.3f}"}
        if style == "ms":
            return {"retry-after-ms": f"{seconds * 1000:.0f}"}
        # A date has whole seconds: the next one, or the client would come back too early.
        return {"retry-after": formatdate(now + seconds + 1, usegmt=True)} if style == "date" else {}


def _window(limit: float | None, length: float, phase: float) -> Window | None:
    return None if limit is None else Window(limit, length, phase)
