"""How well recipes rank within each fifth of the trace.

Importance falls along a trace, so a recipe can rank a whole trace by knowing where it is. Within a
fifth that helps little. What does not belong here: nulls that keep position (`nulls`).

Invariant: a fifth without sentences, or with one class, has no value and is counted, not averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.aggregation import chance_levels
from taprobe_core.batched_metrics import centred_rank_rows, pr_auc_rows, rank_rows, spearman_rows
from taprobe_core.control_task import position_bin
from taprobe_core.metrics import primary_metric
from taprobe_core.score_blocks import Block, ScoreBlocks
from taprobe_core.study.config import Target
from taprobe_core.tables import POSITION_BINS, schema_of


def position_metrics(scored: ScoreBlocks, targets: Mapping[str, Target]) -> pl.DataFrame:
    """Measure every recipe within each fifth of the trace, on test.

    Args:
        scored: from `make_blocks`.
        targets: recipe -> what its scores predict.

    Returns:
        `tables.POSITION_BINS`: the primary metric, seeds averaged inside a problem, then problems;
        `chance` is the mean expected PR-AUC of a random ranking where it is defined (0 for rank
        correlation); n_problems are those with sentences in the fifth.
    """
    metric = {name: primary_metric(target) for name, target in targets.items()}
    by_precision = (
        scored.units["recipe"].replace_strict(metric, return_dtype=pl.String) == "pr_auc"
    ).to_numpy()
    parts = [
        measured
        for block in scored.of_split("test")
        for measured in _measure(block, by_precision[block.units])
    ]
    if not parts:
        return schema_of(POSITION_BINS).to_frame()
    unit, place, value, chance = (np.concatenate(column) for column in zip(*parts, strict=True))
    measured = pl.DataFrame({"bin": place, "value": value, "chance": chance}, nan_to_null=True)
    key = ["recipe", "protocol", "bin"]
    return (
        scored.units[unit]
        .hstack(measured)
        .sort(*key, "problem_id", "fold", "seed")
        .group_by(*key, "problem_id", maintain_order=True)
        .agg(pl.col("value", "chance").mean())
        .group_by(key, maintain_order=True)
        .agg(
            pl.col("value").mean(),
            pl.col("chance").filter(pl.col("value").is_not_null()).mean(),
            pl.len().cast(pl.Int64).alias("n_problems"),
            pl.col("value").count().cast(pl.Int64).alias("n_defined"),
        )
        .with_columns(pl.col("recipe").replace_strict(metric).alias("metric"))
        .select(schema_of(POSITION_BINS).names())
        .sort(key)
    )


def _measure(
    block: Block, by_precision: NDArray[np.bool_]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]:
    """Return unit, bin, value and chance of every unit in each bin that has sentences."""
    fifth = position_bin(block.relative_position)
    found = []
    for place in np.unique(fifth):
        columns = fifth == place
        ranking = rank_rows(block.scores[:, columns])
        positive = block.positive[:, columns]
        first, kind = block.target_of
        ranks = centred_rank_rows(block.target[first][:, columns])[kind]
        value = np.where(
            by_precision, pr_auc_rows(positive, ranking), spearman_rows(ranks, ranking)
        )
        n, k = np.full(len(value), columns.sum()), positive.sum(axis=1)
        chance = np.where(by_precision, chance_levels(n, k), 0.0)
        found.append((block.units, np.full(len(value), place), value, chance))
    return found
