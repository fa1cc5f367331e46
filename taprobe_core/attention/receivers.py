"""Kurtosis of heads over problems to receiver heads, and what besides meaning explains them.

A receiver head sends the attention of many later sentences to few earlier ones: its vertical
scores have heavy tails. Beside every head's score stand figures of what else could explain it
(length, position). What does not belong here: the scores and kurtosis of one text (`scores`), and
correcting a score for what explains it.

Invariants: heads are chosen on training problems alone; nothing about another problem can change
which heads are chosen or in which order. A share or a slope that cannot be known is NaN, never 0.

Source: Thought Anchors (arXiv:2506.19143): kurtosis averaged over traces, layer 0 left out, top 20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taprobe_core.attention.scores import PROXIMITY, FloatArray, pearson
from taprobe_core.errors import NotEnoughDataError

_N_COEFFICIENTS = 3
_NO_SPREAD = 1e-12


class SinkShare(NamedTuple):
    """Share of a head's attention that ends in a sink; float64 [..., head], from 0 to 1.

    Attributes:
        bos: on token 0, over all tokens of all sentences.
        first_sentence: on the first sentence, over the tokens of the sentences after it; NaN where
            there is none.
    """

    bos: FloatArray
    first_sentence: FloatArray


class DistanceLaw(NamedTuple):
    """log v_k = intercept + slope_distance log d_k + slope_length log n_k; float64 [head] each.

    Attributes:
        intercept: of the fit.
        slope_distance: exponent of the mean distance; negative where attention fades.
        slope_length: exponent of the sentence's length in tokens.
        r_squared: share of the variance of log v that both explain, from 0 to 1.
        n_sentences: int64 [head], scores in the fit; the others are NaN or not above 0.
    """

    intercept: FloatArray
    slope_distance: FloatArray
    slope_length: FloatArray
    r_squared: FloatArray
    n_sentences: npt.NDArray[np.int64]


def sink_share(mass: npt.ArrayLike, bos_mass: npt.ArrayLike, n_tokens: npt.ArrayLike) -> SinkShare:
    """Return the share of attention on BOS and on the first sentence.

    Each query token hands out one unit of attention, so shares are masses over query tokens.

    Args:
        mass: [..., head, sentence, sentence], as `sentence_mass` gives it.
        bos_mass: [..., head, sentence], from the same place.
        n_tokens: tokens of each sentence, [sentence].
    """
    lengths = np.asarray(n_tokens, dtype=np.float64)
    bos = np.asarray(bos_mass, dtype=np.float64).sum(axis=-1) / lengths.sum()
    on_first = np.asarray(mass, dtype=np.float64)[..., 1:, 0].sum(axis=-1)
    return SinkShare(bos, _ratio(on_first, np.full_like(on_first, lengths[1:].sum())))


def near_diagonal_share(mass: npt.ArrayLike, width: int = 1) -> FloatArray:
    """Return the share of the mass between sentences that stays within `width` of the diagonal.

    Args:
        mass: [..., head, sentence, sentence], as `sentence_mass` gives it.
        width: greatest distance in sentences; 1 is a sentence and its predecessor.

    Returns:
        float64 [..., head], from 0 to 1; NaN where a head has no mass between sentences.
    """
    values = np.asarray(mass, dtype=np.float64)
    sentence = np.arange(values.shape[-1])
    is_near = np.abs(sentence[:, None] - sentence) <= width
    return _ratio((values * is_near).sum(axis=(-2, -1)), values.sum(axis=(-2, -1)))


def distance_law(
    vertical: FloatArray, n_tokens: npt.ArrayLike, *, proximity: int = PROXIMITY
) -> DistanceLaw:
    """Regress the log of the vertical score on the logs of distance and length, head by head.

    Scores span orders of magnitude and attention fades roughly as a power of distance, so the fit
    is of logs, by least squares. The distance of sentence k is the mean of q - k over the rows that
    its score averages, in sentences: d_k = (proximity + S - 1 - k) / 2, which falls with position.

    Args:
        vertical: scores without depth control, [head, sentence], from `vertical_scores`.
        n_tokens: tokens of each sentence, [sentence].
        proximity: the one that the scores were made with.

    Returns:
        The fit of each head. A slope is NaN where its regressor does not vary, everything but the
        count is NaN below four scores, and R^2 is NaN where the scores are equal.
    """
    n_sentences = vertical.shape[-1]
    distance = (proximity + np.arange(n_sentences - 1, -1, -1)) / 2
    regressors = np.log(np.stack([distance, np.asarray(n_tokens, dtype=np.float64)]))
    used = vertical > 0
    n = used.sum(axis=-1)
    weight = used / np.maximum(n, 1)[:, None]
    log_score = np.log(np.where(used, vertical, 1.0))
    mean_score, mean_x = (log_score * weight).sum(axis=-1), weight @ regressors.T
    x = np.where(used[:, None, :], regressors - mean_x[..., None], 0.0)
    varies = (x**2).sum(axis=-1) > _NO_SPREAD
    x = np.where(varies[..., None], x, 0.0)
    y = np.where(used, log_score - mean_score[:, None], 0.0)
    slope = np.einsum("hpq,hqs,hs->hp", np.linalg.pinv(x @ x.mT, hermitian=True), x, y)
    residual = y - np.einsum("hp,hps->hs", slope, x)
    total = (y**2).sum(axis=-1)
    is_fitted = n > _N_COEFFICIENTS
    r_squared = 1 - _ratio((residual**2).sum(axis=-1), np.where(total > _NO_SPREAD, total, 0.0))
    intercept = mean_score - (slope * mean_x).sum(axis=-1)
    slope = np.where(varies & is_fitted[:, None], slope, np.nan)
    return DistanceLaw(
        np.where(is_fitted, intercept, np.nan),
        slope[:, 0],
        slope[:, 1],
        np.where(is_fitted, r_squared, np.nan),
        n,
    )


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


TOP_K = 20


class ReceiverHead(NamedTuple):
    """One chosen head.

    Attributes:
        layer: the model's layer.
        head: head within the layer.
        kurtosis: mean over the training problems in which it is defined.
        n_problems: how many those are.
    """

    layer: int
    head: int
    kurtosis: float
    n_problems: int


@dataclass(frozen=True)
class ReceiverHeads:
    """Chosen heads, highest kurtosis first.

    Attributes:
        heads: at most `top_k`; fewer where the model has fewer defined ones.
        train_problems: problems that they were chosen on, ascending.
        n_undefined: head and problem pairs left out because their kurtosis is NaN.
    """

    heads: tuple[ReceiverHead, ...]
    train_problems: tuple[int, ...]
    n_undefined: int


class SplitHalf(NamedTuple):
    """How well two halves of the problems agree on the heads' kurtosis.

    Attributes:
        pearson: correlation over heads of the two mean kurtoses; NaN below two heads or a half
            without a problem.
        n_heads: heads defined in both halves.
        n_undefined: heads left out.
        halves: the problems of each half.
    """

    pearson: float
    n_heads: int
    n_undefined: int
    halves: tuple[tuple[int, ...], tuple[int, ...]]


def choose_receiver_heads(
    kurtosis: Mapping[int, FloatArray],
    train_problems: Iterable[int],
    *,
    top_k: int = TOP_K,
    skip_first_layer: bool = True,
    layers: Sequence[int] | None = None,
) -> ReceiverHeads:
    """Choose the heads with the highest mean kurtosis over the training problems.

    NaN is left out of a mean; a head that is NaN in every training problem is not chosen. Equal
    means are ordered by layer, then head.

    Args:
        kurtosis: problem id to `head_kurtosis` of its text, [layer, head]. Problems that are not
            in `train_problems` are not read.
        train_problems: ids of the fold's training problems.
        top_k: most heads to choose.
        skip_first_layer: leave out the model's layer 0.
        layers: the model's layer of each row, [layer]; None means rows are layers 0, 1, ...

    Raises:
        NotEnoughDataError: no training problem, one without kurtosis, or no head defined in any.
    """
    train = tuple(sorted({int(problem_id) for problem_id in train_problems}))
    if not train:
        raise NotEnoughDataError(
            "no training problems to choose receiver heads on",
            "train_problems",
            "pass the training side of a fold",
        )
    missing = [problem_id for problem_id in train if problem_id not in kurtosis]
    if missing:
        raise NotEnoughDataError(
            f"no kurtosis of training problems {missing}",
            "kurtosis",
            "extract attention in mode full for every training problem",
        )
    stacked, depth = _stack(kurtosis, train, layers, skip_first_layer=skip_first_layer)
    mean, n_problems = _mean_defined(stacked)
    rows, heads = np.nonzero(n_problems)
    if not len(rows):
        raise NotEnoughDataError(
            f"no head has a kurtosis in any of {len(train)} training problems",
            "kurtosis",
            "use longer texts, a smaller proximity, or layers beyond the first",
        )
    order = np.lexsort((heads, depth[rows], -mean[rows, heads]))[:top_k]
    chosen = tuple(
        ReceiverHead(int(depth[row]), int(head), float(mean[row, head]), int(n_problems[row, head]))
        for row, head in zip(rows[order], heads[order], strict=True)
    )
    return ReceiverHeads(chosen, train, int(np.isnan(stacked).sum()))


def receiver_scores(
    vertical: FloatArray, heads: Sequence[ReceiverHead], *, layers: Sequence[int] | None = None
) -> FloatArray:
    """Average the vertical scores of one text over the chosen heads.

    Args:
        vertical: [layer, head, sentence], from `vertical_scores`.
        heads: chosen heads, at least one; only their layer and head are read.
        layers: the model's layer of each row of `vertical`; None means 0, 1, ...

    Returns:
        float64 [sentence]; NaN where a chosen head has no score.

    Raises:
        NotEnoughDataError: no head, or a head's layer is not among `layers`.
    """
    depth = list(range(len(vertical)) if layers is None else layers)
    absent = sorted({each.layer for each in heads} - set(depth))
    if absent or not heads:
        raise NotEnoughDataError(
            f"no attention of layers {absent}" if absent else "no receiver heads",
            f"layers {depth}",
            "extract attention in mode full at the layers of the receiver heads",
        )
    rows = [depth.index(each.layer) for each in heads]
    return np.asarray(vertical[rows, [each.head for each in heads]].mean(axis=0))


def split_half_reliability(
    kurtosis: Mapping[int, FloatArray],
    problems: Iterable[int] | None = None,
    *,
    skip_first_layer: bool = True,
    layers: Sequence[int] | None = None,
) -> SplitHalf:
    """Correlate the heads' mean kurtosis between the odd and the even problems.

    Problems are sorted and dealt out in turn, so that ids that are all even still make two halves.

    Args:
        kurtosis: problem id to [layer, head].
        problems: ids to use; None all.
        skip_first_layer: leave out the model's layer 0.
        layers: the model's layer of each row; None means 0, 1, ...

    Raises:
        KeyError: a problem without kurtosis.
    """
    ids = sorted(kurtosis if problems is None else {int(each) for each in problems})
    halves = (tuple(ids[::2]), tuple(ids[1::2]))
    if not halves[1]:
        return SplitHalf(float("nan"), 0, 0, halves)
    first, second = (
        _mean_defined(_stack(kurtosis, half, layers, skip_first_layer=skip_first_layer)[0])[0]
        for half in halves
    )
    both = ~np.isnan(first) & ~np.isnan(second)
    n_heads = int(both.sum())
    value = float(pearson(first[both], second[both])) if n_heads > 1 else float("nan")
    return SplitHalf(value, n_heads, both.size - n_heads, halves)


def _stack(
    kurtosis: Mapping[int, FloatArray],
    problems: Sequence[int],
    layers: Sequence[int] | None,
    *,
    skip_first_layer: bool,
) -> tuple[FloatArray, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return kurtosis [problem, layer, head] and the model's layer of each row."""
    stacked = np.stack([np.asarray(kurtosis[each], dtype=np.float64) for each in problems])
    depth = np.arange(stacked.shape[1]) if layers is None else np.asarray(layers, dtype=np.int64)
    kept = np.flatnonzero(depth != 0) if skip_first_layer else np.arange(len(depth))
    return stacked[:, kept], depth[kept]


def _mean_defined(
    values: FloatArray,
) -> tuple[FloatArray, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    """Return the mean over the first axis, NaN left out, and how many values are in each mean."""
    n = (~np.isnan(values)).sum(axis=0)
    mean = np.divide(np.nansum(values, axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)
    return mean, n
