"""Mass between sentences to vertical scores: how much later sentences look back at each one.

The published measure averages over tokens on both sides, leaves out pairs that stand close
together, and averages each column. The simple scores of an earlier system are kept for comparison:
they count the mass on a whole key sentence, so they grow with its length, and averaging heads hides
the few that single out sentences.

What does not belong here: which heads count, and what else explains a score (`receivers`).

Invariants: row = sentence of the queries, column = sentence of the keys; leading dimensions (layer,
head) pass through. A value that the definition leaves open is NaN, never 0; in the simple scores
alone a sentence that no eligible query stands after scores 0, as in the earlier system.

Source: Thought Anchors (arXiv:2506.19143), receiver heads, and the authors' code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from taprobe_core.errors import NonFiniteError

FloatArray = npt.NDArray[np.float64]
DepthControl = Literal["none", "rank", "count"]

PROXIMITY = 4
"""Published least distance, in sentences, between a query and a key that count."""

PROXIMITIES = (1, 4, 8, 16)

_FEWEST_FOR_RANKS = 3


def average_matrix(mass: npt.ArrayLike, n_tokens: npt.ArrayLike) -> FloatArray:
    """Average the attention between two sentences over the tokens of both.

        A[i, j] = mass[i, j] / (n_i n_j)

    Dividing by both lengths keeps a long key sentence from scoring high for its length alone.

    Args:
        mass: [..., head, sentence, sentence], as `sentence_mass` gives it.
        n_tokens: tokens of each sentence, [sentence].

    Returns:
        float64 [..., head, sentence, sentence]; 0 above the diagonal, where causal attention is.

    Raises:
        NonFiniteError: a mass is NaN or infinite, or a sentence has no tokens.
    """
    lengths = np.asarray(n_tokens, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        average = np.asarray(mass, dtype=np.float64) / (lengths[:, None] * lengths)
    if not np.isfinite(average).all():
        first = np.argwhere(~np.isfinite(average))[0].tolist()
        raise NonFiniteError(
            f"{int((~np.isfinite(average)).sum())} average attentions are not finite",
            f"[..., head, sentence, sentence] = {first}",
            "extract the attention again, with the model in bfloat16 or float32",
        )
    return average


def vertical_scores(
    average: FloatArray, *, proximity: int = PROXIMITY, depth_control: DepthControl = "none"
) -> FloatArray:
    """Average each column of a sentence matrix over the rows far enough below it.

        v_k = mean over q >= k + proximity of A'[q, k]

    A row's entries count where q - k >= proximity; c_q = max(0, q - proximity + 1) of them do. A
    row spreads one unit of attention over its candidates, so rows with few candidates hold large
    entries, which lifts early sentences. A' controls for that depth:

    - none: A' = A.
    - rank: A'[q, k] = rank of A[q, k] among the row's counted entries, from 1, ties averaged,
      divided by c_q. The published control.
    - count: A'[q, k] = c_q A[q, k], the ratio to an even spread over the candidates. The authors'
      scripts multiply a row by its depth in the same way; at proximity 1 the factor is the same.

    The earlier system calls the step from a sum to a mean over rows depth control; the mean is part
    of this score under every control; the scores of the earlier system have the other.

    Args:
        average: A, [..., head, sentence, sentence], from `average_matrix`.
        proximity: least q - k, in sentences, at least 1.
        depth_control: what is averaged.

    Returns:
        float64 [..., head, sentence]; NaN for the last `proximity` sentences, which no row is far
        enough below.

    Example:
        >>> vertical_scores(np.tril(np.ones((1, 3, 3))), proximity=2).tolist()
        [[1.0, nan, nan]]
    """
    counted = np.tri(average.shape[-1], k=-proximity, dtype=np.bool_)
    n_candidates = counted.sum(axis=1)
    if depth_control == "rank":
        ranks = stats.rankdata(np.where(counted, average, np.nan), axis=-1, nan_policy="omit")
        average = ranks / np.maximum(n_candidates, 1)[:, None]
    elif depth_control == "count":
        average = average * n_candidates[:, None]
    n_rows = counted.sum(axis=0)
    totals = np.where(counted, average, 0.0).sum(axis=-2)
    undefined = np.full_like(totals, np.nan)
    return np.asarray(np.divide(totals, n_rows, out=undefined, where=n_rows > 0))


def head_kurtosis(vertical: FloatArray, *, skip_first_sentence: bool = False) -> FloatArray:
    """Return how much each head singles out few sentences: the kurtosis of its vertical scores.

    Fisher's excess kurtosis, biased (moments over n), NaN left out, as published.

    Args:
        vertical: [..., head, sentence], from `vertical_scores`.
        skip_first_sentence: leave out sentence 0, which may be an attention sink (`sink_share`).

    Returns:
        float64 [..., head]; NaN where fewer than two scores are defined or all are equal.
    """
    scores = vertical[..., 1:] if skip_first_sentence else vertical
    with warnings.catch_warnings():
        # scipy warns where scores are few or equal; both are NaN here, which says so.
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(stats.kurtosis(scores, axis=-1, nan_policy="omit"), dtype=np.float64)


class ProximitySensitivity(NamedTuple):
    """What the choice of proximity changes.

    Attributes:
        proximities: the values tried.
        kurtosis: float64 [proximity, ..., head], `head_kurtosis` at each.
        spearman: float64 [proximity, ..., head]; rank correlation over sentences with the
            vertical scores at the reference; NaN below three common sentences or for equal scores.
        n_undefined: int64 [proximity], heads without a kurtosis.
    """

    proximities: tuple[int, ...]
    kurtosis: FloatArray
    spearman: FloatArray
    n_undefined: npt.NDArray[np.int64]


def proximity_sensitivity(
    average: FloatArray,
    *,
    proximities: Sequence[int] = PROXIMITIES,
    reference: int = PROXIMITY,
    depth_control: DepthControl = "none",
) -> ProximitySensitivity:
    """Compare the vertical scores of one text at several proximities with those at a reference.

    Args:
        average: [..., head, sentence, sentence], from `average_matrix`.
        proximities: values to try, each at least 1.
        reference: proximity of the scores compared with.
        depth_control: as in `vertical_scores`.

    Returns:
        One entry per proximity, in the order given.
    """
    usual = vertical_scores(average, proximity=reference, depth_control=depth_control)
    kurtosis, spearman = [], []
    for proximity in proximities:
        scores = vertical_scores(average, proximity=proximity, depth_control=depth_control)
        n_common = max(0, scores.shape[-1] - max(proximity, reference))
        kurtosis.append(head_kurtosis(scores))
        spearman.append(_spearman(scores[..., :n_common], usual[..., :n_common]))
    heads = np.stack(kurtosis)
    n_undefined = np.isnan(heads).reshape(len(heads), -1).sum(axis=1)
    return ProximitySensitivity(tuple(proximities), heads, np.stack(spearman), n_undefined)


def _spearman(left: FloatArray, right: FloatArray) -> FloatArray:
    if left.shape[-1] < _FEWEST_FOR_RANKS:
        return np.full(left.shape[:-1], np.nan)
    return pearson(stats.rankdata(left, axis=-1), stats.rankdata(right, axis=-1))


def pearson(left: FloatArray, right: FloatArray) -> FloatArray:
    """Return Pearson's correlation along the last axis, [..., n] to [...]; NaN for equal values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(stats.pearsonr(left, right, axis=-1).statistic, dtype=np.float64)


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
