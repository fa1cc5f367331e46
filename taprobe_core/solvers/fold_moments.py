"""Mean and scale of every feature over the training rows of every fold.

The statistics are those of scikit-learn's `StandardScaler` (population standard deviation; a
feature constant over the training rows has scale 1) for all folds from two matrix products. What
does not belong here: applying them.

Invariant: float64, on the device of the rows; a variance that the products cannot give to nine
digits, because the feature hardly varies around a mean far from the mean of all rows, is computed
again in two passes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
