"""What shuffled labels said: observed values and their null to a p, a band and words.

What does not belong here: fitting and drawing (`shuffling`). Invariant: advice is given only where
the check fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taprobe_core.splits import Fold
from taprobe_core.tripwires.null import excess_p, two_sided_p

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
