"""Logistic regression of many columns: the converged optimum of scikit-learn, in few batches.

Each column minimises `sum_i weight_i log(1 + exp(-s_i (x_i' w + b))) + ||w||^2 / (2 C)` with x
standardised on its fold's training rows and b free: scikit-learn's
`Pipeline(StandardScaler(), LogisticRegression(C))` with class balance in the weights
(`balanced_weights`). Few features go to Newton's method (`logistic_phases`), all others to
`logistic_batch`.

What does not belong here: which penalties, thresholds on scores. Invariants: precision decides
speed, not the result: a column is accepted only when its gradient, from float64 logits, bounds its
coefficients' relative error; a column's result does not depend on its neighbours up to that bound.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NotEnoughDataError
from taprobe_core.solvers.columns import FitRequest, class_sizes
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic_batch import BatchSolver
from taprobe_core.solvers.linear.logistic_phases import newton
from taprobe_core.solvers.linear.solution import (
    LinearSolution,
    agreeing_groups,
    as_rows,
    check_request,
    finish,
)

MAX_COLUMNS_PER_BATCH = 240
MAX_NEWTON_FEATURES = 32
MAX_NEWTON_VALUES = 1 << 16

_FLOAT64_VALUES = 1 << 20


def balanced_weights(
    y: NDArray[np.float64], train: NDArray[np.bool_], fold: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return scikit-learn's `class_weight="balanced"` on each column's training rows.

    Args:
        y: [row, column], 0 and 1 on training rows.
        train: [fold, row] bool.
        fold: [column].

    Returns:
        [row, column] float64, n / (2 n_class) on training rows, 0 elsewhere.

    Raises:
        NotEnoughDataError: a column has one class only; names it.
    """
    inside = train[fold].T
    negative, positive = class_sizes(y, inside)
    _require_two_classes(negative, positive, fold)
    count = negative + positive
    weight = np.where(y > 0.5, count / (2.0 * positive), count / (2.0 * negative))
    return np.asarray(np.where(inside, weight, 0.0))


def _require_two_classes(
    negative: NDArray[np.int64], positive: NDArray[np.int64], fold: NDArray[np.int64]
) -> None:
    bad = np.flatnonzero((negative == 0) | (positive == 0))
    if bad.size:
        raise NotEnoughDataError(
            f"{bad.size} columns have one class only among their training rows",
            f"column {bad[0]}, fold {fold[bad[0]]}, class {int(positive[bad[0]] > 0)}",
            "use more problems, or another percentile",
        )


def solve_logistic(
    matrix: FoldMatrix,
    columns: FitRequest,
    C: NDArray[np.float64],
    *,
    tol: float = 2e-4,
    max_iter: int = 400,
) -> LinearSolution:
    """Fit all columns.

    Args:
        matrix: features; its scaling decides in which space the penalty acts.
        columns: folds, labels 0 and 1, weights (class balance included).
        C: [column] float64 inverse penalty, positive.
        tol: largest change of a logit in the last iteration, of any row.
        max_iter: iterations of a column, all phases together.

    Returns:
        Coefficients, intercepts and logits.

    Raises:
        DataError: faulty columns, penalties, or labels other than 0 and 1; names the first.
        NotEnoughDataError: a column has one class only; names it.
        NumericsError: a column did not converge; names it.
    """
    inverse_penalty = np.asarray(C, dtype=np.float64)
    check_request(matrix, columns, inverse_penalty)
    support = columns.weight > 0
    _check_labels(columns, support)
    n_values = matrix.n_rows * matrix.n_dense
    is_narrow = matrix.n_dense <= MAX_NEWTON_FEATURES or n_values <= MAX_NEWTON_VALUES
    if matrix.text is None and is_narrow:
        return _solve_small(matrix, columns, inverse_penalty)
    group = agreeing_groups(support, columns.y, inverse_penalty)
    is_small = matrix.n_rows * max(matrix.n_features, matrix.n_rows) <= _FLOAT64_VALUES
    solver = BatchSolver(matrix, torch.float64 if is_small else torch.float32, tol, max_iter)
    order, parts = [], []
    for chosen in _batches(group, solver.max_groups):
        order.append(chosen)
        part = columns.take(chosen)
        parts.append(solver.solve(part, inverse_penalty[chosen], group[chosen], chosen))
    back = torch.as_tensor(np.argsort(np.concatenate(order)), device=matrix.device)
    coef, intercept, logits, n_iter = (
        torch.cat([getattr(each, name) for each in parts])[back]
        for name in ("coef", "intercept", "logits", "n_iter")
    )
    return finish(matrix, columns, coef, intercept, n_iter.cpu().numpy(), logits)


def _solve_small(
    matrix: FoldMatrix, columns: FitRequest, penalty: NDArray[np.float64]
) -> LinearSolution:
    shared, shift, ratio = matrix.shared_values()
    at = torch.as_tensor(columns.fold, device=matrix.device)
    ones = shared.new_ones(len(shared), 1)
    factor = torch.cat([ratio[at], ratio.new_ones(len(at), 1)], dim=1)
    own = (1 / torch.as_tensor(penalty, device=matrix.device))[:, None].expand(factor.shape)
    own = torch.cat([own[:, :-1], torch.zeros_like(own[:, :1])], dim=1)
    coef, n_iter = newton(
        torch.cat([shared, ones], dim=1),
        factor,
        torch.where(as_rows(columns.y, matrix.device) > 0.5, 1.0, -1.0).double(),
        as_rows(columns.weight, matrix.device),
        own,
    )
    intercept = coef[:, -1] + (coef[:, :-1] * ratio[at] * shift[at]).sum(1)
    return finish(matrix, columns, coef[:, :-1], intercept, n_iter.cpu().numpy())


def _check_labels(columns: FitRequest, support: NDArray[np.bool_]) -> None:
    other = (support & (columns.y != 0) & (columns.y != 1)).any(axis=0)
    if other.any():
        first = int(np.flatnonzero(other)[0])
        raise DataError(
            f"{int(other.sum())} columns have labels other than 0 and 1",
            f"column {first}, fold {int(columns.fold[first])}",
            "use solve_ridge for continuous targets",
        )
    positive = ((columns.y == 1) & support).sum(axis=0)
    _require_two_classes(positive, support.sum(axis=0), columns.fold)


def _batches(group: NDArray[np.int64], max_groups: int) -> list[NDArray[np.intp]]:
    """Cut columns into batches of whole groups where groups are small enough."""
    batches: list[NDArray[np.intp]] = []
    pending: list[NDArray[np.intp]] = []
    for each in np.unique(group):
        members = np.flatnonzero(group == each)
        size = sum(len(part) for part in pending) + len(members)
        if pending and (size > MAX_COLUMNS_PER_BATCH or len(pending) >= max_groups):
            batches.append(np.concatenate(pending))
            pending = []
        pending.append(members)
    batches.append(np.concatenate(pending))
    return batches
