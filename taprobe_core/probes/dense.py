"""Probes of many recipes and folds that read one row a sentence: linear ones and networks.

What does not belong here: the solvers (`solvers.linear`, `solvers.networks`), rows and targets
(`design`).

Early stopping on rows is scikit-learn's and has its weakness: a random tenth of the training *rows*
is held out, so sentences of one trace stand on both sides, and a binary target is judged by
accuracy, which hardly moves when one sentence in ten is an anchor (a continuous one by R^2).
`held_out: problems` stops by the loss on the fold's validation problems instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.features import FoldWords
from taprobe_core.probes.fitted import (
    FittedProbe,
    Floats,
    Rows,
    Solver,
    SolverResult,
    Training,
    scores_of,
)
from taprobe_core.probes.inputs import Arrays, dense_matrix, joint_blocks, joint_features
from taprobe_core.solvers.columns import FitRequest, class_sizes
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import balanced_weights, solve_logistic
from taprobe_core.solvers.linear.ridge import solve_ridge
from taprobe_core.solvers.networks.options import EarlyStopping
from taprobe_core.solvers.networks.solve import NetworkOptions, NetworkSolution, fit_networks
from taprobe_core.study import ProbeRecipe

TOLERANCE = 1e-6
"""Of coefficients, relative: two neighbours in rank that change places move PR-AUC."""

WIDE_TOLERANCE = 2e-5
"""Of the coefficients of wide dense features, in two thirds of the time: PR-AUC is the same to 6
digits (`benchmarks/probes/configuration.py`)."""

WIDE = 1024
"""Features."""


def fit_linear(
    design: Design, fits: Sequence[Fit], device: str, keep_weights: bool = True
) -> SolverResult:
    """Solve linear recipes: logistic regression for classes, ridge for the rest.

    Recipes may differ in dense features (`inputs.joint_features`): then the matrix holds those of
    all, every fold stands in it once for each set of features, and sees its own.

    Args:
        design: rows and folds.
        fits: linear recipes that differ in target, penalty and a few features.
        device: of the products with dense features.
        keep_weights: not read: coefficients are what is solved for, and small.

    Raises:
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
    if recipe.is_binary and design.is_balanced:
        # Both classes count alike, as scikit-learn's `class_weight="balanced"`.
        weight = weight * balanced_weights(columns.y, design.train, columns.fold)
    fold = columns.fold + n_folds * np.repeat(blocks.of_recipe, n_folds)
    columns = FitRequest(fold, columns.y, weight)
    if recipe.is_binary:
        found = solve_logistic(matrix, columns, penalty, tol=tolerance_of(matrix))
    else:
        found = solve_ridge(matrix, columns, penalty)

    def probe(fit: Fit, column: int) -> FittedProbe:
        own = int(columns.fold[column])
        training = Training(int(found.n_iter[column]), bool(found.is_converged[column]))
        arrays, terms = _arrays(matrix, words, found.coef[column], own, blocks.seen[own // n_folds])
        arrays["intercept"] = np.atleast_1d(found.intercept[column])
        return FittedProbe(
            fit.recipe, design.folds[own % n_folds], fit.seed, arrays, terms, training
        )

    bound = np.where(found.is_converged, np.nan, found.bound)
    return SolverResult(scores_of(found.decision, recipe), found.n_iter, probe, bound)


def decide_linear(probe: FittedProbe, X: Rows, texts: Sequence[str]) -> Floats:
    """Log-odds or values of every row by a stored linear probe."""
    decision = probe.inputs(X, texts) @ probe.arrays["coef"] + probe.arrays["intercept"][0]
    return np.asarray(decision)


def tolerance_of(matrix: FoldMatrix) -> float:
    """Return the tolerance of coefficients at which PR-AUC is settled to 6 digits."""
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
    decide_linear,
    n_weights=lambda recipe, n_features: n_features,
    per_model=("regularization",),
    features=joint_features,
)
"""Logistic regression for classes, ridge for values."""


MIN_ROWS = 11
"""Fewer rows hold out a single one, which has neither both classes nor an R^2."""


def fit_mlp(
    design: Design, fits: Sequence[Fit], device: str, keep_weights: bool = True
) -> SolverResult:
    """Train the networks of recipes that differ in target and seed alone.

    Args:
        design: rows and folds.
        fits: recipes of estimator `mlp`, of equal features and settings.
        device: of the training.
        keep_weights: False where no probe will be asked for.

    Raises:
        NumericsError: a network diverged.
        NotEnoughDataError: a fold has no validation problem.
    """
    recipe = fits[0].recipe
    X = dense_matrix(recipe, design.data)
    if X is None:
        raise DataError(
            "a network without dense features", f"recipe {recipe.name!r}", "add activations"
        )
    is_validated = recipe.early_stopping and recipe.held_out == "problems"
    train, validation = design.stopping_sides() if is_validated else (design.train, None)
    columns = design.columns(fits, train)
    stopping, in_words = _stopping(fits, columns)
    options = NetworkOptions(
        hidden=recipe.hidden,
        is_classifier=recipe.is_binary,
        max_iter=recipe.max_iter,
        early_stopping=stopping,
    )
    # An undefined target has no loss.
    known = [design.target(fit.recipe).weight > 0 for fit in fits]
    found = fit_networks(
        X,
        train,
        columns,
        options,
        validation,
        device,
        validation_weight=np.repeat(np.array(known, dtype=float), len(design.folds), axis=0).T,
        keep_weights=keep_weights,
    )

    def probe(fit: Fit, column: int) -> FittedProbe:
        fold = int(found.fold[column])
        training = Training(int(found.n_iter[column]), bool(found.is_converged[column]), in_words)
        arrays = _network_arrays(found, column, fold)
        return FittedProbe(fit.recipe, design.folds[fold], fit.seed, arrays, None, training)

    return SolverResult(scores_of(found.decision, recipe), found.n_iter, probe)


def decide_mlp(probe: FittedProbe, X: Rows, texts: Sequence[str]) -> Floats:
    """Log-odds or values of every row by a stored network: ReLU, linear at last."""
    value: Any = probe.inputs(X, texts)
    for depth in range(len(probe.recipe.hidden) + 1):
        inputs = value if depth == 0 else np.maximum(value, 0)
        value = inputs @ probe.arrays[f"weight_{depth}"] + probe.arrays[f"bias_{depth}"]
    return np.asarray(value[:, 0])


def _n_weights(recipe: ProbeRecipe, n_features: int) -> int:
    sizes = (n_features, *recipe.hidden, 1)
    return sum(n_in * n_out for n_in, n_out in pairwise(sizes))


def _network_arrays(found: NetworkSolution, column: int, fold: int) -> Arrays:
    arrays: Arrays = {"mean": found.mean[fold], "scale": found.scale[fold]}
    for depth, (weight, bias) in enumerate(zip(found.weights, found.biases, strict=True)):
        arrays[f"weight_{depth}"], arrays[f"bias_{depth}"] = weight[column], bias[column]
    return arrays


def _stopping(fits: Sequence[Fit], columns: FitRequest) -> tuple[EarlyStopping, str]:
    """Decide how the networks stop, alike for all folds and for every kind of target."""
    recipe = fits[0].recipe
    if not recipe.early_stopping:
        return "off", "off: the recipe says so"
    if recipe.held_out == "problems":
        return "problems", "on: the fold's validation problems, watched by loss"
    is_row = columns.weight > 0
    n_rows = int(is_row.sum(axis=0).min())
    if n_rows < MIN_ROWS:
        return "off", f"off: {n_rows} training rows in a fold, {MIN_ROWS} needed"
    if recipe.is_binary and int(np.minimum(*class_sizes(columns.y, is_row)).min()) < 2:
        return "off", "off: a class has one training row in a fold, 2 needed"
    score = "accuracy" if recipe.is_binary else "R^2"
    return "rows", f"on: 10 % of the training rows held out, watched by {score}"


MLP = Solver(fit_mlp, decide_mlp, _n_weights)
"""Multilayer perceptrons."""
