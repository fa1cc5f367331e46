"""Rollouts of one trace -> published importance measures: the label code for any rollouts.

`solutions` reads rows, `similarity` compares sentences, `measures` computes. Nothing else belongs
here; files are opened by callers, and targets are made in `labels`.
"""

from taprobe_core.labels.measures import (
    MIN_SENTENCE_CHARS,
    SIMILARITY_THRESHOLD,
    answer_kl,
    published_measures,
    trigram_cosine,
    trigram_masked_dissimilar,
)
from taprobe_core.rollouts.solutions import Rollout, Solutions, read_solutions, states_failure

__all__ = [
    "MIN_SENTENCE_CHARS",
    "SIMILARITY_THRESHOLD",
    "Rollout",
    "Solutions",
    "answer_kl",
    "published_measures",
    "read_solutions",
    "states_failure",
    "trigram_cosine",
    "trigram_masked_dissimilar",
]
