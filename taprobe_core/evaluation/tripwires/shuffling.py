"""Do held-out labels reach a probe? Shuffle the labels, run the whole fit, look at the score.

Labels are shuffled inside each problem, training and held-out problems alike, the pipeline is
fitted on the shuffled training labels of every fold, and the held-out problems are scored against
their own shuffled labels. Where nothing leaks these scores know nothing of those labels: every way
of placing a problem's anchors on its sentences is equally likely, ties of the scores included, and
drawn placements are the null of its PR-AUC, counted as the evaluation counts its nulls.

Three choices keep the check sharp and its rate true:

- Every (fold, shuffle) has labels of its own. Were one shuffle shared by all folds, problem p would
  be scored by a probe that learned from q and q by one that learned from p; the two values are
  correlated, and a null that permutes labels against fixed scores would be too narrow.
- Labels are permuted, not shifted round. A shift keeps runs of anchors, which matters when real
  labels are compared with a null; here observed and null labels are made alike, and a shift has
  only n_sentences arrangements, the real one among them.
- Two statistics share the error equally: the mean over held-out problems, against leaks that are
  everywhere and weak, and the largest excess of one problem, against a leak in one fold.

What does not belong here: a defect that needs no fit to be seen (`rows`), and whether the *real*
labels can be predicted, which is a finding. Invariants: a sound pipeline fails with probability
alpha, whatever its features and estimator; advice is given only where the check fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError, PlanError
from taprobe_core.evaluation.intervals import max_t
from taprobe_core.evaluation.nulls import null_p
from taprobe_core.evaluation.tripwires.rows import fold_masks, numbered_occurrences
from taprobe_core.metrics import pr_auc, pr_auc_at, rank_rows, tie_end_rows
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.logistic import balanced_weights
from taprobe_core.splits import Fold

_FEW = 1 / 3
"""Share of held-out problems up to which a leak is told as theirs."""


@dataclass(frozen=True)
class HeldOutProblem:
    """One problem where it is tested: PR-AUC against shuffled labels, mean over shuffles.

    `chance` is the mean of its null, `p` that of its value, the other problems allowed for.
    """

    protocol: str
    fold: int
    problem_id: int
    value: float
    chance: float
    p: float


@dataclass(frozen=True)
class ShuffledLabels:
    """Result of `shuffled_labels`.

    Attributes:
        p: of both statistics together, min(1, 2 min(p_mean, p_problem)).
        value: mean PR-AUC over held-out problems and shuffles.
        chance: mean of the null.
        low: lower end of the null's band for `value`, at half of alpha, two-sided.
        high: upper end.
        p_mean: two-sided, of the mean.
        p_problem: of the largest excess of one problem, the others allowed for.
        problems: one entry per fold and held-out problem that has both classes.
        n_undefined: held-out problems of a fold left out because they have one class.
        n_shuffles: shuffles of each fold.
        alpha: false-alarm rate.
    """

    p: float
    value: float
    chance: float
    low: float
    high: float
    p_mean: float
    p_problem: float
    problems: tuple[HeldOutProblem, ...]
    n_undefined: int
    n_shuffles: int
    alpha: float

    @property
    def passes(self) -> bool:
        """Whether p is above alpha."""
        return self.p > self.alpha

    @property
    def worst(self) -> HeldOutProblem:
        """The problem that stands out most."""
        return min(self.problems, key=lambda each: (each.p, each.chance - each.value))

    @property
    def text(self) -> str:
        """What was found, and where to look if it is a fault."""
        found = (
            f"Against shuffled labels the probe reaches PR-AUC {self.value:.3f} on held-out "
            f"problems; rankings that know nothing reach {self.low:.3f} to {self.high:.3f} "
            f"(chance {self.chance:.3f}, p = {self.p:.2g}, {len(self.problems)} held-out problems "
            f"x {self.n_shuffles} shuffles, false alarms {self.alpha:g})."
        )
        if self.n_undefined:
            found += f" {self.n_undefined} held-out problems have one class and are left out."
        return found if self.passes else f"{found} {self._advice()}"

    def _advice(self) -> str:
        leaking = [each for each in self.problems if each.p <= self.alpha / 2]
        if 0 < len(leaking) <= _FEW * len(self.problems):
            named = "; ".join(
                f"problem {each.problem_id} in {each.protocol} fold {each.fold} "
                f"({each.value:.3f}, chance {each.chance:.3f})"
                for each in leaking
            )
            return (
                f"Held-out labels of few problems reach the probe: {named}. Look for their "
                "sentences among the training rows of these folds, under their own id or another's."
            )
        if self.value > self.chance:
            return (
                "Held-out labels reach the probe. Look for problems on both sides of a fold, for "
                "sentences stored under a second problem, and for anything learned from labels "
                "before the folds: selected features, residuals, thresholds."
            )
        return (
            "Held-out labels reach the probe with the opposite sign. Look for a target that is "
            "centred, residualised or balanced over all rows and not over the training rows."
        )


Fit = Callable[[NDArray[np.bool_], FitRequest], NDArray[np.float64]]
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
    n_null: int = 1999,
    alpha: float = 1e-3,
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
        n_shuffles: shuffles of each fold; None: `enough_shuffles`.
        n_null: draws of the null.
        alpha: false-alarm rate of the check.

    Raises:
        PlanError: n_null draws cannot show a p of alpha.
        NotEnoughDataError: a fold's training rows have one class, or no held-out problem has two.
        DataError: lengths differ, a fold names a problem without rows, or `fit` returns another
            shape.
        NonFiniteError: a score is NaN or infinite.
    """
    if 2 / (n_null + 1) > alpha + _ROUNDING:
        raise PlanError(
            f"{n_null} draws of the null cannot show p = {alpha:g}",
            "shuffled_labels",
            f"ask for n_null = {int(np.ceil(2 / alpha - _ROUNDING)) - 1} or more",
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
    columns = _columns(problem_id, is_anchor, train, identity, n_shuffles, rng)
    score = _checked(fit(train, columns), columns)
    values = _values(score, columns, defined, n_null, rng)
    means, null = values.mean(axis=1), values[1:].mean(axis=0)
    chance = float(means[1:].mean())
    distance = np.abs(means - means.mean())
    p_mean = null_p(distance[0], distance[1:])
    p_units = np.nan_to_num(max_t(values[0], values[1:].T), nan=1.0)
    reach = float(np.quantile(np.abs(means[1:] - chance), 1 - alpha / 2))
    return ShuffledLabels(
        p=min(1.0, 2 * min(p_mean, float(p_units.min()))),
        value=float(means[0]),
        chance=chance,
        low=chance - reach,
        high=chance + reach,
        p_mean=p_mean,
        p_problem=float(p_units.min()),
        problems=tuple(
            HeldOutProblem(folds[fold].protocol, folds[fold].index, problem, *map(float, row))
            for (fold, problem, _), row in zip(
                defined, np.column_stack([values[0], null, p_units]), strict=True
            )
        ),
        n_undefined=sum(map(len, tested)) - len(defined),
        n_shuffles=n_shuffles,
        alpha=alpha,
    )


def _values(
    score: NDArray[np.float64],
    columns: FitRequest,
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


def permuted_pr_auc(
    score: NDArray[np.float64], n_anchors: int, n_draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw the PR-AUC of one problem's `score` [row] against anchors placed at random, [draw]."""
    # The smallest keys of a row are a random subset; only their places matter.
    keys = rng.random((n_draws, len(score)), dtype=np.float32)
    places = np.argpartition(keys, n_anchors - 1, axis=1)[:, :n_anchors]
    return pr_auc_at(tie_end_rows(rank_rows(score[None]))[0][places], len(score))


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
) -> FitRequest:
    fold = np.repeat(np.arange(len(train)), n_shuffles)
    y = shuffle_within(problem_id, is_anchor, identity, len(fold), rng)
    seeds = rng.integers(0, 2**31, size=len(fold))
    return FitRequest(fold, y, balanced_weights(y, train, fold), seeds)


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


def _checked(score: NDArray[np.float64], columns: FitRequest) -> NDArray[np.float64]:
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
