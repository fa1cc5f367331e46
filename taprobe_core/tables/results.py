"""Contracts of what probes lead to: scores, how good they are, plans, decisions.

Where columns follow from the study (a metric per depth of recall, a delta per baseline), a contract
names them by a pattern. Invariant: a value that is not defined is null, never NaN.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from taprobe_core.tables.contract import (
    FINITE,
    SENTENCE_KEY,
    Column,
    Contract,
    Rule,
    at_least,
    column,
    within,
)

SPLITS = ("train", "val", "test")
PROTOCOLS = ("holdout", "lopo")
OBJECTIVES = ("budget", "error")
NULL_KINDS = ("circular_shift", "position_stratified")
DECISIONS_ON_SENTENCE = ("accept_negative", "accept_positive", "defer")

SCORES = Contract(
    {
        **SENTENCE_KEY,
        "recipe": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "fold": column(pl.Int32, at_least(0)),
        "split": column(pl.Enum(SPLITS)),
        "score": column(pl.Float32, FINITE),
        "target_value": column(pl.Float64, FINITE, nullable=True),
        "is_positive": column(pl.Boolean, nullable=True),
    },
    ordered=True,
    unique=["recipe", "protocol", "fold", "problem_id", "sentence_idx"],
    name="scores",
)
"""One row per sentence × fold of one recipe: val and test rows (training rows are not scored).

`target_value` and `is_positive` are what the scores are judged by: the recipe's own target, and
the anchors it is to find, both as residuals where the recipe is residualised. The target is null
where it is not defined, such as a windowed change at the end of a trace; anchors are null for
signed targets, whose scores do not rank them."""

_OF_TARGET = r"((label|true|oracle)_)?pr_auc|((label|oracle)_)?spearman|pearson|recall_at_\d+"
_METRIC = f"(primary|{_OF_TARGET})"
"""Names of metrics, as a pattern."""


def _each(pattern: str, dtype: Any, *rules: Rule) -> dict[str, Column]:
    """The columns whose whole name is a pattern, any number of them, null where not defined."""
    return {f"^{pattern}$": Column(dtype, rules, nullable=True, is_pattern=True)}


METRICS = Contract(
    {
        "recipe": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "split": column(pl.Enum(SPLITS)),
        "primary_metric": column(pl.String),
        "target": column(pl.String),
        "residualize": column(pl.String),
        "n_problems": column(pl.Int64, at_least(1)),
        "n_seeds": column(pl.Int64, at_least(1)),
        "pooled_pr_auc": column(pl.Float64, within(0, 1), nullable=True),
        "chance_pr_auc": column(pl.Float64, within(0, 1), nullable=True),
        **_each(_METRIC, pl.Float64, within(-1, 1)),
        **_each(f"{_METRIC}_std", pl.Float64, at_least(0), FINITE),
        **_each(f"n_undefined_{_METRIC}", pl.Int64, at_least(0)),
    },
    unique=["recipe", "protocol", "split"],
    name="metrics",
)
"""One row per recipe × protocol × split; per metric its mean over problems, the deviation of that
mean over seeds, and how many problems do not define it (`evaluation.EvaluationTables`)."""

PROBLEM_METRICS = Contract(
    {
        "recipe": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "split": column(pl.Enum(SPLITS)),
        "fold": column(pl.Int32, at_least(0)),
        "seed": column(pl.Int64, at_least(0)),
        "problem_id": column(pl.Int64, at_least(0)),
        "n_sentences": column(pl.Int64, at_least(1)),
        "n_anchors": column(pl.Int64, at_least(0), nullable=True),
        **_each(_METRIC, pl.Float64, within(-1, 1)),
    },
    unique=["recipe", "protocol", "split", "fold", "seed", "problem_id"],
    name="problem_metrics",
)
"""One row per recipe × protocol × split × fold × seed × problem (`evaluation.units`)."""

_TESTS = {
    "t_low": column(pl.Float64, nullable=True),
    "t_high": column(pl.Float64, nullable=True),
    "p_sign_flip": column(pl.Float64, within(0, 1), nullable=True),
    "p_wilcoxon": column(pl.Float64, within(0, 1), nullable=True),
    "interval_note": column(pl.String, nullable=True),
}

DELTAS = Contract(
    {
        "recipe": column(pl.String),
        "baseline": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "metric": column(pl.String),
        "n_problems": column(pl.Int64, at_least(0)),
        "n_better": column(pl.Int64, at_least(0)),
        "delta": column(pl.Float64, nullable=True),
        "delta_low": column(pl.Float64, nullable=True),
        "delta_high": column(pl.Float64, nullable=True),
        **_TESTS,
    },
    ordered=True,
    unique=["recipe", "baseline", "protocol"],
    name="deltas",
)
"""One row per recipe × baseline × protocol, on test. No interval without a note that says why.

`delta_low` and `delta_high` are the bootstrap interval, `t_low` and `t_high` that of Student's t.
Both recipes are judged by the recipe's target (`CONTRASTS`)."""

_RECIPE = {"recipe": column(pl.String), "protocol": column(pl.Enum(PROTOCOLS))}

CONTRASTS = Contract(
    {
        "recipe": column(pl.String),
        "baseline": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "fold": column(pl.Int32, at_least(0)),
        "problem_id": column(pl.Int64, at_least(0)),
        "value": column(pl.Float64, nullable=True),
        "baseline_value": column(pl.Float64, nullable=True),
    },
    ordered=True,
    unique=["recipe", "baseline", "protocol", "fold", "problem_id"],
    name="contrasts",
)
"""One row per recipe × baseline × test problem: both judged by the recipe's own target with its
primary metric, seeds averaged. A recipe that is a baseline stands beside itself too."""

NULLS = Contract(
    {
        **_RECIPE,
        "metric": column(pl.String),
        "null": column(pl.Enum(NULL_KINDS)),
        "n_problems": column(pl.Int64, at_least(0)),
        "n_draws": column(pl.Int64, at_least(1)),
        "value": column(pl.Float64, nullable=True),
        "null_mean": column(pl.Float64, nullable=True),
        "null_std": column(pl.Float64, nullable=True),
        "null_low": column(pl.Float64, nullable=True),
        "null_high": column(pl.Float64, nullable=True),
        "p_null": column(pl.Float64, within(0, 1), nullable=True),
        "draws": column(pl.List(pl.Float32)),
    },
    ordered=True,
    unique=["recipe", "protocol", "null"],
    name="nulls",
)
"""One row per recipe × protocol × null, on test: the primary metric's mean over problems beside its
distribution under relabelling. `null_low` to `null_high` hold 95 % of the draws. Draw b relabels
alike in every recipe, layer and protocol of one model and setting, so the best over them can be
taken draw by draw; no draws where the metric is undefined."""

POSITION_BINS = Contract(
    {
        **_RECIPE,
        "metric": column(pl.String),
        "bin": column(pl.Int64, within(0, 4)),
        "value": column(pl.Float64, nullable=True),
        "chance": column(pl.Float64, nullable=True),
        "n_problems": column(pl.Int64, at_least(0)),
        "n_defined": column(pl.Int64, at_least(0)),
    },
    ordered=True,
    unique=["recipe", "protocol", "bin"],
    name="position_bins",
)
"""One row per recipe × protocol × fifth of the trace, on test: the primary metric among the
sentences of that fifth, mean over the `n_defined` problems where it is defined."""

CALIBRATION = Contract(
    {
        **_RECIPE,
        "n_scores": column(pl.Int64, at_least(1)),
        "prevalence": column(pl.Float64, within(0, 1)),
        "mean_score": column(pl.Float64, within(0, 1)),
        "log_loss": column(pl.Float64, at_least(0)),
        "brier": column(pl.Float64, within(0, 1)),
        "reliability": column(pl.Float64, at_least(0)),
        "resolution": column(pl.Float64, at_least(0)),
        "uncertainty": column(pl.Float64, at_least(0)),
        "within_bins": column(pl.Float64),
        "expected_calibration_error": column(pl.Float64, within(0, 1)),
        "slope": column(pl.Float64, nullable=True),
        "intercept": column(pl.Float64, nullable=True),
    },
    ordered=True,
    unique=["recipe", "protocol"],
    name="calibration",
)
"""One row per recipe × protocol whose scores are probabilities, over its test sentences and seeds.
brier = reliability - resolution + uncertainty + within_bins."""

RELIABILITY_BINS = Contract(
    {
        **_RECIPE,
        "bin": column(pl.Int64, at_least(0)),
        "n_scores": column(pl.Int64, at_least(1)),
        "mean_score": column(pl.Float64, within(0, 1)),
        "share_positive": column(pl.Float64, within(0, 1)),
    },
    ordered=True,
    unique=["recipe", "protocol", "bin"],
    name="reliability_bins",
)
"""One row per bin of about equally many scores, from the lowest; equal scores share a bin."""

BEST_SEEDS = Contract(
    {
        **_RECIPE,
        "metric": column(pl.String),
        "k": column(pl.Int64, at_least(1)),
        "n_seeds": column(pl.Int64, at_least(1)),
        "n_folds": column(pl.Int64, at_least(1)),
        "value": column(pl.Float64, nullable=True),
        "best_of_k": column(pl.Float64, nullable=True),
        "best_of_k_std": column(pl.Float64, nullable=True),
        "best_seed": column(pl.Float64, nullable=True),
        "seeds": column(pl.List(pl.Int64)),
    },
    ordered=True,
    unique=["recipe", "protocol"],
    name="best_seeds",
)
"""One row per recipe × protocol: test means of all seeds (`value`), of the k seeds that are best on
the fold's validation problems, and of the best one; `seeds` lists every fold's best, in fold order.
The deviation is over the k seeds, folds averaged."""

SELECTIVITY = Contract(
    {
        **_RECIPE,
        "metric": column(pl.String),
        "n_problems": column(pl.Int64, at_least(0)),
        "n_undefined": column(pl.Int64, at_least(0)),
        "n_better": column(pl.Int64, at_least(0)),
        "task_value": column(pl.Float64, nullable=True),
        "task_chance": column(pl.Float64, nullable=True),
        "control_value": column(pl.Float64, nullable=True),
        "control_chance": column(pl.Float64, nullable=True),
        "selectivity": column(pl.Float64, nullable=True),
        "selectivity_low": column(pl.Float64, nullable=True),
        "selectivity_high": column(pl.Float64, nullable=True),
        **_TESTS,
    },
    ordered=True,
    unique=["recipe", "protocol"],
    name="selectivity",
)
"""One row per recipe with a control task × protocol, on test: the metric on the task, on the
control, and their difference, over the `n_problems` where both are defined; `n_undefined` problems
hold no positive of the control. `*_chance` is what a random ranking reaches on these problems."""

_PLAN_KEY = {
    "recipe": column(pl.String),
    "protocol": column(pl.Enum(PROTOCOLS)),
    "objective": column(pl.Enum(OBJECTIVES)),
    "objective_value": column(pl.Float64, within(0, 1)),
}

PLANS = Contract(
    {
        **_PLAN_KEY,
        "n_folds": column(pl.Int64, at_least(1)),
        "meets_objective": column(pl.Boolean),
        "val_deferral_rate": column(pl.Float64, within(0, 1)),
        "val_accepted_error": column(pl.Float64, within(0, 1), nullable=True),
        "n_total": column(pl.Int64, at_least(1)),
        "n_deferred": column(pl.Int64, at_least(0)),
        "n_accepted": column(pl.Int64, at_least(0)),
        "n_accepted_errors": column(pl.Int64, at_least(0)),
        "n_accepted_positives": column(pl.Int64, at_least(0)),
        "n_anchors": column(pl.Int64, at_least(0)),
        "n_missed_anchors": column(pl.Int64, at_least(0)),
        "deferral_rate": column(pl.Float64, within(0, 1)),
        "accepted_error": column(pl.Float64, within(0, 1), nullable=True),
        "accepted_anchor_recall": column(pl.Float64, within(0, 1), nullable=True),
        "positive_precision": column(pl.Float64, within(0, 1), nullable=True),
        "all_negative_error": column(pl.Float64, within(0, 1)),
        "meets_objective_on_test": column(pl.Boolean),
        "n_banks": column(pl.Int64, at_least(0)),
        "n_banks_all": column(pl.Int64, at_least(2)),
        "t_negative": column(pl.List(pl.Float32)),
        "t_positive": column(pl.List(pl.Float32)),
        "guarantee": column(pl.String),
    },
    ordered=True,
    unique=list(_PLAN_KEY),
    name="plans",
)
"""One row per recipe × protocol × objective: val-tuned thresholds (one per fold), test counts."""

PLANS_OF_SEEDS = Contract(
    {**PLANS.columns, "seed": column(pl.Int64, at_least(0))},
    ordered=True,
    unique=[*_PLAN_KEY, "seed"],
    name="plans_of_seeds",
)
"""`PLANS` of all seeds."""

DECISIONS = Contract(
    {
        **SENTENCE_KEY,
        **_PLAN_KEY,
        "fold": column(pl.Int32, at_least(0)),
        "score": column(pl.Float32, FINITE),
        "decision": column(pl.Enum(DECISIONS_ON_SENTENCE)),
    },
    ordered=True,
    unique=["problem_id", "sentence_idx", *_PLAN_KEY, "fold"],
    name="decisions",
)
"""One row per test sentence × plan."""


LEADERBOARD = Contract(
    {
        "setting": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "rank": column(pl.Int64, at_least(1), nullable=True),
        "model": column(pl.String),
        "layer": column(pl.Int64, at_least(0), nullable=True),
        "recipe": column(pl.String),
        "target": column(pl.String),
        "residualize": column(pl.String),
        "metric": column(pl.String),
        "value": column(pl.Float64, within(-1, 1), nullable=True),
        "value_std": column(pl.Float64, at_least(0), nullable=True),
        "val_value": column(pl.Float64, within(-1, 1), nullable=True),
        "chance": column(pl.Float64, within(0, 1), nullable=True),
        "skill": column(pl.Float64, FINITE, nullable=True),
        "n_problems": column(pl.Int64, at_least(1)),
        "n_undefined": column(pl.Int64, at_least(0)),
        "n_seeds": column(pl.Int64, at_least(1)),
        "p_shift": column(pl.Float64, within(0, 1), nullable=True),
        "p_position": column(pl.Float64, within(0, 1), nullable=True),
        "p_position_bh": column(pl.Float64, within(0, 1), nullable=True),
        "p_max_t": column(pl.Float64, within(0, 1), nullable=True),
        "pooled_pr_auc": column(pl.Float64, within(0, 1), nullable=True),
        "n_configurations": column(pl.Int64, at_least(1)),
        **_each("oracle", pl.Float64, within(-1, 1)),
        **_each("oracle_skill", pl.Float64, FINITE),
        **_each(r"delta(_low|_high)?_.+", pl.Float64, FINITE),
        **_each(r"p_(sign_flip|adjusted)_.+", pl.Float64, within(0, 1)),
        **_each(r"interval_note_.+", pl.String),
        **_each(f"({_OF_TARGET})", pl.Float64, within(-1, 1)),
    },
    unique=["setting", "protocol", "model", "layer", "recipe"],
    name="leaderboard",
)
"""One row per model × layer × setting × protocol × recipe on test, best first
(`leaderboard.build_leaderboard`)."""
