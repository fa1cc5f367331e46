"""Metrics of problems to one row per recipe: means, spread over seeds, chance level.

Seeds are averaged inside a problem (and, on validation, the folds that share it), problems after
that, so every problem weighs the same. What does not belong here: measuring a problem (`metrics`)
and comparing recipes (`comparison`).

Invariant: an undefined value is null, left out of its mean, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from taprobe_core.metrics import pooled_pr_auc

ROW = ("recipe", "protocol", "split")
"""Key of a summary row."""


def chance_pr_auc(n_sentences: int, n_anchors: int) -> float:
    """Return the expected PR-AUC of a random ranking without ties.

    Not the prevalence: with few positives the step sum is biased upwards. The mean over all
    rankings of n sentences with k anchors is exactly (H + (n - H)(k - 1)/(n - 1)) / n, where H is
    the n-th harmonic number: rank i holds an anchor with probability k/n, and an earlier rank
    then holds another with probability (k - 1)/(n - 1).

    Args:
        n_sentences: n, at least 1.
        n_anchors: k, from 1 to n.

    Returns:
        Expected average precision.

    Example:
        >>> chance_pr_auc(2, 1)
        0.75
    """
    if n_sentences == 1:
        return 1.0
    harmonic = float((1.0 / np.arange(1, n_sentences + 1)).sum())
    others = (n_anchors - 1) / (n_sentences - 1)
    return (harmonic + (n_sentences - harmonic) * others) / n_sentences


def problem_values(per_problem: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Average a metric over seeds and folds inside each problem, on test.

    Args:
        per_problem: `EvaluationTables.problem_metrics`.
        metric: one of its metric columns.

    Returns:
        recipe, protocol, problem_id, value (null where no seed defines it), sorted.
    """
    key = ["recipe", "protocol", "problem_id"]
    test = per_problem.filter(pl.col("split") == "test")
    return test.group_by(key).agg(pl.col(metric).mean().alias("value")).sort(key)


def summarise(
    per_problem: pl.DataFrame, scored: pl.DataFrame, names: Sequence[str], primary: str
) -> pl.DataFrame:
    """Summarise problems to one row per recipe × protocol × split.

    Args:
        per_problem: `EvaluationTables.problem_metrics`.
        scored: scores joined with `is_anchor`, with a `seed` column, for the pooled PR-AUC; no
            rows when scores do not rank anchors.
        names: metric columns.
        primary: the metric that recipes are ranked by.

    Returns:
        `EvaluationTables.metrics`.
    """
    in_problem = per_problem.group_by(*ROW, "problem_id", maintain_order=True).agg(
        pl.col(*names).mean(),
        pl.col("n_sentences", "n_anchors").first(),
        pl.col("seed").n_unique().alias("n_seeds"),
    )
    chance = [
        chance_pr_auc(n, k) if 0 < k < n else None
        for n, k in in_problem.select("n_sentences", "n_anchors").iter_rows()
    ]
    means = (
        in_problem.with_columns(pl.Series("chance_pr_auc", chance, pl.Float64))
        .group_by(ROW, maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("n_problems"),
            pl.col("n_seeds").max().cast(pl.Int64),
            pl.col(*names, "chance_pr_auc").mean(),
            pl.col(*names).null_count().cast(pl.Int64).name.prefix("n_undefined_"),
        )
    )
    columns = [part for name in names for part in (name, f"{name}_std", f"n_undefined_{name}")]
    return (
        means.join(_spread(per_problem, names), on=ROW)
        .join(_pooled(scored), on=ROW, how="left")
        .with_columns(pl.lit(primary).alias("primary_metric"))
        .select(
            *(*ROW, "primary_metric", "n_problems", "n_seeds"),
            *(*columns, "pooled_pr_auc", "chance_pr_auc"),
        )
        .sort(ROW)
    )


def _spread(per_problem: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    # Folds inside a problem first, so that each seed's mean weighs problems as the mean does.
    in_problem = _means(per_problem, [*ROW, "seed", "problem_id"], names)
    by_seed = _means(in_problem, [*ROW, "seed"], names)
    return by_seed.group_by(ROW).agg(pl.col(*names).std(ddof=1).name.suffix("_std"))


def _means(frame: pl.DataFrame, key: Sequence[str], names: Sequence[str]) -> pl.DataFrame:
    # In order: the next mean adds these up, and its last bit depends on the order.
    return frame.group_by(key, maintain_order=True).agg(pl.col(*names).mean())


def _pooled(scored: pl.DataFrame) -> pl.DataFrame:
    rows = [
        (*key[:3], pooled_pr_auc(pool))
        for key, pool in scored.group_by(*ROW, "seed", maintain_order=True)
    ]
    schema = {name: scored.schema[name] for name in ROW} | {"pooled_pr_auc": pl.Float64()}
    pooled = pl.DataFrame(rows, schema, orient="row").with_columns(
        pl.col("pooled_pr_auc").fill_nan(None)
    )
    return pooled.group_by(ROW).agg(pl.col("pooled_pr_auc").mean())
