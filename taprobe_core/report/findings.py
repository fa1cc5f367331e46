"""Comparisons to sentences, in plain words, and what to know before believing a value.

One finding per setting and model, from the choice that validation made over all activation probes
and layers (`selection.ANY_ACTIVATION_PROBE`), under the protocol with most test problems. Beside it
one row of diagnostics per recipe at the layer that validation prefers: the band that relabelling
leaves, the metric by fifth of the trace, the calibration, what seeds add, and how far it stands
above a control task. What does not belong here: computing any of it (`evaluation`), ranking
(`leaderboard`), and laying sentences out (`page`).

Invariants: no test value influences which layer is shown. "Beats" is said only where the whole 95 %
interval lies above zero and the sign-flip test, corrected for every comparison that was planned
with it, is at 0.05 or below; nothing is concluded where there is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from taprobe_core.evaluation.selection import ANY_ACTIVATION_PROBE, Cell
from taprobe_core.probes.control_task import N_BINS
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


Verdict = Literal["beats", "mixed", "no evidence", "worse", "cannot say"]

VERDICT_LABELS: Mapping[Verdict, str] = {
    "beats": "Beats every baseline",
    "mixed": "Beats some baselines, not all",
    "no evidence": "No evidence of beating the baselines",
    "worse": "Beats no baseline, stays below at least one",
    "cannot say": "No interval, so nothing can be said",
}
"""How a verdict is written for readers."""

LEVEL = 0.05
"""A corrected p at or below it counts."""

CORRECTION_LABELS = {
    "holm": "Holm",
    "benjamini_hochberg": "Benjamini-Hochberg",
    "none": "uncorrected",
}
"""How a correction is written for readers."""

METRIC_LABELS = {"pr_auc": "PR-AUC", "spearman": "Spearman"}
"""How a metric is written for readers."""


@dataclass(frozen=True)
class Finding:
    """What one setting and model show.

    Attributes:
        setting: setting.
        model: model key.
        verdict: against all baselines together.
        text: the sentences.
    """

    setting: str
    model: str
    verdict: Verdict
    text: str


def main_protocol(rows: pl.DataFrame) -> str | None:
    """Return the protocol that tests most problems; None without rows.

    Args:
        rows: with protocol and n_problems.
    """
    most = rows.group_by("protocol").agg(pl.col("n_problems").max()).sort("n_problems", "protocol")
    return most["protocol"][-1] if most.height else None


def headline_rows(selected: pl.DataFrame) -> pl.DataFrame:
    """Return the comparisons that the findings speak of, in table order."""
    rows = selected.filter(pl.col("recipe") == ANY_ACTIVATION_PROBE)
    return rows.filter(pl.col("protocol").cast(pl.String) == pl.lit(main_protocol(rows)))


def findings(selected: pl.DataFrame) -> list[Finding]:
    """Say what the comparisons show."""
    shown = headline_rows(selected)
    return [
        _finding(str(setting), str(model), group.to_dicts())
        for (setting, model), group in shown.group_by("setting", "model", maintain_order=True)
    ]


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """Return what one comparison shows."""
    low, high, p = row["delta_low"], row["delta_high"], row["p_adjusted"]
    if low is None or high is None:
        return "cannot say"
    if p is None or p > LEVEL or low <= 0 <= high:
        return "no evidence"
    return "beats" if low > 0 else "worse"


def interval_text(row: Mapping[str, Any]) -> str:
    """Write a difference with its interval, or without one, and its corrected test."""
    if row["delta"] is None:
        return "undefined"
    if row["delta_low"] is None:
        return f"{row['delta']:+.3f}, no interval"
    interval = f"95 % interval {row['delta_low']:+.3f} to {row['delta_high']:+.3f}"
    return f"{row['delta']:+.3f}, {interval}, {p_text(row['p_adjusted'])}"


def p_text(p: float | None) -> str:
    """Write a p-value: three digits, or that it is below them."""
    if p is None:
        return "p undefined"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def _finding(setting: str, model: str, rows: Sequence[Mapping[str, Any]]) -> Finding:
    first = rows[0]
    metric = METRIC_LABELS.get(first["metric"], first["metric"])
    verdicts = [verdict_of(row) for row in rows]
    reached = "undefined" if first["value"] is None else f"{first['value']:.3f}"
    levels = [
        f"{name} {first[name]:.3f}" for name in ("chance", "oracle") if first[name] is not None
    ]
    between = f" ({', '.join(levels)})" if levels else ""
    opening = (
        f"The activation probe that validation chose, fold by fold, out of {first['n_candidates']} "
        f"candidates reaches {metric} {reached}{between} under {first['protocol']}."
    )
    if first["true_value"] is not None:
        opening += f" Against the true anchors the same scores reach {first['true_value']:.3f}."
    clauses = [
        f"{_VERBS[verdict_of(row)]} {row['baseline']} ({interval_text(row)})" for row in rows
    ]
    notes = sorted({row["interval_note"] for row in rows if row["interval_note"]})
    reasons = f" No interval: {'; '.join(notes)}." if notes else ""
    text = f"{opening} It {'; it '.join(clauses)}.{_corrected(first)}{reasons}"
    return Finding(setting, model, _together(verdicts), text)


def _corrected(row: Mapping[str, Any]) -> str:
    n = row["n_contrasts"]
    if not n or row["correction"] == "none":
        return ""
    name = CORRECTION_LABELS.get(row["correction"], row["correction"])
    planned = "planned comparison" if row["is_planned"] else "comparison"
    return f" p is corrected for {n} {planned}{'s' if n > 1 else ''} ({name})."


_VERBS: Mapping[Verdict, str] = {
    "beats": "beats",
    "worse": "stays below",
    "no evidence": "cannot be told apart from",
    "cannot say": "cannot be judged against",
}


def _together(verdicts: Sequence[Verdict]) -> Verdict:
    distinct = set(verdicts)
    if len(distinct) == 1:
        return verdicts[0]
    if "beats" in distinct:
        return "mixed"
    return "worse" if "worse" in distinct else "no evidence"
