"""Do held-out labels reach a probe? Shuffle the labels, run the whole fit, look at the score.

Labels are shuffled inside each problem, training and held-out problems alike, the pipeline is
fitted on the shuffled training labels of every fold, and the held-out problems are scored against
their own shuffled labels. Where nothing leaks these scores know nothing of those labels, so their
PR-AUC has an exact permutation null (`null`). What does not belong here: a defect that needs no fit
to be seen (`duplicates`), and whether the *real* labels can be predicted, which is a finding.

Four choices keep the check exact and stable:

- Every (fold, shuffle) has labels of its own. Were one shuffle shared by all folds, problem p would
  be scored by a probe that learned from q and q by one that learned from p; the two values are
  correlated, and a null that permutes labels against fixed scores would be too narrow.
- Labels are permuted, not shifted round. A shift keeps runs of anchors, which matters when real
  labels are compared with a null; here observed and null labels are made alike, and a shift has
  only n_sentences arrangements, the real one among them.
- Two statistics share the error equally: the mean over held-out problems, against leaks that are
  everywhere and weak, and the largest excess of one problem, against a leak in one fold.
- A look that trips at sqrt(alpha) is taken again with fresh shuffles, and only both together fail.
  A leak trips again, an accident does not; sound pipelines pay for the second look seldom.

Invariant: a sound pipeline fails with probability at most alpha, whatever its features, whatever
the estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError, PlanError
from taprobe_core.metrics import pr_auc
from taprobe_core.solvers.columns import Columns
from taprobe_core.solvers.logistic import balanced_weights
from taprobe_core.splits import Fold
from taprobe_core.tripwires.null import permuted_pr_auc
from taprobe_core.tripwires.rows import fold_masks, numbered_occurrences
from taprobe_core.tripwires.shuffling_verdict import Look, ShuffledLabels, judge

Fit = Callable[[NDArray[np.bool_], Columns], NDArray[np.float64]]
"""train [fold, row] bool, columns -> score of every row by every column, [row, column] float64."""

SCORED = 6_000
SHUFFLES = (2, 20)

_ROUNDING = 1e-9
_DIGITS = 6
"""Of the range of a column's scores. A solver's rounding may depend on held-out labels, and would
break ties by them."""


def shuffled_labels(
    fit: Fit,
    problem_id: NDArray[np.int64],
    is_anchor: NDArray[np.bool_],
    folds: Sequence[Fold],
    *,
    identity: NDArray[np.int64] | None = None,
    seed: int = 0,
    n_shuffles: int | None = None,
    n_null: int = 999,
    alpha: float = 1e-4,
) -> ShuffledLabels:
    """Check that a pipeline scores held-out problems at chance when labels are shuffled.

    Args:
        fit: the pipeline, from labels to scores (`ridge_probe`, `linear_probe`); called once with
            n_folds x n_shuffles columns. Whatever the pipeline learns from labels must be learned
            inside it, or the check cannot see it.
        problem_id: [row].
        is_anchor: [row].
        folds: the folds as they are used; validation problems are neither fitted nor scored.
        identity: [row]; rows of different problems that share a number are shuffled alike, so that
            a trace stored twice keeps one labelling (`row_identity`). None: problems are shuffled
            independently, and copies cannot be seen.
        seed: of the shuffles and the null.
        n_shuffles: shuffles of each fold and look; None: `enough_shuffles`.
        n_null: draws of the null for each look.
        alpha: false-alarm rate of the check; each of the two looks has its square root.

    Raises:
        PlanError: n_null draws cannot show a p of sqrt(alpha).
        NotEnoughDataError: a fold's training rows have one class, or no held-out problem has two.
        DataError: lengths differ, a fold names a problem without rows, or `fit` returns another
            shape.
        NonFiniteError: a score is NaN or infinite.
    """
    level = alpha**0.5
    if 2 / (n_null + 1) > level + _ROUNDING:
        raise PlanError(
            f"{n_null} draws of the null cannot show p = {level:g}, the square root of alpha",
            "shuffled_labels",
            f"ask for n_null = {int(np.ceil(2 / level - _ROUNDING)) - 1} or more",
        )
    rng = np.random.default_rng(seed)
    train, tested = fold_masks(problem_id, is_anchor, folds)
    defined = [
        (fold, int(problem), rows)
        for fold, of_fold in enumerate(tested)
        for problem, rows in of_fold.items()
        if 0 < is_anchor[rows].sum() < len(rows)
    ]
    if not defined:
        raise NotEnoughDataError(
            "no held-out problem has both anchors and other sentences",
            f"{len(folds)} folds",
            "use more problems, or lower labels.percentile",
        )
    if n_shuffles is None:
        n_shuffles = enough_shuffles(sum(len(rows) for *_, rows in defined))
    n_undefined = sum(map(len, tested)) - len(defined)
    units = [(folds[fold], problem) for fold, problem, _ in defined]

    def look() -> Look:
        columns = _columns(problem_id, is_anchor, train, identity, n_shuffles, rng)
        score = _checked(fit(train, columns), columns)
        return judge(_values(score, columns, defined, n_null, rng), units, level)

    first = look()
    second = look() if first.p <= level else None
    return ShuffledLabels(first, second, n_undefined, n_shuffles, alpha)


def _values(
    score: NDArray[np.float64],
    columns: Columns,
    defined: Sequence[tuple[int, int, NDArray[np.intp]]],
    n_null: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Return PR-AUC, mean over shuffles: [1 + n_null, held-out problem], the observed row first."""
    values = np.zeros((1 + n_null, len(defined)))
    for unit, (fold, _, rows) in enumerate(defined):
        mine = np.flatnonzero(columns.fold == fold)
        for column in mine:
            ranked, labels = score[rows, column], columns.y[rows, column]
            null = permuted_pr_auc(ranked, int(labels.sum()), n_null, rng)
            values[:, unit] += np.append(pr_auc(labels, ranked), null) / len(mine)
    return values


def enough_shuffles(n_held_out: int) -> int:
    """Return how many shuffles score `SCORED` held-out sentences, within `SHUFFLES`.

    Small studies need many for the power, large ones have it after two.

    Args:
        n_held_out: held-out rows of one shuffle, over folds.
    """
    fewest, most = SHUFFLES
    return min(most, max(fewest, -(-SCORED // n_held_out)))


def _columns(
    problem_id: NDArray[np.int64],
    is_anchor: NDArray[np.bool_],
    train: NDArray[np.bool_],
    identity: NDArray[np.int64] | None,
    n_shuffles: int,
    rng: np.random.Generator,
) -> Columns:
    fold = np.repeat(np.arange(len(train)), n_shuffles)
    y = shuffle_within(problem_id, is_anchor, identity, len(fold), rng)
    seeds = rng.integers(0, 2**31, size=len(fold))
    return Columns(fold, y, balanced_weights(y, train, fold), seeds)


def shuffle_within(
    problem_id: NDArray[np.int64],
    is_anchor: NDArray[np.bool_],
    identity: NDArray[np.int64] | None,
    n_columns: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Shuffle labels inside each problem, every column anew.

    Each row draws a key, and a problem's k anchors go to its k smallest keys. Rows that share an
    identity share their key; inside a problem no two rows do, so that every placement of its
    anchors is equally likely.

    Args:
        problem_id: [row].
        is_anchor: [row].
        identity: [row], or None when every row is its own.
        n_columns: shuffles wanted.
        rng: source of the keys.

    Returns:
        [row, column] float64 of 0 and 1.
    """
    n = len(problem_id)
    problem = np.unique(problem_id, return_inverse=True)[1]
    key = np.arange(n) if identity is None else numbered_occurrences(problem, identity)
    keys = rng.random((n_columns, int(key.max()) + 1))[:, key]
    # A key is below 1, so problems stay apart and one sort serves them all.
    order = np.argsort(problem + keys, axis=1)
    labels = np.asarray(is_anchor, dtype=np.float64)[np.lexsort((~is_anchor, problem))]
    y = np.empty((n_columns, n))
    np.put_along_axis(y, order, np.broadcast_to(labels, y.shape), axis=1)
    return np.ascontiguousarray(y.T)


def _checked(score: NDArray[np.float64], columns: Columns) -> NDArray[np.float64]:
    if score.shape != columns.y.shape:
        raise DataError(
            f"scores are {score.shape}, expected {columns.y.shape}",
            "shuffled_labels",
            "let fit return one score per row and column",
        )
    if not np.isfinite(score).all():
        column = int(np.flatnonzero(~np.isfinite(score).all(axis=0))[0])
        raise NonFiniteError(
            "scores against shuffled labels are NaN or infinite",
            f"column {column}, fold {int(columns.fold[column])}",
            "look for extreme values in the features",
        )
    low, high = score.min(axis=0), score.max(axis=0)
    relative = (score - low) / np.where(high > low, high - low, 1)
    return np.asarray(np.round(relative, _DIGITS), dtype=np.float64)
