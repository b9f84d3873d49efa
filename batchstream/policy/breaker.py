"""When to stop the whole run instead of burning the remaining rows: pure counting."""

from __future__ import annotations

from batchstream.policy.retry import NOT_THE_ROWS
from batchstream.records import Failure

REFUSALS = 3
"""So many rows refused for the account's or the endpoint's sake, with no success between them."""

ALIKE_LIMIT = 20
"""So many rows given up in a row, all for the same reason and with no success between them."""

OF_THE_ROW = frozenset({"context_length", "content_filter"})
"""Kinds that speak about one row; a file may well be full of them."""


class Breaker:
    """Counts what ended in a row. `refused` and `row_failed` return the reason to stop, or None."""

    __slots__ = ("_alike", "_kind", "_refusals", "enabled")

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._refusals = 0
        self._alike = 0
        self._kind = ""

    def succeeded(self) -> None:
        self._refusals = self._alike = 0

    def refused(self, failure: Failure) -> str | None:
        """A row was given up for no fault of its own (`policy.retry.NOT_THE_ROWS`)."""
        self._refusals += 1
        if self.enabled and self._refusals >= REFUSALS:
            return f"{failure.kind}: {failure.message}"
        return None

    def row_failed(self, failure: Failure) -> str | None:
        """A row has been given up after its last attempt."""
        if not self.enabled or failure.kind in OF_THE_ROW or failure.kind in NOT_THE_ROWS:
            return None
        self._alike = self._alike + 1 if failure.kind == self._kind else 1
        self._kind = failure.kind
        if self._alike >= ALIKE_LIMIT:
            return f"{self._alike} rows failed in a row with {failure.kind}: {failure.message}"
        return None
