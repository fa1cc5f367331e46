"""Judge rankings of sentences: labels and scores in, numbers out; one ranking, or many at once.

Each metric is defined over one ranking. The batched functions take a matrix with one row per unit
(a recipe, fold and seed judged on one problem) and one column per sentence, so that a sweep costs
array operations per problem and not Python per unit: scores are sorted once, and every metric reads
the same order.

Metrics are computed inside a problem, because the problem is the unit of inference; pooling over
problems is an extra. A metric that has no value (one class, a constant column, fewer than two
rows) is NaN, never 0 or 1, so that it can be counted. What does not belong here: which units there
are, intervals, tests and comparisons between recipes (`evaluation`).

Invariant: each batched value equals the function of one ranking on that row, NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


Doubles = NDArray[np.float64]


class Ranking(NamedTuple):
    """Sentences of each unit by falling score.

    Attributes:
        order: [unit, sentence] int64, column numbers; among equal scores the earlier comes first.
        is_tie_end: [unit, sentence] bool, in ranked order: the next score is another, or none is.
        has_ties: [unit] bool.
    """

    order: NDArray[np.int64]
    is_tie_end: NDArray[np.bool_]
    has_ties: NDArray[np.bool_]

    def of(self, units: NDArray[Any]) -> Ranking:
        """Return the ranking of `units`, row numbers [n] or a mask [unit]."""
        return Ranking(self.order[units], self.is_tie_end[units], self.has_ties[units])


def rank_rows(scores: NDArray[np.floating[Any]]) -> Ranking:
    """Sort each row of scores once, for every metric that follows.

    Args:
        scores: [unit, sentence] float32 or float64, finite.

    Returns:
        The ranking. Single precision is sorted as integers, score above column number, which
        gives the stable order at the price of an unstable sort.
    """
    order, ranked = _sorted_rows(scores)
    is_tie_end = np.ones(scores.shape, dtype=bool)
    is_tie_end[:, :-1] = ranked[:, 1:] != ranked[:, :-1]
    return Ranking(order, is_tie_end, np.asarray(~is_tie_end.all(axis=1)))


def pr_auc_rows(positive: NDArray[np.bool_], ranking: Ranking) -> Doubles:
    """Average precision of each unit.

    Args:
        positive: [unit, sentence] bool.
        ranking: of the scores.

    Returns:
        [unit] float64, as `metrics.pr_auc`; NaN with one class.
    """
    n_units, n = ranking.order.shape
    if n == 0:
        return np.full(n_units, np.nan)
    hit = np.take_along_axis(positive, ranking.order, axis=1)
    found = np.cumsum(hit, axis=1, dtype=np.float64)
    n_positive = found[:, -1].copy()
    found /= np.arange(1, n + 1)
    if ranking.has_ties.any():
        tied = ranking.has_ties
        found[tied] = np.take_along_axis(found[tied], _tie_ends(ranking.is_tie_end[tied]), axis=1)
    total = np.einsum("us,us->u", hit, found)
    return _where((n_positive > 0) & (n_positive < n), total, n_positive)


def spearman_rows(centred_ranks: Doubles, ranking: Ranking) -> Doubles:
    """Spearman's rank correlation of each unit.

    Args:
        centred_ranks: [unit, sentence], `centred_rank_rows` of what the scores are compared with.
        ranking: of the scores.

    Returns:
        [unit] float64, as `metrics.spearman`; NaN with a constant side or fewer than two columns.
    """
    n = ranking.order.shape[1]
    other = np.take_along_axis(centred_ranks, ranking.order, axis=1)
    own = np.broadcast_to(np.arange(n) - (n - 1) / 2, other.shape)
    if ranking.has_ties.any():
        own = own.copy()
        own[ranking.has_ties] = _tied_ranks(ranking.is_tie_end[ranking.has_ties])
    # Ranks fall with the score where they grow with the other side, hence the sign.
    spread = np.sqrt(np.einsum("us,us->u", own, own) * np.einsum("us,us->u", other, other))
    return _where(spread > 0, -np.einsum("us,us->u", own, other), spread)


def pearson_rows(values: Doubles, scores: NDArray[np.floating[Any]]) -> Doubles:
    """Pearson's correlation of each unit.

    Args:
        values: [unit, sentence] float64, finite.
        scores: [unit, sentence], finite.

    Returns:
        [unit] float64; NaN with a constant side or fewer than two columns.
    """
    if values.shape[1] < 2:
        return np.full(len(values), np.nan)
    is_constant = (values == values[:, :1]).all(axis=1) | (scores == scores[:, :1]).all(axis=1)
    a = values - values.mean(axis=1, keepdims=True)
    b = scores - scores.mean(axis=1, keepdims=True, dtype=np.float64)
    spread = np.sqrt(np.einsum("us,us->u", a, a) * np.einsum("us,us->u", b, b))
    return _where(~is_constant & (spread > 0), np.einsum("us,us->u", a, b), spread)


def recall_rows(is_top: NDArray[np.bool_], ranking: Ranking, k: int) -> Doubles:
    """Share of each unit's k best scored sentences that are top.

    Args:
        is_top: [unit, sentence] bool, `top_rows` of the importance with the same k.
        ranking: of the scores.
        k: at least 1; cut to the number of columns.

    Returns:
        [unit] float64, as `metrics.recall_at_k`; NaN without columns.
    """
    k = min(k, ranking.order.shape[1])
    if k < 1:
        return np.full(len(ranking.order), np.nan)
    hits = np.take_along_axis(is_top, ranking.order[:, :k], axis=1)
    return np.asarray(hits.sum(axis=1) / k, dtype=np.float64)


def top_rows(values: Doubles, k: int) -> NDArray[np.bool_]:
    """Mark the k largest values of each row; among ties the earlier column comes first.

    Args:
        values: [unit, sentence], finite.
        k: at least 1.

    Returns:
        [unit, sentence] bool.
    """
    is_top = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(is_top, np.argsort(-values, axis=1, kind="stable")[:, :k], True, axis=1)
    return is_top


def centred_rank_rows(values: NDArray[np.floating[Any]]) -> Doubles:
    """Rank each row from its smallest value, ties sharing their mean, less the mean of all ranks.

    Args:
        values: [unit, sentence], finite.

    Returns:
        [unit, sentence] float64; a constant row is all zero.
    """
    ranking = rank_rows(-values)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, ranking.order, _tied_ranks(ranking.is_tie_end), axis=1)
    return ranks


def tie_end_rows(ranking: Ranking) -> NDArray[np.int32]:
    """Count, for each sentence of each unit, the sentences that score at least as high.

    Args:
        ranking: of the scores.

    Returns:
        [unit, sentence] int32, in the order of the columns, at least 1.
    """
    ends = np.empty(ranking.order.shape, dtype=np.int32)
    np.put_along_axis(ends, ranking.order, _tie_ends(ranking.is_tie_end).astype(np.int32) + 1, 1)
    return ends


def pr_auc_at(ends: NDArray[np.int32], n: int) -> Doubles:
    """Average precision from where the positives stand, without the other sentences.

    Each positive adds the precision at its own tie: positives up to there over sentences up to
    there. That is `metrics.pr_auc`, at the cost of the positives alone.

    Args:
        ends: [..., positive] int32, `tie_end_rows` at the positive sentences, in any order.
        n: sentences.

    Returns:
        [...] float64; NaN without positives, or with nothing else.
    """
    k = ends.shape[-1]
    if not 0 < k < n:
        return np.full(ends.shape[:-1], np.nan)
    ranked = np.sort(ends, axis=-1)
    found = np.broadcast_to(np.arange(1, k + 1), ranked.shape)
    is_last = np.ones(ranked.shape, dtype=bool)
    is_last[..., :-1] = ranked[..., 1:] != ranked[..., :-1]
    if not is_last.all():
        found = _tie_ends(is_last.reshape(-1, k)).reshape(ranked.shape) + 1
    return np.asarray((found / ranked).mean(axis=-1), dtype=np.float64)


def _sorted_rows(scores: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return columns by falling score, and a key of each ranked score that equal scores share."""
    if scores.dtype != np.float32:
        order = np.argsort(-scores, axis=1, kind="stable")
        return order, np.take_along_axis(scores, order, axis=1)
    # Zero has two bit patterns; adding zero leaves one. Then flip so that integers sort as floats.
    bits = np.ascontiguousarray(scores + np.float32(0)).view(np.uint32)
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys = (~rising).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(scores.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), keys >> np.uint64(32)


def _tie_ends(is_tie_end: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the ranked place where the tie of each ranked place ends, [unit, sentence]."""
    n = is_tie_end.shape[1]
    ends = np.where(is_tie_end, np.arange(n), n)
    return np.asarray(np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1], dtype=np.int64)


def _tied_ranks(is_tie_end: NDArray[np.bool_]) -> Doubles:
    """Return the centred rank of each ranked place, the places of a tie sharing their mean."""
    n = is_tie_end.shape[1]
    is_start = np.ones(is_tie_end.shape, dtype=bool)
    is_start[:, 1:] = is_tie_end[:, :-1]
    starts = np.maximum.accumulate(np.where(is_start, np.arange(n), 0), axis=1)
    return np.asarray((starts + _tie_ends(is_tie_end) - (n - 1)) / 2, dtype=np.float64)


def _where(is_defined: NDArray[np.bool_], above: Doubles, below: Doubles) -> Doubles:
    """Divide where defined, NaN elsewhere."""
    out = np.full(len(above), np.nan)
    np.divide(above, below, out=out, where=is_defined)
    return out
