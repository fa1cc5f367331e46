"""The seeds that validation would choose, and what they reach on test.

A network's seeds differ, and the best of several on test is an optimistic number. Here each fold's
validation problems choose, and only the chosen seeds are read on that fold's test problems. What
does not belong here: choosing layers and recipes (`selection`).

Invariant: no test value influences a choice; ties go to the lower seed, undefined values last.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from taprobe_core.tables import BEST_SEEDS, schema_of

_KEY = ["recipe", "protocol"]


def best_seeds(per_problem: pl.DataFrame, k: int, metric_of: Mapping[str, str]) -> pl.DataFrame:
    """Choose the best k seeds, and the best one, of every recipe in every fold.

    Args:
        per_problem: `EvaluationTables.problem_metrics`.
        k: seeds to choose; cut to those there are.
        metric_of: recipe -> the name of its primary metric.

    Returns:
        `tables.BEST_SEEDS`: test means over problems, seeds (all, the k, or the one) averaged
        inside each problem.
    """
    ranked = (
        per_problem.filter(pl.col("split") == "val")
        .group_by(*_KEY, "fold", "seed", maintain_order=True)
        .agg(pl.col("primary").mean().alias("val_value"))
        .sort(
            [*_KEY, "fold", "val_value", "seed"],
            descending=[False, False, False, True, False],
            nulls_last=True,
        )
        .with_columns(pl.int_range(pl.len()).over([*_KEY, "fold"]).alias("place"))
    )
    test = per_problem.filter(pl.col("split") == "test").join(
        ranked, on=[*_KEY, "fold", "seed"], how="inner", maintain_order="left"
    )
    value = pl.col("primary")
    best = ranked.filter(place=0).group_by(_KEY, maintain_order=True).agg(pl.col("seed"))
    by_place = (
        test.filter(pl.col("place") < k)
        .group_by(*_KEY, "place", maintain_order=True)
        .agg(value.mean())
        .group_by(_KEY, maintain_order=True)
        .agg(value.std(ddof=1).alias("best_of_k_std"))
    )
    return (
        test.group_by(*_KEY, "problem_id", maintain_order=True)
        .agg(
            value.mean().alias("value"),
            value.filter(pl.col("place") < k).mean().alias("best_of_k"),
            value.filter(pl.col("place") == 0).mean().alias("best_seed"),
            pl.col("seed").n_unique().alias("n_seeds"),
            pl.col("fold").unique().alias("folds"),
        )
        .group_by(_KEY, maintain_order=True)
        .agg(
            pl.col("value", "best_of_k", "best_seed").mean(),
            pl.col("n_seeds").max().cast(pl.Int64),
            pl.col("folds").explode().n_unique().cast(pl.Int64).alias("n_folds"),
        )
        .join(by_place, on=_KEY, how="left", maintain_order="left")
        .join(best.rename({"seed": "seeds"}), on=_KEY, how="left", maintain_order="left")
        .with_columns(
            pl.col("recipe").replace_strict(dict(metric_of)).alias("metric"),
            pl.min_horizontal(pl.lit(k, pl.Int64), "n_seeds").alias("k"),
        )
        .select(schema_of(BEST_SEEDS).names())
        .sort(_KEY)
    )
