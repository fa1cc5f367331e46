"""Evaluations of many layers to the ones that validation would have chosen.

The best of many layers on test is an optimistic number: the more are tried, the higher it stands
by chance. Here validation chooses, fold by fold, and only the choice is measured on test. What does
not belong here: the full ranking (`leaderboard`).

Invariant: no test value influences a choice. Under lopo the validation problems of one fold are
test problems of another; a choice uses scores of its own fold only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import polars as pl

from taprobe_core.aggregation import chance_pr_auc
from taprobe_core.evaluation import EvaluationTables, compare_values
from taprobe_core.keys import Site
from taprobe_core.study.config import Evaluation, ProbeRecipe
from taprobe_core.tables import PROTOCOLS

Cell = tuple[Site, str, EvaluationTables]
"""A site, a setting, and their evaluation."""

ANY_ACTIVATION_PROBE = "any_activation_probe"
"""Stands for every recipe that reads activations: validation chooses recipe and layer together."""

_PLACE = ["setting", "model", "protocol"]
_CHOICE = [*_PLACE, "fold", "candidate", "layer"]
_SCHEMA = pl.Schema(
    {
        "setting": pl.String(),
        "model": pl.String(),
        "protocol": pl.Enum(PROTOCOLS),
        "recipe": pl.String(),
        "metric": pl.String(),
        "value": pl.Float64(),
        "chance": pl.Float64(),
        "oracle": pl.Float64(),
        "true_value": pl.Float64(),
        "n_candidates": pl.Int64(),
        "chosen": pl.List(pl.String()),
        "baseline": pl.String(),
        "baseline_value": pl.Float64(),
        "n_problems": pl.Int64(),
        "n_better": pl.Int64(),
        "delta": pl.Float64(),
        "delta_low": pl.Float64(),
        "delta_high": pl.Float64(),
        "p_sign_flip": pl.Float64(),
        "interval_note": pl.String(),
    }
)


def select_on_validation(
    cells: Sequence[Cell], *, recipes: Sequence[ProbeRecipe], evaluation: Evaluation
) -> pl.DataFrame:
    """Choose layers on validation and measure the choice on test.

    Per model, setting, protocol and fold, the candidate with the highest validation mean of the
    primary metric is chosen (ties: lower layer, then name). For each activation recipe the
    candidates are its layers; for `ANY_ACTIVATION_PROBE` they are all recipes × layers.

    Args:
        cells: evaluations of the study.
        recipes: the study's recipes.
        evaluation: baselines and bootstrap.

    Returns:
        One row per setting × model × protocol × recipe × baseline: the chosen candidates' test
        mean `value` beside `chance`, `chosen` (`recipe@Lnn`, distinct), `n_candidates`, and the
        paired comparison with the baseline. Where the truth is known, `oracle` is what the true
        importance itself reaches and `true_value` the choice's PR-AUC against the true anchors. A
        baseline that reads activations is chosen likewise.
        Empty when no recipe reads activations.
    """
    reading = {recipe.name for recipe in recipes if recipe.reads_activations}
    names = reading & {name for *_, tables in cells for name in tables.metrics["recipe"].unique()}
    if not names:
        return _SCHEMA.to_frame()
    metric = str(cells[0][2].metrics["primary_metric"][0])
    units = _units(cells, metric)
    test = units.filter(pl.col("split") == "test")
    picked = _picked(units, names)
    rows = []
    for key, own in picked.group_by(*_PLACE, "recipe", maintain_order=True):
        place = dict(zip([*_PLACE, "recipe"], key, strict=True))
        for baseline in evaluation.baselines:
            if baseline != place["recipe"]:
                other = _baseline(baseline, picked if baseline in names else test, place)
                rows.append(_row(place, own, other, baseline, metric, evaluation))
    return pl.DataFrame(rows, _SCHEMA, strict=False).sort(*_PLACE, "recipe", "baseline")


def chosen_values(cells: Sequence[Cell], *, recipes: Sequence[ProbeRecipe]) -> pl.DataFrame:
    """Return what `select_on_validation` averages: the choice's metric on each test problem.

    Args:
        cells: evaluations of the study, one at least.
        recipes: the study's recipes, one at least that reads activations.

    Returns:
        setting, model, protocol, recipe, fold, candidate, layer, n_candidates, problem_id, value
        (seeds averaged), n_sentences, n_anchors, true_pr_auc and oracle_pr_auc if there are.
    """
    metric = str(cells[0][2].metrics["primary_metric"][0])
    names = {recipe.name for recipe in recipes if recipe.reads_activations}
    return _picked(_units(cells, metric), names).drop("split")


def _picked(units: pl.DataFrame, names: Collection[str]) -> pl.DataFrame:
    test = units.filter(pl.col("split") == "test")
    return _choose(units.filter(pl.col("candidate").is_in(names))).join(test, on=_CHOICE)


def _units(cells: Sequence[Cell], metric: str) -> pl.DataFrame:
    """One row per problem and fold of every candidate: seeds averaged."""
    return pl.concat(
        tables.problem_metrics.group_by(
            "recipe", "protocol", "split", "fold", "problem_id", maintain_order=True
        )
        .agg(
            pl.col(metric).mean().alias("value"),
            pl.col("n_sentences", "n_anchors").first(),
            pl.col("^(true|oracle)_pr_auc$").mean(),
        )
        .with_columns(
            pl.lit(setting).alias("setting"),
            pl.lit(site.model).alias("model"),
            pl.lit(site.layer).alias("layer"),
        )
        .rename({"recipe": "candidate"})
        for site, setting, tables in cells
    ).sort(*_CHOICE, "problem_id")


def _choose(units: pl.DataFrame) -> pl.DataFrame:
    """The chosen candidate of each place, recipe and fold."""
    on_val = (
        units.filter(pl.col("split") == "val")
        .group_by(_CHOICE, maintain_order=True)
        .agg(pl.col("value").mean().alias("val_value"))
    )
    own = on_val.with_columns(pl.col("candidate").alias("recipe"))
    together = on_val.with_columns(pl.lit(ANY_ACTIVATION_PROBE).alias("recipe"))
    group = [*_PLACE, "recipe", "fold"]
    order = [*group, "val_value", "layer", "candidate"]
    falling = [name == "val_value" for name in order]
    return (
        pl.concat([own, together])
        .sort(order, descending=falling, nulls_last=True)
        .group_by(group, maintain_order=True)
        .agg(pl.col("candidate", "layer").first(), pl.len().cast(pl.Int64).alias("n_candidates"))
    )


def _baseline(name: str, units: pl.DataFrame, place: dict[str, Any]) -> pl.DataFrame:
    where = {key: place[key] for key in _PLACE}
    column = "recipe" if "recipe" in units.columns else "candidate"
    mine = units.filter(pl.col(column) == name, **where)
    # Without activations every layer holds the same scores.
    return mine.filter(pl.col("layer") == pl.col("layer").min()) if column == "candidate" else mine


def _row(
    place: dict[str, Any],
    own: pl.DataFrame,
    other: pl.DataFrame,
    baseline: str,
    metric: str,
    evaluation: Evaluation,
) -> dict[str, Any]:
    sizes = own.filter(
        pl.col("n_anchors").is_between(0, pl.col("n_sentences"), closed="none")
    ).select("n_sentences", "n_anchors")
    levels = [chance_pr_auc(n, k) for n, k in sizes.iter_rows()]
    chosen = own.select(
        pl.format("{}@L{}", "candidate", pl.col("layer").cast(pl.String).str.zfill(2))
    )
    return {
        **place,
        "metric": metric,
        "value": own["value"].mean(),
        "chance": (sum(levels) / len(levels) if levels else None) if metric == "pr_auc" else 0.0,
        "oracle": _mean(own, "oracle_pr_auc") if metric == "pr_auc" else None,
        "true_value": _mean(own, "true_pr_auc"),
        "n_candidates": own["n_candidates"].max(),
        "chosen": chosen.to_series().unique().sort().to_list(),
        "baseline": baseline,
        "baseline_value": other["value"].mean(),
        **compare_values(
            own.select("problem_id", "value"), other.select("problem_id", "value"), evaluation
        )._asdict(),
    }


def _mean(frame: pl.DataFrame, name: str) -> Any:
    return frame[name].mean() if name in frame.columns else None
