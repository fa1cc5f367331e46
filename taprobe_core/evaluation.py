"""Scores to metrics: how well each recipe ranks sentences, and against which level.

Metrics are computed inside a problem, averaged over seeds (and, on validation, over the folds that
share the problem) inside it, and then over problems. A value that is not defined, such as a rank
correlation with a constant, is null, left out of the mean and counted. What does not belong here:
the metrics of one problem (`metrics`), means (`aggregation`), the statistics of a difference
(`comparison`), choosing a layer (`selection`).

Invariant: a recipe is measured on every sentence of a problem or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from taprobe_core.aggregation import problem_values, summarise
from taprobe_core.comparison import Comparison, compare
from taprobe_core.errors import DataError, LabelError, NotEnoughDataError
from taprobe_core.metrics import metric_names, problem_metrics
from taprobe_core.study.config import Evaluation, Target
from taprobe_core.tables import DELTAS

_UNIT = ["recipe", "protocol", "split", "fold", "seed", "problem_id"]


@dataclass(frozen=True)
class EvaluationTables:
    """The evaluation of one site and setting.

    Attributes:
        metrics: one row per recipe × protocol × split. Columns: recipe, protocol, split,
            primary_metric, n_problems, n_seeds, per metric `<m>`, `<m>_std`, `n_undefined_<m>`,
            then pooled_pr_auc and chance_pr_auc. `<m>` is the mean over problems; `<m>_std` the
            standard deviation of that mean over seeds (ddof 1, so null for one seed; the earlier
            script system used ddof 0). A seed is no replicate of the data: its deviation is no
            standard error. `pooled_pr_auc` pools all sentences of a seed, over folds too, and so
            compares scores of different probes and problems; it is an extra, never ranked.
        problem_metrics: one row per recipe × protocol × split × fold × seed × problem.
        deltas: `tables.DELTAS`.
    """

    metrics: pl.DataFrame
    problem_metrics: pl.DataFrame
    deltas: pl.DataFrame


def primary_metric(target: Target) -> str:
    """Return the metric that recipes are ranked by: `pr_auc` for anchors, else `spearman`."""
    return "pr_auc" if target == "anchor_binary" else "spearman"


def evaluate(
    scores_by_seed: Mapping[int, pl.DataFrame],
    labels: pl.DataFrame,
    evaluation: Evaluation,
    target: Target,
) -> EvaluationTables:
    """Evaluate every recipe of one site and setting over all seeds.

    Args:
        scores_by_seed: seed -> `tables.SCORES`; the same recipes and folds for each seed.
        labels: `tables.LABELS`.
        evaluation: baselines, recall depths, bootstrap.
        target: what the recipes were fitted to.

    Returns:
        The three tables; undefined values are null, never NaN.

    Raises:
        NotEnoughDataError: no scores.
        LabelError: a scored sentence has no label, or a problem is scored in part.
        DataError: a baseline has no scores.
    """
    scored = _join(scores_by_seed, labels)
    missing = sorted(set(evaluation.baselines) - set(scored["recipe"]))
    if missing:
        raise DataError(
            f"no scores of the baselines {missing}",
            "scores",
            "fit them, or edit evaluation.baselines",
        )
    per_problem = _per_problem(scored, evaluation.recall_at, target)
    primary = primary_metric(target)
    # Scores of signed importance do not rank anchors: a large negative importance makes one too.
    pool = scored.clear() if target == "importance_signed" else scored
    return EvaluationTables(
        metrics=summarise(
            per_problem, pool, metric_names(evaluation.recall_at, _has_truth(scored)), primary
        ),
        problem_metrics=per_problem,
        deltas=_deltas(per_problem, evaluation, primary),
    )


def compare_values(
    values: pl.DataFrame, baseline_values: pl.DataFrame, evaluation: Evaluation
) -> Comparison:
    """Compare two recipes on the problems where both are defined.

    Args:
        values: problem_id, value.
        baseline_values: problem_id, value.
        evaluation: bootstrap settings.

    Returns:
        The comparison of `values` minus `baseline_values`.
    """
    paired = values.join(baseline_values, on="problem_id", suffix="_baseline").drop_nulls()
    differences = paired.select(pl.col("value") - pl.col("value_baseline")).to_series()
    return compare(differences.to_numpy(), evaluation.n_bootstrap, evaluation.bootstrap_seed)


def _join(scores_by_seed: Mapping[int, pl.DataFrame], labels: pl.DataFrame) -> pl.DataFrame:
    if not any(scores.height for scores in scores_by_seed.values()):
        raise NotEnoughDataError("no scores to evaluate", "scores", "fit the probes first")
    scores = pl.concat(
        frame.with_columns(pl.lit(seed, pl.Int64).alias("seed"))
        for seed, frame in scores_by_seed.items()
    )
    key, wanted = (
        ["problem_id", "sentence_idx"],
        ["importance_abs", "importance_signed", "is_anchor"],
    )
    if not labels["is_true_anchor"].null_count():
        wanted += ["true_importance", "is_true_anchor"]
    scored = scores.join(labels.select(*key, *wanted), on=key, how="left", maintain_order="left")
    partial = (
        scored.group_by(_UNIT)
        .agg(pl.len().alias("n_scored"), pl.col("is_anchor").count().alias("n_matched"))
        .join(
            labels.group_by("problem_id").agg(pl.len().alias("n_labels")),
            on="problem_id",
            how="left",
        )
        .filter(~pl.all_horizontal(pl.col("n_scored", "n_matched").eq_missing(pl.col("n_labels"))))
        .sort(_UNIT)
    )
    if partial.height:
        first = partial.row(0, named=True)
        raise LabelError(
            f"{first['n_scored']} scores match {first['n_matched']} of {first['n_labels'] or 0} "
            f"labels of problem {first['problem_id']} ({partial.height} such cases)",
            "recipe {recipe!r}, {protocol}, fold {fold}, {split}, seed {seed}".format(**first),
            "fit the probes again on these labels",
        )
    return scored


def _has_truth(scored: pl.DataFrame) -> bool:
    return "is_true_anchor" in scored.columns


def _per_problem(scored: pl.DataFrame, recall_at: Sequence[int], target: Target) -> pl.DataFrame:
    units = scored.select(_UNIT).unique().sort(_UNIT).with_row_index("unit")
    # One call for all units: each stands in for a problem. Ties are broken by sentence order.
    ordered = scored.join(units, on=_UNIT).sort("unit", "sentence_idx")
    frame = ordered.select(
        pl.col("unit").cast(pl.Int64).alias("problem_id"),
        "importance_abs",
        "importance_signed",
        "is_anchor",
        "score",
        *(["true_importance", "is_true_anchor"] if _has_truth(scored) else []),
    )
    measured = problem_metrics(frame, recall_at, target)
    names = metric_names(recall_at, _has_truth(scored))
    return (
        units.with_columns(pl.col("unit").cast(pl.Int64))
        .join(measured, left_on="unit", right_on="problem_id", how="left")
        .select(
            *_UNIT,
            *(pl.col(name).cast(pl.Float64).fill_nan(None) for name in names),
            pl.col("n_sentences", "n_anchors").cast(pl.Int64),
        )
        .sort(_UNIT)
    )


def _deltas(per_problem: pl.DataFrame, evaluation: Evaluation, primary: str) -> pl.DataFrame:
    values = problem_values(per_problem, primary)
    rows = []
    for (recipe, protocol), own in values.group_by("recipe", "protocol", maintain_order=True):
        for baseline in evaluation.baselines:
            if baseline == recipe:
                continue
            other = values.filter(recipe=baseline, protocol=protocol)
            comparison = compare_values(own, other, evaluation)
            key = {"recipe": recipe, "baseline": baseline, "protocol": protocol, "metric": primary}
            rows.append({**key, **comparison._asdict()})
    schema = {name: column.dtype.type for name, column in DELTAS.columns.items()}
    return pl.DataFrame(rows, schema)
