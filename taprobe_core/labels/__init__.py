"""Labels: rollouts of a trace -> published importance measures -> importance, anchors, their doubt.

`measures` computes what the dataset publishes, for any rollouts; `make` turns it into labels;
`noise` says how sure a measure is; `effects` estimates true effects behind noisy ones; `audit`
finds what is wrong with a rollouts folder. Files are opened by callers.
"""

from taprobe_core.labels.make import make_labels, unlabelled
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
    "make_labels",
    "published_measures",
    "read_solutions",
    "states_failure",
    "trigram_cosine",
    "trigram_masked_dissimilar",
    "unlabelled",
]
