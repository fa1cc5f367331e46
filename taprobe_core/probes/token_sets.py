"""Attention, MultiMax and rolling MultiMax probes of many recipes, folds and seeds; their scores.

What does not belong here: the training (`solvers.token_probes`), rows and targets (`design`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.errors import DataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.fitted import FittedProbe, Training
from taprobe_core.probes.solved import Solved, Solver
from taprobe_core.solvers.columns import Columns
from taprobe_core.solvers.platt import probabilities
from taprobe_core.solvers.ragged import RaggedTokens
from taprobe_core.solvers.token_options import TokenProbeOptions
from taprobe_core.solvers.token_probes import (
    fit_token_probes,
    positive_weights,
    score_token_probe,
)
from taprobe_core.study import ProbeRecipe


def fit_token_sets(
    design: Design, fits: Sequence[Fit], device: str, keep_weights: bool = True
) -> Solved:
    """Train the token probes of recipes that differ in target and seed alone.

    Binary targets weigh both classes alike while training; their scores are then calibrated on the
    fold's validation problems, the ones whose loss stopped the training.

    Args:
        design: rows and folds.
        fits: recipes of one token estimator, of equal settings.
        device: of the training.
        keep_weights: False where no probe will be asked for.

    Raises:
        DataError: the data has no token sets.
        NonFiniteError: a probe diverged.
    """
    recipe = fits[0].recipe
    train, validation = design.watched()
    # An undefined target has no loss; `fit` groups fits by what leaves it undefined.
    validation &= design.target(recipe).weight > 0
    columns, options = design.columns(fits, train), token_options(recipe)
    if options.is_binary:
        weight = columns.weight * positive_weights(columns.y, columns.fold, train)
        columns = Columns(columns.fold, columns.y, weight, columns.seed)
    tokens = ragged_tokens(recipe, design.data)
    found = fit_token_probes(
        tokens, train, validation, columns, options, device, keep_weights=keep_weights
    )
    score = found.probability() if options.is_binary else found.decision

    def probe(fit: Fit, column: int) -> FittedProbe:
        is_fitted = bool(found.is_calibrated[column])
        in_words = f"on: validation loss, best in epoch {found.best_epoch[column]}"
        if options.is_binary and not is_fitted:
            in_words += "; not calibrated"
        training = Training(int(found.n_iter[column]), bool(found.is_converged[column]), in_words)
        arrays: dict[str, NDArray[Any]] = {**found.column(column)}
        arrays["calibration"] = found.calibration[column]
        fold = design.folds[int(columns.fold[column])]
        return FittedProbe(fit.recipe, fold, fit.seed, arrays, None, training)

    return Solved(score.astype(np.float32), found.n_iter, probe)


def score_tokens(probe: FittedProbe, data: ProbeData) -> NDArray[np.float32]:
    """Score every row of `data` with a stored token probe.

    Returns:
        [sentence] float32: the calibrated probability of an anchor, or the predicted value.

    Raises:
        DataError: `data` has no token sets, or of another d_model.
    """
    options = token_options(probe.recipe)
    decision = score_token_probe(ragged_tokens(probe.recipe, data), probe.arrays, options)
    if options.is_binary:
        decision = probabilities(decision[:, None], probe.arrays["calibration"][None])[:, 0]
    return decision.astype(np.float32)


def ragged_tokens(recipe: ProbeRecipe, data: ProbeData) -> RaggedTokens:
    """Return the token sets of the rows.

    Raises:
        DataError: the data has none.
    """
    if data.tokens is None:
        raise DataError(
            f"recipe {recipe.name!r} reads token sets, and the data has none",
            "ProbeData.tokens",
            "pass activations of pooling tokens to join_features",
        )
    return RaggedTokens(torch.from_numpy(data.tokens.values), data.tokens.offsets)


def token_options(recipe: ProbeRecipe) -> TokenProbeOptions:
    """Return the solver's settings of a recipe."""
    own = recipe.token_probe
    return TokenProbeOptions(
        pooling=recipe.estimator,  # type: ignore[arg-type] # the recipe has a token estimator
        loss="logistic" if recipe.is_binary else own.loss,
        **own.model_dump(exclude={"loss"}),
    )


def _n_weights(recipe: ProbeRecipe, d_model: int) -> int:
    width, depth = recipe.token_probe.width, recipe.token_probe.depth
    return width * (d_model + (depth - 1) * width)


TOKEN_SETS = Solver(fit_token_sets, score_tokens, _n_weights, is_watched=True)
"""Probes that read each token of a sentence and pool what they read."""
