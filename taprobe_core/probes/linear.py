"""Logistic regression and ridge of many recipes and folds, solved together.

What does not belong here: the solvers (`solvers.logistic`, `solvers.ridge`), rows and targets
(`design`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.fitted import FittedProbe, Training
from taprobe_core.probes.inputs import Arrays
from taprobe_core.probes.solved import Solved
from taprobe_core.solvers.columns import Columns
from taprobe_core.solvers.fold_matrix import FoldMatrix
from taprobe_core.solvers.logistic import balanced_weights, solve_logistic
from taprobe_core.solvers.ridge import solve_ridge
from taprobe_core.words import FoldWords

TOLERANCE = 1e-6
"""Of logits. At 2e-4 one fold of text in thirty has another PR-AUC in the fourth digit: two
neighbours in rank change places."""

WIDE_TOLERANCE = 2e-4
"""Of logits from wide dense features, in a third of the time: PR-AUC is the same to 6 digits
(`benchmarks/probes/configuration.py`)."""

WIDE = 1024
"""Features."""


def fit_linear(
    design: Design, fits: Sequence[Fit], device: str, keep_weights: bool = True
) -> Solved:
    """Solve linear recipes of equal features: logistic regression for anchors, ridge for the rest.

    Args:
        design: rows and folds.
        fits: linear recipes that differ in target and penalty alone.
        device: of the products with dense features.
        keep_weights: not read: coefficients are what is solved for, and small.

    Raises:
        NumericsError: a column did not converge.
        NotEnoughDataError: the training texts of a fold hold no word.
    """
    recipe = fits[0].recipe
    matrix = design.matrix(recipe, device)
    words = design.words if "text" in recipe.features else None
    penalty = np.repeat([fit.recipe.regularization for fit in fits], len(design.folds))
    columns = design.columns(fits)
    if recipe.target == "anchor_binary":
        # Both classes count alike, as scikit-learn's `class_weight="balanced"`.
        weight = columns.weight * balanced_weights(columns.y, design.train, columns.fold)
        columns = Columns(columns.fold, columns.y, weight)
        found = solve_logistic(matrix, columns, penalty, tol=tolerance_of(matrix))
        score = expit(found.decision)
    else:
        found = solve_ridge(matrix, columns, penalty)
        score = found.decision

    def probe(fit: Fit, column: int) -> FittedProbe:
        fold = int(columns.fold[column])
        training = Training(int(found.n_iter[column]), is_converged=True)
        arrays, terms = _arrays(matrix, words, found.coef[column], fold)
        arrays["intercept"] = np.atleast_1d(found.intercept[column])
        return FittedProbe(fit.recipe, design.folds[fold], fit.seed, arrays, terms, training)

    return Solved(score.astype(np.float32), probe)


def tolerance_of(matrix: FoldMatrix) -> float:
    """Return the tolerance of logits at which PR-AUC is settled to 6 digits."""
    is_wide = matrix.n_dense > WIDE and not matrix.n_terms
    return WIDE_TOLERANCE if is_wide else TOLERANCE


def _arrays(
    matrix: FoldMatrix, words: FoldWords | None, coef: NDArray[np.float64], fold: int
) -> tuple[Arrays, tuple[str, ...] | None]:
    arrays: Arrays = {}
    terms = None
    if matrix.n_dense:
        arrays |= {"mean": matrix.mean[fold], "scale": matrix.scale[fold]}
    if words is not None:
        is_own = words.idf[fold] > 0
        terms = words.terms_of(fold)
        arrays["idf"] = words.idf[fold, is_own]
        coef = np.concatenate([coef[: len(is_own)][is_own], coef[len(is_own) :]])
    return {**arrays, "coef": coef}, terms
