"""A fitted probe: arrays in, scores out, no estimator object.

What does not belong here: how the arrays were found (`linear`, `network`, `token_sets`) and how
they are kept (`files`). Invariant: a score is a function of arrays, terms and the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from taprobe_core.errors import DataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.inputs import Arrays, Matrix, dense_matrix, transform_inputs
from taprobe_core.splits import Fold
from taprobe_core.study import ProbeRecipe


@dataclass(frozen=True)
class Training:
    """How a fit ended.

    Attributes:
        n_iter: epochs of a network, else solver steps; 1 for equations solved at once.
        is_converged: False when a network used up its epochs; a linear probe always is.
        early_stopping: what a network did, in words; None for a linear probe.
    """

    n_iter: int
    is_converged: bool
    early_stopping: str | None = None


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """One recipe fitted on the training problems of one fold.

    Attributes:
        recipe: target, features, estimator and settings.
        fold: the division it was fitted on.
        seed: the run's seed; a linear probe does not depend on it.
        arrays: `mean` and `scale` [feature] of dense features, `idf` [term] of text; `coef`
            [feature] and `intercept` [1] of a linear probe; all these float64; `weight_<i>`
            [in, out] and `bias_<i>` [out] of a network, float32; those of a token probe as
            `solvers.token_probes` names them. Features stand as terms, then `DENSE_BLOCKS`.
        terms: the terms of `idf`, alphabetical; None without text.
        training: how the fit ended.
    """

    recipe: ProbeRecipe
    fold: Fold
    seed: int
    arrays: Arrays
    terms: tuple[str, ...] | None
    training: Training

    def predict(self, data: ProbeData) -> NDArray[np.float32]:
        """Score every row of `data`.

        Args:
            data: rows of any problems, with what the recipe reads of the same site.

        Returns:
            [sentence] float32: the probability of an anchor for `anchor_binary`, else the
            predicted value.

        Raises:
            DataError: `data` lacks a feature, or has another d_model.
        """
        if self.recipe.reads_tokens:
            # Deferred: a linear probe should not pay for PyTorch's import.
            from taprobe_core.probes.token_sets import score_tokens

            return score_tokens(self, data)
        dense = dense_matrix(self.recipe, data)
        found, expected = (0 if dense is None else dense.shape[1]), len(self.arrays.get("mean", ()))
        if found != expected:
            raise DataError(
                f"the data has {found} features, the probe was fitted on {expected}",
                f"recipe {self.recipe.name!r}, {self.fold}",
                "use activations of the model that the probe was fitted on",
            )
        output = self._output(transform_inputs(dense, data.texts, self.arrays, self.terms))
        score = expit(output) if self.recipe.target == "anchor_binary" else output
        return np.asarray(score, dtype=np.float32)

    def _output(self, X: Matrix) -> NDArray[np.float64]:
        if self.recipe.estimator == "mlp":
            return self._forward(X)
        output: NDArray[np.float64] = X @ self.arrays["coef"] + self.arrays["intercept"][0]
        return output

    def _forward(self, X: Matrix) -> NDArray[np.float64]:
        """ReLU layers, and a linear one at the end."""
        value: Any = X
        for depth in range(len(self.recipe.hidden) + 1):
            inputs = value if depth == 0 else np.maximum(value, 0)
            value = inputs @ self.arrays[f"weight_{depth}"] + self.arrays[f"bias_{depth}"]
        output: NDArray[np.float64] = value[:, 0]
        return output
