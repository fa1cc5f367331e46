"""The contract of every table: columns, types, ranges, keys.

Every table is checked before the store takes it (`pipeline.commit`); a reader may then rely on it.
One name for one thing: the same column means the same quantity in every table. What does not belong
here: how a table is made (its stage) and where it lives (the store).

    contract ◄─ dataset      rollouts, labels, spans
             ◄─ results      scores, metrics, contrasts, nulls, plans, leaderboard
             ◄─ attention    what follows from attention between sentences
             ◄─ sweep        configurations, their results, who goes on
             ◄─ indexes      which parts an artifact is made up of
"""

from taprobe_core.tables.attention import (
    ATTENTION_HEADS,
    ATTENTION_SCORES,
    HEAD_KURTOSIS,
    RECEIVER_HEADS,
    RECEIVER_RELIABILITY,
    RECEIVER_SCORES,
    VERTICAL_SCORES,
)
from taprobe_core.tables.contract import Contract, check_table, schema_of
from taprobe_core.tables.dataset import (
    LABEL_STATUS,
    LABELS,
    NOTES,
    PROBLEMS,
    SENTENCES,
    SKIPPED,
    SPANS,
    TEXTS,
)
from taprobe_core.tables.indexes import ACTIVATION_SHARDS, ATTENTION_SHARDS, FITS
from taprobe_core.tables.results import (
    BEST_SEEDS,
    CALIBRATION,
    CONTRASTS,
    DECISIONS,
    DECISIONS_ON_SENTENCE,
    DELTAS,
    LEADERBOARD,
    METRICS,
    NULL_KINDS,
    NULLS,
    OBJECTIVES,
    PLANS,
    PLANS_OF_SEEDS,
    POSITION_BINS,
    PROBLEM_METRICS,
    PROTOCOLS,
    RELIABILITY_BINS,
    SCORES,
    SELECTIVITY,
    SPLITS,
)
from taprobe_core.tables.sweep import (
    SWEEP_CHOICES,
    SWEEP_CONFIGURATIONS,
    SWEEP_DELTAS,
    SWEEP_LEADERBOARD,
    SWEEP_RECIPES,
    SWEEP_SHORTLIST,
    SWEEP_STABILITY,
    SWEEP_STAGES,
)

__all__ = [
    "ACTIVATION_SHARDS",
    "ATTENTION_HEADS",
    "ATTENTION_SCORES",
    "ATTENTION_SHARDS",
    "BEST_SEEDS",
    "CALIBRATION",
    "CONTRASTS",
    "DECISIONS",
    "DECISIONS_ON_SENTENCE",
    "DELTAS",
    "FITS",
    "HEAD_KURTOSIS",
    "LABELS",
    "LABEL_STATUS",
    "LEADERBOARD",
    "METRICS",
    "NOTES",
    "NULLS",
    "NULL_KINDS",
    "OBJECTIVES",
    "PLANS",
    "PLANS_OF_SEEDS",
    "POSITION_BINS",
    "PROBLEMS",
    "PROBLEM_METRICS",
    "PROTOCOLS",
    "RECEIVER_HEADS",
    "RECEIVER_RELIABILITY",
    "RECEIVER_SCORES",
    "RELIABILITY_BINS",
    "SCORES",
    "SELECTIVITY",
    "SENTENCES",
    "SKIPPED",
    "SPANS",
    "SPLITS",
    "SWEEP_CHOICES",
    "SWEEP_CONFIGURATIONS",
    "SWEEP_DELTAS",
    "SWEEP_LEADERBOARD",
    "SWEEP_RECIPES",
    "SWEEP_SHORTLIST",
    "SWEEP_STABILITY",
    "SWEEP_STAGES",
    "TEXTS",
    "VERTICAL_SCORES",
    "Contract",
    "check_table",
    "schema_of",
]
