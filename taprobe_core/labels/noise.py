"""How sure a published measure is: counts behind the shares, and standard errors from the counts.

The dataset publishes shares (accuracy, dissimilar share, duplicate share), not counts. Every share
is a whole number over the same number of answered rollouts, so that number can be found again, and
with it all counts. From the counts follow binomial standard errors; that the binomial model holds
was checked on chunk 0, whose prefix is empty in both settings: a free replicate.

What a measure means as a label belongs in `make`. Invariant: NaN where a count or an error cannot
be known, never a guess.

Source: the estimators of Thought Anchors (arXiv:2506.19143); the reconstruction is our own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

FloatArray = npt.NDArray[np.float64]

COUNT_TOLERANCE = 1e-6
"""A share times its count is this close to a whole number; other counts miss by over 1e-3."""

IDENTITY_TOLERANCE = 1e-9


class Counts(NamedTuple):
    """Rollouts resampled at each sentence: float64 [sentence], whole numbers, NaN where unknown."""

    n_rollouts: FloatArray
    n_correct: FloatArray
    n_dissimilar: FloatArray
    n_dissimilar_correct: FloatArray

    def take(self, index: npt.NDArray[np.int64]) -> Counts:
        """Return the counts at `index`, [sentence]; NaN where it is negative."""
        return Counts(*(_take(column, index) for column in self))


def successors(problem_id: npt.NDArray[np.int64], accuracy: FloatArray) -> npt.NDArray[np.int64]:
    """Return for each row the next row of its problem that has rollouts, -1 where there is none.

    Args:
        problem_id: [sentence], rows of one problem together, in sentence order.
        accuracy: [sentence], NaN where a sentence has no rollouts.

    Returns:
        Row numbers, int64 [sentence].
    """
    index = np.full(len(problem_id), -1, dtype=np.int64)
    following = -1
    for row in range(len(problem_id) - 2, -1, -1):
        if problem_id[row] != problem_id[row + 1]:
            following = -1
        elif not np.isnan(accuracy[row + 1]):
            following = row + 1
        index[row] = following
    return index


def reconstruct_counts(
    accuracy: FloatArray,
    dissimilar_share: FloatArray,
    duplicate_share: FloatArray,
    importance: FloatArray,
    next_accuracy: FloatArray,
    n_max: int = 100,
) -> Counts:
    """Find the counts behind published shares.

    n_rollouts is the largest n <= n_max for which accuracy * n, dissimilar_share * n and
    duplicate_share * n are all whole numbers; then n_correct = accuracy * n, n_dissimilar =
    dissimilar_share * n, and, as importance = n_dissimilar_correct / n_dissimilar - next_accuracy,

        n_dissimilar_correct = (importance + next_accuracy) * n_dissimilar,

    NaN unless that is a whole number from 0 to n_dissimilar. A smaller n with the same shares
    cannot be told from the one found, so n is exact where all n_max rollouts have an answer and an
    upper bound elsewhere.

    Args:
        accuracy: share of correct among answered rollouts, [sentence], NaN unknown.
        dissimilar_share: `different_trajectories_fraction`, [sentence], NaN unknown.
        duplicate_share: `overdeterminedness`, [sentence]; NaN puts no constraint on n.
        importance: `counterfactual_importance_accuracy`, [sentence], NaN unknown.
        next_accuracy: accuracy of the successor, [sentence], NaN where there is none.

    Returns:
        Counts, each [sentence].
    """
    n = np.full(len(accuracy), np.nan)
    unconstrained = np.isnan(duplicate_share)
    for candidate in range(1, n_max + 1):
        fits = _is_whole(accuracy * candidate) & _is_whole(dissimilar_share * candidate)
        n[fits & (unconstrained | _is_whole(duplicate_share * candidate))] = candidate
    n_dissimilar = _rounded(dissimilar_share * n)
    correct = (importance + next_accuracy) * n_dissimilar
    fits = _is_whole(correct) & (np.rint(correct) >= 0) & (np.rint(correct) <= n_dissimilar)
    n_dissimilar_correct = np.where(fits, _rounded(correct), np.nan)
    return Counts(n, _rounded(accuracy * n), n_dissimilar, n_dissimilar_correct)


def importance_se(counts: Counts, next_counts: Counts) -> FloatArray:
    """Return the standard error of `counterfactual_importance_accuracy`.

        SE^2 = pd (1 - pd) / (nd - 1) + q (1 - q) / (n' - 1)

    with pd = n_dissimilar_correct / nd at the sentence and q = n_correct' / n' at its successor:
    the unbiased plug-in of p (1 - p) / n. With nd = 1 the sentence's own rate p = n_correct / n
    stands for pd, with the variance of one draw, n p (1 - p) / (n - 1).

    Args:
        counts: at each sentence, [sentence].
        next_counts: at each sentence's successor, [sentence].

    Returns:
        float64 [sentence]; NaN where a count is unknown, no rollout is dissimilar, or n' = 1. It
        is 0 where both sides are unanimous: no spread was seen, which is not certainty.
    """
    own = _rate_variance(counts.n_dissimilar_correct, counts.n_dissimilar)
    one_draw = counts.n_rollouts * _rate_variance(counts.n_correct, counts.n_rollouts)
    is_borrowed = (counts.n_dissimilar == 1) & ~np.isnan(counts.n_dissimilar_correct)
    own = np.where(is_borrowed, one_draw, own)
    following = _rate_variance(next_counts.n_correct, next_counts.n_rollouts)
    return np.asarray(np.sqrt(own + following), dtype=np.float64)


def resampling_se(counts: Counts, next_counts: Counts) -> FloatArray:
    """Return the standard error of `resampling_importance_accuracy`.

        SE^2 = p (1 - p) / (n - 1) + q (1 - q) / (n' - 1)

    with p and q the accuracies of the sentence and of its successor.

    Args:
        counts: at each sentence, [sentence].
        next_counts: at each sentence's successor, [sentence].

    Returns:
        float64 [sentence]; NaN where a count is unknown or 1.
    """
    own = _rate_variance(counts.n_correct, counts.n_rollouts)
    following = _rate_variance(next_counts.n_correct, next_counts.n_rollouts)
    return np.asarray(np.sqrt(own + following), dtype=np.float64)


def verify_resampling_identity(
    sentences: pl.DataFrame, tolerance: float = IDENTITY_TOLERANCE
) -> pl.DataFrame:
    """Check per sentence that resampling importance is the next accuracy minus the own."""
    following = pl.col("accuracy").shift(-1).over("problem_id")
    residual = following - pl.col("accuracy") - pl.col("resampling_importance_accuracy")
    return (
        sentences.sort("problem_id", "sentence_idx")
        .select("problem_id", "sentence_idx", residual.alias("residual"))
        .with_columns((pl.col("residual").abs() <= tolerance).alias("is_exact"))
    )


def _is_whole(values: FloatArray) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(values - np.rint(values)) < COUNT_TOLERANCE, dtype=np.bool_)


def _rounded(values: FloatArray) -> FloatArray:
    # Adding zero turns -0.0 into 0.0.
    return np.asarray(np.rint(values) + 0.0, dtype=np.float64)


def _rate_variance(hits: FloatArray, n: FloatArray) -> FloatArray:
    known = n >= 2
    size = np.where(known, n, 2.0)
    rate = hits / size
    return np.where(known, rate * (1 - rate) / (size - 1), np.nan)


def _take(values: FloatArray, index: npt.NDArray[np.int64]) -> FloatArray:
    if not len(values):
        return values
    return np.where(index >= 0, values[index], np.nan)
