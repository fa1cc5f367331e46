"""Score tables to matrices: what one problem's sentences were scored with, and judged by.

A unit is a recipe, protocol, split, fold and seed on one problem. All units of a problem that are
judged on the same sentences form a block, so that metrics and nulls are array operations. What
does not belong here: the metrics (`metrics`), and what follows from them.

Invariant: a recipe is measured on every sentence of a problem whose target is defined, or not at
all; columns stand in sentence order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import LabelError, NotEnoughDataError
from taprobe_core.metrics import Ranking, rank_rows

UNIT = ("recipe", "protocol", "split", "fold", "seed", "problem_id")
"""Key of a unit."""

_LABELS = ("importance_abs", "importance_signed", "is_anchor")
_TRUTH = ("true_importance", "is_true_anchor")


@dataclass(frozen=True, eq=False)
class Block:
    """Units of one problem that are judged on the same sentences.

    Attributes:
        problem_id: problem.
        units: [unit] int64, row numbers of `ScoreBlocks.units`.
        n_sentences: labelled sentences of the problem, judged or not.
        columns: [sentence] int64, which of the labelled sentences are judged, ascending.
        sentence_idx: [sentence] int64 of the judged ones, ascending.
        scores: [unit, sentence] float32.
        target: [unit, sentence] float64, what each unit's own target is worth.
        positive: [unit, sentence] bool, each unit's own anchors; all False where it has none.
        ranks_anchors: [unit] bool, whether the unit has anchors of its own to find.
        labels: [sentence] arrays: importance_abs, importance_signed, is_anchor; with
            true_importance and is_true_anchor where the truth is known.
    """

    problem_id: int
    units: NDArray[np.int64]
    n_sentences: int
    columns: NDArray[np.int64]
    sentence_idx: NDArray[np.int64]
    scores: NDArray[np.float32]
    target: NDArray[np.float64]
    positive: NDArray[np.bool_]
    ranks_anchors: NDArray[np.bool_]
    labels: Mapping[str, NDArray[Any]]

    @cached_property
    def ranking(self) -> Ranking:
        """Sentences of each unit by falling score."""
        return rank_rows(self.scores)

    @cached_property
    def target_of(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return [distinct] and [unit] int64: units with distinct targets; the one of each unit.

        Seeds, layers and most folds and recipes share target and anchors: what is computed of the
        target alone is computed once.
        """
        return distinct_rows(self.target, self.positive)

    @property
    def relative_position(self) -> NDArray[np.float64]:
        """Place in the trace, [sentence] in [0, 1]: sentence_idx / (n_sentences - 1)."""
        return self.sentence_idx / max(self.n_sentences - 1, 1)

    def of(self, chosen: NDArray[Any]) -> Block:
        """Return the block of `chosen` units, row numbers or a mask [unit]."""
        return Block(
            self.problem_id,
            self.units[chosen],
            self.n_sentences,
            self.columns,
            self.sentence_idx,
            self.scores[chosen],
            self.target[chosen],
            self.positive[chosen],
            self.ranks_anchors[chosen],
            self.labels,
        )


@dataclass(frozen=True, eq=False)
class ScoreBlocks:
    """The scores of one site and setting, of all recipes and seeds.

    Attributes:
        units: one row per unit, sorted: `UNIT`.
        blocks: every unit stands in exactly one.
        has_truth: whether the true importance is known.
        score: float32, the scores of all units one after another, judged or not.
        start: [unit] int64, where each unit's scores start.
    """

    units: pl.DataFrame
    blocks: tuple[Block, ...]
    has_truth: bool
    score: NDArray[np.float32]
    start: NDArray[np.int64]

    def of_split(self, split: str) -> Iterator[Block]:
        """Yield the blocks of one split's units."""
        is_split = (self.units["split"] == split).to_numpy()
        for block in self.blocks:
            mine = is_split[block.units]
            if mine.all():
                yield block
            elif mine.any():
                yield block.of(mine)


def make_blocks(scores_by_seed: Mapping[int, pl.DataFrame], labels: pl.DataFrame) -> ScoreBlocks:
    """Lay scores out by problem.

    Args:
        scores_by_seed: seed -> `tables.SCORES`.
        labels: `tables.LABELS`.

    Returns:
        The blocks, in order of the problems.

    Raises:
        NotEnoughDataError: no scores.
        LabelError: a scored sentence has no label, or a problem is scored in part.
    """
    if not any(scores.height for scores in scores_by_seed.values()):
        raise NotEnoughDataError("no scores to evaluate", "scores", "fit the probes first")
    parts = [_runs(frame, seed) for seed, frame in scores_by_seed.items() if frame.height]
    offset, keys, columns = 0, [], []
    for units, values in parts:
        keys.append(units.with_columns(pl.col("start") + offset))
        columns.append(values)
        offset += len(values["score"])
    values = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    units = pl.concat(keys).sort(UNIT)
    has_truth = not labels["is_true_anchor"].null_count()
    by_problem = _by_problem(labels, has_truth)
    starts, lengths = (units[name].to_numpy() for name in ("start", "n"))
    problem_of = units["problem_id"].to_numpy()
    order = np.argsort(problem_of, kind="stable")
    bounds = np.flatnonzero(np.diff(problem_of[order], prepend=-1))
    blocks: list[Block] = []
    incomplete: list[tuple[int, int]] = []
    for members in np.split(order, bounds[1:]):
        problem_id = int(problem_of[members[0]])
        labelled = by_problem.get(problem_id, {"sentence_idx": np.empty(0, np.int64)})
        faults = _incomplete(labelled, values, starts[members], lengths[members])
        incomplete += [(int(members[row]), n_matched) for row, n_matched in faults]
        if not faults:
            blocks += _blocks(problem_id, members, starts[members], values, labelled)
    if incomplete:
        _refuse(units, by_problem, incomplete)
    return ScoreBlocks(units.select(UNIT), tuple(blocks), has_truth, values["score"], starts)


def distinct_rows(*matrices: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find equal rows, taking the matrices together.

    Args:
        matrices: [row, ...] each.

    Returns:
        [distinct] int64, the first row of each kind, and [row] int64, the kind of each row.
    """
    seen: dict[tuple[bytes, ...], int] = {}
    kinds = np.array(
        [
            seen.setdefault(key, len(seen))
            for key in zip(*(map(bytes, np.ascontiguousarray(m)) for m in matrices), strict=True)
        ],
        dtype=np.int64,
    )
    return np.unique(kinds, return_index=True)[1].astype(np.int64), kinds


def _runs(frame: pl.DataFrame, seed: int) -> tuple[pl.DataFrame, dict[str, NDArray[Any]]]:
    """Return the units of one seed with start and n, and the columns as arrays."""
    key = [name for name in UNIT if name != "seed"]
    ordered, start, units = frame, *_starts(frame, key)
    if units.is_duplicated().any():  # a unit that starts twice: not in the order of `tables.SCORES`
        ordered = frame.sort(*key, "sentence_idx")
        start, units = _starts(ordered, key)
    stop = start.shift(-1, fill_value=ordered.height)
    units = units.with_columns(
        pl.lit(seed, pl.Int64).alias("seed"), start.alias("start"), (stop - start).alias("n")
    )
    columns = {
        "sentence_idx": ordered["sentence_idx"].cast(pl.Int32).to_numpy(),
        "score": ordered["score"].to_numpy(),
        "target": ordered["target_value"].fill_null(float("nan")).to_numpy(),
        "is_positive": ordered["is_positive"].cast(pl.Int8).fill_null(-1).to_numpy(),
    }
    return units.select(*UNIT, "start", "n"), columns


def _starts(frame: pl.DataFrame, key: Sequence[str]) -> tuple[pl.Series, pl.DataFrame]:
    """Return the rows where the key changes or the sentences start again, and their keys."""
    changes = [pl.col(name) != pl.col(name).shift(1) for name in key]
    restarts = pl.col("sentence_idx") <= pl.col("sentence_idx").shift(1)
    is_start = frame.select(pl.any_horizontal(*changes, restarts).fill_null(value=True))
    start = is_start.to_series().arg_true().cast(pl.Int64)
    return start, frame[start].select(key)


def _by_problem(labels: pl.DataFrame, has_truth: bool) -> dict[int, dict[str, NDArray[Any]]]:
    wanted = ["sentence_idx", *_LABELS, *(_TRUTH if has_truth else ())]
    ordered = labels.select("problem_id", *wanted).sort("problem_id", "sentence_idx")
    return {
        int(key[0]): {name: group[name].to_numpy() for name in wanted}
        for key, group in ordered.group_by("problem_id", maintain_order=True)
    }


def _incomplete(
    labelled: Mapping[str, NDArray[Any]],
    values: Mapping[str, NDArray[Any]],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> list[tuple[int, int]]:
    """Return (row, sentences with a label) of the units that do not cover the labels exactly."""
    expected = labelled["sentence_idx"]
    if (lengths == len(expected)).all():
        found = values["sentence_idx"][starts[:, None] + np.arange(len(expected))]
        if (found == expected).all():
            return []
    faults = []
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        own = values["sentence_idx"][start : start + n]
        if not np.array_equal(own, expected):
            faults.append((row, int(np.isin(own, expected).sum())))
    return faults


def _refuse(
    units: pl.DataFrame,
    by_problem: Mapping[int, Mapping[str, NDArray[Any]]],
    incomplete: Sequence[tuple[int, int]],
) -> None:
    row, n_matched = min(incomplete)
    first = units.row(row, named=True)
    problem_id = first["problem_id"]
    n_labels = len(by_problem[problem_id]["sentence_idx"]) if problem_id in by_problem else 0
    raise LabelError(
        f"{first['n']} scores match {n_matched} of {n_labels} labels of problem {problem_id} "
        f"({len(incomplete)} such cases)",
        "recipe {recipe!r}, {protocol}, fold {fold}, {split}, seed {seed}".format(**first),
        "fit the probes again on these labels",
    )


def _blocks(
    problem_id: int,
    units: NDArray[np.int64],
    starts: NDArray[np.int64],
    values: Mapping[str, NDArray[Any]],
    labelled: Mapping[str, NDArray[Any]],
) -> Iterator[Block]:
    """Divide a problem's units by the sentences whose target they define."""
    n = len(labelled["sentence_idx"])
    place = starts[:, None] + np.arange(n)
    target = values["target"][place]
    is_defined = ~np.isnan(target)
    first, kinds = distinct_rows(is_defined)
    for kind, row in enumerate(first):
        columns = np.flatnonzero(is_defined[row])
        mine = kinds == kind
        here = place[np.ix_(mine, columns)]
        positive = values["is_positive"][here]
        ranks_anchors = (positive >= 0).all(axis=1)
        yield Block(
            problem_id=problem_id,
            units=units[mine].astype(np.int64),
            n_sentences=n,
            columns=columns,
            sentence_idx=labelled["sentence_idx"][columns],
            scores=values["score"][here],
            target=target[np.ix_(mine, columns)],
            positive=(positive > 0) & ranks_anchors[:, None],
            ranks_anchors=ranks_anchors,
            labels={name: each[columns] for name, each in labelled.items()},
        )
