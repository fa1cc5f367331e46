"""The scikit-learn pipeline of a recipe, its fit, and the arrays that a fit leaves.

Inputs: text as TF-IDF, activations and position standardised, joined by a `ColumnTransformer`.
Estimators: logistic regression or ridge (`linear`), a multilayer perceptron (`mlp`). What does not
belong here: folds and rows (`fit`), scores from stored arrays (`fitted`). Invariant: given rows,
target and seed a fit depends on nothing else, and no warning of scikit-learn leaves it.

A known weakness of `mlp`: its early stopping is scikit-learn's. A random tenth of the training
*rows* is held out, not of the problems, so sentences of one trace stand on both sides; and a binary
target is watched by accuracy, which hardly moves when one sentence in ten is an anchor (a
continuous one by R^2). `early_stopping: false` in the recipe trains on all rows until the training
loss stalls. One rule for both kinds of target says when it is off: see `early_stopping_of`.
"""

from __future__ import annotations

import warnings

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from taprobe_core.errors import NumericsError
from taprobe_core.probes.fitted import Training
from taprobe_core.probes.inputs import DENSE_BLOCKS, Arrays
from taprobe_core.probes.words import text_pipeline
from taprobe_core.study.config import ProbeRecipe, Target

TOLERANCE = 1e-8
"""Of the linear solvers. At scikit-learn's default, 1e-4, scores still move in the second digit."""

MAX_ITER = 10_000
PATIENCE = 20
HELD_OUT = 0.1
MIN_ROWS = 11
"""Fewer rows hold out a single one, which has neither both classes nor an R^2."""


def make_pipeline(recipe: ProbeRecipe, target: Target, seed: int) -> Pipeline:
    """Return the unfitted pipeline of `recipe`: step `inputs`, then step `estimator`.

    Args:
        recipe: features, estimator and settings.
        target: `anchor_binary` gets a classifier, the others a regressor.
        seed: of a network; a linear estimator has no randomness.

    Returns:
        To be fitted on frames of `inputs.input_frame`.
    """
    blocks = {
        "text": text_pipeline(),
        "activations": StandardScaler(),
        "position": StandardScaler(),
    }
    inputs = ColumnTransformer(
        [(name, block, name) for name, block in blocks.items() if name in recipe.features],
        sparse_threshold=1.0,  # sparse as soon as there is text
    )
    return Pipeline([("inputs", inputs), ("estimator", _estimator(recipe, target, seed))])


def _estimator(recipe: ProbeRecipe, target: Target, seed: int) -> BaseEstimator:
    is_binary = target == "anchor_binary"
    if recipe.estimator == "mlp":
        network = MLPClassifier if is_binary else MLPRegressor
        return network(
            hidden_layer_sizes=recipe.hidden,
            alpha=1e-4,
            learning_rate_init=1e-3,
            max_iter=recipe.max_iter,
            early_stopping=recipe.early_stopping,
            validation_fraction=HELD_OUT,
            n_iter_no_change=PATIENCE,
            random_state=seed,
        )
    if is_binary:
        return LogisticRegression(
            C=recipe.regularization, class_weight="balanced", tol=TOLERANCE, max_iter=MAX_ITER
        )
    return Ridge(alpha=recipe.regularization, tol=TOLERANCE)


def early_stopping_of(
    recipe: ProbeRecipe, target: Target, y: NDArray[np.float64]
) -> tuple[bool, str]:
    """Decide whether a network can stop early, and say so in words.

    Off when the recipe says so, with fewer than `MIN_ROWS` training rows, or when a class of a
    binary target has fewer than two.
    """
    if not recipe.early_stopping:
        return False, "off: the recipe says so"
    if len(y) < MIN_ROWS:
        return False, f"off: {len(y)} training rows, {MIN_ROWS} needed"
    if target == "anchor_binary" and np.unique(y, return_counts=True)[1].min() < 2:
        return False, "off: a class has one training row, 2 needed"
    score = "accuracy" if target == "anchor_binary" else "R^2"
    return True, f"on: 10 % of {len(y)} training rows held out, watched by {score}"


def fit_pipeline(
    recipe: ProbeRecipe,
    target: Target,
    frame: pl.DataFrame,
    y: NDArray[np.float64],
    seed: int,
    where: str,
) -> tuple[Pipeline, Training]:
    """Fit the pipeline of `recipe` and say how it ended.

    Args:
        recipe: features, estimator and settings.
        target: what `y` is.
        frame: training rows, from `inputs.input_frame`.
        y: [row]; both classes of a binary target.
        seed: of a network.
        where: recipe and fold, for errors.

    Raises:
        NumericsError: a linear fit did not converge, a network diverged, or features are not
            finite.
    """
    pipeline = make_pipeline(recipe, target, seed)
    is_network, in_words = recipe.estimator == "mlp", None
    if is_network:
        stops_early, in_words = early_stopping_of(recipe, target, y)
        pipeline.set_params(estimator__early_stopping=stops_early)
    # A diverging network overflows first; scikit-learn then refuses its weights.
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        if is_network:
            warnings.simplefilter("ignore", ConvergenceWarning)
        else:
            # Ridge says that its equations are singular with a plain UserWarning.
            warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", LinAlgWarning)
        try:
            pipeline.fit(frame, y)
        except (UserWarning, LinAlgWarning, ValueError) as error:
            raise _unfitted(error, is_network, target, where) from error
    n_iter = _n_iter(pipeline["estimator"])
    return pipeline, Training(n_iter, not is_network or n_iter < recipe.max_iter, in_words)


def _unfitted(error: Exception, is_network: bool, target: Target, where: str) -> NumericsError:
    reason = str(error).splitlines()[0]
    if is_network or isinstance(error, ValueError):
        return NumericsError(
            f"the probe cannot be fitted: {reason}",
            where,
            "look for extreme values in the features"
            + (", or use estimator: linear" if is_network else ""),
        )
    change = "lower" if target == "anchor_binary" else "raise"
    return NumericsError(
        f"the linear probe did not converge: {reason}",
        where,
        f"{change} the recipe's regularization, which penalises more",
    )


def _n_iter(estimator: BaseEstimator) -> int:
    n_iter = estimator.n_iter_
    # Ridge has none when its equations are solved at once.
    return 1 if n_iter is None else int(np.max(n_iter))


def extract_arrays(pipeline: Pipeline) -> tuple[Arrays, tuple[str, ...] | None]:
    """Return what a fitted pipeline learned, as `FittedProbe` holds it.

    Returns:
        The arrays described at `FittedProbe.arrays`, and the terms, or None without text.
    """
    inputs, estimator = pipeline["inputs"].named_transformers_, pipeline["estimator"]
    arrays: Arrays = {}
    scalers = [inputs[name] for name in DENSE_BLOCKS if name in inputs]
    if scalers:
        arrays["mean"] = np.concatenate([scaler.mean_ for scaler in scalers])
        arrays["scale"] = np.concatenate([scaler.scale_ for scaler in scalers])
    terms = None
    if "text" in inputs:
        arrays["idf"] = inputs["text"]["weigh"].idf_
        terms = tuple(str(term) for term in inputs["text"][:-1].get_feature_names_out())
    if isinstance(estimator, (MLPClassifier, MLPRegressor)):
        layers = zip(estimator.coefs_, estimator.intercepts_, strict=True)
        for depth, (weight, bias) in enumerate(layers):
            # Half the size on disk, and far finer than the scores.
            arrays[f"weight_{depth}"] = weight.astype(np.float32)
            arrays[f"bias_{depth}"] = bias.astype(np.float32)
    else:
        arrays["coef"] = estimator.coef_.ravel()
        arrays["intercept"] = np.atleast_1d(estimator.intercept_)
    return arrays, terms
