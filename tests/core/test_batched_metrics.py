from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from taprobe_core.metrics import (
    centred_rank_rows,
    pearson_rows,
    pr_auc,
    pr_auc_at,
    pr_auc_rows,
    rank_rows,
    recall_at_k,
    recall_rows,
    spearman,
    spearman_rows,
    tie_end_rows,
    top_rows,
)

# Few distinct values, so that ties and constant rows are common.
matrices = st.tuples(
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(0, 10_000),
    st.sampled_from([np.float32, np.float64]),
)


def _draw(shape: tuple[int, int, int, int, type]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_units, n, n_values, seed, dtype = shape
    rng = np.random.default_rng(seed)
    scores = rng.integers(-n_values, n_values, size=(n_units, n)).astype(dtype) / 3
    target = rng.integers(-n_values, n_values, size=(n_units, n)) / 7
    return scores, target, rng.random((n_units, n)) < rng.random()


@settings(max_examples=80, deadline=None)
@given(matrices, st.integers(1, 12))
def test_each_row_equals_the_scalar_metric(shape, k):
    scores, target, positive = _draw(shape)
    ranking = rank_rows(scores)
    found = {
        "pr_auc": pr_auc_rows(positive, ranking),
        "spearman": spearman_rows(centred_rank_rows(target), ranking),
        "recall": recall_rows(top_rows(target, k), ranking, k),
    }
    for unit in range(len(scores)):
        expected = {
            "pr_auc": pr_auc(positive[unit], scores[unit]),
            "spearman": spearman(target[unit], scores[unit]),
            "recall": recall_at_k(target[unit], scores[unit], k),
        }
        for name, value in expected.items():
            assert found[name][unit] == pytest.approx(value, abs=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_average_precision_follows_from_the_positives_alone(shape):
    scores, _, positive = _draw(shape)
    ends = tie_end_rows(rank_rows(scores))
    for unit in range(len(scores)):
        at_least = [(scores[unit] >= score).sum() for score in scores[unit]]
        assert ends[unit].tolist() == at_least
        found = pr_auc_at(ends[unit, positive[unit]], scores.shape[1])
        expected = pr_auc(positive[unit], scores[unit])
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_both_precisions_rank_alike_and_zero_has_no_sign():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 60)).astype(np.float32)
    scores[:, ::7], scores[:, 1::7] = 0.0, -0.0
    single, double = rank_rows(scores), rank_rows(scores.astype(np.float64))
    for one, other in zip(single, double, strict=True):
        assert np.array_equal(one, other)
    assert single.has_ties.all()
    assert np.array_equal(single.of(np.array([3])).order, single.order[3:4])


def test_pearson_equals_scipys_and_constants_have_none():
    rng = np.random.default_rng(1)
    values, scores = rng.normal(size=(6, 20)), rng.normal(size=(6, 20)).astype(np.float32)
    values[4], scores[5] = 0.1, 0.1
    found = pearson_rows(values, scores)
    for unit in range(4):
        assert found[unit] == pytest.approx(pearsonr(values[unit], scores[unit])[0], abs=1e-6)
    assert np.isnan(found[4:]).all()
    assert np.isnan(pearson_rows(values[:, :1], scores[:, :1])).all()


def test_nothing_to_rank_has_no_value():
    none = rank_rows(np.empty((2, 0), np.float32))
    assert np.isnan(pr_auc_rows(np.empty((2, 0), bool), none)).all()
    assert np.isnan(spearman_rows(np.empty((2, 0)), none)).all()
    assert np.isnan(recall_rows(np.empty((2, 0), bool), none, 5)).all()
    assert np.isnan(pr_auc_at(np.empty((3, 0), np.int32), 5)).all()
    assert np.isnan(pr_auc_at(np.array([[1, 2]], np.int32), 2)).all()
