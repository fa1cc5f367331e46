"""What is left of a target when a baseline's prediction is taken from it, fold by fold.

The baseline is ridge regression on standardised position, or on TF-IDF and standardised position
together (`BASELINE_FEATURES`), fitted on the training rows of the fold alone; the residual is
y - y_hat on every row. Training residuals are in-sample. What does not belong here: what the target
means (`targets`), and fitting probes to what is left (`probes`).

Invariant: nothing of a problem that is not trained on in a fold enters that fold's residuals of
other problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from taprobe_core.labels.make import anchors_by_problem
from taprobe_core.probes.targets import TargetValues
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.ridge import solve_ridge
from taprobe_core.study.config import Labels
from taprobe_core.study.probes import Feature, ProbeRecipe, Residualize

if TYPE_CHECKING:
    from taprobe_core.solvers.linear.fold_matrix import FoldMatrix

BASELINE_FEATURES: Mapping[Residualize, tuple[Feature, ...]] = {
    "none": (),
    "position": ("position",),
    "position_plus_text": ("text", "position"),
}
"""What the baseline reads."""

ALPHA = 1.0
"""Penalty of the baseline."""


@dataclass(frozen=True, eq=False)
class ResidualTargets:
    """What is left of one target.

    Attributes:
        value: [fold, sentence] float64, the target less the baseline's prediction; 0 where the
            target is not defined.
        is_positive: [fold, sentence] bool, the sentences of each problem whose target is furthest
            above its prediction; None for signed targets.
    """

    value: NDArray[np.float64]
    is_positive: NDArray[np.bool_] | None


def baseline_predictions(
    matrix: FoldMatrix, train: NDArray[np.bool_], target: TargetValues
) -> NDArray[np.float64]:
    """Fit the baseline on every fold, to the value of the target.

    Args:
        matrix: the features of `BASELINE_FEATURES[recipe.residualize]`, standardised by the folds
            of `train`.
        train: [fold, sentence] bool, the training rows of each fold.
        target: what the recipe would be fitted to without a baseline.

    Returns:
        [fold, sentence].

    Raises:
        DataError: a fold has no training row on which the target is defined.
    """
    n_folds = len(train)
    columns = FitRequest(
        fold=np.arange(n_folds, dtype=np.int64),
        y=np.repeat(target.value[:, None], n_folds, axis=1),
        weight=(train * target.weight).T,
    )
    return solve_ridge(matrix, columns, np.full(n_folds, ALPHA)).decision.T


def residual_targets(
    predictions: NDArray[np.float64],
    target: TargetValues,
    problem_id: NDArray[np.int64],
    recipe: ProbeRecipe,
    labels: Labels,
) -> ResidualTargets:
    """Take the baseline's predictions from the target.

    A binary target is replaced by the value that its anchors are chosen by. Residual anchors are
    chosen by the *signed* residual within a problem: under the rank rule the highest that are
    positive, under the legacy rule all at or above numpy's percentile, positive or not.

    Args:
        predictions: [fold, sentence], of the value of the target.
        target: what the recipe would be fitted to without a baseline.
        problem_id: [sentence], rows of one problem together.
        recipe: with its target filled in (`ProbeRecipe.resolved`).
        labels: the study's, for the tie rule and the percentile of targets that have none.

    Returns:
        Per fold, as the predictions.
    """
    value = np.where(target.is_defined, target.value - predictions, 0.0)
    if target.is_positive is None:
        return ResidualTargets(value, None)
    is_positive = np.zeros(value.shape, dtype=bool)
    known = target.is_defined
    percentile = recipe.percentile or labels.percentile
    for fold in range(len(predictions)):
        is_positive[fold, known] = anchors_by_problem(
            problem_id[known], value[fold, known], percentile, labels.tie_rule
        )
    return ResidualTargets(value, is_positive)
