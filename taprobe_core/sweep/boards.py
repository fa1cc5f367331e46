"""Every configuration of a sweep, ranked beside those that predict the same target.

Validation chooses among a configuration's candidates, and ranks configurations; test values stand
beside them and decide nothing, unless the study asks for the earlier rule. Who goes on belongs in
`shortlist`, what a value is worth in `values`.

Invariant: what is missing, undefined or a duplicate has no rank and stands below everything that
has one; ties are broken by skill on validation, then by id.
"""

from __future__ import annotations

import polars as pl

from taprobe_core.study.sweep import RankBy
from taprobe_core.study.targets import target_settings
from taprobe_core.sweep.sheets import with_status
from taprobe_core.sweep.values import PLACE, problem_values, recipe_values
from taprobe_core.tables.contract import check_table
from taprobe_core.tables.results import PROTOCOLS
from taprobe_core.tables.sweep import SWEEP_LEADERBOARD

_ALIKE = [
    *("stage", "model", "setting", "target", *target_settings()),
    *("drop_last_sentence", "residualize"),
]
"""Configurations that agree in these are judged by the same values on the same sentences."""


def sweep_leaderboard(
    configurations: pl.DataFrame,
    recipes: pl.DataFrame,
    results: pl.DataFrame,
    *,
    protocol: str,
    rank_by: RankBy = "validation_skill",
) -> pl.DataFrame:
    """Rank configurations of any number of stages.

    Args:
        configurations: `tables.SWEEP_CONFIGURATIONS`, stages one after another.
        recipes: `tables.SWEEP_RECIPES` of the same.
        results: `tables.SWEEP_RESULTS`; recipes that no configuration asks for are ignored.
        protocol: whose folds decide.
        rank_by: see `study.sweep.Shortlists`.

    Returns:
        `tables.SWEEP_LEADERBOARD`.

    Raises:
        DataError: the results cannot be used (`problem_values`).
    """
    known = recipe_values(problem_values(results, protocol))
    board = (
        configurations.drop("kind")
        .join(_status(recipes, known), on=["stage", "config_id"], how="left")
        .join(_chosen(recipes, known, rank_by), on="config_id", how="left")
        .with_columns(pl.col("n_kinds").fill_null(0), _score(rank_by).alias("score"))
    )
    group = ["stage", "target"]
    has_rank = (
        (pl.col("status") == "done")
        & pl.col("duplicate_of").is_null()
        & pl.col("score").is_not_null()
    )
    ordered = board.with_columns(has_rank.alias("has_rank")).sort(
        [*group, "has_rank", "score", "val_skill", "config_id"],
        descending=[False, False, True, True, True, False],
        nulls_last=True,
    )
    ranked = ordered.with_columns(
        pl.when("has_rank").then(pl.int_range(1, pl.len() + 1).over(group)).alias("rank"),
        pl.col("has_rank").sum().over(group).cast(pl.Int64).alias("n_tried"),
        pl.lit(protocol, pl.Enum(PROTOCOLS)).alias("protocol"),
    )
    return check_table(
        ranked.select(*SWEEP_LEADERBOARD.columns), SWEEP_LEADERBOARD, "results of a sweep"
    )


def _status(recipes: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    there = known.filter("is_whole").select(*PLACE, "recipe", pl.lit(1, pl.Int64).alias("is_there"))
    found = (
        recipes.join(there, on=[*PLACE, "recipe"], how="left", maintain_order="left")
        .group_by("stage", "config_id", maintain_order=True)
        .agg(pl.len().cast(pl.Int64).alias("n"), pl.col("is_there").sum().alias("n_there"))
    )
    return with_status(found, "n", "n_there").select("stage", "config_id", "status")


def _chosen(recipes: pl.DataFrame, known: pl.DataFrame, rank_by: RankBy) -> pl.DataFrame:
    """The candidate of each configuration that validation (or the earlier rule) prefers."""
    by = "test_value" if rank_by == "test_primary" else "val_skill"
    return (
        recipes.filter(pl.col("role") == "candidate")
        .select("config_id", *PLACE, "kind", "recipe")
        .join(known, on=[*PLACE, "recipe"], how="left")
        .sort(["config_id", by, "kind"], descending=[False, True, False], nulls_last=True)
        .group_by("config_id", maintain_order=True)
        .agg(
            pl.all().exclude("config_id", *PLACE).first(),
            pl.len().cast(pl.Int64).alias("n_kinds"),
        )
    )


def _score(rank_by: RankBy) -> pl.Expr:
    if rank_by == "test_primary":
        return pl.col("test_value")
    if rank_by == "validation_skill":
        return pl.col("val_skill")
    # A duplicate would count its twin a second time; what is not done is not there to compare.
    skill = pl.when(pl.col("duplicate_of").is_null() & (pl.col("status") == "done")).then(
        pl.col("val_skill")
    )
    rank = skill.rank("average", descending=True).over(_ALIKE)
    return 1 - (rank - 0.5) / skill.count().over(_ALIKE)
