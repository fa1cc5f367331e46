"""Held-out sentences that stand in training too: the same row under another problem's id.

Exact, without any fit. A few equal rows are natural: "Wait." is said in every trace, and at the
embeddings equal text makes equal rows. A held-out problem most of whose rows stand in training is a
copy: a trace stored under two ids. What does not belong here: rows that are merely alike, and equal
rows inside one problem (`memorisation`).

Invariant: counts are of exact equality, so a pass says nothing about copies that were run twice on
other hardware or stored in another number format; text compared the same way sees those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError
from taprobe_core.splits import Fold


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
