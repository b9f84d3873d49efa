"""Percentiles are exact, refused where the sample cannot carry them, and their intervals hold what they promise."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchstream.figures import percentiles
from batchstream.figures.percentiles import Sample, interval_ranks, needed_for, quantile

microseconds = st.lists(st.integers(0, 2**33), min_size=1, max_size=200)
quantiles = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0])


def sample_of(values: list[int]) -> Sample:
    sample = Sample()
    for value in values:
        sample.add(value / 1e6)
    return sample


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=300))
def test_percentiles_are_those_of_the_definition_worked_out_by_another_hand(values):
    # The standard library's "inclusive" method is type 7 too.
    expected = statistics.quantiles(values, n=1000, method="inclusive")
    sample = sample_of(values)
    for per_mille in (500, 900, 950, 990, 999):
        got = sample.percentile(per_mille / 1000)
        if got is not None:
            assert got == pytest.approx(expected[per_mille - 1] / 1e6, abs=1e-6)
        assert quantile(sorted(values), per_mille / 1000) == pytest.approx(expected[per_mille - 1])


@given(microseconds, quantiles, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(values, q, rng):
    shuffled = rng.sample(values, len(values))
    one, other = sample_of(values), sample_of(shuffled)
    assert (one.percentile(q), one.interval(q)) == (other.percentile(q), other.interval(q))
    assert (one.min, one.max, one.mean) == (other.min, other.max, other.mean)


@given(microseconds, microseconds, quantiles)
def test_joined_samples_are_one_sample(left, right, q):
    joined, whole = sample_of(left), sample_of(left + right)
    joined.percentile(0.5)  # asked in between, so that a part is in order already
    joined.extend(sample_of(right))
    assert (joined.n, joined.mean, joined.max) == (whole.n, whole.mean, whole.max)
    assert (joined.percentile(q), joined.interval(q)) == (whole.percentile(q), whole.interval(q))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=100), quantiles, st.integers(1, 20), st.integers(0, 99))
def test_samples_larger_than_a_piece_are_just_as_exact(values, q, piece, asked_after):
    brute = sample_of(values)
    expected = (brute.percentile(q), brute.interval(q))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(percentiles, "_PIECE", piece)
        sample = sample_of(values[:asked_after])
        if sample.n:
            sample.percentile(0.5)
        sample.extend(sample_of(values[asked_after:]))
        assert (sample.percentile(q), sample.interval(q)) == expected


@pytest.mark.parametrize(("q", "needed"), [(0.5, 1), (0.9, 29), (0.95, 59), (0.99, 299), (0.999, 2995), (1.0, 1)])
def test_a_percentile_is_refused_below_the_sample_that_can_bound_it(q, needed):
    assert needed_for(q) == needed
    sample = sample_of([1_000_000] * (needed - 1))
    assert sample.percentile(q) is None
    assert sample.refused(q) == f"needs {needed:,} values, has {needed - 1:,}"
    sample.add(1.0)
    assert (sample.percentile(q), sample.refused(q)) == (1.0, None)


@pytest.mark.parametrize("q", [0.9, 0.95, 0.99, 0.999])
def test_the_refusal_is_where_the_interval_begins_to_exist(q):
    assert interval_ranks(needed_for(q) - 1, q) is None
    assert interval_ranks(needed_for(q), q) is not None


def test_a_median_of_few_values_is_given_without_an_interval():
    sample = sample_of([1_000_000, 2_000_000, 4_000_000, 8_000_000, 9_000_000])
    assert (sample.percentile(0.5), sample.interval(0.5)) == (4.0, None)
    sample.add(16.0)
    assert sample.interval(0.5) == (1.0, 16.0)


def test_an_empty_sample_has_no_figures():
    sample = Sample()
    sample.add(None)
    assert (sample.n, sample.min, sample.max, sample.mean, sample.percentile(0.5)) == (0, None, None, None, None)
    with pytest.raises(ValueError, match="at least one value"):
        quantile([], 0.5)


def test_a_duration_of_hours_keeps_its_microseconds():
    sample = sample_of([1, 2])
    sample.add(86_400.000001)
    assert (sample.n, sample.max, sample.min) == (3, 86_400.000001, 0.000001)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"duration of 0 s or more, got -1\.5"):
        Sample().add(-1.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 99"):
        Sample().percentile(99)


def binomial(n: int, k: int, q: float) -> float:
    return math.comb(n, k) * q**k * (1 - q) ** (n - k)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.99]))
def test_intervals_hold_95_percent_and_no_shorter_one_does(n, q):
    mass = [binomial(n, k, q) for k in range(n + 1)]
    sums = [0.0]
    for probability in mass:
        sums.append(sums[-1] + probability)

    def held(low: int, high: int) -> float:  # P(low <= count < high)
        return sums[high] - sums[low]

    ranks = interval_ranks(n, q)
    if ranks is None:
        assert held(1, n) < 0.95 + 1e-9
        return
    low, high = ranks
    assert 1 <= low < high <= n
    assert held(low, high) >= 0.95 - 1e-9
    shorter = high - low - 1
    assert all(held(s, s + shorter) < 0.95 + 1e-9 for s in range(1, n - shorter + 1))


def test_intervals_cover_the_truth_of_skewed_latencies():
    rng = random.Random(20)
    runs, n = 1000, 400
    missed = {0.5: 0, 0.9: 0, 0.99: 0}
    for _ in range(runs):
        sample = Sample()
        for _ in range(n):
            sample.add(rng.lognormvariate(-1.0, 0.8))
        for q in missed:
            low, high = sample.interval(q) or (math.inf, math.inf)
            truth = math.exp(-1.0 + 0.8 * statistics.NormalDist().inv_cdf(q))
            missed[q] += not low <= truth <= high
            assert low <= (sample.percentile(q) or 0.0) <= high
    assert all(misses <= 0.06 * runs for misses in missed.values()), missed


def test_the_interval_of_a_large_sample_is_as_narrow_as_theory_says():
    n = 1_000_000
    low, high = interval_ranks(n, 0.5) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(n * 0.25), rel=0.01)


def test_a_value_takes_about_four_bytes():
    sample = sample_of(list(range(100_000)))
    assert sample._values.itemsize * sample.n == 400_000
