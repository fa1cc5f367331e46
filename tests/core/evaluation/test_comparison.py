from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from taprobe_core.evaluation.intervals import (
    MIN_PROBLEMS,
    compare,
    compare_values,
    sign_flip_p,
    wilcoxon_p,
)
from taprobe_core.study.config import Evaluation

difference = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(difference, min_size=MIN_PROBLEMS, max_size=25),
    st.integers(0, 99),
    st.sampled_from(["bca", "percentile"]),
)
def test_an_interval_has_width_and_stays_inside_the_differences(values, seed, interval):
    differences = np.array(values)
    found = compare(differences, 500, seed, interval)
    assert found.delta == pytest.approx(differences.mean())
    assert found == compare(differences, 500, seed, interval)
    if found.delta_low is None:
        assert len(set(values)) == 1
        assert "equal" in str(found.interval_note)
        assert found.t_low is None
        return
    assert found.delta_low < found.delta_high
    assert differences.min() - 1e-12 <= found.delta_low
    assert found.delta_high <= differences.max() + 1e-12
    assert found.interval_note is None
    if interval == "percentile":
        assert found.delta_low - 1e-12 <= found.delta <= found.delta_high + 1e-12


@pytest.mark.parametrize(("interval", "method"), [("bca", "BCa"), ("percentile", "percentile")])
def test_the_bootstrap_agrees_with_scipys(interval, method):
    for seed in range(4):
        skewed = np.random.default_rng(seed).gamma(1.0, 0.1, size=20) - 0.05
        found = compare(skewed, 20_000, seed, interval)
        expected = stats.bootstrap(
            (skewed,), np.mean, method=method, n_resamples=20_000, rng=np.random.default_rng(9)
        ).confidence_interval
        width = expected.high - expected.low
        assert found.delta_low == pytest.approx(expected.low, abs=0.03 * width)
        assert found.delta_high == pytest.approx(expected.high, abs=0.03 * width)


def test_bca_moves_the_interval_of_skewed_differences_to_their_tail():
    skewed = np.random.default_rng(0).gamma(1.0, 0.1, size=20)
    plain, corrected = (compare(skewed, 20_000, 0, name) for name in ("percentile", "bca"))
    assert corrected.delta_low > plain.delta_low
    assert corrected.delta_high > plain.delta_high


def test_the_t_interval_equals_scipys():
    differences = np.random.default_rng(3).normal(0.1, 0.1, 12)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    found = compare(differences, 0, 0)
    assert (found.t_low, found.t_high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("interval", ["bca", "percentile"])
def test_the_interval_covers_a_known_mean_about_as_often_as_it_says(interval):
    rng = np.random.default_rng(5)
    samples = rng.normal(0.1, 0.1, size=(250, 14))
    found = [compare(sample, 300, seed, interval) for seed, sample in enumerate(samples)]
    covered = np.mean([each.delta_low <= 0.1 <= each.delta_high for each in found])
    assert 0.85 <= covered <= 0.98


def test_the_interval_has_the_width_of_95_percent():
    differences = np.random.default_rng(1).normal(0, 1, 400)
    found = compare(differences, 4000, 0)
    expected = 2 * 1.96 * differences.std(ddof=1) / 20
    assert found.delta_high - found.delta_low == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("n", "distinct"), [(1, 1), (2, 3), (3, 10), (5, 126)])
def test_few_problems_get_no_interval_but_a_reason(n, distinct):
    found = compare(np.full(n, 0.25), 2000, 0)
    assert (found.delta, found.delta_low, found.delta_high) == (0.25, None, None)
    assert found.interval_note == f"{n} problems have only {distinct} distinct resamples"
    assert found.p_sign_flip == 2 / 2**n


def test_no_problem_and_no_bootstrap_are_said():
    assert compare(np.empty(0), 2000, 0)[2:9] == (None,) * 7
    assert compare(np.empty(0), 2000, 0).interval_note == "no problem where both are defined"
    assert "n_bootstrap is 0" in str(compare(np.ones(9), 0, 0).interval_note)


def test_equal_recipes_differ_by_zero_and_have_no_interval():
    found = compare(np.zeros(12), 2000, 0)
    assert found[:7] == (12, 0, 0.0, None, None, None, None)
    assert (found.p_sign_flip, found.p_wilcoxon) == (1.0, 1.0)
    assert compare(np.full(12, 0.2), 2000, 0).delta_low is None


@settings(max_examples=40, deadline=None)
@given(st.lists(difference, min_size=1, max_size=9))
def test_sign_flips_equal_the_full_enumeration(values):
    observed = abs(sum(values))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    assert sign_flip_p(np.array(values)) == np.mean([each >= observed - 1e-9 for each in sums])


def test_twenty_problems_are_counted_out():
    """Brute force over all 2^20 patterns, one problem after another."""
    differences = np.random.default_rng(2).normal(0.03, 0.1, size=20)
    sums = np.zeros(1)
    for each in differences:
        sums = np.concatenate([sums + each, sums - each])
    expected = (np.abs(sums) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip_p(differences) == expected


def test_many_problems_use_random_flips_that_agree_with_the_exact_test():
    rng = np.random.default_rng(2)
    differences = np.append(rng.normal(0.03, 0.1, size=30), 0.0)
    assert sign_flip_p(differences, 1) == sign_flip_p(differences, 1)
    assert sign_flip_p(differences, 1) == pytest.approx(sign_flip_p(differences[:30]), abs=0.015)
    assert sign_flip_p(np.ones(40)) > 0


def test_wilcoxon_equals_scipys_and_leaves_zeros_out():
    differences = np.random.default_rng(4).normal(0.05, 0.1, 15)
    assert wilcoxon_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert wilcoxon_p(np.append(differences, [0.0, 0.0])) == pytest.approx(wilcoxon_p(differences))
    tied = np.array([0.1, 0.1, -0.1, 0.2, 0.2, 0.3, 0.4])
    assert wilcoxon_p(tied) == pytest.approx(stats.wilcoxon(tied, method="asymptotic").pvalue)
    assert wilcoxon_p(np.zeros(5)) == 1.0


def test_pairs_are_matched_by_problem_and_undefined_ones_left_out():
    own = pl.DataFrame({"problem_id": [1, 2, 3], "value": [0.5, 0.7, None]})
    other = pl.DataFrame({"problem_id": [3, 2, 9, 1], "value": [0.1, 0.2, 0.3, 0.6]})
    found = compare_values(own, other, Evaluation(n_bootstrap=10))
    assert (found.n_problems, found.n_better) == (2, 1)
    assert found.delta == pytest.approx((-0.1 + 0.5) / 2)
