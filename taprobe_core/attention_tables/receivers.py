"""Tables of every layer to receiver heads, fold by fold, and how far they can be relied on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from taprobe_core.attention.receivers import (
    ReceiverHead,
    ReceiverHeads,
    choose_receiver_heads,
    receiver_scores,
    split_half_reliability,
)
from taprobe_core.attention_tables.rows import joined, long_rows
from taprobe_core.errors import NotEnoughDataError
from taprobe_core.splits import Fold
from taprobe_core.study import Attention
from taprobe_core.tables import (
    PROTOCOLS,
    RECEIVER_HEADS,
    RECEIVER_RELIABILITY,
    RECEIVER_SCORES,
    SPLITS,
    check_table,
)

FloatArray = npt.NDArray[np.float64]
Kurtosis = dict[int, FloatArray]
"""Problem id -> [layer, head]."""


def receiver_tables(
    kurtosis: pl.DataFrame,
    read_vertical: Callable[[int], pl.DataFrame],
    folds: Sequence[Fold],
    attention: Attention,
) -> dict[str, pl.DataFrame]:
    """Choose receiver heads fold by fold and score every problem's sentences by them.

    Args:
        kurtosis: `HEAD_KURTOSIS` of every layer, with its layer as column `layer`.
        read_vertical: returns the `VERTICAL_SCORES` of a layer; asked once for each layer that has
            a chosen head.
        folds: heads are chosen on the training side of each.
        attention: proximities, of which the first chooses, and the number of heads.

    Returns:
        `heads` (`RECEIVER_HEADS`), `receiver_scores` (`RECEIVER_SCORES`) and `reliability`
        (`RECEIVER_RELIABILITY`).

    Raises:
        NotEnoughDataError: no head has a kurtosis in any training problem of a fold.
        SchemaError: the tables break their contracts.
    """
    by_problem, layers = _by_problem(kurtosis, attention.proximity[0])
    chosen = [
        choose_receiver_heads(
            by_problem, fold.train, top_k=attention.n_receiver_heads, layers=layers
        )
        for fold in folds
    ]
    where = "kurtosis and vertical scores of every layer"
    return {
        "heads": check_table(_heads(folds, chosen), RECEIVER_HEADS, where),
        "receiver_scores": check_table(
            _scores(folds, chosen, read_vertical), RECEIVER_SCORES, where
        ),
        "reliability": check_table(
            _reliability(kurtosis, attention, layers), RECEIVER_RELIABILITY, where
        ),
    }


def _by_problem(kurtosis: pl.DataFrame, proximity: int) -> tuple[Kurtosis, list[int]]:
    """Return kurtosis by problem, and the layer of each row."""
    rows = kurtosis.filter(proximity=proximity).sort("problem_id", "layer", "head")
    layers = rows["layer"].unique().sort().to_list()
    found = {
        problem_id: group["kurtosis"].fill_null(float("nan")).to_numpy().reshape(len(layers), -1)
        for (problem_id,), group in rows.group_by("problem_id", maintain_order=True)
    }
    return found, layers


def _in_fold(fold: Fold, rows: pl.DataFrame) -> pl.DataFrame:
    protocol = pl.lit(fold.protocol, pl.Enum(PROTOCOLS)).alias("protocol")
    return rows.select(protocol, pl.lit(fold.index, pl.Int32).alias("fold"), pl.all())


def _heads(folds: Sequence[Fold], chosen: Sequence[ReceiverHeads]) -> pl.DataFrame:
    parts = []
    for fold, found in zip(folds, chosen, strict=True):
        rows = pl.DataFrame(found.heads, schema=list(ReceiverHead._fields), orient="row")
        rank = pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("rank")
        parts.append(_in_fold(fold, rows.select(rank, pl.all())))
    return pl.concat(parts)


def _scores(
    folds: Sequence[Fold],
    chosen: Sequence[ReceiverHeads],
    read_vertical: Callable[[int], pl.DataFrame],
) -> pl.DataFrame:
    layers = sorted({head.layer for found in chosen for head in found.heads})
    vertical = _stacked(read_vertical, layers)
    parts = []
    for fold, found in zip(folds, chosen, strict=True):
        for split in SPLITS:
            side = pl.lit(split, pl.Enum(SPLITS)).alias("split")
            for problem_id in getattr(fold, split):
                score = receiver_scores(vertical[problem_id], found.heads, layers=layers)
                rows = long_rows(problem_id, ("sentence_idx",), receiver_score=score)
                rows = rows.select("problem_id", "sentence_idx", side, "receiver_score")
                parts.append(_in_fold(fold, rows))
    return joined(parts)


def _stacked(
    read_vertical: Callable[[int], pl.DataFrame], layers: Sequence[int]
) -> dict[int, FloatArray]:
    """Return problem id -> [layer, head, sentence], NaN where there is no score."""
    by_problem: dict[int, list[FloatArray]] = defaultdict(list)
    for layer in layers:
        rows = read_vertical(layer).sort("problem_id", "head", "sentence_idx")
        n_heads = rows["head"].n_unique()
        for (problem_id,), group in rows.group_by("problem_id", maintain_order=True):
            scores = group["vertical_score"].fill_null(float("nan")).to_numpy()
            by_problem[problem_id].append(scores.reshape(n_heads, -1))
    return {problem_id: np.stack(scores) for problem_id, scores in by_problem.items()}


def _reliability(
    kurtosis: pl.DataFrame, attention: Attention, layers: Sequence[int]
) -> pl.DataFrame:
    first = _top_heads(_by_problem(kurtosis, attention.proximity[0])[0], attention, layers)
    rows = []
    for proximity in attention.proximity:
        by_problem, _ = _by_problem(kurtosis, proximity)
        halves = split_half_reliability(by_problem, layers=layers)
        top = _top_heads(by_problem, attention, layers)
        # Where every head is among the top ones, that they stay says nothing.
        is_choice = halves.n_heads + halves.n_undefined > attention.n_receiver_heads
        kept = len(first & top) / len(first) if first and top and is_choice else None
        spearman = kurtosis.filter(pl.col("layer") != 0, proximity=proximity)["spearman_with_first"]
        rows.append(
            {
                "proximity": proximity,
                "n_problems": len(by_problem),
                "n_heads": halves.n_heads,
                "n_undefined": halves.n_undefined,
                "split_half_pearson": halves.pearson,
                "top_heads_kept": kept,
                "median_spearman": spearman.median(),
            }
        )
    schema = {name: column.dtype.type for name, column in RECEIVER_RELIABILITY.columns.items()}
    return joined([pl.DataFrame(rows, schema=schema)])


def _top_heads(
    by_problem: Kurtosis, attention: Attention, layers: Sequence[int]
) -> set[tuple[int, int]]:
    try:
        found = choose_receiver_heads(
            by_problem, by_problem, top_k=attention.n_receiver_heads, layers=layers
        )
    except NotEnoughDataError:
        return set()  # texts too short for this proximity: its row says null
    return {(head.layer, head.head) for head in found.heads}
