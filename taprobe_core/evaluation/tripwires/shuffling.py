"""Do held-out labels reach a probe? Shuffle the labels, run the whole fit, look at the score.

Labels are shuffled inside each problem, training and held-out problems alike, the pipeline is
fitted on the shuffled training labels of every fold, and the held-out problems are scored against
their own shuffled labels. Where nothing leaks these scores know nothing of those labels, so their
PR-AUC has an exact permutation null (`rows`), and observed values become a p, a band and words.

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

What does not belong here: a defect that needs no fit to be seen (`rows`), and whether the *real*
labels can be predicted, which is a finding. Invariants: a sound pipeline fails with probability at
most alpha, whatever its features and estimator; advice is given only where the check fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError, PlanError
from taprobe_core.evaluation.tripwires.rows import (
    excess_p,
    fold_masks,
    numbered_occurrences,
    permuted_pr_auc,
    two_sided_p,
)
from taprobe_core.metrics import pr_auc
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.logistic import balanced_weights
from taprobe_core.splits import Fold

_FEW = 1 / 3
"""Share of held-out problems up to which a leak is told as theirs."""


@dataclass(frozen=True)
class HeldOutProblem:
    """One problem where it is tested: PR-AUC against shuffled labels, mean over shuffles.

    Attributes:
        protocol: of the fold.
        fold: index of the fold.
        problem_id: problem.
        value: PR-AUC against the shuffled labels.
        chance: mean of its null.
        excess: value above chance, in standard deviations of the null.
        p: of that excess, the other problems allowed for.
    """

    protocol: str
    fold: int
    problem_id: int
    value: float
    chance: float
    excess: float
    p: float


@dataclass(frozen=True)
class Look:
    """One set of shuffles.

    Attributes:
        p: of both statistics together, min(1, 2 min(p_mean, p_problem)).
        value: mean PR-AUC over held-out problems and shuffles.
        chance: mean of the null.
        low: lower end of the null's band for `value`, at half the level of the look, two-sided.
        high: upper end.
        p_mean: two-sided, of the mean.
        p_problem: of the largest excess of one problem, the others allowed for.
        problems: one entry per fold and held-out problem that has both classes.
    """

    p: float
    value: float
    chance: float
    low: float
    high: float
    p_mean: float
    p_problem: float
    problems: tuple[HeldOutProblem, ...]


def judge(values: NDArray[np.float64], units: Sequence[tuple[Fold, int]], level: float) -> Look:
    """Judge one set of shuffles.

    Args:
        values: [1 + draw, unit] PR-AUC; the observed row, then draws of the null.
        units: fold and held-out problem of each unit.
        level: false-alarm rate of the look.
    """
    means = values.mean(axis=1)
    chance = float(means[1:].mean())
    reach = float(np.quantile(np.abs(means[1:] - chance), 1 - level / 2))
    p_mean = two_sided_p(means)
    excess, p_excess = excess_p(values)
    p_problem = float(p_excess.min())
    rows = np.column_stack([values[0], values[1:].mean(axis=0), excess, p_excess])
    return Look(
        p=min(1.0, 2 * min(p_mean, p_problem)),
        value=float(means[0]),
        chance=chance,
        low=chance - reach,
        high=chance + reach,
        p_mean=p_mean,
        p_problem=p_problem,
        problems=tuple(
            HeldOutProblem(fold.protocol, fold.index, problem, *map(float, row))
            for (fold, problem), row in zip(units, rows, strict=True)
        ),
    )


@dataclass(frozen=True)
class ShuffledLabels:
    """Result of `shuffled_labels`.

    Attributes:
        first: the first set of shuffles.
        second: a fresh set if the first has p <= sqrt(alpha), else None.
        n_undefined: held-out problems of a fold left out because they have one class.
        n_shuffles: shuffles of each fold and look.
        alpha: false-alarm rate.
    """

    first: Look
    second: Look | None
    n_undefined: int
    n_shuffles: int
    alpha: float

    @property
    def passes(self) -> bool:
        """Whether not both looks have p <= sqrt(alpha)."""
        return self.second is None or self.second.p > self.alpha**0.5

    @property
    def p(self) -> float:
        """How surprising both looks together are.

        That of the first look; with a second one the square of the larger of the two, which is
        uniform below alpha and never too small above it.
        """
        return self.first.p if self.second is None else max(self.first.p, self.second.p) ** 2

    @property
    def last(self) -> Look:
        """The look that decided."""
        return self.second or self.first

    @property
    def worst(self) -> HeldOutProblem:
        """The problem with the largest excess in the look that decided."""
        return max(self.last.problems, key=lambda problem: problem.excess)

    @property
    def text(self) -> str:
        """What was found, and where to look if it is a fault."""
        look = self.last
        again = "" if self.second is None else ", second look"
        found = (
            f"Against shuffled labels the probe reaches PR-AUC {look.value:.3f} on held-out "
            f"problems; rankings that know nothing reach {look.low:.3f} to {look.high:.3f} "
            f"(chance {look.chance:.3f}, p = {self.p:.2g}, {len(look.problems)} held-out problems "
            f"x {self.n_shuffles} shuffles{again}, false alarms {self.alpha:g})."
        )
        if self.n_undefined:
            found += f" {self.n_undefined} held-out problems have one class and are left out."
        return found if self.passes else f"{found} {self._advice()}"

    def _advice(self) -> str:
        look, level = self.last, self.alpha**0.5
        leaking = [each for each in look.problems if each.p <= level / 2]
        if 0 < len(leaking) <= _FEW * len(look.problems):
            named = "; ".join(
                f"problem {each.problem_id} in {each.protocol} fold {each.fold} "
                f"({each.value:.3f}, chance {each.chance:.3f})"
                for each in leaking
            )
            return (
                f"Held-out labels of few problems reach the probe: {named}. Look for their "
                "sentences among the training rows of these folds, under their own id or another's."
            )
        if look.value > look.chance:
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
