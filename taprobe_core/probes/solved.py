"""What a batched solve leaves: scores of every row, and each model's arrays on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taprobe_core.probes.design import Fit
from taprobe_core.probes.fitted import FittedProbe


@dataclass(frozen=True, eq=False)
class Solved:
    """One solve.

    Attributes:
        score: [row, column] float32: the probability of an anchor for `anchor_binary`, else the
            predicted value; the columns of `Design.columns`.
        n_iter: [column] int64, epochs of a network or token probe, else solver steps.
        probe: makes the stored probe of one column; called only for folds that are tested.
    """

    score: NDArray[np.float32]
    n_iter: NDArray[np.int64]
    probe: Callable[[Fit, int], FittedProbe]
