"""Ridge regression of many columns: the optimum of scikit-learn, from few factorisations.

Each column minimises `sum_i weight_i (y_i - x_i' w - b)^2 + alpha ||w||^2` with x standardised on
its fold's training rows (unweighted) and b free: scikit-learn's
`Pipeline(StandardScaler(), Ridge(alpha))` with sample weights on the ridge step.

Two ways, by size. Few features: normal equations per distinct (fold, weight, alpha) in float64.
Many features: the dual, `(K_f + alpha / weight) beta + b = y`, `1' beta = 0`, `w = X_f' beta`, by
conjugate gradients in float64. K_f differs from the kernel under the scaling of all rows only
through the folds' own scales, so one factorisation of the latter, cut down to each fold's rows
(`kernel_systems`), is a nearly exact preconditioner for every fold, target and residual target.

What does not belong here: which penalties. Invariant: a column's result does not depend on which
columns are solved beside it, up to the tolerance. Source: Saunders, Gammerman and Vovk (1998) for
the dual; Hestenes and Stiefel (1952), with the Polak-Ribiere coefficient because the preconditioner
is rounded to float32 (Golub and Ye 1999).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import NumericsError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.kernel_systems import BorderedInverse, cholesky
from taprobe_core.solvers.linear.solution import (
    LinearSolution,
    agreeing_groups,
    as_rows,
    check_request,
    finish,
    row_patterns,
)

MAX_PRIMAL_FEATURES = 1024


def solve_ridge(
    matrix: FoldMatrix,
    columns: FitRequest,
    alpha: NDArray[np.float64],
    *,
    tol: float = 1e-10,
    max_iter: int = 200,
) -> LinearSolution:
    """Fit all columns.

    Args:
        matrix: features; its scaling decides in which space the penalty acts.
        columns: folds, targets and weights.
        alpha: [column] float64 penalty, positive.
        tol: residual of the dual system over that of a constant model at which a column is done.
        max_iter: of conjugate gradients.

    Returns:
        Coefficients, intercepts and decisions; `n_iter` is 0 where the solution is direct. A column
        that is not within `tol` is marked and ends no other.

    Raises:
        DataError: faulty columns or penalties; names the first.
        NumericsError: normal equations are singular to rounding.
    """
    alpha = np.asarray(alpha, dtype=np.float64)
    check_request(matrix, columns, alpha)
    n_features = matrix.n_features
    if n_features <= MAX_PRIMAL_FEATURES and (matrix.text is None or n_features <= matrix.n_rows):
        return _primal(matrix, columns, alpha)
    return _dual(matrix, columns, alpha, tol, max_iter)


def _primal(matrix: FoldMatrix, columns: FitRequest, alpha: NDArray[np.float64]) -> LinearSolution:
    """Solve normal equations, fold by fold; columns of equal weights and alpha share them."""
    y, weight = (as_rows(each, matrix.device) for each in (columns.y, columns.weight))
    coef = torch.zeros(len(columns), matrix.n_features, dtype=torch.float64, device=matrix.device)
    intercept = torch.zeros(len(columns), dtype=torch.float64, device=matrix.device)
    keys = np.column_stack([columns.fold.astype(np.float64), alpha, columns.weight.T])
    _, first, index = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    by_fold: dict[int, list[int]] = {}
    for group, column in enumerate(first):
        by_fold.setdefault(int(columns.fold[column]), []).append(group)
    for fold, groups in by_fold.items():
        rows = matrix.rows(fold)
        for group in groups:
            chosen = torch.as_tensor(np.flatnonzero(index.reshape(-1) == group), device=rows.device)
            own = weight[chosen[0]]
            share = own / own.sum()
            x_mean, y_mean = share @ rows, y[chosen] @ share
            centred = rows - x_mean
            weighted = centred * own[:, None]
            system = weighted.T @ centred
            system.diagonal().add_(float(alpha[first[group]]))
            right = weighted.T @ (y[chosen] - y_mean[:, None]).T
            where = f"column {int(chosen[0])}, fold {fold}"
            factor = cholesky(system, "normal equations are", where, "raise alpha")
            solved = torch.cholesky_solve(right, factor).T
            coef[chosen] = solved
            intercept[chosen] = y_mean - solved @ x_mean
    return finish(matrix, columns, coef, intercept, np.zeros(len(columns), dtype=np.int64))


def _dual(
    matrix: FoldMatrix, columns: FitRequest, alpha: NDArray[np.float64], tol: float, max_iter: int
) -> LinearSolution:
    support = columns.weight > 0
    group = agreeing_groups(support, columns.weight, alpha)
    gram = matrix.shared_gram(torch.float32)
    beta = torch.zeros(len(columns), matrix.n_rows, dtype=torch.float64, device=matrix.device)
    kernel_beta = torch.zeros_like(beta)
    intercept = torch.zeros(len(columns), dtype=torch.float64, device=matrix.device)
    n_iter = np.zeros(len(columns), dtype=np.int64)
    bound = np.zeros(len(columns))
    for each in np.unique(group):
        chosen = np.flatnonzero(group == each)
        part = columns.take(chosen)
        at = torch.as_tensor(chosen, device=matrix.device)
        beta[at], kernel_beta[at], intercept[at], n_iter[chosen], bound[chosen] = _dual_group(
            matrix, gram, part, float(alpha[chosen[0]]), tol, max_iter
        )
    coef = matrix.backward(columns.fold, beta)
    decision = kernel_beta + intercept[:, None]
    return finish(matrix, columns, coef, intercept, n_iter, decision, bound, bound <= tol)


def _dual_group(
    matrix: FoldMatrix, gram: Tensor, columns: FitRequest, alpha: float, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, NDArray[np.int64], NDArray[np.float64]]:
    """Solve columns whose penalties agree on common rows.

    Returns:
        beta and K_f beta, [column, row]; intercept, iterations, residual over that of a constant
        model, [column].
    """
    weight = as_rows(columns.weight, matrix.device)
    inside = weight > 0
    mask = inside.double()
    penalty = torch.where(inside, alpha / weight.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    known = mask.sum(0)
    mean_penalty = torch.where(known > 0, penalty.sum(0) / known.clamp(min=1), alpha)
    patterns, pattern = row_patterns(columns.weight > 0)
    inverse = _preconditioner(gram, mean_penalty.to(gram), patterns)
    count = mask.sum(1, keepdim=True)

    def project(values: Tensor, inside: Tensor, count: Tensor) -> Tensor:
        return (values - (values * inside).sum(1, keepdim=True) / count) * inside

    y = as_rows(columns.y, matrix.device)
    n_columns = len(columns)
    all_beta, all_kernel = torch.zeros_like(y), torch.zeros_like(y)
    n_iter = np.zeros(n_columns, dtype=np.int64)
    bound = np.zeros(n_columns)
    live = np.arange(n_columns)
    residual = project(y, mask, count)
    norm = residual.norm(dim=1)
    beta, kernel = torch.zeros_like(y), torch.zeros_like(y)
    direction, old_residual = torch.zeros_like(y), torch.zeros_like(y)
    old_steep = torch.ones_like(count)
    for _ in range(max_iter):
        done = residual.norm(dim=1) <= tol * norm
        if bool(done.any()):
            at = torch.as_tensor(live, device=y.device)
            all_beta[at[done]], all_kernel[at[done]] = beta[done], kernel[done]
            keep = ~done
            live = live[keep.cpu().numpy()]
            if not len(live):
                break
            mask, count, penalty, norm = mask[keep], count[keep], penalty[keep], norm[keep]
            beta, kernel, residual = beta[keep], kernel[keep], residual[keep]
            direction, old_residual = direction[keep], old_residual[keep]
            old_steep = old_steep[keep]
        # Scaled to 1, or residuals of a nearly solved column would underflow in float32.
        size = residual.norm(dim=1, keepdim=True)
        steep = inverse.solve((residual / size).to(gram), pattern[live]).double() * size
        steep = project(steep, mask, count)
        slope = (residual * steep).sum(1, keepdim=True)
        change = ((residual - old_residual) * steep).sum(1, keepdim=True)
        direction = steep + direction * (change / old_steep)
        kernel_direction = matrix.kernel(columns.fold[live], direction)
        product = project(kernel_direction + penalty * direction, mask, count)
        step = slope / (direction * product).sum(1, keepdim=True)
        beta = beta + step * direction
        kernel = kernel + step * kernel_direction
        old_residual, old_steep = residual, slope
        residual = residual - step * product
        n_iter[live] += 1
    else:
        at = torch.as_tensor(live, device=y.device)
        all_beta[at], all_kernel[at] = beta, kernel
        left = (residual.norm(dim=1) / norm).cpu().numpy()
        bound[live] = np.nan_to_num(left, nan=np.inf)
    mask = inside.double()
    penalty = torch.where(inside, alpha / weight.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    intercept = ((y - all_kernel - penalty * all_beta) * mask).sum(1) / mask.sum(1)
    return all_beta, all_kernel, intercept, n_iter, bound


def _preconditioner(gram: Tensor, penalty: Tensor, patterns: NDArray[np.bool_]) -> BorderedInverse:
    """Factorise the shared system; with a larger penalty where rounding leaves it indefinite."""
    size = gram.diagonal().mean()
    for share in (0.0, 1e-5, 1e-3):
        try:
            return BorderedInverse(gram, penalty + share * size, patterns)
        except NumericsError:
            continue
    return BorderedInverse(gram, penalty + size, patterns)
