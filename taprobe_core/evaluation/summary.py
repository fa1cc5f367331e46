"""Metrics of problems to one row per recipe: means, spread over seeds, chance, chosen seeds.

Seeds are averaged inside a problem (and, on validation, the folds that share it), problems after
that, so every problem weighs the same. The seeds of a network differ, and the best of several on
test is an optimistic number: each fold's validation problems choose, and only the chosen seeds are
read on that fold's test problems. What does not belong here: measuring a problem (`units`),
comparing recipes (`contrasts`) and choosing layers and recipes (`selection`).

Invariants: an undefined value is null, left out of its mean, and counted. No test value influences
a choice of seeds; ties go to the lower seed, undefined values last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.evaluation.blocks import ScoreBlocks
from taprobe_core.metrics import pr_auc_rows, rank_rows
from taprobe_core.tables import BEST_SEEDS, schema_of

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


def chance_levels(
    n_sentences: NDArray[np.integer], n_anchors: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return `chance_pr_auc` of many problems.

    Args:
        n_sentences: [problem].
        n_anchors: [problem].

    Returns:
        [problem] float64; NaN where there are no anchors or nothing else.
    """
    n, k = np.asarray(n_sentences, dtype=np.int64), np.asarray(n_anchors, dtype=np.int64)
    harmonic = np.cumsum(np.append(0.0, 1.0 / np.arange(1, max(n.max(initial=1), 1) + 1)))[n]
    others = (k - 1) / np.maximum(n - 1, 1)
    level = (harmonic + (n - harmonic) * others) / np.maximum(n, 1)
    return np.where((k > 0) & (k < n), level, np.nan)


def normalised_skill(value: pl.Expr, chance: pl.Expr, level: pl.Expr | float = 1.0) -> pl.Expr:
    """Return the share of the way from chance to a level: (value - chance) / (level - chance).

    Percentiles and settings have other base rates and so other chance levels; this is what may be
    compared across them. 0 is chance, 1 the level, below 0 worse than chance.

    Args:
        value: the metric.
        chance: what a random ranking reaches.
        level: what is to be reached: 1 is a perfect ranking, else for instance what the labels
            themselves reach when measured again, or the true importance.

    Returns:
        Null where a part is null, or the level is not above chance.
    """
    room = pl.lit(level) - chance if isinstance(level, float) else level - chance
    return pl.when(room > 0).then((value - chance) / room)


def summarise(
    per_problem: pl.DataFrame, names: Sequence[str], by: Sequence[str] = ROW
) -> pl.DataFrame:
    """Summarise problems to one row of each key.

    Args:
        per_problem: `EvaluationTables.problem_metrics`, or a part of its columns.
        names: metric columns.
        by: the key; seeds, and folds that it does not name, are averaged inside a problem.

    Returns:
        `by`, n_problems, n_seeds, per metric `<m>`, `<m>_std` and `n_undefined_<m>`, then
        chance_pr_auc; sorted.
    """
    in_problem = per_problem.group_by(*by, "problem_id", maintain_order=True).agg(
        pl.col(*names).mean(),
        pl.col("n_sentences", "n_anchors").first(),
        pl.col("seed").n_unique().alias("n_seeds"),
    )
    sizes = in_problem.select(pl.col("n_sentences", "n_anchors").fill_null(0)).to_numpy().T
    chance = pl.Series("chance_pr_auc", chance_levels(*sizes)).fill_nan(None)
    means = (
        in_problem.with_columns(chance)
        .group_by(by, maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("n_problems"),
            pl.col("n_seeds").max().cast(pl.Int64),
            pl.col(*names, "chance_pr_auc").mean(),
            pl.col(*names).null_count().cast(pl.Int64).name.prefix("n_undefined_"),
        )
    )
    columns = [part for name in names for part in (name, f"{name}_std", f"n_undefined_{name}")]
    return (
        means.join(_spread(per_problem, names, by), on=by)
        .select(*by, "n_problems", "n_seeds", *columns, "chance_pr_auc")
        .sort(by)
    )


def _spread(per_problem: pl.DataFrame, names: Sequence[str], by: Sequence[str]) -> pl.DataFrame:
    # Folds inside a problem first, so that each seed's mean weighs problems as the mean does.
    in_problem = _means(per_problem, [*by, "seed", "problem_id"], names)
    by_seed = _means(in_problem, [*by, "seed"], names)
    return by_seed.group_by(by).agg(pl.col(*names).std(ddof=1).name.suffix("_std"))


def _means(frame: pl.DataFrame, key: Sequence[str], names: Sequence[str]) -> pl.DataFrame:
    # In order: the next mean adds these up, and its last bit depends on the order.
    return frame.group_by(key, maintain_order=True).agg(pl.col(*names).mean())


def pooled_pr_auc(scored: ScoreBlocks) -> pl.DataFrame:
    """PR-AUC over the test sentences of all problems together, mean over seeds.

    Problems weigh by their anchors, and scores of different folds are compared as if they shared
    a scale: an extra beside the mean over problems.
    """
    key = [*ROW, "seed"]
    unit, score, positive = [], [], []
    for block in scored.of_split("test"):
        mine = np.flatnonzero(block.ranks_anchors)
        unit.append(np.repeat(block.units[mine], len(block.columns)))
        score.append(block.scores[mine].ravel())
        positive.append(block.positive[mine].ravel())
    schema = {name: scored.units.schema[name] for name in ROW} | {"pooled_pr_auc": pl.Float64()}
    if not sum(map(len, unit)):
        return pl.DataFrame(schema=schema)
    groups = scored.units.select(pl.struct(key).rank("dense").alias("group"), *key)
    group = groups["group"].to_numpy()[np.concatenate(unit)]
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=0))
    scores, hits = np.concatenate(score)[order], np.concatenate(positive)[order]
    found = {
        int(group[order[start]]): pr_auc_rows(hit[None], rank_rows(part[None]))[0]
        for start, part, hit in zip(
            starts, np.split(scores, starts[1:]), np.split(hits, starts[1:]), strict=True
        )
    }
    pooled = pl.DataFrame(
        {"group": list(found), "pooled_pr_auc": list(found.values())}, nan_to_null=True
    )
    return (
        groups.unique("group", maintain_order=True)
        .join(pooled.cast({"group": groups.schema["group"]}), on="group", maintain_order="left")
        .group_by(ROW, maintain_order=True)
        .agg(pl.col("pooled_pr_auc").mean())
    )


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
