"""Which rows are which: rows of a fold's sides, rows that are the same, rows that contradict.

Arrays in, arrays out. What does not belong here: what follows from it (`shuffling`,
`memorisation`, `duplicates`). Invariant: two rows are the same only if every feature is equal, the
sign of a zero apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.solvers.columns import class_sizes
from taprobe_core.splits import Fold


def row_identity(X: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number the distinct rows of a feature matrix.

    Args:
        X: [row, feature], finite.

    Returns:
        [row] int64; equal numbers for equal rows.

    Raises:
        NonFiniteError: a feature is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
    if bad.size:
        raise NonFiniteError(
            f"{bad.size} feature rows hold NaN or infinity",
            f"rows {bad[:10].tolist()}",
            "extract them again; with storage float16, set activations.storage to float32",
        )
    if not X.shape[1]:
        return np.zeros(len(X), dtype=np.int64)
    # Adding 0 turns -0 into 0, which has other bytes.
    whole = np.ascontiguousarray(X + X.dtype.type(0))
    as_bytes = whole.view(np.dtype((np.void, whole.dtype.itemsize * whole.shape[1])))
    return np.unique(as_bytes.ravel(), return_inverse=True)[1].astype(np.int64)


def numbered_occurrences(
    problem: NDArray[np.int64], identity: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number rows so that the i-th occurrence of an identity has one number in every problem.

    Args:
        problem: [row].
        identity: [row].

    Returns:
        [row] int64 from 0; no number stands twice in a problem.
    """
    order = np.lexsort((identity, problem))
    is_new = np.ones(len(order), dtype=np.bool_)
    is_new[1:] = (np.diff(problem[order]) != 0) | (np.diff(identity[order]) != 0)
    first = np.flatnonzero(is_new)[np.cumsum(is_new) - 1]
    occurrence = np.empty(len(order), dtype=np.int64)
    occurrence[order] = np.arange(len(order)) - first
    pairs = np.column_stack([identity, occurrence])
    return np.unique(pairs, axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def fold_masks(
    problem_id: NDArray[np.int64], is_anchor: NDArray[np.bool_], folds: Sequence[Fold]
) -> tuple[NDArray[np.bool_], list[dict[int, NDArray[np.intp]]]]:
    """Return the training rows of each fold, and the rows of each problem that it tests.

    A problem on both sides is passed on as it is: to find that out is what the checks are for.

    Args:
        problem_id: [row].
        is_anchor: [row].
        folds: at least one.

    Returns:
        train [fold, row] bool; per fold, problem id -> rows.

    Raises:
        DataError: lengths differ, or a fold names a problem without rows.
        NotEnoughDataError: no fold, or a fold's training rows have one class.
    """
    if len(problem_id) != len(is_anchor):
        raise DataError(
            f"{len(problem_id)} problem ids and {len(is_anchor)} labels",
            "rows",
            "give one of each per row",
        )
    if not folds:
        raise NotEnoughDataError("no fold to check", "folds", "make them with splits.make_folds")
    known = set(problem_id.tolist())
    for fold in folds:
        unknown = sorted({*fold.train, *fold.test} - known)
        if unknown:
            raise DataError(
                f"problems {unknown} have no rows", str(fold), "make the folds from the rows' ids"
            )
    train = np.stack([np.isin(problem_id, fold.train) for fold in folds])
    n_others, n_anchors = class_sizes(is_anchor[:, None], train.T)
    one_class = np.flatnonzero((n_anchors == 0) | (n_others == 0))
    if one_class.size:
        raise NotEnoughDataError(
            f"training needs two classes, found {n_anchors[one_class[0]]} anchors among "
            f"{train[one_class[0]].sum()} sentences",
            str(folds[one_class[0]]),
            "use more problems, or lower labels.percentile",
        )
    tested = [
        {problem: np.flatnonzero(problem_id == problem) for problem in fold.test} for fold in folds
    ]
    return train, tested
