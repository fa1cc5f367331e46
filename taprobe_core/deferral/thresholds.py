"""Scores and labels to two thresholds: the search behind a deferral plan.

At or below `negative` a sentence is accepted as no anchor, at or above `positive` as an anchor
(this wins where both hold), in between it is deferred. The search counts every pair of candidate
thresholds at once and takes the best feasible pair.

What does not belong here: folds, pooling and relabel lists (`plans`).

Invariant: accepted + deferred = all sentences, for every pair. All scores and thresholds are
float32, so that a threshold read back from disk decides as it did when it was tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

_EDGE = 1e-6
_N_LEVELS = 101
SLACK = 1e-12
"""A share counts as within its budget up to this, so that 0.2 of 5 sentences is 1 sentence."""


class Objective(NamedTuple):
    """What a plan must keep to: at most this share deferred, or at most this accepted error."""

    kind: Literal["budget", "error"]
    value: float


class Thresholds(NamedTuple):
    """A pair of thresholds and what it does on the sentences it was tuned on.

    Attributes:
        negative: accept as no anchor at or below it, float32.
        positive: accept as anchor at or above it, float32; wins where both hold.
        n_deferred: sentences strictly between.
        n_accepted: the others.
        n_errors: accepted sentences whose decision differs from the label.
        meets_objective: whether the objective holds on these sentences.
    """

    negative: np.float32
    positive: np.float32
    n_deferred: int
    n_accepted: int
    n_errors: int
    meets_objective: bool

    @property
    def error(self) -> float:
        """Wrong among the accepted; infinite when nothing is accepted."""
        return self.n_errors / self.n_accepted if self.n_accepted else float("inf")


@dataclass(frozen=True)
class PairGrid:
    """Every candidate pair of thresholds with its counts; arrays are [pair]."""

    negative: NDArray[np.float32]
    positive: NDArray[np.float32]
    n_deferred: NDArray[np.int64]
    n_accepted: NDArray[np.int64]
    n_errors: NDArray[np.int64]

    @cached_property
    def deferral(self) -> NDArray[np.float64]:
        """Share deferred, [pair]."""
        return np.asarray(self.n_deferred / (self.n_deferred + self.n_accepted))

    @cached_property
    def error(self) -> NDArray[np.float64]:
        """Wrong among the accepted, [pair]; infinite when nothing is accepted."""
        empty = self.n_accepted == 0
        return np.where(empty, np.inf, self.n_errors / np.where(empty, 1, self.n_accepted))


def candidates(score: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the thresholds worth trying: 101 quantiles and a step of 1e-6 beyond either end.

    Args:
        score: scores to tune on, [sentence], finite, at least one.

    Returns:
        [candidate], float32, ascending, unique, at most 103.
    """
    wide = score.astype(np.float64)
    levels = np.quantile(wide, np.linspace(0.0, 1.0, _N_LEVELS)).astype(np.float32)
    # Far from zero a step of 1e-6 is lost in float32; the next float keeps "accept none" possible.
    below = min(np.float32(wide.min() - _EDGE), np.nextafter(score.min(), np.float32(-np.inf)))
    above = max(np.float32(wide.max() + _EDGE), np.nextafter(score.max(), np.float32(np.inf)))
    return np.unique(np.concatenate([[below], levels, [above]]).astype(np.float32))


def pair_grid(score: NDArray[np.float32], is_anchor: NDArray[np.bool_]) -> PairGrid:
    """Count decisions and errors of every pair `negative <= positive` of candidates.

    Counts come from the ranks of the candidates among the sorted scores, so the cost is one sort
    plus a few operations per pair.

    Args:
        score: scores to tune on, [sentence], float32, finite, at least one.
        is_anchor: labels, [sentence].

    Returns:
        The grid, at most 5,356 pairs.
    """
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    n_anchors_before = np.concatenate([[0], np.cumsum(is_anchor[order])])
    levels = candidates(score)
    below = np.searchsorted(ranked, levels, side="left")
    up_to = np.searchsorted(ranked, levels, side="right")
    low, high = _pairs(levels.size)
    # Equal thresholds contest the scores equal to them, and positive wins there.
    n_negative = np.where(low == high, below[low], up_to[low])
    n_positive = score.size - below[high]
    n_missed = n_anchors_before[n_negative]
    n_false = n_positive - (n_anchors_before[-1] - n_anchors_before[below[high]])
    n_accepted = n_negative + n_positive
    return PairGrid(
        levels[low], levels[high], score.size - n_accepted, n_accepted, n_missed + n_false
    )


@cache
def _pairs(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the lower and of the upper of every pair; there are few sizes."""
    return np.triu_indices(n)


def choose(grid: PairGrid, objective: Objective) -> Thresholds:
    """Pick the pair that serves an objective best.

    Budget: among pairs that defer at most the budget, the lexicographic minimum of (error,
    deferral, negative, positive). Error: among pairs at or below the error, the minimum of
    (deferral, error, negative, positive). Where no pair meets the error, the pair with the minimum
    of (error, deferral, negative, positive) stands in and `meets_objective` is false.

    Args:
        grid: from `pair_grid`.
        objective: budget or error.

    Returns:
        The thresholds.
    """
    deferral, error = grid.deferral, grid.error
    if objective.kind == "budget":
        feasible, ranks = deferral <= objective.value + SLACK, (error, deferral)
    else:
        feasible, ranks = error <= objective.value, (deferral, error)
    meets = bool(feasible.any())
    if not meets:
        feasible, ranks = np.ones_like(feasible), (error, deferral)
    best = np.flatnonzero(feasible)
    # The lexicographic minimum, one key after the other: far cheaper than sorting every pair.
    for key in (*ranks, grid.negative, grid.positive):
        values = key[best]
        best = best[values == values.min()]
        if best.size == 1:
            break
    chosen = int(best[0])
    return Thresholds(
        grid.negative[chosen],
        grid.positive[chosen],
        int(grid.n_deferred[chosen]),
        int(grid.n_accepted[chosen]),
        int(grid.n_errors[chosen]),
        meets,
    )


def decide(
    score: NDArray[np.float32], negative: np.float32, positive: np.float32
) -> NDArray[np.uint8]:
    """Apply a pair of thresholds.

    Args:
        score: [sentence], float32.
        negative: accept as no anchor at or below it.
        positive: accept as anchor at or above it; wins where both hold.

    Returns:
        [sentence], index into `tables.DECISIONS_ON_SENTENCE`.
    """
    accepted = np.where(score <= negative, np.uint8(0), np.uint8(2))
    return np.where(score >= positive, np.uint8(1), accepted)
