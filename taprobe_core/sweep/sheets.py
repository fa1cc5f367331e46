"""Configurations and their recipes as tables, and which of them are there.

There is no registry: the status of a configuration is read off what is there, so it cannot go
stale. What there is to find belongs to the store and its plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandera.polars as pa
import polars as pl

from taprobe_core.store.canonical import canonical_json
from taprobe_core.sweep.factors import FACTORS, Configuration
from taprobe_core.sweep.space import SweepSpace
from taprobe_core.sweep.uses import duplicates, uses_of
from taprobe_core.tables.contract import check_table
from taprobe_core.tables.results import schema_of
from taprobe_core.tables.sweep import (
    SWEEP_CONFIGURATIONS,
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


def _checked(rows: list[dict[str, Any]], contract: pa.DataFrameSchema) -> pl.DataFrame:
    return check_table(
        pl.DataFrame(rows, schema_of(contract)), contract, "the expansion of a sweep"
    )
