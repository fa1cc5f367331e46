"""How each estimator is solved, and how a stored probe of it scores.

What is known of an estimator beside that (settings, what it reads, what a sweep tunes) stands in
its entry in `study.estimators`, under the same name.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taprobe_core.probes.dense import LINEAR, MLP
from taprobe_core.probes.features import ProbeData
from taprobe_core.probes.fitted import TOKEN_SETS, FittedProbe, Solver

SOLVERS: dict[str, Solver] = {
    "linear": LINEAR,
    "mlp": MLP,
    "attention": TOKEN_SETS,
    "multimax": TOKEN_SETS,
    "rolling_multimax": TOKEN_SETS,
}
"""Name of an estimator (`study.ESTIMATORS`) -> how it is fitted and scored."""


def predict(probe: FittedProbe, data: ProbeData) -> NDArray[np.float32]:
    """Score every row of `data` with a stored probe.

    Args:
        probe: fitted, or loaded by `load_probes`.
        data: rows of any problems, with what the recipe reads of the same site.

    Returns:
        [sentence] float32: the probability of an anchor for targets that are classes, else the
        predicted value.

    Raises:
        DataError: `data` lacks a feature, or has another d_model.
    """
    return SOLVERS[probe.recipe.estimator].score(probe, data)
