"""Which rows are whose, where several machines do a job's shards: blocks of rows, dealt out in turn.

The n-th block of `SHARD_ROWS` rows belongs to shard n modulo N, so every shard knows its rows without knowing how many
there are, and no shard is left with the long end of a sorted file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

SHARD_ROWS = 32
"""Rows of a block: what is read at once, and small enough to deal out short files evenly."""

COUNT_VARIABLE = "BATCHSTREAM_SHARDS"
"""How many there are, where the scheduler tells a task only its own number (Kubernetes)."""

_SLURM = "SLURM_ARRAY_TASK_"


class Shard(msgspec.Struct, frozen=True):
    """Number `index` (from 1) of the `of` shards of a job."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def has(self, row: int) -> bool:
        """Whether a row, by its ordinal, is this shard's."""
        return row // SHARD_ROWS % self.of == self.index - 1

    def count(self, total: int) -> int:
        """How many of the first `total` rows are this shard's."""
        blocks, rest = divmod(total, SHARD_ROWS)
        rounds, left = divmod(blocks, self.of)
        mine = (rounds + (self.index <= left)) * SHARD_ROWS
        return mine + (rest if self.index - 1 == left else 0)


def parse_shard(text: str) -> Shard | None:
    """``I/N`` with I from 1 to N; None for ``auto`` (`shard_from`). Raises ValueError."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return Shard(int(match[1]), int(match[2]))
    raise ValueError(f"expected I/N with I from 1 to N, or auto, got {text!r}")


def shard_from(environ: Mapping[str, str]) -> Shard:
    """The shard that the environment says: of a Slurm array, or of a Kubernetes Indexed Job. Raises ValueError.

    Slurm tells a task its number, and of the array the smallest and largest number, the step and how many there are.
    A Kubernetes pod knows only its index, from 0: `COUNT_VARIABLE` says how many.
    """
    if f"{_SLURM}ID" in environ:
        number, least = _number(environ, f"{_SLURM}ID"), _number(environ, f"{_SLURM}MIN")
        most, count = _number(environ, f"{_SLURM}MAX"), _number(environ, f"{_SLURM}COUNT")
        step = _number(environ, f"{_SLURM}STEP") if f"{_SLURM}STEP" in environ else 1
        if step < 1 or (number - least) % step or not least <= number <= most or (most - least) // step + 1 != count:
            raise ValueError(
                f"expected an array of numbers without gaps (--array=1-8), got number {number} of {count} between "
                f"{least} and {most}; name the shard itself: I/N"
            )
        return Shard((number - least) // step + 1, count)
    if "JOB_COMPLETION_INDEX" in environ:
        if COUNT_VARIABLE not in environ:
            raise ValueError(f"JOB_COMPLETION_INDEX is set, but not {COUNT_VARIABLE}: set it to the Job's completions")
        index, count = _number(environ, "JOB_COMPLETION_INDEX"), _number(environ, COUNT_VARIABLE)
        if not index < count:
            raise ValueError(f"expected JOB_COMPLETION_INDEX below {COUNT_VARIABLE}, got {index} and {count}")
        return Shard(index + 1, count)
    raise ValueError(
        f"auto finds neither a Slurm array ({_SLURM}ID) nor a Kubernetes Indexed Job (JOB_COMPLETION_INDEX) in the "
        "environment; name the shard itself: I/N"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"expected a whole number in {name}, got {text!r}")
    return int(text)
