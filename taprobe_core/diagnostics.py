"""Evaluations of every cell to what a reader should know before believing a value.

One row per recipe at the layer that validation prefers: the band that relabelling leaves, the
metric by fifth of the trace, the calibration, what seeds add, and how far it stands above a control
task. What does not belong here: computing any of it (`nulls`, `position_bins`, `calibration`,
`best_seeds`, `selectivity`), and ranking (`leaderboard`).

Invariant: no test value influences which layer is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from taprobe_core.control_task import N_BINS
from taprobe_core.selection import Cell
from taprobe_core.study.config import ProbeRecipe

_KEY = ["recipe", "protocol"]
_PLACE = ["setting", "protocol", "model"]


def diagnose(cells: Sequence[Cell], *, recipes: Sequence[ProbeRecipe]) -> pl.DataFrame:
    """Gather the diagnostics of every recipe at the layer best on validation (ties: the lower).

    Args:
        cells: evaluations of the study, one at least.
        recipes: the study's recipes, for whether they read activations.

    Returns:
        setting, protocol, model, layer (null: reads no activations), recipe, metric, value,
        val_value; null_mean, null_low, null_high and p_position (labels permuted within fifths of
        the trace), p_shift (turned along it); fifths and n_defined (lists of 5; null without
        sentences); slope, intercept, expected_calibration_error, brier, log_loss (null where scores
        are no probabilities); k, n_seeds, best_of_k, best_seed; task_value, task_chance,
        control_value, control_chance, selectivity, selectivity_low, selectivity_high,
        selectivity_note, p_selectivity, n_selective, n_control (null without a control task).
        Ordered by setting, protocol, model, recipe.
    """
    layer_free = [recipe.name for recipe in recipes if not recipe.reads_activations]
    is_free = pl.col("recipe").is_in(layer_free)
    rows = pl.concat(_rows(cell) for cell in cells)
    return (
        rows.sort(
            [*_PLACE, "recipe", "val_value", "layer"],
            descending=[False] * 4 + [True, False],
            nulls_last=True,
        )
        .unique([*_PLACE, "recipe"], keep="first", maintain_order=True)
        .with_columns(pl.when(~is_free).then("layer").alias("layer"))
        .select(*_PLACE, "layer", "recipe", pl.exclude(*_PLACE, "layer", "recipe"))
    )


def _rows(cell: Cell) -> pl.DataFrame:
    site, setting, tables = cell
    value = pl.col("primary")
    on_val = tables.metrics.filter(pl.col("split") == "val").select(*_KEY, value.alias("val_value"))
    metric = pl.col("primary_metric").alias("metric")
    rows = (
        tables.metrics.filter(pl.col("split") == "test")
        .select(*_KEY, metric, value.alias("value"))
        .join(on_val, on=_KEY, how="left", maintain_order="left")
    )
    stratified, shifted = (
        tables.nulls.filter(pl.col("null") == name)
        for name in ("position_stratified", "circular_shift")
    )
    band = [pl.col("null_mean", "null_low", "null_high"), pl.col("p_null").alias("p_position")]
    calibration = ["slope", "intercept", "expected_calibration_error", "brier", "log_loss"]
    for table in (
        stratified.select(*_KEY, *band),
        shifted.select(*_KEY, pl.col("p_null").alias("p_shift")),
        _fifths(tables.position_bins),
        tables.calibration.select(*_KEY, *calibration),
        tables.best_seeds.select(*_KEY, "k", "n_seeds", "best_of_k", "best_seed"),
        _selectivity(tables.selectivity),
    ):
        rows = rows.join(table, on=_KEY, how="left", maintain_order="left")
    return rows.with_columns(
        pl.lit(setting).alias("setting"),
        pl.lit(site.model).alias("model"),
        pl.lit(site.layer, pl.Int64).alias("layer"),
    )


def _selectivity(table: pl.DataFrame) -> pl.DataFrame:
    levels = ["task_value", "task_chance", "control_value", "control_chance"]
    renamed = {
        "selectivity_note": "interval_note",
        "p_selectivity": "p_sign_flip",
        "n_selective": "n_better",
        "n_control": "n_problems",
    }
    return table.select(
        *_KEY,
        *levels,
        "selectivity",
        "selectivity_low",
        "selectivity_high",
        **{name: pl.col(column) for name, column in renamed.items()},
    )


def _fifths(bins: pl.DataFrame) -> pl.DataFrame:
    """Lay the bins of each recipe out as lists, a fifth without sentences as null."""
    every = pl.DataFrame({"bin": range(N_BINS)}, {"bin": pl.Int64})
    return (
        bins.select(_KEY)
        .unique(maintain_order=True)
        .join(every, how="cross", maintain_order="left_right")
        .join(bins, on=[*_KEY, "bin"], how="left", maintain_order="left")
        .group_by(_KEY, maintain_order=True)
        .agg(pl.col("value").alias("fifths"), pl.col("n_defined").fill_null(0))
    )
