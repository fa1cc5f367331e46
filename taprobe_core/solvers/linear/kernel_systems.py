"""Kernel systems with a free intercept: one factorisation that serves every subset of the rows.

The system of a kernel method with an unpenalised intercept is bordered:

    [K + diag(ridge)  1] [beta]   [h]
    [1'               0] [b   ] = [0]

Its inverse, restricted to the first block, is `P = Q - Q 1 1' Q / (1' Q 1)`, `Q = (K + ridge)^-1`.
The same system without the rows B is solved from P by deletion: `beta = P h - P[:, B] lam` with
`lam = P[B, B]^-1 (P h)[B]`, which makes beta 0 on B. So a factorisation per kernel serves all folds
(block inversion; Cawley and Talbot 2003 use it for leave-one-out).

What does not belong here: where the kernel comes from. Invariant: results are 0 outside a column's
rows and sum to 0.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import NumericsError


def cholesky(system: Tensor, what: str, where: str, fix: str) -> Tensor:
    """Return the lower factor of a positive definite matrix, or of a batch of them.

    Args:
        system: [..., row, row] symmetric.
        what: the system in words, singular or plural with its verb.
        where: which one, for the error.
        fix: what to do where it is not positive definite.

    Raises:
        NumericsError: a matrix is not positive definite in its precision.
    """
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        raise NumericsError(f"{what} not positive definite", where, fix)
    return factor  # type: ignore[no-any-return]


class BorderedInverse:
    """Solve bordered kernel systems of many columns on different subsets of rows.

    Args:
        gram: [row, row] symmetric, positive semidefinite; float32 or float64.
        ridge: [row] positive.
        patterns: [pattern, row] bool, the rows of each subset.
        chosen: [pattern] bool, the subsets that will be asked for; None for all.

    Raises:
        NumericsError: a system is not positive definite in the precision of `gram`.
    """

    def __init__(
        self,
        gram: Tensor,
        ridge: Tensor,
        patterns: NDArray[np.bool_],
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        asked = np.arange(len(patterns)) if chosen is None else np.flatnonzero(chosen)
        in_any = patterns[asked].any(axis=0)
        used = torch.as_tensor(in_any, device=gram.device)
        # Rows that no subset has are left out of the factorisation.
        self._used = torch.nonzero(used)[:, 0]
        self._is_whole = bool(used.all())
        system = (gram if self._is_whole else gram[self._used][:, self._used]).clone()
        system.diagonal().add_(ridge[self._used])
        self._inverse = _centred(_inverse(system))
        self._held_out: dict[int, Tensor] = {}
        self._factors: dict[int, Tensor] = {}
        for index in asked:
            rows = torch.as_tensor(np.flatnonzero(~patterns[index, in_any]), device=gram.device)
            block = self._inverse[rows][:, rows]
            what = f"a deleted block of {len(rows)} rows is"
            self._held_out[int(index)] = rows
            self._factors[int(index)] = cholesky(block, what, "kernel system", "raise the penalty")

    def solve(self, right: Tensor, pattern: NDArray[np.int64]) -> Tensor:
        """Return beta of every column, [column, row], 0 outside the column's subset.

        Args:
            right: [column, row], 0 outside the column's subset.
            pattern: [column] which subset.
        """
        inner = right if self._is_whole else right[:, self._used]
        beta = inner @ self._inverse
        missing = torch.zeros_like(beta)
        is_cut = False
        for index in np.unique(pattern):
            rows = self._held_out[int(index)]
            if not len(rows):
                continue
            which = torch.as_tensor(np.flatnonzero(pattern == index), device=right.device)[:, None]
            is_cut = True
            factor = self._factors[int(index)]
            missing[which, rows] = torch.cholesky_solve(beta[which, rows].T, factor).T
        if is_cut:
            beta -= missing @ self._inverse
            # 0 by construction; rounding would leave them a little off.
            beta[missing != 0] = 0.0
        if self._is_whole:
            return beta
        out = torch.zeros_like(right)
        out[:, self._used] = beta
        return out


def _inverse(system: Tensor) -> Tensor:
    """Invert a positive definite matrix; LAPACK by SciPy on a CPU, where it is faster."""
    if system.device.type == "cpu":
        kind = "s" if system.dtype == torch.float32 else "d"
        factorise = getattr(scipy.linalg.lapack, f"{kind}potrf")
        invert = getattr(scipy.linalg.lapack, f"{kind}potri")
        # The transpose of a row-major array is what LAPACK reads without a copy.
        factor, failed = factorise(system.numpy().T, lower=0, overwrite_a=1)
        if failed == 0:
            half, failed = invert(factor, lower=0, overwrite_c=1)
        if failed != 0:
            raise _not_definite()
        lower = torch.from_numpy(np.ascontiguousarray(half.T))
        return torch.tril(lower) + torch.tril(lower, -1).T
    factor_, failed_ = torch.linalg.cholesky_ex(system)
    if int(failed_) != 0:
        raise _not_definite()
    return torch.cholesky_inverse(factor_)


def _centred(inverse: Tensor) -> Tensor:
    total = inverse.sum(0)
    return inverse.sub_(torch.outer(total, total / total.sum()))


def _not_definite() -> NumericsError:
    return NumericsError(
        "a kernel matrix with its penalty is not positive definite",
        "kernel system",
        "raise the penalty (ridge alpha, or lower C)",
    )
