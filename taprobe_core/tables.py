"""The contract of every table: columns, types, ranges, keys.

A stage checks its table once, before the store takes it; a reader may then rely on it. One name
for one thing: the same column means the same quantity in every table. What does not belong here:
how a table is made (its stage) and where it lives (the store).
"""

from __future__ import annotations

from typing import Any

import pandera.polars as pa
import polars as pl
from pandera.errors import SchemaErrors

from taprobe_core.errors import SchemaError

LABEL_STATUS = ("measured", "no_dissimilar", "equal_rates", "missing_rollouts", "last_sentence")
"""Why a counterfactual importance is what it is; a zero has the four causes after `measured`."""

SPLITS = ("train", "val", "test")
PROTOCOLS = ("holdout", "lopo")
OBJECTIVES = ("budget", "error")
DECISIONS_ON_SENTENCE = ("accept_negative", "accept_positive", "defer")


def _column(dtype: Any, *checks: pa.Check, nullable: bool = False) -> pa.Column:
    return pa.Column(dtype, checks=list(checks), nullable=nullable)


def _at_least(bound: float) -> pa.Check:
    return pa.Check.ge(bound)


def _within(low: float, high: float) -> pa.Check:
    return pa.Check.in_range(low, high)


_FINITE = pa.Check(
    lambda data: data.lazyframe.select(pl.col(data.key).is_finite()), name="finite", error="finite"
)

_SENTENCE_KEY = {
    "problem_id": _column(pl.Int64, _at_least(0)),
    "sentence_idx": _column(pl.Int64, _at_least(0)),
}

PROBLEMS = pa.DataFrameSchema(
    {
        "problem_id": _column(pl.Int64, _at_least(0)),
        "problem": _column(pl.String),
        "prompt": _column(pl.String),
        "base_text": _column(pl.String),
        "thinking_start_char": _column(pl.Int64, _at_least(0)),
        "thinking_end_char": _column(pl.Int64, _at_least(0)),
        "answer": _column(pl.String, nullable=True),
        "gt_answer": _column(pl.String, nullable=True),
        "is_correct": _column(pl.Boolean, nullable=True),
        "subject": _column(pl.String, nullable=True),
        "level": _column(pl.String, nullable=True),
        "nickname": _column(pl.String, nullable=True),
        "n_sentences": _column(pl.Int64, _at_least(1)),
        "text_sha256": _column(pl.String),
    },
    strict=True,
    ordered=True,
    unique=["problem_id"],
    name="problems",
)
"""One row per problem. `base_text` is prompt + completion; thinking is base_text[start:end]."""

SENTENCES = pa.DataFrameSchema(
    {
        **_SENTENCE_KEY,
        "sentence": _column(pl.String),
        "function_tag": _column(pl.String),
        "depends_on": _column(pl.List(pl.Int64)),
        "accuracy": _column(pl.Float64, _within(0, 1), nullable=True),
        "resampling_importance_accuracy": _column(pl.Float64, _within(-1, 1), nullable=True),
        "resampling_importance_kl": _column(pl.Float64, _at_least(0), nullable=True),
        "counterfactual_importance_accuracy": _column(pl.Float64, _within(-1, 1), nullable=True),
        "counterfactual_importance_kl": _column(pl.Float64, _at_least(0), nullable=True),
        "forced_importance_accuracy": _column(pl.Float64, _within(-1, 1), nullable=True),
        "forced_importance_kl": _column(pl.Float64, _at_least(0), nullable=True),
        "different_trajectories_fraction": _column(pl.Float64, _within(0, 1), nullable=True),
        "overdeterminedness": _column(pl.Float64, _within(0, 1), nullable=True),
        "summary": _column(pl.String, nullable=True),
        "true_importance": _column(pl.Float64, _within(-1, 1), nullable=True),
    },
    strict=True,
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="sentences",
)
"""One row per sentence (chunk in the dataset) with the published measures as found.

`true_importance` is the counterfactual importance (accuracy) that infinitely many rollouts would
give; only the demo worlds know it."""

SKIPPED = pa.DataFrameSchema(
    {
        "problem_id": _column(pl.Int64, _at_least(0)),
        "stage": _column(pl.String),
        "error": _column(pl.String),
        "what": _column(pl.String),
        "where": _column(pl.String, nullable=True),
        "fix": _column(pl.String, nullable=True),
    },
    strict=True,
    ordered=True,
    unique=["problem_id"],
    name="skipped",
)
"""Problems left out, each with its reason."""

LABELS = pa.DataFrameSchema(
    {
        **_SENTENCE_KEY,
        "n_sentences": _column(pl.Int64, _at_least(1)),
        "function_tag": _column(pl.String),
        "importance_signed": _column(pl.Float64, _within(-1, 1)),
        "importance_abs": _column(pl.Float64, _within(0, 1)),
        "is_anchor": _column(pl.Boolean),
        "n_rollouts": _column(pl.Int64, _at_least(0), nullable=True),
        "n_correct": _column(pl.Int64, _at_least(0), nullable=True),
        "n_dissimilar": _column(pl.Int64, _at_least(0), nullable=True),
        "n_dissimilar_correct": _column(pl.Int64, _at_least(0), nullable=True),
        "importance_se": _column(pl.Float64, _at_least(0), nullable=True),
        "label_status": _column(pl.Enum(LABEL_STATUS)),
        "true_importance": _column(pl.Float64, _within(-1, 1), nullable=True),
        "is_true_anchor": _column(pl.Boolean, nullable=True),
    },
    strict=True,
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="labels",
)
"""One row per labelled sentence. Counts are reconstructed; null where no count fits.

The last two are null for rollouts whose truth nobody knows, which is all but the demo's."""

TEXTS = pa.DataFrameSchema(
    {
        "problem_id": _column(pl.Int64, _at_least(0)),
        "text": _column(pl.String),
        "text_view": _column(pl.Enum(["base", "flattened"])),
        "token_ids": _column(pl.List(pl.Int32)),
        "n_tokens": _column(pl.Int64, _at_least(2)),
        "bos_token_id": _column(pl.Int64, _at_least(0)),
        "input_sha256": _column(pl.String),
    },
    strict=True,
    ordered=True,
    unique=["problem_id"],
    name="texts",
)
"""One row per problem: what the model reads, BOS first, cut after the last sentence's last token.

`input_sha256` identifies token ids and spans together: equal hash, equal activations."""

SPANS = pa.DataFrameSchema(
    {
        **_SENTENCE_KEY,
        "start_char": _column(pl.Int64, _at_least(0)),
        "end_char": _column(pl.Int64, _at_least(1)),
        "start_token": _column(pl.Int64, _at_least(1)),
        "end_token": _column(pl.Int64, _at_least(2)),
        "n_tokens": _column(pl.Int64, _at_least(1)),
    },
    strict=True,
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="spans",
)
"""One row per sentence: half-open character range in `texts.text`, half-open token range in
`texts.token_ids` (so token 0 is BOS and no span holds it)."""

SCORES = pa.DataFrameSchema(
    {
        **_SENTENCE_KEY,
        "recipe": _column(pl.String),
        "protocol": _column(pl.Enum(PROTOCOLS)),
        "fold": _column(pl.Int32, _at_least(0)),
        "split": _column(pl.Enum(SPLITS)),
        "score": _column(pl.Float32, _FINITE),
    },
    strict=True,
    ordered=True,
    unique=["recipe", "protocol", "fold", "problem_id", "sentence_idx"],
    name="scores",
)
"""One row per sentence × fold of one recipe: val and test rows (training rows are not scored)."""

DELTAS = pa.DataFrameSchema(
    {
        "recipe": _column(pl.String),
        "baseline": _column(pl.String),
        "protocol": _column(pl.Enum(PROTOCOLS)),
        "metric": _column(pl.String),
        "n_problems": _column(pl.Int64, _at_least(0)),
        "n_better": _column(pl.Int64, _at_least(0)),
        "delta": _column(pl.Float64, nullable=True),
        "delta_low": _column(pl.Float64, nullable=True),
        "delta_high": _column(pl.Float64, nullable=True),
        "p_sign_flip": _column(pl.Float64, _within(0, 1), nullable=True),
        "interval_note": _column(pl.String, nullable=True),
    },
    strict=True,
    ordered=True,
    unique=["recipe", "baseline", "protocol"],
    name="deltas",
)
"""One row per recipe × baseline × protocol, on test. No interval without a note that says why."""

_PLAN_KEY = {
    "recipe": _column(pl.String),
    "protocol": _column(pl.Enum(PROTOCOLS)),
    "objective": _column(pl.Enum(OBJECTIVES)),
    "objective_value": _column(pl.Float64, _within(0, 1)),
}

PLANS = pa.DataFrameSchema(
    {
        **_PLAN_KEY,
        "n_folds": _column(pl.Int64, _at_least(1)),
        "meets_objective": _column(pl.Boolean),
        "val_deferral_rate": _column(pl.Float64, _within(0, 1)),
        "val_accepted_error": _column(pl.Float64, _within(0, 1), nullable=True),
        "n_total": _column(pl.Int64, _at_least(1)),
        "n_deferred": _column(pl.Int64, _at_least(0)),
        "n_accepted": _column(pl.Int64, _at_least(0)),
        "n_accepted_errors": _column(pl.Int64, _at_least(0)),
        "n_accepted_positives": _column(pl.Int64, _at_least(0)),
        "n_anchors": _column(pl.Int64, _at_least(0)),
        "n_missed_anchors": _column(pl.Int64, _at_least(0)),
        "deferral_rate": _column(pl.Float64, _within(0, 1)),
        "accepted_error": _column(pl.Float64, _within(0, 1), nullable=True),
        "accepted_anchor_recall": _column(pl.Float64, _within(0, 1), nullable=True),
        "positive_precision": _column(pl.Float64, _within(0, 1), nullable=True),
        "all_negative_error": _column(pl.Float64, _within(0, 1)),
        "meets_objective_on_test": _column(pl.Boolean),
        "n_banks": _column(pl.Int64, _at_least(0)),
        "n_banks_all": _column(pl.Int64, _at_least(2)),
        "t_negative": _column(pl.List(pl.Float32)),
        "t_positive": _column(pl.List(pl.Float32)),
        "guarantee": _column(pl.String),
    },
    strict=True,
    ordered=True,
    unique=list(_PLAN_KEY),
    name="plans",
)
"""One row per recipe × protocol × objective: val-tuned thresholds (one per fold), test counts."""

DECISIONS = pa.DataFrameSchema(
    {
        **_SENTENCE_KEY,
        **_PLAN_KEY,
        "fold": _column(pl.Int32, _at_least(0)),
        "score": _column(pl.Float32, _FINITE),
        "decision": _column(pl.Enum(DECISIONS_ON_SENTENCE)),
    },
    strict=True,
    ordered=True,
    unique=["problem_id", "sentence_idx", *_PLAN_KEY, "fold"],
    name="decisions",
)
"""One row per test sentence × plan."""


def check_table(frame: pl.DataFrame, schema: pa.DataFrameSchema, where: str) -> pl.DataFrame:
    """Return `frame` if it keeps `schema`.

    Args:
        frame: candidate table.
        schema: one of this module's contracts.
        where: what the table was made from, for the message.

    Raises:
        SchemaError: lists every fault, each with up to five offending values.
    """
    try:
        checked: pl.DataFrame = schema.validate(frame, lazy=True)
    except SchemaErrors as error:
        raise SchemaError(
            f"table {schema.name!r} breaks its contract",
            where,
            "repair the source record, or leave the problem out with rollouts.problem_ids",
            _faults(error.failure_cases),
        ) from None
    return checked


def _faults(cases: pl.DataFrame) -> list[str]:
    grouped = cases.group_by("column", "check", maintain_order=True).agg(
        pl.col("failure_case").cast(pl.String).head(5).alias("found"),
        pl.col("index").head(5).alias("rows"),
        pl.len().alias("n"),
    )
    return [_fault(row) for row in grouped.iter_rows(named=True)]


def _fault(row: dict[str, Any]) -> str:
    found = ", ".join(str(value) for value in row["found"])
    rows = [index for index in row["rows"] if index is not None]
    at = f" at row {', '.join(map(str, rows))}" if rows else ""
    column = f"column {row['column']!r}: " if row["column"] else ""
    return f"{column}{row['check']}, {row['n']} fault(s), found {found}{at}"
