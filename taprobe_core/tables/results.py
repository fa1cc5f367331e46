"""Contracts of what probes lead to: scores, differences, plans, decisions."""

from __future__ import annotations

import pandera.polars as pa
import polars as pl

from taprobe_core.tables.contract import FINITE, SENTENCE_KEY, at_least, column, within

SPLITS = ("train", "val", "test")
PROTOCOLS = ("holdout", "lopo")
OBJECTIVES = ("budget", "error")
DECISIONS_ON_SENTENCE = ("accept_negative", "accept_positive", "defer")

SCORES = pa.DataFrameSchema(
    {
        **SENTENCE_KEY,
        "recipe": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "fold": column(pl.Int32, at_least(0)),
        "split": column(pl.Enum(SPLITS)),
        "score": column(pl.Float32, FINITE),
    },
    strict=True,
    ordered=True,
    unique=["recipe", "protocol", "fold", "problem_id", "sentence_idx"],
    name="scores",
)
"""One row per sentence × fold of one recipe: val and test rows (training rows are not scored)."""

DELTAS = pa.DataFrameSchema(
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
        "p_sign_flip": column(pl.Float64, within(0, 1), nullable=True),
        "interval_note": column(pl.String, nullable=True),
    },
    strict=True,
    ordered=True,
    unique=["recipe", "baseline", "protocol"],
    name="deltas",
)
"""One row per recipe × baseline × protocol, on test. No interval without a note that says why."""

_PLAN_KEY = {
    "recipe": column(pl.String),
    "protocol": column(pl.Enum(PROTOCOLS)),
    "objective": column(pl.Enum(OBJECTIVES)),
    "objective_value": column(pl.Float64, within(0, 1)),
}

PLANS = pa.DataFrameSchema(
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
    strict=True,
    ordered=True,
    unique=list(_PLAN_KEY),
    name="plans",
)
"""One row per recipe × protocol × objective: val-tuned thresholds (one per fold), test counts."""

DECISIONS = pa.DataFrameSchema(
    {
        **SENTENCE_KEY,
        **_PLAN_KEY,
        "fold": column(pl.Int32, at_least(0)),
        "score": column(pl.Float32, FINITE),
        "decision": column(pl.Enum(DECISIONS_ON_SENTENCE)),
    },
    strict=True,
    ordered=True,
    unique=["problem_id", "sentence_idx", *_PLAN_KEY, "fold"],
    name="decisions",
)
"""One row per test sentence × plan."""
