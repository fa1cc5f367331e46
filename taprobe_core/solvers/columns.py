"""What a batched solver is asked for: many models over the same rows, one column each.

A column is one model: a fold, a target and, for a stochastic fit, a seed. Columns that share a
feature matrix are solved together. What does not belong here: penalties and network settings,
which are each solver's own arguments.

Invariant: a row outside the training side of a column's fold has weight 0 in that column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError


def class_sizes(
    y: NDArray[Any], counts: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many rows of class 0 and of class 1 count, [column] each.

    Args:
        y: [row, column], or [row, 1] for all columns; 0 or 1 where it counts.
        counts: [row, column].
    """
    positive = ((y > 0.5) & counts).sum(axis=0)
    return counts.sum(axis=0) - positive, positive


@dataclass(frozen=True, eq=False)
class Columns:
    """Models to fit; all members share the order of the columns.

    Attributes:
        fold: [column] int64, index into the solver's folds.
        y: [row, column] float64, the target; any finite number where the weight is 0.
        weight: [row, column] float64, at least 0; 0 on every row outside the fold's training rows.
        seed: [column] int64 of stochastic fits, else None.
    """

    fold: NDArray[np.int64]
    y: NDArray[np.float64]
    weight: NDArray[np.float64]
    seed: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.fold)

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> Columns:
        """Return some of the columns."""
        seed = None if self.seed is None else self.seed[chosen]
        return Columns(self.fold[chosen], self.y[:, chosen], self.weight[:, chosen], seed)

    def check(self, train: NDArray[np.bool_]) -> None:
        """Check shapes, finite values and that no column learns from rows it must not see.

        Args:
            train: [fold, row] bool, the training rows of each fold.

        Raises:
            DataError: names the first offending column.
        """
        shape = (train.shape[1], len(self.fold))
        if self.y.shape != shape or self.weight.shape != shape:
            raise DataError(
                f"y is {self.y.shape} and weight {self.weight.shape}, expected {shape}",
                "columns",
                "give one row per sentence and one column per model",
            )
        faults = {
            "a target that is not finite": ~np.isfinite(self.y).all(axis=0),
            "a weight that is negative or not finite": ~(
                np.isfinite(self.weight) & (self.weight >= 0)
            ).all(axis=0),
            "weight on rows outside its training rows": (
                (self.weight > 0) & ~train[self.fold].T
            ).any(axis=0),
            "no training row": ~(self.weight > 0).any(axis=0),
        }
        for what, is_bad in faults.items():
            if is_bad.any():
                first = int(np.flatnonzero(is_bad)[0])
                raise DataError(
                    f"{int(is_bad.sum())} of {len(self)} columns have {what}",
                    f"column {first}, fold {int(self.fold[first])}",
                    "make the columns from the folds they are fitted on",
                )
