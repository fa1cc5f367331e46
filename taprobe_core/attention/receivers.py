"""Kurtosis of heads over problems to receiver heads, and their scores of sentences.

A receiver head sends the attention of many later sentences to few earlier ones: its vertical
scores have heavy tails. What does not belong here: the scores and kurtosis of one text (scores).

The invariant: heads are chosen on training problems alone; nothing about another problem can change
which heads are chosen or in which order.

Source: Thought Anchors (arXiv:2506.19143): kurtosis averaged over traces, layer 0 left out, top 20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taprobe_core.attention.scores import FloatArray, pearson
from taprobe_core.errors import NotEnoughDataError

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
