"""Evaluations of many layers to the ones that validation would have chosen.

The best of many layers on test is an optimistic number: the more are tried, the higher it stands
by chance. Here validation chooses, fold by fold, and only the choice is measured on test, by its
own target, beside baselines judged by the same target (`contrasts`). What does not belong here: the
full ranking (`report.leaderboard`).

Invariant: no test value influences a choice. Under lopo the validation problems of one fold are
test problems of another; a choice uses scores of its own fold only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import polars as pl

from taprobe_core.evaluation.evaluate import EvaluationTables
from taprobe_core.evaluation.intervals import adjust, benjamini_hochberg, compare_values
from taprobe_core.evaluation.summary import chance_levels
from taprobe_core.keys import Site
from taprobe_core.study.config import Evaluation, ProbeRecipe
from taprobe_core.study.evaluation import ANY_ACTIVATION_PROBE
from taprobe_core.study.targets import target_settings
from taprobe_core.tables import PROTOCOLS

__all__ = ["ANY_ACTIVATION_PROBE", "Cell", "choose", "chosen_values", "select_on_validation"]

Cell = tuple[Site, str, EvaluationTables]
"""A site, a setting, and their evaluation."""

_PLACE = ["setting", "model", "protocol"]
_CHOICE = [*_PLACE, "fold", "candidate", "layer"]
_TRUTH = "^(true_pr_auc|oracle_pr_auc|oracle_spearman)$"
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
        "t_low": pl.Float64(),
        "t_high": pl.Float64(),
        "p_sign_flip": pl.Float64(),
        "p_wilcoxon": pl.Float64(),
        "interval_note": pl.String(),
        "is_planned": pl.Boolean(),
        "correction": pl.String(),
        "n_contrasts": pl.Int64(),
        "p_adjusted": pl.Float64(),
    }
)


def select_on_validation(
    cells: Sequence[Cell], *, recipes: Sequence[ProbeRecipe], evaluation: Evaluation
) -> pl.DataFrame:
    """Choose layers on validation and measure the choice on test.

    Per model, setting, protocol and fold, the candidate with the highest validation mean of its
    primary metric is chosen (ties: lower layer, then name). For each activation recipe the
    candidates are its layers. For `ANY_ACTIVATION_PROBE` they are the layers of all activation
    recipes that predict what the first baseline predicts (same target with the same settings, and
    residualisation): values of different targets are not compared.

    Args:
        cells: evaluations of the study.
        recipes: the study's recipes, resolved (`Study.recipes`).
        evaluation: baselines, bootstrap, planned comparisons and their correction.

    Returns:
        One row per setting × model × protocol × recipe × baseline: the chosen candidates' test
        mean `value` beside `chance`, `chosen` (`recipe@Lnn`, distinct), `n_candidates`, and the
        paired comparison with the baseline, judged by the recipe's target. A baseline that reads
        activations is chosen likewise. Where the truth is known, `oracle` is what the true
        importance itself reaches and `true_value` the choice's PR-AUC against the true anchors.
        `p_adjusted` corrects p_sign_flip for `n_contrasts` of the same protocol, settings and
        models together: planned ones by `evaluation.correction`, the others among themselves by
        Benjamini-Hochberg. Empty when no recipe reads activations.
    """
    names = _activation_recipes(cells, recipes)
    if not names:
        return _SCHEMA.to_frame()
    picked = _picked(_units(cells), names, _joint(names, recipes, evaluation))
    contrasts = _contrasts(cells)
    rows = []
    for key, own in picked.group_by(*_PLACE, "recipe", maintain_order=True):
        place = dict(zip([*_PLACE, "recipe"], key, strict=True))
        for baseline in evaluation.baselines:
            if baseline != place["recipe"]:
                paired = _paired(own, baseline, contrasts, picked if baseline in names else None)
                rows.append(_row(place, paired, baseline, evaluation))
    frame = pl.DataFrame(rows, _SCHEMA, strict=False).sort(*_PLACE, "recipe", "baseline")
    return _adjusted(frame, evaluation)


def chosen_values(
    cells: Sequence[Cell],
    *,
    recipes: Sequence[ProbeRecipe],
    evaluation: Evaluation | None = None,
) -> pl.DataFrame:
    """Return what `select_on_validation` averages: the choice's metric on each test problem.

    Args:
        cells: evaluations of the study, one at least.
        recipes: the study's recipes, one at least that reads activations.
        evaluation: for the first baseline, whose target the joint choice takes.

    Returns:
        setting, model, protocol, recipe, fold, candidate, layer, n_candidates, problem_id, metric,
        value (seeds averaged), n_sentences, n_anchors, and true_pr_auc, oracle_pr_auc and
        oracle_spearman if there are.
    """
    names = _activation_recipes(cells, recipes)
    joint = _joint(names, recipes, evaluation or Evaluation())
    return _picked(_units(cells), names, joint).drop("split")


def choose(
    candidates: pl.DataFrame, group: Sequence[str], by: str, ties: Sequence[str]
) -> pl.DataFrame:
    """Choose one candidate of each group.

    Args:
        candidates: `group`, `by`, `ties` and any other columns.
        group: what each choice is made for.
        by: the highest is chosen, undefined ones (null) last.
        ties: the lowest of equal ones.

    Returns:
        The chosen rows, in order of `group`, with n_candidates.
    """
    order = [*group, by, *ties]
    return (
        candidates.sort(order, descending=[name == by for name in order], nulls_last=True)
        .group_by(group, maintain_order=True)
        .agg(pl.all().first(), pl.len().cast(pl.Int64).alias("n_candidates"))
    )


def _activation_recipes(cells: Sequence[Cell], recipes: Sequence[ProbeRecipe]) -> set[str]:
    reading = {recipe.name for recipe in recipes if recipe.reads_activations}
    return reading & {name for *_, tables in cells for name in tables.metrics["recipe"].unique()}


def _joint(
    names: Collection[str], recipes: Sequence[ProbeRecipe], evaluation: Evaluation
) -> set[str]:
    """Return the activation recipes that predict what the first baseline predicts."""
    predicts = {
        recipe.name: (
            recipe.target,
            *(getattr(recipe, name) for name in target_settings()),
            recipe.residualize,
        )
        for recipe in recipes
    }
    first = next(name for name in (*evaluation.baselines, *sorted(names)) if name in predicts)
    return {name for name in names if predicts[name] == predicts[first]}


def _picked(units: pl.DataFrame, names: Collection[str], joint: Collection[str]) -> pl.DataFrame:
    test = units.filter(pl.col("split") == "test")
    return _choose(units.filter(pl.col("candidate").is_in(names)), joint).join(test, on=_CHOICE)


def _units(cells: Sequence[Cell]) -> pl.DataFrame:
    """One row per problem and fold of every candidate: seeds averaged."""
    return pl.concat(
        (
            tables.problem_metrics.group_by(
                "recipe", "protocol", "split", "fold", "problem_id", maintain_order=True
            )
            .agg(
                pl.col("primary").mean().alias("value"),
                pl.col("n_sentences", "n_anchors").first(),
                pl.col(_TRUTH).mean(),
            )
            .join(_metric_of(tables), on="recipe", how="left", maintain_order="left")
            .with_columns(_where(site, setting))
            .rename({"recipe": "candidate"})
            for site, setting, tables in cells
        ),
        how="diagonal",
    ).sort(*_CHOICE, "problem_id")


def _contrasts(cells: Sequence[Cell]) -> pl.DataFrame:
    return pl.concat(
        tables.contrasts.rename({"recipe": "candidate"})
        .drop("value")
        .with_columns(_where(site, setting))
        for site, setting, tables in cells
    )


def _where(site: Site, setting: str) -> list[pl.Expr]:
    return [
        pl.lit(setting).alias("setting"),
        pl.lit(site.model).alias("model"),
        pl.lit(site.layer).alias("layer"),
    ]


def _metric_of(tables: EvaluationTables) -> pl.DataFrame:
    return tables.metrics.select("recipe", pl.col("primary_metric").alias("metric")).unique()


def _choose(units: pl.DataFrame, joint: Collection[str]) -> pl.DataFrame:
    """The chosen candidate of each place, recipe and fold."""
    on_val = (
        units.filter(pl.col("split") == "val")
        .group_by(_CHOICE, maintain_order=True)
        .agg(pl.col("value").mean().alias("val_value"))
    )
    own = on_val.with_columns(pl.col("candidate").alias("recipe"))
    together = on_val.filter(pl.col("candidate").is_in(joint)).with_columns(
        pl.lit(ANY_ACTIVATION_PROBE).alias("recipe")
    )
    group = [*_PLACE, "recipe", "fold"]
    chosen = choose(pl.concat([own, together]), group, "val_value", ["layer", "candidate"])
    return chosen.select(*group, "candidate", "layer", "n_candidates")


def _paired(
    own: pl.DataFrame, baseline: str, contrasts: pl.DataFrame, picked: pl.DataFrame | None
) -> pl.DataFrame:
    """Set beside each chosen value the baseline's, at the layer chosen for it if it has layers."""
    mine = contrasts.filter(pl.col("baseline") == baseline)
    if picked is None:
        return own.join(
            mine, on=[*_CHOICE, "problem_id"], how="left", maintain_order="left", suffix="_other"
        )
    layers = picked.filter(pl.col("recipe") == baseline).select(
        *_PLACE, "fold", "problem_id", pl.col("layer").alias("baseline_layer")
    )
    return own.join(
        layers, on=[*_PLACE, "fold", "problem_id"], how="left", maintain_order="left"
    ).join(
        mine.rename({"layer": "baseline_layer"}),
        on=[*_PLACE, "fold", "candidate", "problem_id", "baseline_layer"],
        how="left",
        maintain_order="left",
    )


def _row(
    place: dict[str, Any], own: pl.DataFrame, baseline: str, evaluation: Evaluation
) -> dict[str, Any]:
    metric = str(own["metric"][0])
    sizes = own.select(pl.col("n_sentences", "n_anchors").fill_null(0)).to_numpy().T
    level = own.select(
        pl.Series("chance", chance_levels(*sizes)).fill_nan(None).mean()
    ).to_series()[0]
    chosen = own.select(
        pl.format("{}@L{}", "candidate", pl.col("layer").cast(pl.String).str.zfill(2))
    )
    other = own.select("problem_id", pl.col("baseline_value").alias("value"))
    return {
        **place,
        "metric": metric,
        "value": own["value"].mean(),
        "chance": level if metric == "pr_auc" else 0.0,
        "oracle": _mean(own, f"oracle_{metric}"),
        "true_value": _mean(own, "true_pr_auc"),
        "n_candidates": own["n_candidates"].max(),
        "chosen": chosen.to_series().unique().sort().to_list(),
        "baseline": baseline,
        "baseline_value": own["baseline_value"].mean(),
        **compare_values(own.select("problem_id", "value"), other, evaluation)._asdict(),
    }


def _adjusted(frame: pl.DataFrame, evaluation: Evaluation) -> pl.DataFrame:
    is_planned = pl.col("recipe").is_in(evaluation.planned)
    parts = []
    for (planned, _), group in frame.with_columns(is_planned=is_planned).group_by(
        "is_planned", "protocol", maintain_order=True
    ):
        p = group["p_sign_flip"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        adjusted = adjust(p, evaluation.correction) if planned else benjamini_hochberg(p)
        parts.append(
            group.with_columns(
                pl.lit(evaluation.correction if planned else "benjamini_hochberg").alias(
                    "correction"
                ),
                pl.col("p_sign_flip").count().cast(pl.Int64).alias("n_contrasts"),
                pl.Series("p_adjusted", adjusted).fill_nan(None),
            )
        )
    return pl.concat([frame.clear(), *parts]).sort(*_PLACE, "recipe", "baseline")


def _mean(frame: pl.DataFrame, name: str) -> Any:
    return frame[name].mean() if name in frame.columns else None
