"""What rankings that know nothing reach: PR-AUC of fixed scores against permuted labels.

A probe that never saw a problem's labels has scores that are independent of them, so every way of
placing the problem's anchors on its sentences is equally likely: drawing placements gives the exact
distribution of its PR-AUC, ties of the scores included. What does not belong here: fitting, and
what follows from a value outside the band (`shuffling`).

Invariant: scores are used by rank alone, and each placement has as many anchors as the problem.

Source: permutation null of a ranking measure; Monte Carlo p of Phipson and Smyth (2010), which is
valid at any number of draws because the observed value counts as one of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-12


def permuted_pr_auc(
    score: NDArray[np.float64], n_anchors: int, n_draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw the PR-AUC of `score` against anchors placed at random.

    With anchors at ranks r_1 < ... < r_k (counted from 1, highest score first, a tie at its last
    rank), PR-AUC is the mean over anchors of found(r_i) / r_i, found being the number of anchors
    at or above that rank.

    Args:
        score: [row] of one problem, finite.
        n_anchors: anchors of the problem, 1 to n_rows.
        n_draws: placements to draw.
        rng: source of the placements.

    Returns:
        [draw] float64, each what `metrics.pr_auc` gives for one placement.
    """
    ranked = -np.sort(-score)
    is_last = np.append(ranked[1:] != ranked[:-1], True)
    last_of_tie = np.flatnonzero(is_last)[np.cumsum(is_last) - is_last]
    # The smallest keys of a row are a random subset; only their places matter.
    keys = rng.random((n_draws, len(score)), dtype=np.float32)
    places = np.argpartition(keys, n_anchors - 1, axis=1)[:, :n_anchors]
    places.sort(axis=1)
    rank = last_of_tie[places] + 1
    found = np.arange(1, n_anchors + 1)
    if len(is_last) != is_last.sum():
        is_end = np.ones(rank.shape, dtype=np.bool_)
        is_end[:, :-1] = rank[:, 1:] != rank[:, :-1]
        # Anchors of one tie are found together: each takes the count of the last of them.
        counts = np.where(is_end, found, n_anchors)
        found = np.minimum.accumulate(counts[:, ::-1], axis=1)[:, ::-1]
    return np.asarray((found / rank).mean(axis=1), dtype=np.float64)


def two_sided_p(values: NDArray[np.float64]) -> float:
    """Return the p of the first value: how many lie as far from the mean of all as it does.

    Args:
        values: [1 + draw]; the observed value, then draws of its null.
    """
    distance = np.abs(values - values.mean())
    return float((distance >= distance[0] - _ROUNDING).mean())


def excess_p(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the excess of each unit and its p, the other units allowed for (max-T).

    Each unit is centred and scaled by its own mean and standard deviation, the observed row
    included so that all rows are alike; a unit that never varies has no excess.

    Args:
        values: [1 + draw, unit]; the observed row, then draws of its null.

    Returns:
        [unit] observed excess in standard deviations of the null; [unit] share of rows whose
        largest excess is at least that.

    Source:
        Westfall and Young (1993), single-step max-T.
    """
    deviation = values - values.mean(axis=0)
    spread = deviation.std(axis=0)
    excess = np.divide(deviation, spread, out=np.zeros_like(values), where=spread > _ROUNDING)
    largest = np.sort(excess.max(axis=1))
    below = np.searchsorted(largest, excess[0] - _ROUNDING)
    return excess[0], (len(values) - below) / len(values)
