"""Which sentences which models of a stack read, so that the others cost nothing.

Every fold leaves some sentences out, and another fold needs most of those: a batch holds what any
model learns from. Sentences that the same models read are put next to each other, and neighbouring
models (of one fold, or of folds that follow each other) form a part that reads a few ranges of the
batch. What does not belong here: the products over the ranges (`token_forward`, `token_backward`)
and training (`token_training`).

Invariant: every sentence that a model learns from, or is watched on, is read for it; which others
are read with it changes no number of it but by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]

PART_VALUES = {"cpu": 3 * 2**19}
"""First-layer weights of a part, at least: smaller products run well below the processor's rate."""

MIN_SHARE_SAVED = 0.12
"""Of the products; below, one large product is faster than parts."""

MIN_GAP = 48
"""Tokens; a shorter gap between two ranges is read through."""

TOKENS_OF_A_COPY = 64
"""Copying a model's weights takes about as long as its product with this many tokens."""


def n_batches(n_learnt: int, batch_size: int) -> int:
    """Return into how many batches a model's epoch is cut: a function of its own sentences alone.

    As many as if the model were alone, rounded up to three binary digits (above 8 by at most a
    quarter), so that folds of nearly equal size can share their batches.

    Args:
        n_learnt: sentences that the model learns from.
        batch_size: most of them in a batch, on average.

    Example:
        >>> [n_batches(n, 32) for n in (1, 640, 641, 3100, 3200)]
        [1, 20, 24, 112, 112]
    """
    exact = max(-(-n_learnt // batch_size), 1)
    step = 1 << max(exact.bit_length() - 3, 0)
    return -(-exact // step) * step


PRODUCTS_OF_A_PASS = 2**26
"""A scoring pass takes about as long to call as so many multiplications."""


class Part(NamedTuple):
    """Neighbouring models and what they read of a batch.

    Attributes:
        models: half-open range of models.
        ranges: half-open ranges of token rows, ascending.
    """

    models: tuple[int, int]
    ranges: tuple[tuple[int, int], ...]


class Readers:
    """Parts of a stack and the sentences that each learns from.

    Attributes:
        is_used: [sentence] bool, whether any model learns from it.
    """

    def __init__(self, is_read: Mask, lengths: Index, values: int, kind: str) -> None:
        """Cut the models into parts, or leave them whole where that saves too little.

        Args:
            is_read: [sentence, model] bool, whether the model learns from it.
            lengths: [sentence] int64, tokens.
            values: first-layer weights of one model.
            kind: type of the device, as PyTorch names it.
        """
        self.is_used: Mask = np.any(is_read, axis=1)
        m = is_read.shape[1]
        # A recorded step cannot have other ranges than before: elsewhere models are not parted.
        each = -(-PART_VALUES[kind] // values) if kind in PART_VALUES else m
        n_parts = max(m // each, 1)
        bounds = np.linspace(0, m, n_parts + 1).astype(int)
        self._models = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        by_part = np.stack([is_read[:, low:high].any(axis=1) for low, high in self._models], 1)
        sizes = np.diff(bounds)
        n_read = float((lengths @ by_part) @ sizes)
        n_whole = float(lengths[self.is_used].sum()) * m
        self._by_part: Mask | None = None
        self._rank = np.zeros(len(lengths), dtype=np.int64)
        if n_parts > 1 and n_read < (1 - MIN_SHARE_SAVED) * n_whole:
            self._by_part = by_part
            self._rank = np.unique(by_part, axis=0, return_inverse=True)[1].reshape(-1)

    def order(self, batch: Index) -> Index:
        """Return the sentences of a batch that are read, those with the same readers together.

        A step takes place even if nobody learns from it, lest it depend on who is here.
        """
        used = batch[self.is_used[batch]]
        if not len(used):
            return batch[:1]
        return used if self._by_part is None else used[np.argsort(self._rank[used], kind="stable")]

    def parts(self, sentences: Index, lengths: Index) -> list[Part] | None:
        """Return who reads what of a batch, None if all models read everything.

        Args:
            sentences: of the batch, in its order.
            lengths: [sentence] int64, tokens of every sentence there is.
        """
        if self._by_part is None:
            return None
        ends = np.concatenate([[0], np.cumsum(lengths[sentences])])
        read = np.zeros((len(self._models), len(sentences) + 2), dtype=np.int8)
        read[:, 1:-1] = self._by_part[sentences].T
        part, at = np.nonzero(np.diff(read, axis=1))
        edges = ends[at].reshape(-1, 2)
        ranges: list[list[tuple[int, int]]] = [[] for _ in self._models]
        for of, (low, high) in zip(part[::2].tolist(), edges.tolist(), strict=True):
            mine = ranges[of]
            if mine and low - mine[-1][1] < MIN_GAP:
                mine[-1] = (mine[-1][0], high)
            else:
                mine.append((low, high))
        return [
            Part(models, tuple(mine)) for models, mine in zip(self._models, ranges, strict=True)
        ]


class Watchers(NamedTuple):
    """Models that are watched on the same sentences, or nearly: [model] and [sentence] int64."""

    models: Index
    sentences: Index


def watchers(watched: NDArray[np.float64], lengths: Index, values: int) -> Sequence[Watchers]:
    """Group the sentences that models are watched on by who they are.

    Args:
        watched: [sentence, model], above 0 where the model is watched.
        lengths: [sentence] int64, tokens.
        values: first-layer weights of one model.

    Returns:
        Groups that together hold every watched sentence once, each with every model it counts for.
    """
    is_watched = watched > 0
    patterns, which = np.unique(is_watched, axis=0, return_inverse=True)
    n_tokens = np.bincount(which.reshape(-1), lengths, len(patterns))
    merged: list[tuple[Mask, float, list[int]]] = []
    for at, models in enumerate(patterns):
        if not models.any():
            continue
        if merged:
            known, n, members = merged[-1]
            both = known | models
            wasted = n * (both & ~known).sum() + n_tokens[at] * (both & ~models).sum()
            if wasted <= TOKENS_OF_A_COPY * models.sum() + PRODUCTS_OF_A_PASS / values:
                merged[-1] = (both, n + n_tokens[at], [*members, at])
                continue
        merged.append((models, float(n_tokens[at]), [at]))
    return [
        Watchers(np.flatnonzero(models), np.flatnonzero(np.isin(which.reshape(-1), members)))
        for models, _, members in merged
    ]
