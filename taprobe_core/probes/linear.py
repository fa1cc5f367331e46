"""Logistic regression and ridge of many recipes and folds, solved together, and their scores.

What does not belong here: the solvers (`solvers.logistic`, `solvers.ridge`), rows and targets
(`design`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taprobe_core.features import ProbeData
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.fitted import FittedProbe, Training
from taprobe_core.probes.inputs import Arrays, joint_blocks, joint_features
from taprobe_core.probes.solved import Solved, Solver, scores_of
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
    """Solve linear recipes: logistic regression for classes, ridge for the rest.

    Recipes may differ in dense features (`inputs.joint_features`): then the matrix holds those of
    all, every fold stands in it once for each set of features, and sees its own.

    Args:
        design: rows and folds.
        fits: linear recipes that differ in target, penalty and a few features.
        device: of the products with dense features.
        keep_weights: not read: coefficients are what is solved for, and small.

    Raises:
        NumericsError: a column did not converge.
        NotEnoughDataError: the training texts of a fold hold no word.
    """
    recipe = fits[0].recipe
    joint, blocks = joint_blocks([fit.recipe for fit in fits], design.data)
    matrix = design.matrix(joint, device, visible=blocks.seen)
    words = design.words if "text" in recipe.features else None
    n_folds = len(design.folds)
    penalty = np.repeat([fit.recipe.regularization for fit in fits], n_folds)
    columns = design.columns(fits)
    weight = columns.weight
    if recipe.is_binary:
        # Both classes count alike, as scikit-learn's `class_weight="balanced"`.
        weight = weight * balanced_weights(columns.y, design.train, columns.fold)
    fold = columns.fold + n_folds * np.repeat(blocks.of_recipe, n_folds)
    columns = Columns(fold, columns.y, weight)
    if recipe.is_binary:
        found = solve_logistic(matrix, columns, penalty, tol=tolerance_of(matrix))
    else:
        found = solve_ridge(matrix, columns, penalty)

    def probe(fit: Fit, column: int) -> FittedProbe:
        own = int(columns.fold[column])
        training = Training(int(found.n_iter[column]), is_converged=True)
        arrays, terms = _arrays(matrix, words, found.coef[column], own, blocks.seen[own // n_folds])
        arrays["intercept"] = np.atleast_1d(found.intercept[column])
        return FittedProbe(
            fit.recipe, design.folds[own % n_folds], fit.seed, arrays, terms, training
        )

    return Solved(scores_of(found.decision, recipe), found.n_iter, probe)


def score_linear(probe: FittedProbe, data: ProbeData) -> NDArray[np.float32]:
    """Score every row of `data` with a stored linear probe, [sentence] float32."""
    decision = probe.inputs(data) @ probe.arrays["coef"] + probe.arrays["intercept"][0]
    return scores_of(decision, probe.recipe)


def tolerance_of(matrix: FoldMatrix) -> float:
    """Return the tolerance of logits at which PR-AUC is settled to 6 digits."""
    is_wide = matrix.n_dense > WIDE and not matrix.n_terms
    return WIDE_TOLERANCE if is_wide else TOLERANCE


def _arrays(
    matrix: FoldMatrix,
    words: FoldWords | None,
    coef: NDArray[np.float64],
    fold: int,
    seen: NDArray[np.bool_],
) -> tuple[Arrays, tuple[str, ...] | None]:
    """Cut the arrays of one fold down to the dense features that it sees, [feature] bool."""
    arrays: Arrays = {}
    terms = None
    dense = coef[matrix.n_terms :][seen]
    if len(dense):
        arrays |= {"mean": matrix.mean[fold][seen], "scale": matrix.scale[fold][seen]}
    if words is not None:
        own = fold % len(words.idf)
        is_own = words.idf[own] > 0
        terms = words.terms_of(own)
        arrays["idf"] = words.idf[own, is_own]
        dense = np.concatenate([coef[: matrix.n_terms][is_own], dense])
    return {**arrays, "coef": dense}, terms


LINEAR = Solver(
    fit_linear,
    score_linear,
    n_weights=lambda recipe, n_features: n_features,
    per_model=("regularization",),
    features=joint_features,
)
"""Logistic regression for classes, ridge for values."""
