"""Fits of a sweep to what they reach: one row per recipe, fold, seed and problem.

A recipe is measured once for each site, not once for each configuration that asks for it. What
does not belong here: the metrics (`evaluation.units`), and what follows from them (`sweep`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import polars as pl

from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.units import measure_units
from taprobe_core.keys import Site
from taprobe_core.pipeline.fit import WantedFit, fit_key
from taprobe_core.pipeline.plan import Plan
from taprobe_core.tables import SWEEP_RESULTS, schema_of

_RECIPES_AT_ONCE = 32
"""Whose scores are read together: bounds memory."""


def measure_fits(
    plan: Plan, site: Site, setting: str, wanted: Mapping[str, Sequence[WantedFit]]
) -> pl.DataFrame:
    """Measure fits that are in the store by their primary metric, problem by problem.

    Args:
        plan: the plan.
        site: model and layer.
        setting: the setting.
        wanted: recipe name -> its fits, one per seed.

    Returns:
        `tables.SWEEP_RESULTS`.

    Raises:
        MissingArtifactError: a fit is not there.
    """
    labels = plan.read("labels", (site.model, setting), "labels")
    parts = [schema_of(SWEEP_RESULTS).to_frame()]
    by_rows: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for name, fits in wanted.items():
        by_rows[fits[0].view.drop_last_sentence, fits[0].recipe.is_stochastic].append(name)
    for (drops, _), names in by_rows.items():
        kept = labels
        if drops:
            last = pl.col("sentence_idx").max().over("problem_id")
            kept = labels.filter(pl.col("sentence_idx") < last)
        for start in range(0, len(names), _RECIPES_AT_ONCE):
            some = names[start : start + _RECIPES_AT_ONCE]
            parts.append(_measured(plan, site, setting, some, wanted, kept))
    return pl.concat(parts).sort("recipe", "protocol", "fold", "split", "seed", "problem_id")


def _measured(
    plan: Plan,
    site: Site,
    setting: str,
    names: Sequence[str],
    wanted: Mapping[str, Sequence[WantedFit]],
    labels: pl.DataFrame,
) -> pl.DataFrame:
    by_seed: dict[int, list[pl.DataFrame]] = defaultdict(list)
    for name in names:
        for fit in wanted[name]:
            artifact = plan.store.open(fit_key(plan, site, setting, fit))
            by_seed[fit.seed].append(artifact.read_table("scores.parquet"))
    recipes = {name: wanted[name][0].recipe for name in names}
    scored = make_blocks({seed: pl.concat(tables) for seed, tables in by_seed.items()}, labels)
    units = measure_units(
        scored,
        (),
        {name: recipe.target or plan.study.probes.target for name, recipe in recipes.items()},
        {name: recipe.residualize for name, recipe in recipes.items()},
    )
    ranks = pl.col("recipe").replace_strict(
        {name: recipe.is_binary for name, recipe in recipes.items()}
    )
    return units.select(
        pl.lit(site.model).alias("model"),
        pl.lit(site.layer, pl.Int64).alias("layer"),
        pl.lit(setting).alias("setting"),
        "recipe",
        "protocol",
        "fold",
        pl.col("split").cast(pl.String).cast(schema_of(SWEEP_RESULTS)["split"]),
        "seed",
        "problem_id",
        pl.when(ranks).then(pl.lit("pr_auc")).otherwise(pl.lit("spearman")).alias("metric"),
        pl.col("primary").alias("value"),
        pl.lit(None, pl.Float64).alias("ceiling"),
        pl.col("n_sentences").cast(pl.Int64),
        pl.col("n_anchors").fill_null(0).cast(pl.Int64).alias("n_positives"),
    )
