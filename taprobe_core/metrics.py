"""Judge a ranking of sentences: labels and scores in, numbers out.

Metrics are computed inside a problem, because the problem is the unit of inference; pooling over
problems is an extra. A metric that has no value (one class, a constant column, fewer than two
rows) is NaN, never 0 or 1, so that it can be counted. What does not belong here: intervals, tests
and comparisons between recipes (`evaluation`).

Called once per problem, recipe, site and seed: every metric is a handful of array operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from taprobe_core.study.config import Target

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


def pr_auc_trapezoid(y_true: ArrayLike, score: ArrayLike) -> float:
    """Area under precision over recall by the trapezoid rule, from (recall 0, precision 1).

    The earlier figures of this field were computed so; kept to reproduce them, not to judge.

    Args:
        y_true: [row] bool or 0/1.
        score: [row] finite.

    Returns:
        Value in (0, 1], equal to scikit-learn's `auc` over `precision_recall_curve`; NaN with one
        class.
    """
    precision, recall = _precision_recall(y_true, score)
    if not recall.size:
        return float("nan")
    return float(np.trapezoid(np.append(1.0, precision), np.append(0.0, recall)))


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


def problem_metrics(
    frame: pl.DataFrame, recall_at: Sequence[int] = (5, 10), target: Target = "anchor_binary"
) -> pl.DataFrame:
    """Return the metrics of each problem.

    Args:
        frame: one row per sentence, in sentence order, with problem_id, importance_abs,
            importance_signed, is_anchor and score; with true_importance and is_true_anchor where
            the truth is known.
        recall_at: values of k.
        target: what the scores predict. Spearman compares with signed importance when it is
            `importance_signed`, else with absolute importance. Scores of signed importance do not
            rank anchors (a large negative importance makes one), so PR-AUC and recall are NaN.

    Returns:
        One row per problem, ascending: problem_id, n_sentences, n_anchors (Int64), pr_auc,
        spearman, recall_at_<k> ... (Float64, NaN where undefined). With the truth also
        true_pr_auc, the scores against the true anchors, and oracle_pr_auc, what the absolute true
        importance as a score reaches against the labelled anchors.
    """
    ordered = frame.sort("problem_id", maintain_order=True)
    problem_id = ordered["problem_id"].to_numpy()
    signed, absolute, anchor, score = (
        ordered[name].to_numpy()
        for name in ("importance_signed", "importance_abs", "is_anchor", "score")
    )
    ranks_anchors = target != "importance_signed"
    correlate = absolute if ranks_anchors else signed
    starts = np.flatnonzero(np.diff(problem_id, prepend=-1))
    has_truth = "is_true_anchor" in frame.columns
    true = ordered.select("is_true_anchor", pl.col("true_importance").abs()) if has_truth else None
    records = []
    for start, stop in zip(starts, np.append(starts, len(problem_id))[1:], strict=True):
        part = slice(int(start), int(stop))
        record: dict[str, float | int] = {
            "problem_id": int(problem_id[start]),
            "n_sentences": int(stop - start),
            "n_anchors": int(anchor[part].sum()),
            "pr_auc": pr_auc(anchor[part], score[part]) if ranks_anchors else float("nan"),
            "spearman": spearman(correlate[part], score[part]),
        }
        for k in recall_at:
            record[f"recall_at_{k}"] = (
                recall_at_k(absolute[part], score[part], k) if ranks_anchors else float("nan")
            )
        if true is not None:
            true_anchor, effect = (column.to_numpy()[part] for column in true)
            record["true_pr_auc"] = (
                pr_auc(true_anchor, score[part]) if ranks_anchors else float("nan")
            )
            record["oracle_pr_auc"] = pr_auc(anchor[part], effect)
        records.append(record)
    return pl.DataFrame(records, schema=_schema(recall_at, has_truth))


def pooled_pr_auc(frame: pl.DataFrame) -> float:
    """PR-AUC over the sentences of all problems together; NaN with one class.

    Problems weigh by their anchors, and scores of different folds are compared as if they shared
    a scale: an extra beside the mean over problems.

    Args:
        frame: one row per sentence with is_anchor and score.
    """
    return pr_auc(frame["is_anchor"].to_numpy(), frame["score"].to_numpy())


def metric_names(recall_at: Sequence[int], has_truth: bool) -> list[str]:
    """Return the metric columns, in table order."""
    truth = ["true_pr_auc", "oracle_pr_auc"] if has_truth else []
    return ["pr_auc", "spearman", *(f"recall_at_{k}" for k in recall_at), *truth]


def _schema(recall_at: Sequence[int], has_truth: bool) -> dict[str, type[pl.DataType]]:
    floats = metric_names(recall_at, has_truth)
    counts = ["problem_id", "n_sentences", "n_anchors"]
    return {**dict.fromkeys(counts, pl.Int64), **dict.fromkeys(floats, pl.Float64)}


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
