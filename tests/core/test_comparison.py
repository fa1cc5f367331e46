from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.comparison import MIN_PROBLEMS, compare, sign_flip_p

difference = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(difference, min_size=MIN_PROBLEMS, max_size=25), st.integers(0, 99))
def test_the_interval_holds_the_mean_and_stays_inside_the_differences(values, seed):
    differences = np.array(values)
    found = compare(differences, 500, seed)
    assert found.delta == pytest.approx(differences.mean())
    assert found.delta_low is not None
    assert found.delta_high is not None
    assert found.delta_low <= found.delta + 1e-12
    assert found.delta_high >= found.delta - 1e-12
    assert differences.min() - 1e-12 <= found.delta_low
    assert found.delta_high <= differences.max() + 1e-12
    assert found.interval_note is None
    assert found == compare(differences, 500, seed)


def test_the_interval_covers_a_known_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    samples = rng.normal(0.1, 0.1, size=(250, 14))
    found = [compare(sample, 300, seed) for seed, sample in enumerate(samples)]
    covered = np.mean([low <= 0.1 <= high for *_, low, high, _, _ in found])
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
    assert compare(np.empty(0), 2000, 0)[2:6] == (None, None, None, None)
    assert compare(np.empty(0), 2000, 0).interval_note == "no problem where both are defined"
    assert "n_bootstrap is 0" in str(compare(np.ones(9), 0, 0).interval_note)


def test_equal_recipes_differ_by_zero():
    found = compare(np.zeros(12), 2000, 0)
    assert found[:6] == (12, 0, 0.0, 0.0, 0.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(difference, min_size=1, max_size=9))
def test_sign_flips_equal_the_full_enumeration(values):
    observed = abs(sum(values))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    assert sign_flip_p(np.array(values)) == np.mean([each >= observed - 1e-9 for each in sums])


def test_many_problems_use_random_flips_that_agree_with_the_exact_test():
    rng = np.random.default_rng(2)
    differences = np.append(rng.normal(0.03, 0.1, size=20), 0.0)
    assert sign_flip_p(differences, 1) == sign_flip_p(differences, 1)
    assert sign_flip_p(differences, 1) == pytest.approx(sign_flip_p(differences[:20]), abs=0.015)
    assert sign_flip_p(np.ones(40)) > 0
