"""What the tripwires know of rows without a fit: equal rows and copied problems.

Two rows are the same only if every feature is equal, the sign of a zero apart. A few equal rows are
natural: "Wait." is said in every trace, and at the embeddings equal text makes equal rows. A
held-out problem most of whose rows stand in training is a copy: a trace stored under two ids.

What does not belong here: fitting, what follows from a value outside the band (`shuffling`), rows
that are merely alike, and equal rows inside one problem (`memorisation`).

Invariant: counts are of exact equality, so a pass says nothing about copies that were run twice on
other hardware or stored in another number format; text compared the same way sees those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class CopiedProblem:
    """A held-out problem and how much of it stands in training.

    Attributes:
        protocol: of the fold.
        fold: index of the fold.
        problem_id: held-out problem.
        n_rows: its sentences.
        n_found: those that equal a row of a training problem.
        source: training problem with most of them; None if there is none.
    """

    protocol: str
    fold: int
    problem_id: int
    n_rows: int
    n_found: int
    source: int | None


@dataclass(frozen=True)
class Duplicates:
    """Result of `duplicates_across_problems`.

    Attributes:
        passes: no held-out problem has more than `max_share` of its rows in training.
        n_rows: held-out rows, over folds.
        n_found: those that equal a row of a training problem.
        worst: the problem with the largest share.
        max_share: share allowed.
    """

    passes: bool
    n_rows: int
    n_found: int
    worst: CopiedProblem
    max_share: float

    @property
    def text(self) -> str:
        """What was found, and where to look if it is a fault."""
        found = (
            f"{self.n_found} of {self.n_rows} held-out sentences "
            f"({self.n_found / self.n_rows:.1%}) equal a sentence of a training problem."
        )
        worst = self.worst
        if worst.source is None:
            return found
        found += (
            f" Most are in problem {worst.problem_id}, {worst.protocol} fold {worst.fold}: "
            f"{worst.n_found} of {worst.n_rows}, and problem {worst.source} has the most of them."
        )
        if self.passes:
            return found
        return (
            f"{found} That is a copy. Look for a problem stored under two ids or on both sides of "
            "the fold, and for rows joined by sentence_idx alone."
        )


def duplicates_across_problems(
    identity: NDArray[np.int64],
    problem_id: NDArray[np.int64],
    folds: Sequence[Fold],
    max_share: float = 0.5,
) -> Duplicates:
    """Count held-out rows that equal a row of a training problem.

    Args:
        identity: [row]; equal numbers for equal rows: `row_identity` of the features, or the text's
            own number.
        problem_id: [row].
        folds: at least one, every held-out problem with rows.
        max_share: share of a held-out problem's rows that may stand in training.

    Raises:
        DataError: lengths differ, or no fold holds a row out.
    """
    if len(identity) != len(problem_id):
        raise DataError(
            f"{len(identity)} row identities and {len(problem_id)} problem ids",
            "rows",
            "give one of each per row",
        )
    found = [
        _copied(identity, problem_id, fold, problem)
        for fold in folds
        for problem in fold.test
        if (problem_id == problem).any()
    ]
    if not found:
        raise DataError(
            "no fold holds out a problem with rows",
            f"{len(folds)} folds",
            "make the folds from the rows' problem ids",
        )
    worst = max(found, key=lambda each: each.n_found / each.n_rows)
    return Duplicates(
        passes=worst.n_found <= max_share * worst.n_rows,
        n_rows=sum(each.n_rows for each in found),
        n_found=sum(each.n_found for each in found),
        worst=worst,
        max_share=max_share,
    )


def _copied(
    identity: NDArray[np.int64], problem_id: NDArray[np.int64], fold: Fold, problem: int
) -> CopiedProblem:
    rows = identity[problem_id == problem]
    is_train = np.isin(problem_id, fold.train)
    is_copy = np.isin(rows, identity[is_train])
    shared = is_train & np.isin(identity, rows)
    ids, counts = np.unique(problem_id[shared], return_counts=True)
    source = int(ids[np.argmax(counts)]) if ids.size else None
    return CopiedProblem(fold.protocol, fold.index, problem, len(rows), int(is_copy.sum()), source)
