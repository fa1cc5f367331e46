"""The fits that the tripwires make, on the project's own batched solvers.

What does not belong here: anything that learns from labels outside a solver, and judging.

Invariant: the network has no early stopping and no validation rows; it ends after `MAX_ITER`
passes, or when the loss over all of its rows has fallen by less than `TOL` a pass for `PATIENCE`
passes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.evaluation.tripwires.memorisation import Memorise
from taprobe_core.evaluation.tripwires.shuffling import Fit
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import solve_logistic
from taprobe_core.solvers.linear.ridge import solve_ridge
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks

HIDDEN = (50, 50)
MAX_ITER = 500
TOL = 1e-5
PATIENCE = 20


def network(device: str | torch.device = "cpu") -> Memorise:
    """Return the networks that learn one problem by heart.

    Args:
        device: where they are trained.

    Returns:
        A function from features, labels and seeds to the logits of the rows that were learned.
    """

    def fit(
        X: NDArray[np.float32], is_anchor: NDArray[np.bool_], seeds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        shape = (len(X), len(seeds))
        y = np.broadcast_to(is_anchor[:, None], shape).astype(np.float64)
        columns = FitRequest(np.zeros(len(seeds), dtype=np.int64), y, np.ones(shape), seeds)
        options = NetworkOptions(
            hidden=HIDDEN, max_iter=MAX_ITER, early_stopping="off", tol=TOL, patience=PATIENCE
        )
        train = np.ones((1, len(X)), dtype=np.bool_)
        return fit_networks(X, train, columns, options, device=device, keep_weights=False).decision

    return fit


def ridge_probe(
    X: NDArray[np.float32], alpha: float = 1.0, device: str | torch.device = "cpu"
) -> Fit:
    """Return the cheap probe: features standardised in the fold, ridge regression on 0 and 1.

    It sees what the logistic probe sees (rows, folds, features) and serves all folds and shuffles
    from few factorisations, however many labellings there are. Weights count as in or out.

    Args:
        X: [row, feature].
        alpha: penalty of every column.
        device: where the products are computed.

    Returns:
        A function from training rows and columns to the predictions for every row.
    """

    def fit(train: NDArray[np.bool_], columns: FitRequest) -> NDArray[np.float64]:
        matrix = FoldMatrix(train, X, device=device)
        alike = replace(columns, weight=(columns.weight > 0).astype(np.float64))
        return solve_ridge(matrix, alike, np.full(len(columns), alpha)).decision

    return fit


def linear_probe(X: NDArray[np.float32], C: float = 1.0, device: str | torch.device = "cpu") -> Fit:
    """Return the linear probe: features standardised in the fold, balanced logistic regression.

    Dearer than `ridge_probe`: every labelling is a fit of its own.

    Args:
        X: [row, feature].
        C: inverse penalty of every column.
        device: where the products are computed.

    Returns:
        A function from training rows and columns to the logits of every row.
    """

    def fit(train: NDArray[np.bool_], columns: FitRequest) -> NDArray[np.float64]:
        matrix = FoldMatrix(train, X, device=device)
        penalty = np.full(len(columns), C)
        return solve_logistic(matrix, columns, penalty, tol=1e-4).decision

    return fit
