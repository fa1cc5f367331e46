"""What linear solvers return, and the checks on what they are asked for.

What does not belong here: solving. Invariant: `decision` is `X_f coef + intercept` in float64 for
every row, training or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import DataError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """Linear models of all columns.

    Attributes:
        coef: [column, feature] float64 in the column's fold's standardised space.
        intercept: [column] float64.
        decision: [row, column] float64 of every row; logits of a classifier.
        n_iter: [column] int64, iterations; 0 for a direct solution.
        bound: [column] float64, on the relative error: of the coefficients of a classifier, of the
            dual system of a ridge column; 0 for a direct solution.
        is_converged: [column] bool, whether the bound is within what was asked for.
    """

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    decision: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    bound: NDArray[np.float64]
    is_converged: NDArray[np.bool_]


def check_request(matrix: FoldMatrix, columns: FitRequest, penalty: NDArray[np.float64]) -> None:
    """Check columns and penalties before a fit.

    Raises:
        DataError: columns are faulty, penalties are not positive and finite, or counts differ.
    """
    columns.check(matrix.train)
    if penalty.shape != (len(columns),):
        raise DataError(
            f"{penalty.shape} penalties for {len(columns)} columns", "columns", "give one of each"
        )
    bad = np.flatnonzero(~(np.isfinite(penalty) & (penalty > 0)))
    if bad.size:
        raise DataError(
            f"penalty {penalty[bad[0]]} is not a positive number",
            f"column {bad[0]}",
            "give a positive one",
        )
    folds = columns.fold
    if len(folds) and not (folds.min() >= 0 and folds.max() < matrix.n_folds):
        raise DataError(
            f"a column names a fold outside 0..{matrix.n_folds - 1}",
            "columns",
            "number folds as in the matrix's training masks",
        )


def finish(
    matrix: FoldMatrix,
    columns: FitRequest,
    coef: Tensor,
    intercept: Tensor,
    n_iter: NDArray[np.int64],
    decision: Tensor | None = None,
    bound: NDArray[np.float64] | None = None,
    is_converged: NDArray[np.bool_] | None = None,
) -> LinearSolution:
    """Hand everything over as arrays; computes the decisions of all rows unless they are known."""
    if decision is None:
        decision = matrix.forward(columns.fold, coef) + intercept[:, None]
    return LinearSolution(
        coef.cpu().numpy(),
        intercept.cpu().numpy(),
        np.ascontiguousarray(decision.cpu().numpy().T),
        np.asarray(n_iter, dtype=np.int64),
        np.zeros(len(columns)) if bound is None else bound,
        np.ones(len(columns), dtype=bool) if is_converged is None else is_converged,
    )


def row_patterns(
    support: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return the distinct row subsets [pattern, row] of [row, column] and each column's index."""
    packed = np.packbits(support.T, axis=1)
    _, first, index = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return support.T[first], index.reshape(-1).astype(np.int64)


def agreeing_groups(
    support: NDArray[np.bool_], values: NDArray[np.float64], key: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Group columns that have equal keys and equal values wherever both have support.

    Args:
        support: [row, column] bool.
        values: [row, column] float64.
        key: [column], for instance the penalty.

    Returns:
        [column] group, numbered from 0.
    """
    group = np.full(values.shape[1], -1, dtype=np.int64)
    known: list[tuple[float, NDArray[np.float64], NDArray[np.bool_]]] = []
    for column in range(values.shape[1]):
        rows, own = support[:, column], values[:, column]
        for index, (other_key, other, other_rows) in enumerate(known):
            both = rows & other_rows
            if other_key == key[column] and np.allclose(own[both], other[both], 1e-9, 0.0):
                new = rows & ~other_rows
                other[new] = own[new]
                other_rows |= rows
                group[column] = index
                break
        else:
            group[column] = len(known)
            known.append((float(key[column]), own.copy(), rows.copy()))
    return group


def group_batches(
    group: NDArray[np.int64], max_groups: int, max_columns: int
) -> list[NDArray[np.intp]]:
    """Cut columns into batches of whole groups."""
    batches: list[NDArray[np.intp]] = []
    pending: list[NDArray[np.intp]] = []
    for each in np.unique(group):
        members = np.flatnonzero(group == each)
        size = sum(len(part) for part in pending) + len(members)
        if pending and (size > max_columns or len(pending) >= max_groups):
            batches.append(np.concatenate(pending))
            pending = []
        pending.append(members)
    batches.append(np.concatenate(pending))
    return batches


def as_rows(values: NDArray[np.float64], device: torch.device) -> Tensor:
    """Return [row, column] as a contiguous [column, row] tensor."""
    return torch.as_tensor(np.ascontiguousarray(values.T), device=device)
