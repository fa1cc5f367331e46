"""Divide problems into folds: study splits in, training, validation and test problems out.

The problem is the unit: every sentence of a problem stands on one side. Two protocols:

- holdout: one fold; shuffle the sorted ids with `random.Random(seed)`, cut by the fractions.
- lopo (leave one problem out): one fold per problem, no randomness. Validation takes the next ids
  in turn after the tested one (`rotating`), or the smallest of the others (`smallest`): then
  nearly all folds share their validation problems, and a choice made on them is made once, not
  once per fold.

Folds are made of the problems of the whole study, then cut to those that a model and setting has
(`present`), so that a problem that is tested in a fold is tested in it everywhere. With
`inner_folds` a fold trains on everything that is not tested, and `inner_folds` divides that again,
for choices.

What does not belong here: which rows a problem has (`probes.features`) and what is fitted
(`probes.fit`).
Invariant: the sides of a fold are disjoint; an inner fold never holds a tested problem.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from taprobe_core.errors import LeakageError, PlanError
from taprobe_core.study.config import Splits

MIN_PROBLEMS = 3
SIDES = ("train", "val", "test")

_Sides = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Fold:
    """One division of the problems; each side holds problem ids in ascending order.

    Attributes:
        protocol: `holdout` or `lopo`.
        index: number among the protocol's folds of the whole study, wherever it is used.
        train: problems that probes are fitted on.
        val: problems that choices are made on; empty in a study with inner folds.
        test: problems that nothing is chosen on; empty in an inner fold.
        inner: number of the inner fold, None for an outer one.
        absent: problems of `train` and `val` in the whole study that have no rows here.
    """

    protocol: str
    index: int
    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    inner: int | None = None
    absent: tuple[int, ...] = ()

    def __str__(self) -> str:
        inner = "" if self.inner is None else f" inner fold {self.inner}"
        return f"{self.protocol} fold {self.index}{inner}"


def make_folds(
    problem_ids: Iterable[int], splits: Splits, present: Iterable[int] | None = None
) -> list[Fold]:
    """Return the outer folds of every requested protocol, in the order of `splits.protocols`.

    Args:
        problem_ids: problems of the whole study, over all models and settings; order and repeats
            do not matter.
        splits: protocols, fractions, seed and who validates. Leave-one-problem-out uses
            `val_fraction` only; with `inner_folds` the problems of `val` are trained on.
        present: problems with rows here; None for all. The others are taken from every side, and a
            fold without a tested problem is left out. Where none is left to validate, the training
            problem after the tested one does.

    Returns:
        One fold for holdout; for lopo one per problem, fold i testing the i-th smallest id of the
        whole study.

    Raises:
        PlanError: fewer than three problems, fractions that leave a side empty, `present` that
            empties a side of a fold that tests something, or names a problem of no fold.
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
        for index, (train, val, test) in enumerate(makers[protocol](ids, splits)):
            fold = Fold(protocol, index, train, val, test)
            _check_sides(fold, len(ids))
            folds.append(_joined(fold) if splits.inner_folds else fold)
    if present is not None:
        folds = _cut(folds, ids, {int(problem_id) for problem_id in present})
    for fold in folds:
        check_no_leakage(fold)
    return folds


def inner_folds(fold: Fold, splits: Splits) -> list[Fold]:
    """Divide what a fold does not test into groups, each validated on by probes of the others.

    The groups are those of the whole study, whatever is absent here; their sizes differ by one at
    most before absent problems are taken out. The order is drawn by `splits.seed` and the fold.

    Args:
        fold: an outer fold of `make_folds`; the problems of `train` and `val` are divided.
        splits: `inner_folds` groups, 2 or more; with 0 there is nothing to divide.

    Returns:
        One fold per group that has a problem here: `val` is the group, `train` the other groups,
        `test` empty, `inner` the number of the group. Empty without inner folds.

    Raises:
        PlanError: fewer problems than groups, or no other group has a problem here.
    """
    if not splits.inner_folds:
        return []
    ids = sorted({*fold.train, *fold.val, *fold.absent})
    if len(ids) < splits.inner_folds:
        raise PlanError(
            f"{splits.inner_folds} inner folds of {len(ids)} problems",
            str(fold),
            "lower splits.inner_folds, or use more problems",
        )
    # A string's seed is its SHA-512, the same on every machine.
    random.Random(f"{splits.seed} {fold.protocol} {fold.index}").shuffle(ids)  # noqa: S311
    here = set(ids) - set(fold.absent)
    folds = []
    for number in range(splits.inner_folds):
        group = set(ids[number :: splits.inner_folds]) & here
        if not group:
            continue
        rest = tuple(sorted(here - group))
        inner = replace(fold, train=rest, val=tuple(sorted(group)), test=(), inner=number)
        if not rest:
            raise PlanError(
                f"problems {sorted(fold.absent)} have no rows, which leaves train empty",
                str(inner),
                "lower splits.inner_folds, or repair the problems that were left out",
            )
        check_no_leakage(inner, fold)
        folds.append(inner)
    return folds


def check_no_leakage(fold: Fold, outer: Fold | None = None) -> None:
    """Check that no problem stands twice in `fold`, nor in an inner fold of one that tests it.

    Args:
        fold: the fold.
        outer: the outer fold of an inner one.

    Raises:
        LeakageError: names the fold and every problem that stands where it must not.
    """
    uses = Counter([*fold.train, *fold.val, *fold.test])
    twice = sorted(problem_id for problem_id, count in uses.items() if count > 1)
    if twice:
        raise LeakageError(
            f"problems {twice} stand on more than one side, or twice on one",
            str(fold),
            "make the folds with splits.make_folds, which keeps the sides apart",
        )
    if outer is None:
        return
    foreign = sorted(set(uses) - {*outer.train, *outer.val})
    if foreign:
        raise LeakageError(
            f"problems {foreign} are not among those that {outer} may learn from",
            str(fold),
            "make the inner folds with splits.inner_folds from the outer fold itself",
        )


def _holdout(ids: list[int], splits: Splits) -> list[_Sides]:
    shuffled = list(ids)
    random.Random(splits.seed).shuffle(shuffled)  # noqa: S311 - a split, not a secret
    n_train = max(1, int(splits.train_fraction * len(ids)))
    n_val = max(1, int(splits.val_fraction * len(ids)))
    while n_train + n_val > len(ids) - 1:
        if n_train >= n_val:
            n_train -= 1
        else:
            n_val -= 1
    cut = n_train + n_val
    parts = (shuffled[:n_train], shuffled[n_train:cut], shuffled[cut:])
    train, val, test = (tuple(sorted(part)) for part in parts)
    return [(train, val, test)]


def _leave_one_out(ids: list[int], splits: Splits) -> list[_Sides]:
    n_val = max(1, round(splits.val_fraction * (len(ids) - 1)))
    folds: list[_Sides] = []
    for index, tested in enumerate(ids):
        following = ids[index + 1 :] + ids[:index]
        rest = following if splits.lopo_validation == "rotating" else sorted(following)
        train, val = tuple(sorted(rest[n_val:])), tuple(sorted(rest[:n_val]))
        folds.append((train, val, (tested,)))
    return folds


def _joined(fold: Fold) -> Fold:
    """Train on everything that is not tested."""
    return replace(fold, train=tuple(sorted(fold.train + fold.val)), val=())


def _cut(folds: list[Fold], ids: Collection[int], present: set[int]) -> list[Fold]:
    unknown = sorted(present - set(ids))
    if unknown:
        raise PlanError(
            f"problems {unknown} are in no fold",
            "splits",
            "make the folds from the problems of the whole study",
        )

    def kept(side: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(problem_id for problem_id in side if problem_id in present)

    left = []
    for fold in folds:
        test = kept(fold.test)
        if not test:
            continue
        absent = tuple(sorted(set(fold.train + fold.val) - present))
        own = replace(fold, train=kept(fold.train), val=kept(fold.val), test=test, absent=absent)
        if fold.val and not own.val and len(own.train) > 1:
            own = _with_another_val(own)
        emptied = [side for side in SIDES if getattr(fold, side) and not getattr(own, side)]
        if emptied:
            raise PlanError(
                f"{len(present)} of {len(ids)} problems are left here, {list(absent)} have no "
                f"rows, which leaves {' and '.join(emptied)} empty",
                str(fold),
                "repair the problems that were left out, or add others",
            )
        left.append(own)
    return left


def _with_another_val(fold: Fold) -> Fold:
    """Let the training problem after the tested one validate: one lost problem costs no fold."""
    after = [problem_id for problem_id in fold.train if problem_id > fold.test[0]]
    moved = (after or fold.train)[0]
    train = tuple(problem_id for problem_id in fold.train if problem_id != moved)
    return replace(fold, train=train, val=(moved,))


def _check_sides(fold: Fold, n: int) -> None:
    empty = [side for side in SIDES if not getattr(fold, side)]
    if empty:
        raise PlanError(
            f"{fold.protocol} with n = {n} problems leaves {' and '.join(empty)} empty",
            "splits.val_fraction",
            "lower splits.val_fraction, or use more problems",
        )
