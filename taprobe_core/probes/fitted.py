"""A fitted probe: arrays and what they were fitted on, no estimator object.

What does not belong here: how the arrays are found and how they score (`linear`, `network`,
`token_sets`), and how they are kept (`files`). Invariant: what a probe reads of a row is a function
of arrays, terms and the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def inputs(self, data: ProbeData) -> Matrix:
        """Return the dense features and texts of every row as the probe reads them.

        Args:
            data: rows of any problems, with what the recipe reads of the same site.

        Returns:
            [row, feature] float64, sparse when the recipe reads text.

        Raises:
            DataError: `data` lacks a feature, or has another d_model.
        """
        dense = dense_matrix(self.recipe, data)
        found, expected = (0 if dense is None else dense.shape[1]), len(self.arrays.get("mean", ()))
        if found != expected:
            raise DataError(
                f"the data has {found} features, the probe was fitted on {expected}",
                f"recipe {self.recipe.name!r}, {self.fold}",
                "use activations of the model that the probe was fitted on",
            )
        return transform_inputs(dense, data.texts, self.arrays, self.terms)
