"""Candidates against the baselines of their own configuration, problem by problem.

A plain fit is compared with position and text on the same target. A fit to residuals is judged by
residuals: it is compared with what those baselines say about the same residuals, where that was
measured, and with chance. The statistics of a difference belong in `comparison`, corrections in
`multiplicity`.

Invariant: both sides of a difference are judged by one target on the same problem, and a fit that
many configurations share is one test.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from taprobe_core.comparison import Comparison, compare_values
from taprobe_core.multiplicity import benjamini_hochberg, holm
from taprobe_core.study.evaluation import Evaluation
from taprobe_core.sweep.values import PLACE, over_seeds, problem_values
from taprobe_core.tables.contract import check_table
from taprobe_core.tables.results import PROTOCOLS, schema_of
from taprobe_core.tables.sweep import SWEEP_DELTAS

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
            (pl.col("value") - pl.col("excess")).alias("other"),
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
