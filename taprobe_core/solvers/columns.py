"""What a batched solver is asked for: many models over the same rows; the scaling of each fold.

One model is one column: a fold, a target and, for a stochastic fit, a seed. The columns of a
`FitRequest` share a feature matrix and are solved together. The mean and scale of every feature are
those of scikit-learn's `StandardScaler` on the training rows of each fold (population standard
deviation; a constant feature has scale 1), for all folds from two matrix products. What does not
belong here: applying them, penalties and network settings, which are each solver's own arguments.

Invariants: a row outside the training side of a column's fold has weight 0 in that column.
Statistics are float64, on the device of the rows; a variance that the products cannot give to nine
digits, because the feature hardly varies around a mean far from the mean of all rows, is computed
again in two passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
class FitRequest:
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

    def take(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> FitRequest:
        """Return some of the columns."""
        seed = None if self.seed is None else self.seed[chosen]
        return FitRequest(self.fold[chosen], self.y[:, chosen], self.weight[:, chosen], seed)

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


FEATURES_AT_ONCE = 512
MIN_SHARE = 1e-5
"""Of the variance in the mean square around the mean of all rows; below it, two passes."""


def fold_moments(
    X: NDArray[np.float32], train: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and scale of each feature within each fold's training rows.

    Args:
        X: [row, feature] float32 or float64, finite.
        train: [fold, row] bool, at least one row in each fold.

    Returns:
        mean and scale, each [fold, feature] float64; scale > 0.

    Source:
        scikit-learn 1.9, `StandardScaler` and its rule for constant features
        (`preprocessing/_data.py`, `_is_constant_feature`).
    """
    mean, scale = tensor_moments(torch.as_tensor(X), torch.as_tensor(train))
    return mean.numpy(), scale.numpy()


def tensor_moments(X: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and scale like `fold_moments`, of rows on any device.

    Args:
        X: [row, feature], real, finite.
        train: [fold, row] bool, at least one row in each fold, on the same device.

    Returns:
        mean and scale, each [fold, feature] float64; scale > 0.
    """
    counts = train.sum(dim=1, keepdim=True).double()
    shares = train / counts
    mean = torch.empty(len(train), X.shape[1], dtype=torch.float64, device=X.device)
    variance = torch.empty_like(mean)
    for first in range(0, X.shape[1], FEATURES_AT_ONCE):
        block = slice(first, first + FEATURES_AT_ONCE)
        values = X[:, block].double()
        centre = values.mean(dim=0)
        # Not in place: float64 rows are a view of what was given.
        values = values - centre
        shift = shares @ values
        square = shares @ values.square_()
        mean[:, block] = centre + shift
        variance[:, block] = square - shift.square()
        is_lost = variance[:, block] <= MIN_SHARE * square
        for fold in torch.nonzero(is_lost.any(dim=1))[:, 0].tolist():
            lost = first + torch.nonzero(is_lost[fold])[:, 0]
            rows = X[:, lost][train[fold]].double()
            mean[fold, lost] = rows.mean(dim=0)
            # Twice: a mean that is large rounds, and its rounding is a mean of what is left.
            rows -= mean[fold, lost]
            rest = rows.mean(dim=0)
            mean[fold, lost] += rest
            variance[fold, lost] = (rows - rest).square_().mean(dim=0)
    eps = torch.finfo(torch.float64).eps
    is_constant = variance <= counts * eps * variance + (counts * mean * eps).square()
    return mean, torch.where(is_constant, 1.0, variance).sqrt()
