"""Scores to deferral plans: which sentences a probe may decide, and which to label again.

Two thresholds are tuned on the validation problems of a fold and projected onto its test problems;
counts are then pooled over folds, and every rate is a ratio of pooled counts. At or below
`negative` a sentence is accepted as no anchor, at or above `positive` as an anchor (this wins where
both hold), in between it is deferred. The search counts every pair of candidate thresholds at once
and takes the best feasible pair. The deferred sentences become a relabel list of runs.

What does not belong here: fitting probes, the price of a bank in tokens.

Invariants: accepted negatives + accepted positives + deferred = all test sentences, for every pair
and plan. All scores and thresholds are float32, so that a threshold read back from disk decides as
it did when it was tuned.

A tuned plan is a point estimate and no guarantee: its error on new problems is not bounded, the
validation problems are few, and sentences of one problem are not independent. Every row of the
plan table says so. Thresholds are tuned against `is_anchor` whatever the target, so the scores
must grow with importance: signed targets and residuals do not promise that, and get no plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import LabelError, PlanError
from taprobe_core.study.config import Deferral
from taprobe_core.tables import DECISIONS_ON_SENTENCE, OBJECTIVES, PLANS, PROTOCOLS

_EDGE = 1e-6
_N_LEVELS = 101
SLACK = 1e-12
"""A share counts as within its budget up to this, so that 0.2 of 5 sentences is 1 sentence."""


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

    @cached_property
    def deferral(self) -> NDArray[np.float64]:
        """Share deferred, [pair]."""
        return np.asarray(self.n_deferred / (self.n_deferred + self.n_accepted))

    @cached_property
    def error(self) -> NDArray[np.float64]:
        """Wrong among the accepted, [pair]; infinite when nothing is accepted."""
        empty = self.n_accepted == 0
        return np.where(empty, np.inf, self.n_errors / np.where(empty, 1, self.n_accepted))


def candidates(score: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the thresholds worth trying: 101 quantiles and a step of 1e-6 beyond either end.

    Args:
        score: scores to tune on, [sentence], finite, at least one.

    Returns:
        [candidate], float32, ascending, unique, at most 103.
    """
    wide = score.astype(np.float64)
    levels = np.quantile(wide, np.linspace(0.0, 1.0, _N_LEVELS)).astype(np.float32)
    # Far from zero a step of 1e-6 is lost in float32; the next float keeps "accept none" possible.
    below = min(np.float32(wide.min() - _EDGE), np.nextafter(score.min(), np.float32(-np.inf)))
    above = max(np.float32(wide.max() + _EDGE), np.nextafter(score.max(), np.float32(np.inf)))
    return np.unique(np.concatenate([[below], levels, [above]]).astype(np.float32))


def pair_grid(score: NDArray[np.float32], is_anchor: NDArray[np.bool_]) -> PairGrid:
    """Count decisions and errors of every pair `negative <= positive` of candidates.

    Counts come from the ranks of the candidates among the sorted scores, so the cost is one sort
    plus a few operations per pair.

    Args:
        score: scores to tune on, [sentence], float32, finite, at least one.
        is_anchor: labels, [sentence].
    """
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    n_anchors_before = np.concatenate([[0], np.cumsum(is_anchor[order])])
    levels = candidates(score)
    below = np.searchsorted(ranked, levels, side="left")
    up_to = np.searchsorted(ranked, levels, side="right")
    low, high = _pairs(levels.size)
    # Equal thresholds contest the scores equal to them, and positive wins there.
    n_negative = np.where(low == high, below[low], up_to[low])
    n_positive = score.size - below[high]
    n_missed = n_anchors_before[n_negative]
    n_false = n_positive - (n_anchors_before[-1] - n_anchors_before[below[high]])
    n_accepted = n_negative + n_positive
    return PairGrid(
        levels[low], levels[high], score.size - n_accepted, n_accepted, n_missed + n_false
    )


@cache
def _pairs(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the lower and of the upper of every pair; there are few sizes."""
    return np.triu_indices(n)


def choose(grid: PairGrid, objective: Objective) -> Thresholds:
    """Pick the pair that serves an objective best.

    Budget: among pairs that defer at most the budget, the lexicographic minimum of (error,
    deferral, negative, positive). Error: among pairs at or below the error, the minimum of
    (deferral, error, negative, positive). Where no pair meets the error, the pair with the minimum
    of (error, deferral, negative, positive) stands in and `meets_objective` is false.
    """
    deferral, error = grid.deferral, grid.error
    if objective.kind == "budget":
        feasible, ranks = deferral <= objective.value + SLACK, (error, deferral)
    else:
        feasible, ranks = error <= objective.value, (deferral, error)
    meets = bool(feasible.any())
    if not meets:
        feasible, ranks = np.ones_like(feasible), (error, deferral)
    best = np.flatnonzero(feasible)
    # The lexicographic minimum, one key after the other: far cheaper than sorting every pair.
    for key in (*ranks, grid.negative, grid.positive):
        values = key[best]
        best = best[values == values.min()]
        if best.size == 1:
            break
    chosen = int(best[0])
    return Thresholds(
        grid.negative[chosen],
        grid.positive[chosen],
        int(grid.n_deferred[chosen]),
        int(grid.n_accepted[chosen]),
        int(grid.n_errors[chosen]),
        meets,
    )


def decide(
    score: NDArray[np.float32], negative: np.float32, positive: np.float32
) -> NDArray[np.uint8]:
    """Apply a pair of thresholds.

    Args:
        score: [sentence], float32.

    Returns:
        [sentence], index into `tables.DECISIONS_ON_SENTENCE`.
    """
    accepted = np.where(score <= negative, np.uint8(0), np.uint8(2))
    return np.where(score >= positive, np.uint8(1), accepted)


POINT_ESTIMATE = "none: point estimate, thresholds tuned on validation"

_KEY_DTYPES: dict[str, pl.DataType] = {
    "recipe": pl.String(),
    "protocol": pl.Enum(PROTOCOLS),
    "objective": pl.Enum(OBJECTIVES),
    "objective_value": pl.Float64(),
}
_KEY = list(_KEY_DTYPES)
_TUNED_DTYPES = {
    "t_negative": pl.Float32(),
    "t_positive": pl.Float32(),
    "n_val_deferred": pl.Int64(),
    "n_val_accepted": pl.Int64(),
    "n_val_errors": pl.Int64(),
    "meets_objective": pl.Boolean(),
}
_TUNED = pl.Schema({**_KEY_DTYPES, **_TUNED_DTYPES})
_DECIDED = pl.Schema(
    {
        "problem_id": pl.Int64(),
        "sentence_idx": pl.Int64(),
        **_KEY_DTYPES,
        "fold": pl.Int32(),
        "score": pl.Float32(),
        "decision": pl.Enum(DECISIONS_ON_SENTENCE),
        "is_anchor": pl.Boolean(),
    }
)

_Decided = tuple[Objective, NDArray[np.uint32], NDArray[np.uint8]]
"""An objective, rows of test sentences, and what is decided of each."""


@dataclass(frozen=True)
class DeferralTables:
    """The plans of one site and trial.

    Attributes:
        plans: `tables.PLANS`.
        decisions: `tables.DECISIONS`.
    """

    plans: pl.DataFrame
    decisions: pl.DataFrame


def plan_deferrals(
    scores: pl.DataFrame, labels: pl.DataFrame, deferral: Deferral
) -> DeferralTables:
    """Tune every objective on validation and project it onto test, for each recipe and protocol.

    Args:
        scores: `tables.SCORES` of one trial; one or more recipes and protocols.
        labels: `tables.LABELS`.
        deferral: budgets and errors.

    Returns:
        Plans, pooled over folds (thresholds in fold order), and one decision per test sentence.
        Rates over nothing are null. The numbers are point estimates, not guarantees.

    Raises:
        LabelError: a scored sentence has no label.
        PlanError: a fold has no validation or no test sentences.
    """
    objectives = [
        *(Objective("budget", value) for value in deferral.budgets),
        *(Objective("error", value) for value in deferral.errors),
    ]
    joined = _with_labels(scores, labels).sort("protocol", "fold", maintain_order=True)
    tuned, decided = [], []
    folds = joined.select(
        "recipe", "protocol", "fold", "split", "score", "is_anchor"
    ).with_row_index()
    for key, fold in folds.group_by("recipe", "protocol", "fold", maintain_order=True):
        for objective, best, rows, codes in _plan_fold(key, fold, objectives):
            tuned.append((key[0], key[1], *objective, *best))
            decided.append((objective, rows, codes))
    decisions = _decisions(joined, decided)
    plans = _pool(pl.DataFrame(tuned, _TUNED, orient="row"), decisions)
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
    group = [*_KEY, "problem_id"]
    deferred = decisions.filter(pl.col("decision") == "defer").sort(*group, "sentence_idx")
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


def _with_labels(scores: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    key = ["problem_id", "sentence_idx"]
    joined = scores.join(
        labels.select(*key, "is_anchor"), on=key, how="left", maintain_order="left"
    )
    lost = joined.filter(pl.col("is_anchor").is_null())
    if lost.height:
        problem_id, sentence_idx = lost.select(key).row(0)
        raise LabelError(
            f"{lost.height} scored sentences have no label, "
            f"the first is sentence {sentence_idx} of problem {problem_id}",
            "scores",
            "fit the probes again on these labels",
        )
    return joined


def _plan_fold(
    key: tuple[object, ...], fold: pl.DataFrame, objectives: Sequence[Objective]
) -> Iterator[tuple[Objective, Thresholds, NDArray[np.uint32], NDArray[np.uint8]]]:
    """Each objective: its thresholds, the rows of the test sentences, what is decided of them."""
    index, split, score, is_anchor = (
        fold[name].to_numpy() for name in ("index", "split", "score", "is_anchor")
    )
    val, test = split == "val", split == "test"
    if not val.any() or not test.any():
        raise PlanError(
            f"{val.sum()} validation and {test.sum()} test sentences, a plan needs both",
            "recipe {!r}, {}, fold {}".format(*key),
            "raise splits.val_fraction, or take more problems",
        )
    scored = score[val].astype(np.float32, copy=False)
    found = _tuned(scored.tobytes(), is_anchor[val].tobytes(), tuple(objectives))
    for objective, best in zip(objectives, found, strict=True):
        yield objective, best, index[test], decide(score[test], best.negative, best.positive)


@lru_cache(maxsize=4096)
def _tuned(
    score: bytes, is_anchor: bytes, objectives: tuple[Objective, ...]
) -> tuple[Thresholds, ...]:
    """Thresholds of each objective; a recipe without chance has the same scores at every seed.

    Args:
        score: of the validation sentences, float32.
    """
    grid = pair_grid(np.frombuffer(score, np.float32), np.frombuffer(is_anchor, np.bool_))
    return tuple(choose(grid, objective) for objective in objectives)


def _decisions(joined: pl.DataFrame, decided: Sequence[_Decided]) -> pl.DataFrame:
    if not decided:
        return _DECIDED.to_frame()
    sizes = [len(rows) for _, rows, _ in decided]
    objectives, values = zip(*(objective for objective, _, _ in decided), strict=True)
    code = pl.Series("decision", np.concatenate([codes for _, _, codes in decided]))
    return (
        joined[np.concatenate([rows for _, rows, _ in decided])]
        .with_columns(
            pl.Series("objective", np.repeat(objectives, sizes), _KEY_DTYPES["objective"]),
            pl.Series("objective_value", np.repeat(values, sizes), pl.Float64),
            code.cat.to(_DECIDED["decision"]),
        )
        .select(_DECIDED.names())
    )


def _pool(tuned: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    on_val = tuned.group_by(_KEY, maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("n_folds"),
        pl.col("meets_objective").all(),
        pl.col("n_val_deferred", "n_val_accepted", "n_val_errors").sum(),
        "t_negative",
        "t_positive",
    )
    on_test = decisions.group_by(_KEY).agg(*_test_counts())
    banks = relabel_runs(decisions).group_by(_KEY).agg(pl.col("n_banks").sum())
    return (
        on_val.join(on_test, on=_KEY, how="left", maintain_order="left")
        .join(banks, on=_KEY, how="left", maintain_order="left")
        .with_columns(pl.col("n_banks").fill_null(0), *_rates())
        .with_columns(_kept_on_test(), pl.lit(POINT_ESTIMATE).alias("guarantee"))
        .select(*PLANS.columns)
    )


def _test_counts() -> list[pl.Expr]:
    anchor = pl.col("is_anchor")
    positive = pl.col("decision") == "accept_positive"
    negative = pl.col("decision") == "accept_negative"
    counts = {
        "n_total": pl.len(),
        "n_deferred": (pl.col("decision") == "defer").sum(),
        "n_accepted": (positive | negative).sum(),
        "n_accepted_errors": ((positive & ~anchor) | (negative & anchor)).sum(),
        "n_accepted_positives": positive.sum(),
        "n_found_anchors": (positive & anchor).sum(),
        "n_anchors": anchor.sum(),
        "n_missed_anchors": (negative & anchor).sum(),
        "n_banks_all": pl.len() + pl.col("problem_id").n_unique(),
    }
    return [count.cast(pl.Int64).alias(name) for name, count in counts.items()]


def _rates() -> list[pl.Expr]:
    def ratio(part: str, *whole: str) -> pl.Expr:
        total = pl.sum_horizontal(whole)
        return pl.when(total > 0).then(pl.col(part) / total)

    rates = {
        "val_deferral_rate": ratio("n_val_deferred", "n_val_deferred", "n_val_accepted"),
        "val_accepted_error": ratio("n_val_errors", "n_val_accepted"),
        "deferral_rate": ratio("n_deferred", "n_total"),
        "accepted_error": ratio("n_accepted_errors", "n_accepted"),
        "accepted_anchor_recall": ratio("n_found_anchors", "n_found_anchors", "n_missed_anchors"),
        "positive_precision": ratio("n_found_anchors", "n_accepted_positives"),
        "all_negative_error": ratio("n_anchors", "n_total"),
    }
    return [rate.alias(name) for name, rate in rates.items()]


def _kept_on_test() -> pl.Expr:
    value = pl.col("objective_value")
    within_budget = pl.col("deferral_rate") <= value + SLACK
    within_error = (pl.col("accepted_error") <= value).fill_null(value=False)
    kept = pl.when(pl.col("objective") == "budget").then(within_budget).otherwise(within_error)
    return kept.alias("meets_objective_on_test")
