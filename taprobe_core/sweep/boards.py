"""Every configuration of a sweep, ranked beside those that predict the same target.

Recipes are measured and compared by `evaluation`, once at each site and setting; here these tables
are joined to the configurations that ask for the recipes. Validation chooses among a
configuration's candidates, and ranks configurations; test values stand beside them and decide
nothing, unless the study asks for the earlier rule.

    skill = (mean value - mean chance) / (1 - mean chance)

over the problems where the value is defined. Chance moves with the base rate and the metric, so
skill may be compared across percentiles where the value may not. What does not belong here: who
goes on (`shortlist`), values and differences of recipes (`evaluation.summary`, `.contrasts`).

Invariants: what is missing, undefined or a duplicate has no rank and stands below everything that
has one; ties are broken by skill on validation, then by id. A fit that many configurations share is
one test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from taprobe_core.evaluation.contrasts import paired_deltas
from taprobe_core.evaluation.intervals import benjamini_hochberg, holm
from taprobe_core.evaluation.selection import choose
from taprobe_core.evaluation.summary import chance_levels, normalised_skill, summarise
from taprobe_core.metrics import primary_metric
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.study.evaluation import Evaluation
from taprobe_core.study.sweep import RankBy
from taprobe_core.study.targets import target_settings
from taprobe_core.sweep.recipes import FACTORS, Configuration
from taprobe_core.sweep.space import SweepSpace, duplicates, uses_of
from taprobe_core.tables.contract import Contract, check_table, schema_of
from taprobe_core.tables.results import PROTOCOLS
from taprobe_core.tables.sweep import (
    SWEEP_CONFIGURATIONS,
    SWEEP_DELTAS,
    SWEEP_LEADERBOARD,
    SWEEP_RECIPES,
    SWEEP_STATUS_NAMES,
)

PLACE = ("model", "layer", "setting")
FIT = (*PLACE, "recipe")
"""What names the fits of a recipe, of all seeds."""


def configuration_table(space: SweepSpace, configurations: Sequence[Configuration]) -> pl.DataFrame:
    """Lay configurations of one stage out as `tables.SWEEP_CONFIGURATIONS`."""
    twin = duplicates(space, configurations)
    rows = [
        {
            "stage": each.stage,
            "config_id": each.id,
            **{name: getattr(each, name) for name in FACTORS},
            "factors": canonical_json(each.factors),
            "duplicate_of": twin.get(each.id),
        }
        for each in configurations
    ]
    return _checked(rows, SWEEP_CONFIGURATIONS)


def recipe_table(space: SweepSpace, configurations: Sequence[Configuration]) -> pl.DataFrame:
    """Lay the recipes of configurations out as `tables.SWEEP_RECIPES`."""
    rows = [
        {
            "stage": each.stage,
            "config_id": each.id,
            **{name: getattr(each, name) for name in PLACE},
            "kind": use.kind,
            "role": use.role,
            "target": each.target,
            "residualize": use.swept.template.residualize,
            "recipe": use.swept.name,
        }
        for each in configurations
        for use in uses_of(space, each)
    ]
    return _checked(rows, SWEEP_RECIPES)


def _checked(rows: list[dict[str, Any]], contract: Contract) -> pl.DataFrame:
    return check_table(
        pl.DataFrame(rows, schema_of(contract)), contract, "the expansion of a sweep"
    )


def measured(units: pl.DataFrame, recipes: pl.DataFrame, protocol: str) -> pl.DataFrame:
    """Take the units of one protocol and say what chance would have been worth there.

    `units` are `PLACE`, then `tables.PROBLEM_METRICS` with the primary metric; a fit that two
    stages ask for may stand there twice, and recipes that nobody asks for are ignored. Metric and
    chance are added; primary and chance are null where it is not defined.
    """
    target = dict(recipes.select("recipe", "target").unique().iter_rows())
    metric = {name: primary_metric(each) for name, each in target.items()}
    mine = units.filter(pl.col("protocol") == protocol, pl.col("recipe").is_in(list(metric)))
    mine = mine.unique([*FIT, "split", "fold", "seed", "problem_id"], maintain_order=True)
    sizes = mine.select(pl.col("n_sentences", "n_anchors").fill_null(0)).to_numpy().T
    level = pl.Series("chance", chance_levels(*sizes))
    known = mine.with_columns(
        level,
        pl.col("primary").fill_nan(None),
        pl.col("recipe").replace_strict(metric, return_dtype=pl.String).alias("metric"),
    )
    chance = pl.when(pl.col("metric") == "pr_auc").then("chance").otherwise(0.0)
    return known.with_columns(pl.when(pl.col("primary").is_not_null()).then(chance).alias("chance"))


def recipe_values(values: pl.DataFrame) -> pl.DataFrame:
    """Summarise each recipe at each place on validation and on test, null on an absent side."""
    chance = pl.when(pl.col("metric") == "pr_auc").then("chance_pr_auc").otherwise(0.0)
    summary = summarise(values, ["primary"], [*FIT, "metric", "split"]).with_columns(
        normalised_skill(pl.col("primary"), chance).alias("skill"), chance.alias("chance")
    )
    on_val, on_test = (summary.filter(split=split) for split in ("val", "test"))
    sides = on_val.select(
        *FIT, "metric", val_value="primary", val_skill="skill", has_val=pl.lit(value=True)
    ).join(
        on_test.select(
            *(*FIT, "metric", "n_problems", "n_seeds"),
            test_value="primary",
            test_skill="skill",
            test_chance="chance",
            test_seed_sd="primary_std",
            n_undefined="n_undefined_primary",
        ),
        on=[*FIT, "metric"],
        how="full",
        coalesce=True,
    )
    is_whole = pl.all_horizontal(pl.col("has_val", "n_problems").is_not_null())
    return sides.with_columns(is_whole.alias("is_whole")).drop("has_val")


_ALIKE = [
    *("stage", "model", "setting", "target", *target_settings()),
    *("drop_last_sentence", "residualize"),
]
"""Configurations that agree in these are judged by the same values on the same sentences."""


def sweep_leaderboard(
    configurations: pl.DataFrame,
    recipes: pl.DataFrame,
    units: pl.DataFrame,
    *,
    protocol: str,
    rank_by: RankBy = "validation_skill",
) -> pl.DataFrame:
    """Rank configurations of any number of stages, as `tables.SWEEP_LEADERBOARD`.

    Args:
        configurations: `tables.SWEEP_CONFIGURATIONS`.
        recipes: `tables.SWEEP_RECIPES` of the same.
        units: see `measured`.
        protocol: whose folds decide.
        rank_by: see `study.sweep.Shortlists`.
    """
    known = recipe_values(measured(units, recipes, protocol))
    board = (
        configurations.drop("kind")
        .join(_status(recipes, known), on="config_id", how="left")
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
    """Done where every recipe of a configuration has both sides."""
    there = known.select(*FIT, "is_whole")
    is_done = pl.col("is_whole").fill_null(value=False).all()
    status = pl.when(is_done).then(pl.lit("done")).otherwise(pl.lit("missing"))
    return (
        recipes.join(there, on=FIT, how="left")
        .group_by("config_id")
        .agg(status.cast(pl.Enum(SWEEP_STATUS_NAMES)).alias("status"))
    )


def _chosen(recipes: pl.DataFrame, known: pl.DataFrame, rank_by: RankBy) -> pl.DataFrame:
    """The candidate of each configuration that validation (or the earlier rule) prefers."""
    candidates = recipes.filter(role="candidate").select("config_id", *FIT, "kind")
    by = "test_value" if rank_by == "test_primary" else "val_skill"
    chosen = choose(candidates.join(known, on=FIT, how="left"), ["config_id"], by, ["kind"])
    return chosen.drop(*PLACE).rename({"n_candidates": "n_kinds"})


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


CHANCE = "chance"
"""Stands for a random ranking among the baselines."""

_PAIR = [*FIT, "baseline"]


def sweep_paired_deltas(
    configurations: pl.DataFrame,
    recipes: pl.DataFrame,
    units: pl.DataFrame,
    contrasts: pl.DataFrame,
    *,
    protocol: str,
    evaluation: Evaluation,
) -> pl.DataFrame:
    """Compare every candidate that has results with the baselines of its configuration.

    Both sides are judged by the candidate's target (`evaluation.contrasts`): beside a fit to
    residuals, a baseline is asked what it says about the same residuals. Such a fit stands beside
    chance too: position may say nothing of what position left. `contrasts` are `PLACE`, then
    `tables.CONTRASTS`. The result is `tables.SWEEP_DELTAS`, in the order of `configurations`.
    """
    pairs = _pairs(configurations, recipes)
    residual = recipes.filter(pl.col("role") == "candidate", pl.col("residualize") != "none")
    beside_chance = (
        measured(units, recipes, protocol)
        .filter(split="test")
        .join(residual, on=FIT, how="semi")
        .group_by(*FIT, "protocol", "fold", "problem_id", maintain_order=True)
        .agg(value=pl.col("primary").mean(), baseline_value=pl.col("chance").mean())
        .with_columns(baseline=pl.lit(CHANCE))
    )
    judged = (
        pl.concat([contrasts, beside_chance.select(contrasts.columns)])
        .filter(pl.col("protocol") == protocol)
        .join(pairs, on=_PAIR, how="semi", maintain_order="left")
        .unique([*_PAIR, "fold", "problem_id"], maintain_order=True)
    )
    target = dict(recipes.select("recipe", "target").unique().iter_rows())
    deltas = paired_deltas(judged, evaluation, target, PLACE)
    distinct = pairs.select("stage", *_PAIR).unique(maintain_order=True)
    tests = distinct.join(deltas, on=_PAIR, maintain_order="left")
    by_stage = [_corrected(own) for _, own in tests.group_by("stage", maintain_order=True)]
    corrected = pl.concat([_corrected(tests.clear()), *by_stage])
    found = pairs.join(corrected, on=["stage", *_PAIR], maintain_order="left")
    return check_table(
        found.drop("baseline").rename({"baseline_kind": "baseline"}).select(*SWEEP_DELTAS.columns),
        SWEEP_DELTAS,
        "results of a sweep and its baselines",
    )


def _pairs(configurations: pl.DataFrame, recipes: pl.DataFrame) -> pl.DataFrame:
    """Every candidate of every configuration beside the recipes that it is compared with."""
    own = configurations.filter(pl.col("duplicate_of").is_null()).select("config_id")
    mine = own.with_row_index("order").join(recipes, on="config_id")
    candidates = mine.filter(role="candidate")
    baselines = mine.filter(role="baseline", residualize="none").select(
        "config_id", baseline_kind="kind", baseline="recipe"
    )
    chance = candidates.filter(pl.col("residualize") != "none").with_columns(
        baseline_kind=pl.lit(CHANCE), baseline=pl.lit(CHANCE)
    )
    pairs = pl.concat([candidates.join(baselines, on="config_id"), chance])
    return pairs.sort("order", "kind", "recipe", "baseline_kind").drop("order")


def _corrected(tests: pl.DataFrame) -> pl.DataFrame:
    p = tests["p_sign_flip"].to_numpy()
    return tests.with_columns(
        pl.col("p_sign_flip").count().cast(pl.Int64).alias("n_tests"),
        pl.Series("p_holm", holm(p), pl.Float64).fill_nan(None),
        pl.Series("q_bh", benjamini_hochberg(p), pl.Float64).fill_nan(None),
    )
