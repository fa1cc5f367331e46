"""Solve the kernel systems of few features by their normal equations.

The same bordered systems as `bordered`, `(K + diag(ridge)) beta + b = h`, `1' beta = 0` on a subset
of the rows, where the kernel `K = X X'` has far fewer features than rows. With `A = [X 1]`,

    beta = (h - A v) / ridge,    (A' diag(1 / ridge) A + diag(1, .., 1, 0)) v = A' (h / ridge),

so that a factor has the size of the features, and each subset has one of its own: the products of
its held-out rows are taken from those of all rows (Woodbury). What does not belong here: when it is
the cheaper way (`logistic_batch`). Invariant: as in `bordered`, results are 0 outside a column's
rows and sum to 0.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.solvers.cholesky import cholesky


class NarrowInverse:
    """Solve bordered kernel systems of many columns on different subsets of rows.

    Args:
        shared: [row, feature] float64.
        ridge: [row] positive; its type, float32 or float64, is that of what is solved.
        patterns: [pattern, row] bool, the rows of each subset.
        chosen: [pattern] bool, the subsets that will be asked for.

    Raises:
        NumericsError: a system is not positive definite.
    """

    def __init__(
        self,
        shared: Tensor,
        ridge: Tensor,
        patterns: NDArray[np.bool_],
        chosen: NDArray[np.bool_],
    ) -> None:
        self._share = 1 / ridge
        weighted = torch.cat([shared, shared.new_ones(len(shared), 1)], dim=1)
        self._inputs = weighted.to(ridge.dtype)
        weighted = weighted * self._share.double().sqrt()[:, None]
        whole = weighted_products(weighted)
        whole.diagonal()[:-1].add_(1.0)
        self._inside: dict[int, Tensor] = {}
        self._inverse: dict[int, Tensor] = {}
        for index in np.flatnonzero(chosen):
            inside = torch.as_tensor(patterns[index], device=ridge.device)
            system = whole - weighted_products(weighted[~inside])
            where, fix = f"subset {int(index)} of rows", "raise the penalty (lower C)"
            factor = cholesky(system, "normal equations are", where, fix)
            self._inside[int(index)] = inside.to(ridge.dtype)
            self._inverse[int(index)] = torch.cholesky_inverse(factor).to(ridge.dtype)

    def solve(self, right: Tensor, pattern: NDArray[np.int64]) -> Tensor:
        """Return beta of every column, [column, row], 0 outside the column's subset.

        Args:
            right: [column, row], 0 outside the column's subset.
            pattern: [column] which subset.
        """
        fitted = (right * self._share) @ self._inputs
        for index in np.unique(pattern):
            which = torch.as_tensor(np.flatnonzero(pattern == index), device=right.device)
            fitted[which] = fitted[which] @ self._inverse[int(index)]
        beta = (right - fitted @ self._inputs.T) * self._share
        for index in np.unique(pattern):
            which = torch.as_tensor(np.flatnonzero(pattern == index), device=right.device)
            inside = self._inside[int(index)]
            own = beta[which] * inside
            # 0 by construction; rounding would leave the sum a little off.
            beta[which] = own - inside * (own.sum(1, keepdim=True) / inside.sum())
        return beta


def weighted_products(values: Tensor) -> Tensor:
    """Return `values' values`; NumPy sees that both are one matrix and computes one triangle."""
    if values.device.type == "cpu":
        rows = values.numpy()
        return torch.from_numpy(rows.T @ rows)
    return values.T @ values
