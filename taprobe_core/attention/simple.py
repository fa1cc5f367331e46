"""Mass to the scores of the earlier system: one layer, all heads averaged, mass per query token.

They count the mass on a whole key sentence, so they grow with its length, and averaging heads hides
the few that single out sentences; kept for comparison with the published measure (scores).

The invariant: a sentence that no eligible query stands after scores 0, as in the earlier system,
not NaN.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from taprobe_core.attention.scores import FloatArray

SimpleDepthControl = Literal["mean", "sum"]


def full_scores(
    mass: npt.ArrayLike, n_tokens: npt.ArrayLike, *, depth_control: SimpleDepthControl = "mean"
) -> FloatArray:
    """Score each sentence by the attention of the sentences after it.

        S[j, i] = mean over heads of mass[j, i] / n_j
        score_i = mean or sum over j > i of S[j, i]

    S[j, i] is the mean over the query tokens of sentence j of their mass on sentence i.

    Args:
        mass: of one layer, [head, sentence, sentence], as `sentence_mass` gives it.
        n_tokens: tokens of each sentence, [sentence]; a sentence without tokens asks nothing and
            is not counted.
        depth_control: mean divides by the number of sentences counted, sum does not.

    Returns:
        float64 [sentence]; 0 where no sentence counts, as for the last one.
    """
    lengths = np.asarray(n_tokens, dtype=np.float64)
    asks = lengths > 0
    by_query = np.asarray(mass, dtype=np.float64).mean(axis=0) / np.where(asks, lengths, 1)[:, None]
    counted = np.tri(len(lengths), k=-1, dtype=np.bool_) & asks[:, None]
    return _over_queries(by_query, counted, depth_control)


def light_scores(
    tail_mass: npt.ArrayLike, is_after: npt.ArrayLike, *, depth_control: SimpleDepthControl = "mean"
) -> FloatArray:
    """Score each sentence by the attention of the last tokens of the text.

        score_i = mean or sum over eligible queries q of (mean over heads of tail_mass[q, i])

    A query is eligible where it stands at or after the sentence's end.

    Args:
        tail_mass: of one layer, [head, query, sentence], as `tail_mass` gives it.
        is_after: whether the query is eligible, bool [query, sentence], from the same place.
        depth_control: mean divides by the number of eligible queries, sum does not. Where every
            sentence ends before the last queries the two differ by a constant factor.

    Returns:
        float64 [sentence]; 0 where no query is eligible.
    """
    by_query = np.asarray(tail_mass, dtype=np.float64).mean(axis=0)
    return _over_queries(by_query, np.asarray(is_after, dtype=np.bool_), depth_control)


def _over_queries(
    by_query: FloatArray, counted: npt.NDArray[np.bool_], depth_control: SimpleDepthControl
) -> FloatArray:
    total = np.where(counted, by_query, 0.0).sum(axis=0)
    if depth_control == "sum":
        return np.asarray(total)
    return np.asarray(total / np.maximum(counted.sum(axis=0), 1))
