from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from taprobe_core.metrics import metric_names, pr_auc, primary_metric, recall_at_k, spearman

# Few distinct scores, so that ties are common.
scores = st.integers(-5, 5).map(lambda value: value / 4)
rows = st.lists(st.tuples(st.booleans(), scores), min_size=2, max_size=60)
pairs = st.lists(st.tuples(scores, scores), min_size=2, max_size=60)


@given(rows, st.sampled_from([np.float32, np.float64]))
def test_the_area_equals_scikit_learns(rows: list[tuple[bool, float]], dtype: type) -> None:
    y, score = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype)
    assume(0 < y.sum() < len(y))

    assert pr_auc(y, score) == pytest.approx(average_precision_score(y, score), abs=1e-12)


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
        spearman([1.0], [2.0]),
        spearman([], []),
        spearman([1.0, 1.0], [1.0, 2.0]),
        recall_at_k([], [], 5),
    ],
)
def test_what_has_no_value_is_nan(value: float) -> None:
    assert math.isnan(value)


def test_each_target_has_one_metric_to_be_ranked_by() -> None:
    assert primary_metric("anchor_binary") == "pr_auc"
    assert {primary_metric(target) for target in ("importance_abs", "windowed_change")} == {
        "spearman"
    }


def test_the_truth_adds_columns() -> None:
    names, with_truth = (
        metric_names((5, 10), has_truth=False),
        metric_names((5, 10), has_truth=True),
    )
    assert with_truth[: len(names)] == names
    assert with_truth[len(names) :] == ["true_pr_auc", "oracle_pr_auc", "oracle_spearman"]
    assert {"recall_at_5", "recall_at_10", "label_pr_auc"} <= set(names)
