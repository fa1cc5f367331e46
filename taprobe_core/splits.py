"""Divide problems into folds: study splits in, training, validation and test problems out.

The problem is the unit: every sentence of a problem stands on one side. Two protocols:

- holdout: one fold; shuffle the sorted ids with `random.Random(seed)`, cut by the fractions.
- lopo (leave one problem out): one fold per problem. Validation takes the smallest of the other
  ids, so nearly all folds share the same validation problems; treat a choice made on validation
  as made once, not once per fold. No randomness.

What does not belong here: which rows a problem has (`features`) and what is fitted (`probes`).
Invariant: the sides of a fold are disjoint, none is empty, and together they are all problems.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from taprobe_core.errors import LeakageError, PlanError
from taprobe_core.study.config import Splits

MIN_PROBLEMS = 3


@dataclass(frozen=True)
class Fold:
    """One division of the problems; each side holds problem ids in ascending order."""

    protocol: str
    index: int
    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.protocol} fold {self.index}"


def make_folds(problem_ids: Iterable[int], splits: Splits) -> list[Fold]:
    """Return the folds of every requested protocol, in the order of `splits.protocols`.

    Args:
        problem_ids: problems to divide; order and repeats do not matter.
        splits: protocols, fractions and seed. Leave-one-problem-out uses `val_fraction` only.

    Returns:
        One fold for holdout; for lopo one per problem, fold i testing the i-th smallest id.

    Raises:
        PlanError: fewer than three problems, or fractions that leave a side empty.
    """
    ids = sorted({int(problem_id) for problem_id in problem_ids})
    makers = {"holdout": _holdout, "lopo": _leave_one_out}
    folds: list[Fold] = []
    for protocol in splits.protocols:
        if len(ids) < MIN_PROBLEMS:
            raise PlanError(
                f"{protocol} needs {MIN_PROBLEMS} problems or more, found n = {len(ids)}",
                "splits.protocols",
                "raise rollouts.max_problems, or list more rollouts.problem_ids",
            )
        folds.extend(makers[protocol](ids, splits))
    for fold in folds:
        _check_sides(fold, len(ids))
        check_no_leakage(fold)
    return folds


def check_no_leakage(fold: Fold) -> None:
    """Check that no problem stands twice in `fold`.

    Raises:
        LeakageError: names the fold and every problem that stands twice.
    """
    uses = Counter([*fold.train, *fold.val, *fold.test])
    twice = sorted(problem_id for problem_id, count in uses.items() if count > 1)
    if twice:
        raise LeakageError(
            f"problems {twice} stand on more than one side, or twice on one",
            str(fold),
            "make the folds with splits.make_folds, which keeps the sides apart",
        )


def _holdout(ids: list[int], splits: Splits) -> list[Fold]:
    shuffled = list(ids)
    random.Random(splits.seed).shuffle(shuffled)  # noqa: S311 - a split, not a secret
    n_train = max(1, int(splits.train_fraction * len(ids)))
    n_val = max(1, int(splits.val_fraction * len(ids)))
    while n_train + n_val > len(ids) - 1:
        if n_train >= n_val:
            n_train -= 1
        else:
            n_val -= 1
    train, val, test = (
        tuple(sorted(part))
        for part in (
            shuffled[:n_train],
            shuffled[n_train : n_train + n_val],
            shuffled[n_train + n_val :],
        )
    )
    return [Fold("holdout", 0, train, val, test)]


def _leave_one_out(ids: list[int], splits: Splits) -> list[Fold]:
    n_val = max(1, round(splits.val_fraction * (len(ids) - 1)))
    folds = []
    for index, tested in enumerate(ids):
        rest = [problem_id for problem_id in ids if problem_id != tested]
        folds.append(Fold("lopo", index, tuple(rest[n_val:]), tuple(rest[:n_val]), (tested,)))
    return folds


def _check_sides(fold: Fold, n: int) -> None:
    empty = [side for side in ("train", "val", "test") if not getattr(fold, side)]
    if empty:
        raise PlanError(
            f"{fold.protocol} with n = {n} problems leaves {' and '.join(empty)} empty",
            "splits.val_fraction",
            "lower splits.val_fraction, or use more problems",
        )
