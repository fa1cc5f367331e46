"""What a kind of estimator has to offer, and what a batched solve of it leaves.

A solve leaves scores of every row, and each model's arrays on demand. What does not belong here:
which estimator is which (`registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from taprobe_core.features import ProbeData
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.fitted import FittedProbe
from taprobe_core.study import ProbeRecipe


@dataclass(frozen=True, eq=False)
class Solved:
    """One solve.

    Attributes:
        score: [row, column] float32: the probability of an anchor for targets that are classes,
            else the predicted value; the columns of `Design.columns`.
        n_iter: [column] int64, epochs of a network or token probe, else solver steps.
        probe: makes the stored probe of one column; called only for folds that are tested.
    """

    score: NDArray[np.float32]
    n_iter: NDArray[np.int64]
    probe: Callable[[Fit, int], FittedProbe]


def own_features(recipe: ProbeRecipe, data: ProbeData) -> tuple[str, ...]:
    """Return the features that a recipe reads."""
    return recipe.features


@dataclass(frozen=True)
class Solver:
    """How one kind of estimator is fitted and scored.

    Attributes:
        solve: fits many recipes on every fold: design, fits, device and whether weights are kept.
        score: scores every row of data with a stored probe, [sentence] float32.
        n_weights: about how many weights one probe has, given the recipe and the number of dense
            values that it reads of a row or token.
        per_model: settings in which the models of one solve may differ, beside their targets.
        features: what of the features the recipes of one solve have in common.
        is_watched: whether training always stops by the fold's validation rows, so that the models
            of one solve must have their target defined on the same rows.
    """

    solve: Callable[[Design, Sequence[Fit], str, bool], Solved]
    score: Callable[[FittedProbe, ProbeData], NDArray[np.float32]]
    n_weights: Callable[[ProbeRecipe, int], int]
    per_model: tuple[str, ...] = ()
    features: Callable[[ProbeRecipe, ProbeData], tuple[str, ...]] = own_features
    is_watched: bool = False


def scores_of(decision: NDArray[np.float64], recipe: ProbeRecipe) -> NDArray[np.float32]:
    """Return what a recipe's scores are: the probability of a class, else the value as it is."""
    return np.asarray(expit(decision) if recipe.is_binary else decision, dtype=np.float32)
