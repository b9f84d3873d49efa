"""What stored results have cost by the prices given: a fold over their usages, failed attempts included."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from batchstream.policy.budget import Prices, price_of
from batchstream.records import Usage


class _Retry(msgspec.Struct):
    usage: Usage | None = None


class _Row(msgspec.Struct):
    model: str | None = None
    usage: Usage | None = None
    retries: list[_Retry] = []


_decode = msgspec.json.Decoder(_Row).decode


def cost_of(results: Iterable[bytes], prices: Prices, model: str | None) -> float:
    """Money for all `results` (each the JSON object of a row) whose usage is known. `model`: the job's; where its price
    stands under that name only, it is also that of the name the endpoint gave."""
    total = 0.0
    for result in results:
        row = _decode(result)
        price = price_of(prices, row.model or "") or price_of(prices, model or "")
        if price is not None:
            total += sum(price.of(usage) for usage in (row.usage, *(retry.usage for retry in row.retries)) if usage)
    return total
