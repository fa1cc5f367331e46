"""The contract of every table: columns, types, ranges, keys.

A stage checks its table once, before the store takes it; a reader may then rely on it. One name
for one thing: the same column means the same quantity in every table. What does not belong here:
how a table is made (its stage) and where it lives (the store).

    contract ◄─ dataset      rollouts, labels, spans
             ◄─ results      scores, deltas, plans, decisions
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
    PROBLEMS,
    SENTENCES,
    SKIPPED,
    SPANS,
    TEXTS,
)
from taprobe_core.tables.results import (
    DECISIONS,
    DECISIONS_ON_SENTENCE,
    DELTAS,
    OBJECTIVES,
    PLANS,
    PROTOCOLS,
    SCORES,
    SPLITS,
)

__all__ = [
    "ATTENTION_HEADS",
    "ATTENTION_SCORES",
    "DECISIONS",
    "DECISIONS_ON_SENTENCE",
    "DELTAS",
    "HEAD_KURTOSIS",
    "LABELS",
    "LABEL_STATUS",
    "OBJECTIVES",
    "PLANS",
    "PROBLEMS",
    "PROTOCOLS",
    "RECEIVER_HEADS",
    "RECEIVER_RELIABILITY",
    "RECEIVER_SCORES",
    "SCORES",
    "SENTENCES",
    "SKIPPED",
    "SPANS",
    "SPLITS",
    "TEXTS",
    "VERTICAL_SCORES",
    "check_table",
]
