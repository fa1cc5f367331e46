"""From published measures to labels: a signed and an absolute importance, anchors, and their doubt.

Each label keeps the counts behind it, a standard error and a status, because a zero has four
causes and only one of them says that the sentence does not matter. How counts are found belongs in
`noise`; which sentence goes to which split in `splits`.

Invariant: a missing measure leaves its problem without labels and is never a zero; anchors are
chosen within a problem, of all its sentences or not at all.

Source: the labels of Thought Anchors (arXiv:2506.19143); the rank rule is our own.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from taprobe_core import tables
from taprobe_core.errors import LabelError, NotEnoughDataError
from taprobe_core.labels.noise import (
    Counts,
    FloatArray,
    importance_se,
    reconstruct_counts,
    resampling_se,
    successors,
)
from taprobe_core.rollouts.parse import SHARES
from taprobe_core.study.config import Labels

_COUNTERFACTUAL = "counterfactual_importance_accuracy"
_RESAMPLING = "resampling_importance_accuracy"
_KEY = ("problem_id", "sentence_idx")
_IS_LAST = pl.col("sentence_idx") == pl.col("sentence_idx").max().over("problem_id")


def make_labels(
    sentences: pl.DataFrame,
    labels: Labels,
    n_max: int = 100,
    on_bad_problem: Literal["skip", "fail"] = "skip",
) -> pl.DataFrame:
    """Make the labels of one model and setting.

    The importance is the field as published: positive means that replacing the sentence helps for
    the counterfactual one, that keeping it helps for the resampling one. Anchors and n_sentences
    are over the kept sentences. Counts are those of the resampled rollouts whatever the field; the
    standard error is the field's own, null for forced importance, whose rollouts are others.
    `is_true_anchor` marks by the same rule what the true importance would mark, if it is known.

    A problem of which a kept sentence has no value in the field gets no labels (`unlabelled` says
    why): which of its sentences are anchors cannot be told without that one.

    Args:
        sentences: `tables.SENTENCES`, in any order.
        labels: the study's `labels`.
        n_max: most rollouts a sentence can have, to bound the reconstruction of counts.
        on_bad_problem: leave such a problem out, or fail on the first.

    Returns:
        `tables.LABELS`, sorted by problem_id and sentence_idx.

    Raises:
        LabelError: such a problem, and `on_bad_problem` is `fail`.
        NotEnoughDataError: all problems are such; gives the first reasons.
    """
    skipped = unlabelled(sentences, labels)
    if not skipped.is_empty():
        _check_enough(skipped, sentences["problem_id"].n_unique(), on_bad_problem)
    whole = sentences.filter(~pl.col("problem_id").is_in(skipped["problem_id"].implode()))
    measured = _with_noise(whole.sort(_KEY), labels, n_max)
    kept = measured.filter(_is_kept(labels))
    importance_abs = kept["importance_signed"].abs()
    rows = kept.with_columns(
        pl.len().over("problem_id").cast(pl.Int64).alias("n_sentences"),
        importance_abs.alias("importance_abs"),
        pl.Series(
            "is_anchor",
            _anchors(kept, importance_abs, labels),
            dtype=pl.Boolean,
        ),
        _status(labels.field).alias("label_status"),
        pl.Series("is_true_anchor", _true_anchors(kept, labels), dtype=pl.Boolean),
    )
    return tables.check_table(rows.select(tables.LABELS.columns.keys()), tables.LABELS, "labels")


def unlabelled(sentences: pl.DataFrame, labels: Labels) -> pl.DataFrame:
    """Return the problems that `make_labels` leaves out, with the reason of each.

    Args:
        sentences: `tables.SENTENCES`, in any order.
        labels: the study's `labels`.

    Returns:
        `tables.SKIPPED`, stage `labels`, by problem_id.
    """
    kept = sentences.filter(_is_kept(labels))
    missing = (
        kept.sort(_KEY)
        .group_by("problem_id", maintain_order=True)
        .agg(
            pl.col("sentence_idx").filter(pl.col(labels.field).is_null()).alias("missing"),
            pl.len().alias("n"),
        )
        .filter(pl.col("missing").list.len() > 0)
    )
    rows = [
        {
            "problem_id": problem_id,
            "stage": "labels",
            "error": LabelError.__name__,
            "what": f"{len(indices)} of {n} sentences have no {labels.field}, first sentence "
            f"{indices[0]} (absent is not 0: a zero would call it unimportant)",
            "where": f"problem {problem_id}, sentence {indices[0]}",
            "fix": f"state the measure in its chunks_labeled.json, choose another labels.field, or "
            f"leave the problem out: rollouts.exclude_ids: [{problem_id}], or "
            "rollouts.on_bad_problem: skip",
        }
        for problem_id, indices, n in missing.iter_rows()
    ]
    frame = pl.DataFrame(rows, schema=tables.schema_of(tables.SKIPPED))
    return tables.check_table(frame, tables.SKIPPED, "labels")


def anchors(
    importance_abs: npt.ArrayLike, percentile: float, tie_rule: str
) -> npt.NDArray[np.bool_]:
    """Mark the anchors of one problem.

    `legacy` marks every sentence at or above numpy's percentile (linear interpolation): ties at
    the threshold all enter, and a threshold of 0 marks everything. `rank` marks the k most
    important, the earlier of two equal ones first, and never a zero, with

        k = n - ceil((n - 1) * percentile / 100),

    the number of order statistics at or above that percentile: what `legacy` marks where no two
    values are equal.

    Args:
        importance_abs: [sentence] of one problem in sentence order, finite, >= 0.

    Returns:
        bool [sentence].
    """
    values = np.asarray(importance_abs, dtype=np.float64)
    if not len(values):
        return np.zeros(0, dtype=np.bool_)
    if tie_rule == "legacy":
        return np.asarray(values >= np.percentile(values, percentile), dtype=np.bool_)
    # Rounding keeps 375 * 8.8 / 100 = 33.00000000000001 from costing an anchor.
    below = math.ceil(round((len(values) - 1) * percentile / 100, 9))
    first = np.argsort(-values, kind="stable")[: len(values) - below]
    is_anchor = np.zeros(len(values), dtype=np.bool_)
    is_anchor[first] = True
    return is_anchor & (values > 0)


def anchors_by_problem(
    problem_id: npt.NDArray[np.int64], values: FloatArray, percentile: float, tie_rule: str
) -> npt.NDArray[np.bool_]:
    """Mark the anchors of every problem by `anchors`.

    Args:
        problem_id: [sentence], rows of one problem together.
        values: [sentence], finite; what ranks the sentences. Under the rank rule a value that is
            not positive makes no anchor.
        percentile: in (0, 100).
        tie_rule: `rank` or `legacy`.

    Returns:
        bool [sentence].
    """
    starts = np.flatnonzero(np.diff(problem_id)) + 1
    parts = [anchors(part, percentile, tie_rule) for part in np.split(values, starts)]
    return np.concatenate(parts)


def _with_noise(frame: pl.DataFrame, labels: Labels, n_max: int) -> pl.DataFrame:
    column = {name: frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in SHARES}
    accuracy = column["accuracy"]
    index = successors(frame["problem_id"].to_numpy(), accuracy)
    next_accuracy = np.where(index >= 0, accuracy[index], np.nan) if len(index) else accuracy
    counts = reconstruct_counts(
        accuracy,
        column["different_trajectories_fraction"],
        column["overdeterminedness"],
        column[_COUNTERFACTUAL],
        next_accuracy,
        n_max,
    )
    error = _field_se(labels.field, counts, index)
    return frame.with_columns(
        pl.col(labels.field).alias("importance_signed"),
        _IS_LAST.alias("is_last"),
        pl.Series("has_successor", index >= 0, dtype=pl.Boolean),
        pl.Series("importance_se", error, dtype=pl.Float64).fill_nan(None),
        *(
            pl.Series(name, values, dtype=pl.Float64).fill_nan(None).cast(pl.Int64)
            for name, values in counts._asdict().items()
        ),
    )


def _field_se(field: str, counts: Counts, index: npt.NDArray[np.int64]) -> FloatArray:
    if field == _COUNTERFACTUAL:
        return importance_se(counts, counts.take(index))
    if field == _RESAMPLING:
        # The published rule takes the very next sentence, not the next one with rollouts.
        is_next = index == np.arange(1, len(index) + 1)
        return resampling_se(counts, counts.take(np.where(is_next, index, -1)))
    return np.full(len(index), np.nan)


def _status(field: str) -> pl.Expr:
    is_missing = pl.col("n_rollouts").is_null() | ~pl.col("has_successor")
    is_undivided = (pl.col("n_dissimilar") == 0) & (field == _COUNTERFACTUAL)
    return (
        pl.when(pl.col("is_last"))
        .then(pl.lit("last_sentence"))
        .when(is_missing)
        .then(pl.lit("missing_rollouts"))
        .when(is_undivided)
        .then(pl.lit("no_dissimilar"))
        .when(pl.col("importance_signed") == 0)
        .then(pl.lit("equal_rates"))
        .otherwise(pl.lit("measured"))
        .cast(pl.Enum(tables.LABEL_STATUS))
    )


def _is_kept(labels: Labels) -> pl.Expr:
    return ~(_IS_LAST & (pl.len().over("problem_id") > 1) & labels.drop_last_sentence)


def _check_enough(skipped: pl.DataFrame, n_problems: int, on_bad_problem: str) -> None:
    first = skipped.row(0, named=True)
    if on_bad_problem == "fail":
        raise LabelError(first["what"], first["where"], first["fix"])
    if len(skipped) == n_problems:
        reasons = [f"problem {row['problem_id']}: {row['what']}" for row in skipped.to_dicts()]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise NotEnoughDataError(
            f"none of {n_problems} problem(s) can be labelled ({'; '.join(reasons[:3])}{more})",
            "labels.field",
            "choose a labels.field that the dataset states, or state it there",
        )


def _true_anchors(kept: pl.DataFrame, labels: Labels) -> npt.NDArray[np.bool_] | list[None]:
    """Anchors of the true importance, by the same rule; all null unless it is known throughout."""
    true = kept["true_importance"]
    if true.null_count():
        return [None] * kept.height
    return _anchors(kept, true.abs(), labels)


def _anchors(kept: pl.DataFrame, values: pl.Series, labels: Labels) -> npt.NDArray[np.bool_]:
    ids = kept["problem_id"].to_numpy()
    return anchors_by_problem(ids, values.to_numpy(), labels.percentile, labels.tie_rule)
