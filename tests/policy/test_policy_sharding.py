"""Whose row is whose: every row has one shard, by its ordinal alone; what schedulers say in the environment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchstream.policy.sharding import SHARD_ROWS, Shard, parse_shard, shard_from


@given(st.integers(1, 40), st.integers(0, 10**12))
def test_every_row_belongs_to_one_shard(of: int, row: int) -> None:
    assert sum(Shard(index, of).has(row) for index in range(1, of + 1)) == 1


@given(st.integers(1, 7), st.integers(0, 40 * SHARD_ROWS))
def test_a_shard_counts_its_rows_without_looking_at_them(of: int, total: int) -> None:
    for index in range(1, of + 1):
        shard = Shard(index, of)
        assert shard.count(total) == sum(map(shard.has, range(total)))


def test_a_shard_is_named_by_its_number_and_theirs() -> None:
    assert parse_shard("3/8") == Shard(3, 8)
    assert str(Shard(3, 8)) == "3/8"
    assert parse_shard("auto") is None


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "-1/4", "1/4/2", "a/b", "", "1 / 4"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected I/N"):
        parse_shard(text)


def slurm(**values: int) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environ", "shard"),
    [
        (slurm(ID=1, MIN=1, MAX=8, COUNT=8, STEP=1), Shard(1, 8)),
        (slurm(ID=7, MIN=0, MAX=7, COUNT=8, STEP=1), Shard(8, 8)),
        (slurm(ID=20, MIN=0, MAX=30, COUNT=4, STEP=10), Shard(3, 4)),
        (slurm(ID=2, MIN=1, MAX=3, COUNT=3), Shard(2, 3)),
        ({"JOB_COMPLETION_INDEX": "0", "BATCHSTREAM_SHARDS": "8"}, Shard(1, 8)),
        ({"JOB_COMPLETION_INDEX": "7", "BATCHSTREAM_SHARDS": "8"}, Shard(8, 8)),
    ],
)
def test_the_environment_of_a_scheduler_says_which_it_is(environ: dict[str, str], shard: Shard) -> None:
    assert shard_from(environ) == shard


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "finds neither"),
        ({"JOB_COMPLETION_INDEX": "0"}, "not BATCHSTREAM_SHARDS"),
        ({"JOB_COMPLETION_INDEX": "8", "BATCHSTREAM_SHARDS": "8"}, "below"),
        ({"JOB_COMPLETION_INDEX": "x", "BATCHSTREAM_SHARDS": "8"}, "whole number"),
        (slurm(ID=3, MIN=1, MAX=7, COUNT=3, STEP=1), "without gaps"),
        (slurm(ID=4, MIN=1, MAX=7, COUNT=4, STEP=2), "without gaps"),
        (slurm(ID=9, MIN=1, MAX=8, COUNT=8, STEP=1), "without gaps"),
        (slurm(ID=1), "whole number"),
    ],
)
def test_an_environment_that_leaves_it_open_is_refused(environ: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        shard_from(environ)
