"""Scores to tables: how well each recipe ranks sentences, and against which level.

Metrics are computed inside a problem, averaged over seeds (and, on validation, over the folds that
share the problem) inside it, and then over problems. A value that is not defined, such as a rank
correlation with a constant, is null, left out of the mean and counted. What does not belong here:
how each table is made (the modules this one calls) and choosing a layer (`selection`).

    make_blocks ─ measure_units ─┬─ summarise          metrics
                                 ├─ contrast_values    contrasts, deltas
                                 ├─ null_distributions nulls
                                 ├─ position_metrics   position_bins
                                 ├─ calibrate          calibration, reliability_bins
                                 ├─ best_seeds         best_seeds
                                 └─ selectivity        selectivity

Invariant: each recipe is judged by its own target, which its scores carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from taprobe_core.errors import DataError
from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.calibration import calibrate
from taprobe_core.evaluation.contrasts import (
    contrast_values,
    control_values,
    paired_deltas,
    selectivity,
)
from taprobe_core.evaluation.intervals import compare_values
from taprobe_core.evaluation.nulls import null_distributions
from taprobe_core.evaluation.summary import ROW, best_seeds, pooled_pr_auc, summarise
from taprobe_core.evaluation.units import measure_units, position_metrics
from taprobe_core.metrics import metric_names, primary_metric
from taprobe_core.study.config import Evaluation, Target
from taprobe_core.study.probes import Residualize
from taprobe_core.tables import (
    BEST_SEEDS,
    CALIBRATION,
    CONTRASTS,
    NULLS,
    POSITION_BINS,
    RELIABILITY_BINS,
    SELECTIVITY,
    schema_of,
)

__all__ = ["EvaluationTables", "compare_values", "evaluate", "primary_metric"]


@dataclass(frozen=True)
class EvaluationTables:
    """The evaluation of one site and setting; every attribute is a table.

    Attributes:
        metrics: one row per recipe × protocol × split. Columns: recipe, protocol, split,
            primary_metric (`pr_auc` or `spearman`), target, residualize, n_problems, n_seeds, per
            metric `<m>`, `<m>_std`, `n_undefined_<m>` (first `primary`, the primary metric itself),
            then pooled_pr_auc and chance_pr_auc. `<m>` is the mean over problems; `<m>_std` the
            standard deviation of that mean over seeds (ddof 1, so null for one seed; the earlier
            script system used ddof 0). A seed is no replicate of the data: its deviation is no
            standard error. `pooled_pr_auc` (test only) pools all sentences of a seed, over folds
            too, and so compares scores of different probes and problems; it is an extra, never
            ranked.
        problem_metrics: one row per recipe × protocol × split × fold × seed × problem
            (`units.measure_units`).
        deltas: `tables.DELTAS`.
        contrasts: `tables.CONTRASTS`.
        nulls: `tables.NULLS`.
        position_bins: `tables.POSITION_BINS`.
        calibration: `tables.CALIBRATION`.
        reliability_bins: `tables.RELIABILITY_BINS`.
        best_seeds: `tables.BEST_SEEDS`.
        selectivity: `tables.SELECTIVITY`.
    """

    metrics: pl.DataFrame
    problem_metrics: pl.DataFrame
    deltas: pl.DataFrame
    contrasts: pl.DataFrame = field(default_factory=lambda: schema_of(CONTRASTS).to_frame())
    nulls: pl.DataFrame = field(default_factory=lambda: schema_of(NULLS).to_frame())
    position_bins: pl.DataFrame = field(default_factory=lambda: schema_of(POSITION_BINS).to_frame())
    calibration: pl.DataFrame = field(default_factory=lambda: schema_of(CALIBRATION).to_frame())
    reliability_bins: pl.DataFrame = field(
        default_factory=lambda: schema_of(RELIABILITY_BINS).to_frame()
    )
    best_seeds: pl.DataFrame = field(default_factory=lambda: schema_of(BEST_SEEDS).to_frame())
    selectivity: pl.DataFrame = field(default_factory=lambda: schema_of(SELECTIVITY).to_frame())


def evaluate(
    scores_by_seed: Mapping[int, pl.DataFrame],
    labels: pl.DataFrame,
    evaluation: Evaluation,
    targets: Mapping[str, Target],
    residualize: Mapping[str, Residualize] | None = None,
    controls_by_seed: Mapping[int, pl.DataFrame] | None = None,
) -> EvaluationTables:
    """Evaluate every recipe of one site and setting over all seeds.

    Args:
        scores_by_seed: seed -> `tables.SCORES`; the same recipes and folds for each seed.
        labels: `tables.LABELS`.
        evaluation: baselines, recall depths, bootstrap, nulls.
        targets: recipe -> what it was fitted to, of every scored recipe at least.
        residualize: recipe -> what was taken from its target; `none` for those left out.
        controls_by_seed: seed -> `tables.SCORES` of control tasks, under the names of the recipes
            that they control; none leaves `selectivity` empty.

    Returns:
        The tables; undefined values are null, never NaN.

    Raises:
        NotEnoughDataError: no scores.
        LabelError: a scored sentence has no label, or a problem is scored in part.
        DataError: a baseline has no scores, a recipe no target, or a recipe of anchors no anchors.
    """
    scored = make_blocks(scores_by_seed, labels)
    found = set(scored.units["recipe"].unique())
    missing = sorted(set(evaluation.baselines) - found)
    if missing:
        raise DataError(
            f"no scores of the baselines {missing}",
            "scores",
            "fit them, or edit evaluation.baselines",
        )
    taken: Mapping[str, Residualize] = residualize or {}
    per_problem = measure_units(scored, evaluation.recall_at, targets, taken)
    own = {name: targets[name] for name in sorted(found)}
    metric_of = {name: primary_metric(target) for name, target in own.items()}
    about: dict[str, Mapping[str, str]] = {
        "primary_metric": metric_of,
        "target": own,
        "residualize": {name: taken.get(name, "none") for name in own},
    }
    said = [pl.col("recipe").replace_strict(dict(text)).alias(at) for at, text in about.items()]
    names = ["primary", *metric_names(evaluation.recall_at, scored.has_truth)]
    head, tail = [*ROW, *about], ["pooled_pr_auc", "chance_pr_auc"]
    metrics = (
        summarise(per_problem, names)
        .join(pooled_pr_auc(scored), on=ROW, how="left", maintain_order="left")
        .with_columns(said)
    )
    contrasts = contrast_values(scored, per_problem, evaluation.baselines, own)
    controls = control_values(controls_by_seed or {}, labels)
    calibration, bins = calibrate(scored, own, evaluation.calibration_bins)
    return EvaluationTables(
        metrics=metrics.select(*head, pl.exclude(*head, *tail), *tail),
        problem_metrics=per_problem,
        deltas=paired_deltas(contrasts, evaluation, own),
        contrasts=contrasts,
        nulls=null_distributions(scored, own, evaluation.n_null, evaluation.null_seed),
        position_bins=position_metrics(scored, own),
        calibration=calibration,
        reliability_bins=bins,
        best_seeds=best_seeds(per_problem, evaluation.best_of_k, metric_of),
        selectivity=selectivity(per_problem, controls, evaluation),
    )
