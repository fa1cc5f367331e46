"""Judge a ranking of sentences: labels and scores in, a number out.

Metrics are computed inside a problem, because the problem is the unit of inference; pooling over
problems is an extra. A metric that has no value (one class, a constant column, fewer than two
rows) is NaN, never 0 or 1, so that it can be counted. What does not belong here: intervals, tests
and comparisons between recipes (`evaluation`), and the same for thousands of rankings at once
(`batched_metrics`), for which these functions are the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taprobe_core.study.targets import TARGETS, Target

_DOUBLES = NDArray[np.float64]


def pr_auc(y_true: ArrayLike, score: ArrayLike) -> float:
    """Area under the precision-recall steps: sum over thresholds of precision x recall gained.

    Args:
        y_true: [row] bool or 0/1.
        score: [row] finite; tied rows share one threshold.

    Returns:
        Value in (0, 1], equal to scikit-learn's `average_precision_score`; NaN with one class.

    Source:
        Average precision; unlike the trapezoid it does not interpolate between thresholds, which
        is too optimistic (Davis and Goadrich 2006, section 4).
    """
    precision, recall = _precision_recall(y_true, score)
    return float(np.diff(recall, prepend=0.0) @ precision) if recall.size else float("nan")


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties given their mean rank.

    Args:
        a: [row] finite.
        b: [row] finite.

    Returns:
        Value in [-1, 1], equal to `scipy.stats.spearmanr`; NaN with fewer than two rows or a
        constant side.
    """
    ranks_a, ranks_b = (_centred_ranks(np.asarray(side)) for side in (a, b))
    spread = np.sqrt((ranks_a @ ranks_a) * (ranks_b @ ranks_b))
    return float(ranks_a @ ranks_b / spread) if spread > 0 else float("nan")


def recall_at_k(importance_abs: ArrayLike, score: ArrayLike, k: int) -> float:
    """Share of the k most important sentences among the k best scored.

    Args:
        importance_abs: [row] absolute importance.
        score: [row] finite.
        k: at least 1; cut to the number of rows. Among ties the earlier row comes first.

    Returns:
        Value in [0, 1]; NaN without rows.
    """
    importance, scores = np.asarray(importance_abs), np.asarray(score)
    k = min(k, len(scores))
    if k < 1:
        return float("nan")
    hits = np.zeros(len(scores), dtype=bool)
    hits[np.argsort(-importance, kind="stable")[:k]] = True
    return float(hits[np.argsort(-scores, kind="stable")[:k]].sum() / k)


def primary_metric(target: Target) -> str:
    """Return the metric that recipes are ranked by: `pr_auc` for classes, else `spearman`."""
    return TARGETS[target].metric


def metric_names(recall_at: Sequence[int], has_truth: bool) -> list[str]:
    """Return the metric columns, in table order.

    Args:
        recall_at: values of k.
        has_truth: whether the true importance is known.
    """
    truth = ["true_pr_auc", "oracle_pr_auc", "oracle_spearman"] if has_truth else []
    own = ["pr_auc", "spearman", "pearson", *(f"recall_at_{k}" for k in recall_at)]
    return [*own, "label_pr_auc", "label_spearman", *truth]


def _centred_ranks(values: NDArray[np.generic]) -> _DOUBLES:
    """Return the rank of each value, ties sharing their mean, less the mean of all ranks."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    bounds = np.concatenate(([0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, [len(values)]))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((bounds[:-1] + bounds[1:] - len(values)) / 2, np.diff(bounds))
    return ranks


def _precision_recall(y_true: ArrayLike, score: ArrayLike) -> tuple[_DOUBLES, _DOUBLES]:
    """Return precision and recall at each distinct score, highest first; empty with one class."""
    positive, scores = np.asarray(y_true, dtype=bool), np.asarray(score)
    n_positive = np.count_nonzero(positive)
    if n_positive in (0, len(positive)):
        return np.empty(0), np.empty(0)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_tie = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    found = np.cumsum(positive[order])[last_of_tie]
    return found / (last_of_tie + 1), found / n_positive
