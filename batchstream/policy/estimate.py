"""What a job will take, before it is sent: requests, tokens, money, and the time that the known limits ask. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from batchstream.policy.budget import Price, Prices, price_of
from batchstream.policy.limits import Rates


class Estimate(msgspec.Struct, frozen=True):
    """`requests`: as the limits count them, by the models' weights; `cost`: None without prices for all rows;
    `seconds`: at the narrowest of the limits, None where none is known; `narrowest`: which that is, for people."""

    requests: float
    cost: float | None
    seconds: float | None
    narrowest: str


def estimate(
    rows: Mapping[str, int], prompt_tokens: float, answer_tokens: float, rates: Rates, prices: Prices
) -> Estimate:
    """`rows` by model ("" for those of unknown ones), the tokens of all of them. Retries come on top."""
    count = sum(rows.values())
    requests = sum(number * rates.weight(model) for model, number in rows.items())
    units = {"both": prompt_tokens + answer_tokens, "input": prompt_tokens, "output": answer_tokens}[rates.tpm_counts]
    takes: list[tuple[float, str]] = []
    if isinstance(rates.rpm, float | int):
        takes.append((requests / rates.rpm * 60, f"{rates.rpm:g} requests a minute"))
    if isinstance(rates.tpm, float | int):
        takes.append((units / rates.tpm * 60, f"{rates.tpm:g} tokens a minute"))
    for model, number in rows.items():
        if isinstance(rates.rpm, dict) and model in rates.rpm:
            limit = rates.rpm[model]
            takes.append((number * rates.weight(model) / limit * 60, f"{limit:g} requests a minute of {model}"))
        if isinstance(rates.tpm, dict) and model in rates.tpm:
            limit = rates.tpm[model]
            takes.append((units * number / count / limit * 60, f"{limit:g} tokens a minute of {model}"))
    seconds, narrowest = max(takes, default=(None, ""))
    cost: float | None = 0.0 if rows and prices else None
    for model, number in rows.items():
        price: Price | None = price_of(prices, model)
        if cost is None or price is None:
            cost = None
            break
        share = number / count
        cost += price.tokens(prompt_tokens * share, answer_tokens * share)
    return Estimate(requests, cost, seconds, narrowest)
