"""Scores to deferral plans: which sentences a probe may decide, and which to label again.

Two thresholds split the scores: at or below `t_negative` the sentence is accepted as no anchor, at
or above `t_positive` as an anchor (this wins where both hold), in between it is deferred to fresh
rollouts. Thresholds are tuned on the validation problems of a fold and projected onto its test
problems; counts are then pooled over folds and every rate is a ratio of pooled counts.

What does not belong here: fitting probes, and the price of a bank in tokens.

Invariant: accepted negatives + accepted positives + deferred = all test sentences, in every plan.

A tuned plan is a point estimate and no guarantee: its error on new problems is not bounded, the
validation problems are few, and sentences of one problem are not independent. Every row of the
plan table says so. Thresholds are tuned against `is_anchor` whatever the target; with a
continuous target that is well defined (scores are real numbers) but only meaningful when a higher
score means a more important sentence, which `importance_signed` does not promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import LabelError, PlanError
from taprobe_core.study.config import Deferral
from taprobe_core.tables import DECISIONS_ON_SENTENCE, OBJECTIVES, PROTOCOLS

POINT_ESTIMATE = "none: point estimate, thresholds tuned on validation"

_EDGE = 1e-6
_N_LEVELS = 101
_SLACK = 1e-12
_DECISION = pl.Enum(DECISIONS_ON_SENTENCE)
_PLAN_KEY = ["recipe", "protocol", "objective", "objective_value"]
_NEGATIVE, _POSITIVE, _DEFER = DECISIONS_ON_SENTENCE


class Objective(NamedTuple):
    """What a plan must keep to: at most this share deferred, or at most this accepted error."""

    kind: Literal["budget", "error"]
    value: float


class Thresholds(NamedTuple):
    """A pair of thresholds and what it does on the sentences it was tuned on.

    Attributes:
        negative: accept as no anchor at or below it, float32.
        positive: accept as anchor at or above it, float32; wins where both hold.
        n_deferred: sentences strictly between.
        n_accepted: the others.
        n_errors: accepted sentences whose decision differs from the label.
        meets_objective: whether the objective holds on these sentences.
    """

    negative: np.float32
    positive: np.float32
    n_deferred: int
    n_accepted: int
    n_errors: int
    meets_objective: bool

    @property
    def error(self) -> float:
        """Wrong among the accepted; infinite when nothing is accepted."""
        return self.n_errors / self.n_accepted if self.n_accepted else float("inf")


@dataclass(frozen=True)
class PairGrid:
    """Every candidate pair of thresholds with its counts; arrays are [pair]."""

    negative: NDArray[np.float32]
    positive: NDArray[np.float32]
    n_deferred: NDArray[np.int64]
    n_accepted: NDArray[np.int64]
    n_errors: NDArray[np.int64]

    @property
    def deferral(self) -> NDArray[np.float64]:
        """Share deferred, [pair]."""
        return self.n_deferred / (self.n_deferred + self.n_accepted)

    @property
    def error(self) -> NDArray[np.float64]:
        """Wrong among the accepted, [pair]; infinite when nothing is accepted."""
        empty = self.n_accepted == 0
        return np.where(empty, np.inf, self.n_errors / np.where(empty, 1, self.n_accepted))


@dataclass(frozen=True)
class DeferralTables:
    """The result of one site and trial.

    Attributes:
        plans: `tables.PLANS`.
        decisions: `tables.DECISIONS`.
    """

    plans: pl.DataFrame
    decisions: pl.DataFrame


def candidates(score: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the thresholds worth trying: 101 quantiles and a step beyond either end.

    Args:
        score: validation scores, [sentence], finite.

    Returns:
        [candidate], float32, ascending, unique, at most 103.
    """
    wide = score.astype(np.float64)
    levels = np.quantile(wide, np.linspace(0.0, 1.0, _N_LEVELS)).astype(np.float32)
    # Far from zero a step of 1e-6 is lost in float32; the next float keeps "accept none" possible.
    low, high = score.min(), score.max()
    below = min(np.float32(wide.min() - _EDGE), np.nextafter(low, np.float32(-np.inf)))
    above = max(np.float32(wide.max() + _EDGE), np.nextafter(high, np.float32(np.inf)))
    return np.unique(np.concatenate([[below], levels, [above]]).astype(np.float32))


def pair_grid(score: NDArray[np.float32], is_anchor: NDArray[np.bool_]) -> PairGrid:
    """Count decisions and errors of every pair `t_negative <= t_positive` of candidates.

    Counts come from ranks of the candidates among the sorted scores, so the cost is one sort plus
    a few operations per pair.

    Args:
        score: validation scores, [sentence], float32.
        is_anchor: labels, [sentence].

    Returns:
        The grid, about 5,300 pairs.
    """
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    n_anchors_before = np.concatenate([[0], np.cumsum(is_anchor[order])])
    levels = candidates(score)
    below = np.searchsorted(ranked, levels, side="left")
    up_to = np.searchsorted(ranked, levels, side="right")
    low, high = np.triu_indices(levels.size)
    # Equal thresholds contest the scores equal to them, and positive wins there.
    n_negative = np.where(low == high, below[low], up_to[low])
    n_positive = score.size - below[high]
    n_missed = n_anchors_before[n_negative]
    n_false = n_positive - (n_anchors_before[-1] - n_anchors_before[below[high]])
    n_accepted = n_negative + n_positive
    return PairGrid(
        levels[low], levels[high], score.size - n_accepted, n_accepted, n_missed + n_false
    )


def choose(grid: PairGrid, objective: Objective) -> Thresholds:
    """Pick the pair that serves an objective best.

    Budget: among pairs that defer at most the budget, the lexicographic minimum of (error,
    deferral, t_negative, t_positive). Error: among pairs at or below the error, the minimum of
    (deferral, error, t_negative, t_positive). Where no pair meets the error, the pair with the
    lexicographic minimum of (error, deferral, t_negative, t_positive) stands in and
    `meets_objective` is false.

    Args:
        grid: from `pair_grid`.
        objective: budget or error.

    Returns:
        The thresholds.
    """
    deferral, error = grid.deferral, grid.error
    ranks = (deferral, error)
    if objective.kind == "budget":
        feasible = deferral <= objective.value + _SLACK
    else:
        feasible = error <= objective.value
        ranks = (error, deferral)
    meets = bool(feasible.any())
    if not meets:
        feasible, ranks = np.ones_like(feasible), (deferral, error)
    best = np.lexsort((grid.positive, grid.negative, *ranks, ~feasible))[0]
    return Thresholds(
        grid.negative[best],
        grid.positive[best],
        int(grid.n_deferred[best]),
        int(grid.n_accepted[best]),
        int(grid.n_errors[best]),
        meets,
    )


def decide(score: NDArray[np.float32], thresholds: Thresholds) -> NDArray[np.int64]:
    """Apply thresholds.

    Args:
        score: [sentence], float32.
        thresholds: a pair.

    Returns:
        [sentence], index into `tables.DECISIONS_ON_SENTENCE`.
    """
    accepted = np.where(score <= thresholds.negative, 0, 2)
    return np.where(score >= thresholds.positive, 1, accepted)


def plan_deferrals(
    scores: pl.DataFrame, labels: pl.DataFrame, deferral: Deferral
) -> DeferralTables:
    """Tune every objective on validation and project it onto test, for each recipe and protocol.

    Args:
        scores: `tables.SCORES` of one trial; one or more recipes and protocols.
        labels: `tables.LABELS`.
        deferral: budgets and errors.

    Returns:
        Plans, pooled over folds, and one decision per test sentence. Rates over nothing are null.

    Raises:
        LabelError: a scored sentence has no label.
        PlanError: a fold has no validation or no test sentences.
    """
    objectives = [
        *(Objective("budget", value) for value in deferral.budgets),
        *(Objective("error", value) for value in deferral.errors),
    ]
    joined = _with_labels(scores, labels)
    tuned, decided = [_NO_TUNING], [_NO_DECISIONS]
    for key, fold in joined.group_by("recipe", "protocol", "fold", maintain_order=True):
        for tuning, decisions in _plan_fold(fold, f"{key[0]}, {key[1]}, fold {key[2]}", objectives):
            tuned.append(tuning)
            decided.append(decisions)
    decisions = pl.concat(decided)
    plans = _pool(pl.concat(tuned), decisions)
    return DeferralTables(plans, decisions.drop("is_anchor"))


def relabel_runs(decisions: pl.DataFrame) -> pl.DataFrame:
    """Group deferred sentences into runs of neighbours.

    To label sentence i again takes a bank of rollouts before it and one after it; neighbours share
    a bank, so a lone deferral costs two banks and a run of m costs m + 1.

    Args:
        decisions: `tables.DECISIONS`; plans may be mixed.

    Returns:
        One row per run: recipe, protocol, objective, objective_value, problem_id,
        start_sentence_idx and end_sentence_idx (half-open), n_sentences, n_banks.
    """
    group = [*_PLAN_KEY, "problem_id"]
    deferred = decisions.filter(pl.col("decision") == _DEFER).sort(*group, "sentence_idx")
    # Inside a run the index minus its rank stays the same.
    run = (pl.col("sentence_idx") - pl.int_range(pl.len()).over(group)).alias("_run")
    return (
        deferred.group_by(*group, run, maintain_order=True)
        .agg(
            pl.col("sentence_idx").min().alias("start_sentence_idx"),
            (pl.col("sentence_idx").max() + 1).alias("end_sentence_idx"),
            pl.len().cast(pl.Int64).alias("n_sentences"),
        )
        .drop("_run")
        .with_columns((pl.col("n_sentences") + 1).alias("n_banks"))
    )


_KEY_DTYPES = {
    "recipe": pl.String,
    "protocol": pl.Enum(PROTOCOLS),
    "objective": pl.Enum(OBJECTIVES),
    "objective_value": pl.Float64,
}
_NO_TUNING = pl.DataFrame(
    schema={
        **_KEY_DTYPES,
        "t_negative": pl.Float32,
        "t_positive": pl.Float32,
        "n_deferred": pl.Int64,
        "n_accepted": pl.Int64,
        "n_errors": pl.Int64,
        "meets_objective": pl.Boolean,
    }
)
_NO_DECISIONS = pl.DataFrame(
    schema={
        "problem_id": pl.Int64,
        "sentence_idx": pl.Int64,
        **_KEY_DTYPES,
        "fold": pl.Int32,
        "score": pl.Float32,
        "decision": _DECISION,
        "is_anchor": pl.Boolean,
    }
)


def _with_labels(scores: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    key = ["problem_id", "sentence_idx"]
    joined = scores.join(labels.select(*key, "is_anchor"), on=key, how="left", maintain_order="left")
    lost = joined.filter(pl.col("is_anchor").is_null())
    if lost.height:
        at = lost.select(key).unique(maintain_order=True).head(5).rows()
        raise LabelError(
            f"{lost.height} scored sentences have no label, first (problem_id, sentence_idx): {at}",
            "scores",
            "fit the probes again on these labels",
        )
    return joined


def _plan_fold(
    fold: pl.DataFrame, where: str, objectives: list[Objective]
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    val = fold.filter(pl.col("split") == "val")
    test = fold.filter(pl.col("split") == "test")
    if not val.height or not test.height:
        raise PlanError(
            f"{val.height} validation and {test.height} test sentences, a plan needs both",
            where,
            "raise splits.val_fraction, or take more problems",
        )
    grid = pair_grid(val["score"].to_numpy(), val["is_anchor"].to_numpy())
    for objective in objectives:
        chosen = choose(grid, objective)
        key = {
            "recipe": fold["recipe"][0],
            "protocol": fold["protocol"][0],
            "objective": objective.kind,
            "objective_value": objective.value,
        }
        row = dict(zip(list(_NO_TUNING.schema)[4:], chosen, strict=True))
        tuning = pl.DataFrame([{**key, **row}], schema=_NO_TUNING.schema)
        codes = pl.Series("decision", decide(test["score"].to_numpy(), chosen), dtype=pl.UInt8)
        constants = [pl.lit(key[name], dtype=_KEY_DTYPES[name]).alias(name) for name in _PLAN_KEY]
        decisions = test.with_columns(*constants, codes.cast(_DECISION))
        yield tuning, decisions.select(*_NO_DECISIONS.columns)


def _pool(tuned: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """Pool counts over folds; rates are ratios of pooled counts, null over nothing."""
    ...
