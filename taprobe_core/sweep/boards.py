"""Every configuration of a sweep, ranked beside those that predict the same target.

Validation chooses among a configuration's candidates, and ranks configurations; test values stand
beside them and decide nothing, unless the study asks for the earlier rule. The status of a
configuration is read off what is there, so it cannot go stale.

Candidates are compared with the baselines of their own configuration, problem by problem: a plain
fit with position and text on the same target; a fit to residuals with what those baselines say
about the same residuals, where that was measured, and with chance.

What does not belong here: who goes on (`shortlist`), what a value is worth (`values`), statistics
and corrections of differences (`evaluation.intervals`).

Invariants: what is missing, undefined or a duplicate has no rank and stands below everything that
has one; ties are broken by skill on validation, then by id. Both sides of a difference are judged
by one target on the same problem, and a fit that many configurations share is one test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from taprobe_core.evaluation.intervals import Comparison, benjamini_hochberg, compare_values, holm
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.study.evaluation import Evaluation
from taprobe_core.study.sweep import RankBy
from taprobe_core.study.targets import target_settings
from taprobe_core.sweep.recipes import FACTORS, Configuration
from taprobe_core.sweep.space import SweepSpace, duplicates, uses_of
from taprobe_core.sweep.values import PLACE, over_seeds, problem_values, recipe_values
from taprobe_core.tables.contract import Contract, check_table
from taprobe_core.tables.results import PROTOCOLS, schema_of
from taprobe_core.tables.sweep import (
    SWEEP_CONFIGURATIONS,
    SWEEP_DELTAS,
    SWEEP_LEADERBOARD,
    SWEEP_RECIPES,
    SWEEP_STATUS,
    SWEEP_STATUS_NAMES,
)

FIT = ("model", "layer", "setting", "recipe", "seed")
"""What names a fit; `layer` is null where the recipe does not read the site, `seed` where it does
not depend on it."""


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
            "model": each.model,
            "layer": each.layer,
            "setting": each.setting,
            "kind": use.kind,
            "role": use.role,
            "residualize": use.swept.template.residualize,
            "recipe": use.swept.name,
            "reads_site": use.swept.template.reads_activations,
            "is_stochastic": use.swept.template.is_stochastic,
        }
        for each in configurations
        for use in uses_of(space, each)
    ]
    return _checked(rows, SWEEP_RECIPES)


def wanted_fits(recipes: pl.DataFrame, seeds: Iterable[int]) -> pl.DataFrame:
    """Return every fit that configurations need.

    Args:
        recipes: `tables.SWEEP_RECIPES`.
        seeds: of the study.

    Returns:
        stage, config_id, then `FIT`; a fit that many configurations need stands once for each.
    """
    each_seed = pl.Series("seed", list(seeds), pl.Int64)
    none = pl.Series("seed", [None], pl.Int64)
    parts = [
        recipes.filter(pl.col("is_stochastic") == is_stochastic).join(
            own.to_frame(), how="cross", maintain_order="left_right"
        )
        for is_stochastic, own in ((False, none), (True, each_seed))
    ]
    layer = pl.when(pl.col("reads_site")).then(pl.col("layer")).alias("layer")
    return pl.concat(parts).with_columns(layer).select("stage", "config_id", *FIT)


def status_table(wanted: pl.DataFrame, present: pl.DataFrame) -> pl.DataFrame:
    """Say of each configuration whether all its fits are there.

    Args:
        wanted: from `wanted_fits`.
        present: the columns `FIT` of the fits that the store has; others do no harm.

    Returns:
        `tables.SWEEP_STATUS`, in the order of `wanted`.
    """
    known = present.select(FIT).unique().with_columns(pl.lit(1, pl.Int64).alias("is_present"))
    found = (
        wanted.join(known, on=FIT, how="left", nulls_equal=True, maintain_order="left")
        .group_by("stage", "config_id", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("n_fits"),
            pl.col("is_present").sum().alias("n_present"),
        )
    )
    return check_table(with_status(found, "n_fits", "n_present"), SWEEP_STATUS, "the store")


def with_status(frame: pl.DataFrame, wanted: str, present: str) -> pl.DataFrame:
    """Add `status` behind the id: done where the two counts are equal; renames them."""
    is_done = pl.col(wanted) == pl.col(present)
    status = pl.when(is_done).then(pl.lit("done")).otherwise(pl.lit("missing"))
    return frame.select(
        "stage",
        "config_id",
        status.cast(pl.Enum(SWEEP_STATUS_NAMES)).alias("status"),
        pl.col(wanted).alias("n_fits"),
        pl.col(present).alias("n_present"),
    )


def _checked(rows: list[dict[str, Any]], contract: Contract) -> pl.DataFrame:
    return check_table(
        pl.DataFrame(rows, schema_of(contract)), contract, "the expansion of a sweep"
    )


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


CHANCE = "chance"
"""Stands for a random ranking among the baselines."""

_PAIR = [*PLACE, "recipe", "against"]
_TEST = ["stage", *_PAIR]


def sweep_paired_deltas(
    configurations: pl.DataFrame,
    recipes: pl.DataFrame,
    results: pl.DataFrame,
    *,
    protocol: str,
    evaluation: Evaluation,
    contrasts: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Compare every candidate that has results with the baselines of its configuration.

    Args:
        configurations: `tables.SWEEP_CONFIGURATIONS`; duplicates are left out.
        recipes: `tables.SWEEP_RECIPES` of the same.
        results: `tables.SWEEP_RESULTS`.
        protocol: whose test problems to take.
        evaluation: bootstrap and interval.
        contrasts: `tables.CONTRASTS` behind model, layer and setting: what a baseline says about
            the residuals that a recipe was fitted to. Without it such fits have chance alone.

    Returns:
        `tables.SWEEP_DELTAS`, in the order of `configurations`; `p_holm` and `q_bh` are over all
        distinct tests of a stage.
    """
    values = over_seeds(problem_values(results, protocol)).filter(pl.col("split") == "test")
    judged = _judged(values, recipes, contrasts, protocol)
    pairs = _pairs(configurations, recipes)
    tests = _tests(pairs.select(_TEST).unique(maintain_order=True), judged, evaluation)
    found = pairs.join(tests, on=_TEST, maintain_order="left").with_columns(
        pl.lit(protocol, pl.Enum(PROTOCOLS)).alias("protocol")
    )
    return check_table(
        found.select(*SWEEP_DELTAS.columns), SWEEP_DELTAS, "results of a sweep and its baselines"
    )


def _pairs(configurations: pl.DataFrame, recipes: pl.DataFrame) -> pl.DataFrame:
    """Every candidate of every configuration beside what it is compared with."""
    own = configurations.filter(pl.col("duplicate_of").is_null()).select("config_id", "target")
    mine = own.join(recipes, on="config_id", maintain_order="left_right")
    candidates = mine.filter(pl.col("role") == "candidate")
    baselines = mine.filter(role="baseline", residualize="none").select(
        "config_id", pl.col("kind").alias("baseline"), pl.col("recipe").alias("against")
    )
    by_chance = candidates.filter(pl.col("residualize") != "none").with_columns(
        pl.lit(CHANCE).alias("baseline"), pl.lit(CHANCE).alias("against")
    )
    by_baseline = candidates.join(baselines, on="config_id", maintain_order="left_right")
    order = configurations.with_row_index("order").select("config_id", "order")
    return (
        pl.concat([by_baseline, by_chance], how="diagonal")
        .join(order, on="config_id", maintain_order="left")
        .sort("order", "kind", "recipe", "baseline")
        .drop("order")
    )


def _judged(
    values: pl.DataFrame, recipes: pl.DataFrame, contrasts: pl.DataFrame | None, protocol: str
) -> pl.DataFrame:
    """Value and other value of every recipe beside each baseline: `_PAIR`, metric, problem_id."""
    key = [*PLACE, "recipe"]
    level = recipes.select(*key, "residualize", "role").unique(maintain_order=True)
    levelled = values.join(level, on=key, maintain_order="left")
    plain = levelled.filter(role="candidate", residualize="none")
    baselines = levelled.filter(role="baseline", residualize="none").select(
        *PLACE,
        "problem_id",
        "metric",
        pl.col("recipe").alias("against"),
        pl.col("value").alias("other"),
    )
    columns = [*_PAIR, "metric", "problem_id", "value", "other"]
    residual = levelled.filter((pl.col("role") == "candidate") & (pl.col("residualize") != "none"))
    parts = [
        plain.join(
            baselines, on=[*PLACE, "problem_id", "metric"], maintain_order="left_right"
        ).select(columns),
        residual.with_columns(
            pl.lit(CHANCE).alias("against"),
            (pl.col("value") - pl.col("value_above_chance")).alias("other"),
        ).select(columns),
    ]
    if contrasts is not None:
        said = (
            contrasts.filter(pl.col("protocol") == protocol)
            .group_by(*key, "baseline", "problem_id", maintain_order=True)
            .agg(pl.col("baseline_value").mean().alias("other"))
            .rename({"baseline": "against"})
        )
        parts.append(
            residual.join(said, on=[*key, "problem_id"], maintain_order="left_right").select(
                columns
            )
        )
    return pl.concat(parts)


def _tests(pairs: pl.DataFrame, judged: pl.DataFrame, evaluation: Evaluation) -> pl.DataFrame:
    """Compare each distinct pair once, and correct within a stage."""
    wanted = judged.join(pairs.select(_PAIR).unique(), on=_PAIR, how="semi", maintain_order="left")
    rows: list[dict[str, Any]] = []
    for key, pair in wanted.group_by(*_PAIR, "metric", maintain_order=True):
        found = compare_values(
            pair.select("problem_id", "value"),
            pair.select("problem_id", pl.col("other").alias("value")),
            evaluation,
        )
        rows.append({**dict(zip([*_PAIR, "metric"], key, strict=True)), **found._asdict()})
    schema = schema_of(SWEEP_DELTAS)
    kinds = {name: judged.schema[name] for name in [*_PAIR, "metric"]}
    kinds |= {name: schema[name] for name in Comparison._fields}
    tests = pairs.join(pl.DataFrame(rows, kinds), on=_PAIR, maintain_order="left")
    stages = [_corrected(own) for _, own in tests.group_by("stage", maintain_order=True)]
    return pl.concat(stages or [_corrected(tests)])


def _corrected(tests: pl.DataFrame) -> pl.DataFrame:
    p = tests["p_sign_flip"].to_numpy()
    return tests.with_columns(
        pl.col("p_sign_flip").count().cast(pl.Int64).alias("n_tests"),
        pl.Series("p_holm", holm(p), pl.Float64).fill_nan(None),
        pl.Series("q_bh", benjamini_hochberg(p), pl.Float64).fill_nan(None),
    )
