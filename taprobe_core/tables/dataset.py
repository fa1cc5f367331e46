"""Contracts of what is read and placed before any model runs: rollouts, labels, spans."""

from __future__ import annotations

import polars as pl

from taprobe_core.tables.contract import SENTENCE_KEY, Contract, at_least, column, within

LABEL_STATUS = ("measured", "no_dissimilar", "equal_rates", "missing_rollouts", "last_sentence")
"""Why a counterfactual importance is what it is; a zero has the four causes after `measured`."""

PROBLEMS = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "problem": column(pl.String),
        "prompt": column(pl.String),
        "base_text": column(pl.String),
        "thinking_start_char": column(pl.Int64, at_least(0)),
        "thinking_end_char": column(pl.Int64, at_least(0)),
        "answer": column(pl.String, nullable=True),
        "gt_answer": column(pl.String, nullable=True),
        "is_correct": column(pl.Boolean, nullable=True),
        "subject": column(pl.String, nullable=True),
        "level": column(pl.String, nullable=True),
        "nickname": column(pl.String, nullable=True),
        "n_sentences": column(pl.Int64, at_least(1)),
        "text_sha256": column(pl.String),
    },
    ordered=True,
    unique=["problem_id"],
    name="problems",
)
"""One row per problem. `base_text` is prompt + completion; thinking is base_text[start:end]."""

SENTENCES = Contract(
    {
        **SENTENCE_KEY,
        "sentence": column(pl.String),
        "function_tag": column(pl.String),
        "depends_on": column(pl.List(pl.Int64)),
        "accuracy": column(pl.Float64, within(0, 1), nullable=True),
        "resampling_importance_accuracy": column(pl.Float64, within(-1, 1), nullable=True),
        "resampling_importance_kl": column(pl.Float64, at_least(0), nullable=True),
        "counterfactual_importance_accuracy": column(pl.Float64, within(-1, 1), nullable=True),
        "counterfactual_importance_kl": column(pl.Float64, at_least(0), nullable=True),
        "forced_importance_accuracy": column(pl.Float64, within(-1, 1), nullable=True),
        "forced_importance_kl": column(pl.Float64, at_least(0), nullable=True),
        "different_trajectories_fraction": column(pl.Float64, within(0, 1), nullable=True),
        "overdeterminedness": column(pl.Float64, within(0, 1), nullable=True),
        "summary": column(pl.String, nullable=True),
        "true_importance": column(pl.Float64, within(-1, 1), nullable=True),
    },
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="sentences",
)
"""One row per sentence (chunk in the dataset) with the published measures as found.

`true_importance` is the counterfactual importance (accuracy) that infinitely many rollouts would
give; only the demo worlds know it."""

SKIPPED = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "stage": column(pl.String),
        "error": column(pl.String),
        "what": column(pl.String),
        "where": column(pl.String, nullable=True),
        "fix": column(pl.String, nullable=True),
    },
    ordered=True,
    unique=["problem_id"],
    name="skipped",
)
"""Problems left out, each with its reason."""

NOTES = Contract(
    {"problem_id": column(pl.Int64, at_least(0)), "note": column(pl.String)},
    ordered=True,
    name="notes",
)
"""Values of the dataset's files that no stage reads and that are null in the tables, because they
are not usable: one row per value, with file, place, what was found and what was wanted."""

LABELS = Contract(
    {
        **SENTENCE_KEY,
        "n_sentences": column(pl.Int64, at_least(1)),
        "function_tag": column(pl.String),
        "importance_signed": column(pl.Float64, within(-1, 1)),
        "importance_abs": column(pl.Float64, within(0, 1)),
        "is_anchor": column(pl.Boolean),
        "n_rollouts": column(pl.Int64, at_least(0), nullable=True),
        "n_correct": column(pl.Int64, at_least(0), nullable=True),
        "n_dissimilar": column(pl.Int64, at_least(0), nullable=True),
        "n_dissimilar_correct": column(pl.Int64, at_least(0), nullable=True),
        "importance_se": column(pl.Float64, at_least(0), nullable=True),
        "label_status": column(pl.Enum(LABEL_STATUS)),
        "true_importance": column(pl.Float64, within(-1, 1), nullable=True),
        "is_true_anchor": column(pl.Boolean, nullable=True),
    },
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="labels",
)
"""One row per labelled sentence. Counts are reconstructed; null where no count fits.

The last two are null for rollouts whose truth nobody knows, which is all but the demo's."""

TEXTS = Contract(
    {
        "problem_id": column(pl.Int64, at_least(0)),
        "text": column(pl.String),
        "text_view": column(pl.Enum(["base", "flattened"])),
        "token_ids": column(pl.List(pl.Int32)),
        "n_tokens": column(pl.Int64, at_least(1)),
        "bos_token_id": column(pl.Int64, at_least(0), nullable=True),
        "input_sha256": column(pl.String),
    },
    ordered=True,
    unique=["problem_id"],
    name="texts",
)
"""One row per problem: what the model reads, BOS first, cut after the last sentence's last token.
`bos_token_id` is null where the model's tokenizer has none: then no token stands before the text.

`input_sha256` identifies token ids and spans together: equal hash, equal activations."""

SPANS = Contract(
    {
        **SENTENCE_KEY,
        "start_char": column(pl.Int64, at_least(0)),
        "end_char": column(pl.Int64, at_least(1)),
        "start_token": column(pl.Int64, at_least(0)),
        "end_token": column(pl.Int64, at_least(1)),
        "n_tokens": column(pl.Int64, at_least(1)),
    },
    ordered=True,
    unique=["problem_id", "sentence_idx"],
    name="spans",
)
"""One row per sentence: half-open character range in `texts.text`, half-open token range in
`texts.token_ids` (no span holds BOS; without one the first may begin at token 0)."""
