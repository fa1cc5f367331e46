from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

from taprobe_core.metrics import (
    pooled_pr_auc,
    pr_auc,
    pr_auc_trapezoid,
    problem_metrics,
    recall_at_k,
    spearman,
)

# Few distinct scores, so that ties are common.
scores = st.integers(-5, 5).map(lambda value: value / 4)
rows = st.lists(st.tuples(st.booleans(), scores), min_size=2, max_size=60)
pairs = st.lists(st.tuples(scores, scores), min_size=2, max_size=60)


@given(rows, st.sampled_from([np.float32, np.float64]))
def test_both_areas_equal_scikit_learns(rows: list[tuple[bool, float]], dtype: type) -> None:
    y, score = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype)
    assume(0 < y.sum() < len(y))

    assert pr_auc(y, score) == pytest.approx(average_precision_score(y, score), abs=1e-12)
    precision, recall, _ = precision_recall_curve(y, score)
    assert pr_auc_trapezoid(y, score) == pytest.approx(auc(recall, precision), abs=1e-12)


@given(pairs)
def test_spearman_equals_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    assume(len(set(a)) > 1 and len(set(b)) > 1)

    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


@given(pairs, st.integers(1, 70))
def test_recall_is_the_overlap_of_two_top_lists(pairs: list[tuple[float, float]], k: int) -> None:
    importance, score = np.abs(np.array(pairs).T)
    cut = min(k, len(pairs))
    best, found = (
        set(sorted(range(len(pairs)), key=lambda row: (-values[row], row))[:cut])
        for values in (importance, score)
    )

    assert recall_at_k(importance, score, k) == len(best & found) / cut


def test_recall_gives_ties_to_the_earlier_row() -> None:
    assert recall_at_k([0.2, 0.2, 0.2], [1.0, 1.0, 1.0], 1) == 1.0
    assert recall_at_k([0.2, 0.2, 0.2], [0.0, 1.0, 1.0], 1) == 0.0


def test_a_perfect_and_the_worst_ranking() -> None:
    y = np.array([False, True, False, True])

    assert pr_auc(y, [1.0, 3.0, 0.0, 2.0]) == 1.0
    assert pr_auc(y, [3.0, 1.0, 2.0, 0.0]) == pytest.approx((1 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize(
    "value",
    [
        pr_auc([True, True], [0.1, 0.2]),
        pr_auc([False, False], [0.1, 0.2]),
        pr_auc([], []),
        pr_auc_trapezoid([False], [0.1]),
        spearman([1.0], [2.0]),
        spearman([], []),
        spearman([1.0, 1.0], [1.0, 2.0]),
        recall_at_k([], [], 5),
    ],
)
def test_what_has_no_value_is_nan(value: float) -> None:
    assert math.isnan(value)


@pytest.fixture
def frame() -> pl.DataFrame:
    """Two problems, their rows interleaved; problem 3 has no anchor and constant scores."""
    rng = np.random.default_rng(0)
    signed = rng.uniform(-1, 1, 24)
    problem_id = np.tile([9, 9, 3], 8)
    return pl.DataFrame(
        {
            "problem_id": problem_id,
            "importance_abs": np.abs(signed),
            "importance_signed": signed,
            "is_anchor": (np.abs(signed) > 0.7) & (problem_id == 9),
            "score": np.where(problem_id == 9, rng.normal(size=24), 0.5).astype(np.float32),
        }
    )


def test_one_row_per_problem(frame: pl.DataFrame) -> None:
    table = problem_metrics(frame, recall_at=(2, 5))

    nine = frame.filter(pl.col("problem_id") == 9)
    assert table["problem_id"].to_list() == [3, 9]
    assert table["n_sentences"].to_list() == [8, 16]
    assert table["n_anchors"].to_list() == [0, nine["is_anchor"].sum()]
    row = table.row(1, named=True)
    assert row["pr_auc"] == pr_auc(nine["is_anchor"], nine["score"])
    assert row["spearman"] == spearman(nine["importance_abs"], nine["score"])
    assert row["recall_at_2"] == recall_at_k(nine["importance_abs"], nine["score"], 2)
    undefined = table.row(0, named=True)
    assert math.isnan(undefined["pr_auc"])
    assert math.isnan(undefined["spearman"])
    assert table.null_count().sum_horizontal().item() == 0


def test_scores_of_signed_importance_rank_no_anchors(frame: pl.DataFrame) -> None:
    row = problem_metrics(frame, (5,), target="importance_signed").row(1, named=True)

    nine = frame.filter(pl.col("problem_id") == 9)
    assert row["spearman"] == spearman(nine["importance_signed"], nine["score"])
    assert math.isnan(row["pr_auc"])
    assert math.isnan(row["recall_at_5"])


def test_no_problems_give_an_empty_table_of_the_same_columns(frame: pl.DataFrame) -> None:
    assert problem_metrics(frame.clear()).schema == problem_metrics(frame).schema


def test_pooling_is_over_all_sentences(frame: pl.DataFrame) -> None:
    assert pooled_pr_auc(frame) == pr_auc(frame["is_anchor"], frame["score"])
