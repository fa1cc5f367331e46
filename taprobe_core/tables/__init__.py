"""The contract of every table: columns, types, ranges, keys.

A stage checks its table once, before the store takes it; a reader may then rely on it. One name
for one thing: the same column means the same quantity in every table. What does not belong here:
how a table is made (its stage) and where it lives (the store).

    contract ◄─ dataset      rollouts, labels, spans
             ◄─ results      scores, contrasts, nulls, calibration, plans, decisions
             ◄─ attention    what follows from attention between sentences
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
from taprobe_core.tables.contract import check_table
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
from taprobe_core.tables.results import (
    BEST_SEEDS,
    CALIBRATION,
    CONTRASTS,
    DECISIONS,
    DECISIONS_ON_SENTENCE,
    DELTAS,
    NULL_KINDS,
    NULLS,
    OBJECTIVES,
    PLANS,
    POSITION_BINS,
    PROTOCOLS,
    RELIABILITY_BINS,
    SCORES,
    SELECTIVITY,
    SPLITS,
    schema_of,
)
from taprobe_core.tables.sweep import (
    SWEEP_CHOICES,
    SWEEP_CONFIGURATIONS,
    SWEEP_DELTAS,
    SWEEP_LEADERBOARD,
    SWEEP_RECIPES,
    SWEEP_RESULTS,
    SWEEP_SHORTLIST,
    SWEEP_STABILITY,
    SWEEP_STAGES,
    SWEEP_STATUS,
)

__all__ = [
    "ATTENTION_HEADS",
    "ATTENTION_SCORES",
    "BEST_SEEDS",
    "CALIBRATION",
    "CONTRASTS",
    "DECISIONS",
    "DECISIONS_ON_SENTENCE",
    "DELTAS",
    "HEAD_KURTOSIS",
    "LABELS",
    "LABEL_STATUS",
    "NOTES",
    "NULLS",
    "NULL_KINDS",
    "OBJECTIVES",
    "PLANS",
    "POSITION_BINS",
    "PROBLEMS",
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
    "SWEEP_RESULTS",
    "SWEEP_SHORTLIST",
    "SWEEP_STABILITY",
    "SWEEP_STAGES",
    "SWEEP_STATUS",
    "TEXTS",
    "VERTICAL_SCORES",
    "check_table",
    "schema_of",
]
