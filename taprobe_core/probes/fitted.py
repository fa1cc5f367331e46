"""A fitted probe: arrays in, scores out, no estimator object.

The only place where a score is computed: fitting scores with it, and so does whoever loads a probe
from disk. What does not belong here: how the arrays were found (`fit`) and how they are kept
(`files`). Invariant: a score is a function of the arrays, the terms and the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from taprobe_core.errors import DataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.inputs import Arrays, Matrix, input_frame, n_dense, transform_inputs
from taprobe_core.splits import Fold
from taprobe_core.study.config import ProbeRecipe, Target


@dataclass(frozen=True)
class Training:
    """How a fit ended.

    Attributes:
        n_iter: epochs of a network, else solver steps; 1 for equations solved at once.
        is_converged: False when a network used up `max_iter`; a linear probe always is.
        early_stopping: what a network did, in words; None for a linear probe.
    """

    n_iter: int
    is_converged: bool
    early_stopping: str | None = None


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """One recipe fitted on the training problems of one fold.

    Attributes:
        recipe: features, estimator and settings.
        target: what the scores predict.
        fold: the division it was fitted on.
        seed: the run's seed; a linear probe does not depend on it.
        arrays: `mean` and `scale` [feature] of activations and position; `idf` [term] of text;
            `coef` [feature] and `intercept` [1] of a linear probe; all these float64; `weight_<i>`
            [in, out] and `bias_<i>` [out] of a network, float32. Features stand as terms,
            activations, position.
        terms: the terms of `idf`, alphabetical; None without text.
        training: how the fit ended.
    """

    recipe: ProbeRecipe
    target: Target
    fold: Fold
    seed: int
    arrays: Arrays
    terms: tuple[str, ...] | None
    training: Training

    def predict(self, data: ProbeData) -> NDArray[np.float32]:
        """Score every row of `data`.

        Args:
            data: rows of any problems, with activations of the same site if the recipe reads them.

        Returns:
            [sentence] float32: the probability of an anchor for `anchor_binary`, else the
            predicted importance.

        Raises:
            DataError: `data` lacks activations, or has another d_model.
        """
        frame = input_frame(self.recipe, data)
        found, expected = n_dense(frame), len(self.arrays.get("mean", ()))
        if found != expected:
            raise DataError(
                f"the data has {found} features, the probe was fitted on {expected}",
                f"recipe {self.recipe.name!r}, {self.fold}",
                "use activations of the model that the probe was fitted on",
            )
        return self.score(transform_inputs(frame, self.arrays, self.terms))

    def score(self, X: Matrix) -> NDArray[np.float32]:
        """Score rows of the feature matrix, [row, feature], from `inputs.transform_inputs`."""
        if self.recipe.estimator == "mlp":
            output = self._forward(X)
        else:
            output = X @ self.arrays["coef"] + self.arrays["intercept"][0]
        score = expit(output) if self.target == "anchor_binary" else output
        return np.asarray(score, dtype=np.float32)

    def _forward(self, X: Matrix) -> NDArray[np.float64]:
        """ReLU layers, and a linear one at the end."""
        value: Any = X
        for depth in range(len(self.recipe.hidden) + 1):
            inputs = value if depth == 0 else np.maximum(value, 0)
            value = inputs @ self.arrays[f"weight_{depth}"] + self.arrays[f"bias_{depth}"]
        output: NDArray[np.float64] = value[:, 0]
        return output
