from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from taprobe_core.evaluation.intervals import adjust, benjamini_hochberg, holm, max_t

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(p_values)
def test_benjamini_hochberg_equals_scipys(p):
    assert benjamini_hochberg(p).tolist() == pytest.approx(
        stats.false_discovery_control(p).tolist()
    )


@given(p_values, st.floats(0.01, 0.5))
def test_holm_rejects_what_stepping_down_rejects(p, level):
    """The procedure as it was published: go on while the next smallest p is small enough."""
    rejected = set()
    for step, place in enumerate(np.argsort(p, kind="stable")):
        if p[place] > level / (len(p) - step):
            break
        rejected.add(int(place))
    found = {place for place, value in enumerate(holm(p)) if value <= level * (1 + 1e-12)}
    assert found == rejected


@given(p_values)
def test_an_adjusted_p_is_never_below_the_raw_one_and_keeps_the_order(p):
    for adjusted in (holm(p), benjamini_hochberg(p)):
        assert (adjusted >= np.array(p) - 1e-15).all()
        assert adjusted.max() <= 1
        order = np.argsort(p, kind="stable")
        assert (np.diff(adjusted[order]) >= -1e-15).all()


def test_undefined_tests_do_not_count():
    p = [0.01, np.nan, 0.04]
    assert holm(p).tolist() == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert benjamini_hochberg(p).tolist() == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert np.isnan(holm([np.nan])).all()
    assert holm([]).size == 0


def test_the_correction_is_chosen_by_name():
    p = [0.01, 0.02, 0.03]
    assert adjust(p, "none").tolist() == p
    assert adjust(p, "holm").tolist() == holm(p).tolist()
    assert adjust(p, "benjamini_hochberg").tolist() == benjamini_hochberg(p).tolist()


def test_max_t_counts_draws_whose_best_stands_as_high():
    """By hand: two configurations, one with a scale ten times the other's."""
    draws = np.array([[0.0, 1.0, -1.0, 2.0, -2.0], [0.0, -10.0, 10.0, 20.0, -20.0]])
    spread = np.sqrt(2.0)
    best = [0.0, 1 / spread, 1 / spread, 2 / spread, -2 / spread]
    observed = np.array([1.5, 30.0])
    expected = [(1 + sum(b >= t for b in best)) / 6 for t in (1.5 / spread, 3.0 / spread)]
    assert max_t(observed, draws).tolist() == pytest.approx(expected)
    assert expected == [2 / 6, 1 / 6]


def test_the_best_of_many_is_rarely_remarkable_by_chance():
    """200 studies without any effect: the smallest max-T p falls to 0.05 in about 5 % of them."""
    rng = np.random.default_rng(0)
    alone, best = 0, 0
    for _ in range(200):
        shared = rng.normal(size=(1, 201))
        values = 0.6 * shared + rng.normal(size=(20, 201)) * np.linspace(1, 5, 20)[:, None]
        observed, draws = values[:, 0], values[:, 1:]
        best += max_t(observed, draws).min() <= 0.05
        alone += ((1 + (draws >= observed[:, None]).sum(axis=1)) / 201).min() <= 0.05
    assert 2 <= best <= 20
    assert alone > 80


def test_configurations_without_value_or_spread_have_no_p():
    draws = np.random.default_rng(1).normal(size=(3, 50))
    draws[1], draws[2] = 0.0, np.nan
    found = max_t([3.0, 3.0, 3.0], draws)
    assert found[0] == pytest.approx(1 / 51, abs=0.02)
    assert np.isnan(found[1:]).all()
    assert np.isnan(max_t([np.nan], draws[:1])).all()
    assert np.isnan(max_t([0.3, 0.4], np.empty((2, 0)))).all()


def test_a_draw_that_equals_the_observed_value_counts_in_single_precision():
    draws = np.array([[0.1, 0.2, 0.3, 0.30000001]], dtype=np.float32)
    assert max_t([0.3], draws)[0] == pytest.approx(3 / 5)
