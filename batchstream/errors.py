"""The one exception tree. Exceptions are for the caller's mistakes and for the machine's refusals;
what goes wrong with a single row is a `records.Failure`.

Each class carries the exit code of the command line (README, "Exit codes"). A message is one line:
what was expected, what came, what to do.
"""

from __future__ import annotations


class BatchstreamError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code: int = 1


class UsageError(BatchstreamError):
    """An option, a job file or a call of the API is wrong."""

    exit_code = 2


class StoppedError(BatchstreamError):
    """The run stopped by itself: key, payment, suspended account, endpoint down, too many failures."""

    exit_code = 4


class BudgetError(BatchstreamError):
    """The run stopped at a limit the user set (time, tokens, cost), or at a daily limit of the provider."""

    exit_code = 5


class InputError(BatchstreamError):
    """The input is missing, unreadable or malformed."""

    exit_code = 10


class LockedError(BatchstreamError):
    """Another run holds the job."""

    exit_code = 11


class IdentityError(BatchstreamError):
    """The input or the job differs from what the journal was begun with."""

    exit_code = 12


class DamagedError(BatchstreamError):
    """The journal is damaged before its durable mark."""

    exit_code = 13


class StorageError(BatchstreamError):
    """The disk refused: full, read-only, I/O error."""

    exit_code = 14
