"""Mean and scale of every feature over the training rows of every fold.

The statistics are those of scikit-learn's `StandardScaler` (population standard deviation; a
feature constant over the training rows has scale 1) for all folds from two matrix products. What
does not belong here: applying them.

Invariant: float64; a variance that the products cannot give to six digits, because the feature
hardly varies around a mean far from the mean of all rows, is computed again in two passes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEATURES_AT_ONCE = 512
MIN_SHARE = 1e-6
"""Of the variance in the mean square around the mean of all rows; below it, two passes."""


def fold_moments(
    X: NDArray[np.float32], train: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and scale of each feature within each fold's training rows.

    Args:
        X: [row, feature] float32, finite.
        train: [fold, row] bool, at least one row in each fold.

    Returns:
        mean and scale, each [fold, feature] float64; scale > 0.

    Source:
        scikit-learn 1.9, `StandardScaler` and its rule for constant features
        (`preprocessing/_data.py`, `_is_constant_feature`).
    """
    counts = train.sum(axis=1, dtype=np.float64)[:, None]
    shares = train / counts
    mean, variance = (np.empty((len(train), X.shape[1])) for _ in range(2))
    for first in range(0, X.shape[1], FEATURES_AT_ONCE):
        block = slice(first, first + FEATURES_AT_ONCE)
        values = X[:, block].astype(np.float64)
        centre = values.mean(axis=0)
        values -= centre
        shift = shares @ values
        values *= values
        square = shares @ values
        mean[:, block] = centre + shift
        variance[:, block] = square - shift**2
        for fold, is_lost in enumerate(variance[:, block] <= MIN_SHARE * square):
            lost = first + np.flatnonzero(is_lost)
            rows = X[np.ix_(np.flatnonzero(train[fold]), lost)].astype(np.float64)
            mean[fold, lost] = rows.mean(axis=0)
            variance[fold, lost] = ((rows - mean[fold, lost]) ** 2).mean(axis=0)
    eps = np.finfo(np.float64).eps
    is_constant = variance <= counts * eps * variance + (counts * mean * eps) ** 2
    return mean, np.sqrt(np.where(is_constant, 1.0, variance))
