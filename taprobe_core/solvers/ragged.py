"""Token sets of unequal length, and the index tables by which batches of them are pooled.

`RaggedTokens` keeps the states of all sentences end to end, without padding. A batch of sentences
is described by `Slots`: tables that say which items (tokens, windows) each group (sentence, window)
holds. Only head scores, a few numbers per token, are ever laid out by such a table; states are not.
What does not belong here: what is done with the items of a group (`token_pooling`), and networks.

Invariants: a sentence has at least one token; the tables are made on the host and go to the device
in one copy per epoch; both directions are gathers, so gradients do not depend on thread order.

Source:
    None; our own layout. Measured on a CPU beside `segment_reduce`, `index_reduce` and
    `scatter_reduce` on [token, head] scores: softmax by gathered slots takes as long as by segment
    reductions, a maximum half as long, and on CUDA segment sums are not deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from taprobe_core.errors import DataError

Index = NDArray[np.int64]

ALIGNMENT = 32
"""Batches hold a multiple of this many token rows: matrix products of other sizes run at 70 %."""

STORED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class RaggedTokens:
    """Token states of sentences, end to end.

    Attributes:
        values: [token, d] float16, bfloat16 or float32 states.
        offsets: [sentence + 1] int64; sentence i holds tokens `offsets[i]:offsets[i + 1]`.

    Raises:
        DataError: a shape or a type is wrong, or a sentence has no token.
    """

    values: torch.Tensor
    offsets: Index

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault:
            raise DataError(
                fault,
                "token sets",
                "give values [token, d] as float16, bfloat16 or float32, and int64 offsets from 0 "
                "to the number of tokens, at least one token per sentence",
            )

    def _fault(self) -> str | None:
        offsets = self.offsets
        if self.values.ndim != 2 or self.values.dtype not in STORED:
            return f"values are {self.values.dtype} {tuple(self.values.shape)}"
        if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
            return f"offsets are {offsets.dtype} {offsets.shape}"
        if offsets[0] != 0 or offsets[-1] != len(self.values):
            return f"offsets run from {offsets[0]} to {offsets[-1]}, of {len(self.values)} tokens"
        empty = np.flatnonzero(np.diff(offsets) < 1)
        return f"sentence {empty[0]} has no token" if len(empty) else None

    @classmethod
    def from_sentences(cls, sentences: Sequence[ArrayLike | torch.Tensor]) -> RaggedTokens:
        """Join one [token, d] array per sentence; other types become float32.

        Raises:
            DataError: there is no sentence, or one is empty or of another width.
        """
        parts = [torch.as_tensor(np.asarray(each) if not isinstance(each, torch.Tensor) else each)
                 for each in sentences]  # fmt: skip
        widths = {tuple(part.shape[1:]) for part in parts}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise DataError(
                f"{len(parts)} sentences of shapes [token, {sorted(widths)}]",
                "token sets",
                "give one [token, d] array per sentence, of one d",
            )
        parts = [part if part.dtype in STORED else part.float() for part in parts]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(torch.cat(parts), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_features(self) -> int:
        """Width d of a token state."""
        return int(self.values.shape[1])

    @property
    def lengths(self) -> Index:
        """[sentence] int64, tokens of each."""
        return np.diff(self.offsets)

    def to(self, device: torch.device | str) -> RaggedTokens:
        """Return the same sets with their values on a device."""
        return RaggedTokens(self.values.to(device), self.offsets)

    def token_rows(self, sentences: Index) -> Index:
        """Return the rows of `values` that the sentences hold, in their order: [token] int64."""
        lengths = self.lengths[sentences]
        return np.repeat(self.offsets[sentences], lengths) + _count_up(lengths)

    def take(self, sentences: Index) -> RaggedTokens:
        """Return some of the sentences, in the order given."""
        rows = torch.from_numpy(self.token_rows(sentences)).to(self.values.device)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[sentences])]).astype(np.int64)
        return RaggedTokens(self.values.index_select(0, rows), offsets)


class Slots(NamedTuple):
    """Which items each group holds, and where each item went; int64 tensors.

    Attributes:
        member: [group, slot] item in each slot; `n_items` in a slot that is empty.
        home: [item, copy] flat slots that hold the item; `group * slot` where there is no further
            copy. One column if groups do not overlap.
    """

    member: torch.Tensor
    home: torch.Tensor


class TokenBatch(NamedTuple):
    """Index tables of one batch of sentences.

    Attributes:
        row: [sentence] int64, which sentences.
        token: [token] int64, rows of the values; the rows past `n_tokens` fill up the alignment,
            at least one, and are what an empty slot points to.
        n_tokens: tokens that are in a sentence.
        stages: one table, tokens of sentences; or two, tokens of windows and windows of sentences.
    """

    row: torch.Tensor
    token: torch.Tensor
    n_tokens: int
    stages: tuple[Slots, ...]


def plan_batches(
    tokens: RaggedTokens,
    batches: Sequence[Index],
    window: int | None,
    device: torch.device | str,
) -> list[TokenBatch]:
    """Make the tables of several batches and bring them to the device in one copy.

    Args:
        tokens: the sets; only their lengths are read.
        batches: sentences of each, [sentence] int64, not empty.
        window: tokens of a window, or None for poolings over whole sentences.
        device: where the tables are wanted.
    """
    arrays: list[Index] = []
    for sentences in batches:
        lengths = tokens.lengths[sentences]
        rows = tokens.token_rows(sentences)
        n_rows = (len(rows) // ALIGNMENT + 1) * ALIGNMENT
        filled = np.zeros(n_rows, dtype=np.int64)
        filled[: len(rows)] = rows
        arrays += [sentences, filled]
        arrays += _disjoint(lengths) if window is None else _windows(lengths, window)
    placed = iter(_upload(arrays, device))
    n_stages = 1 if window is None else 2
    return [
        TokenBatch(
            next(placed),
            next(placed),
            int(tokens.lengths[sentences].sum()),
            tuple(Slots(next(placed), next(placed)) for _ in range(n_stages)),
        )
        for sentences in batches
    ]


def _upload(arrays: Sequence[Index], device: torch.device | str) -> list[torch.Tensor]:
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    parts = flat.split_with_sizes([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _count_up(lengths: Index) -> Index:
    """0, 1, ... within each group."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _disjoint(lengths: Index) -> list[Index]:
    """Tables of groups of these many items each, one after another."""
    n_items, n_slots = int(lengths.sum()), int(lengths.max())
    slot = np.arange(n_slots)
    start = np.cumsum(lengths) - lengths
    member = np.where(slot < lengths[:, None], start[:, None] + slot, n_items)
    home = np.repeat(np.arange(len(lengths)) * n_slots, lengths) + _count_up(lengths)
    return [member, home[:, None]]


def _windows(lengths: Index, window: int) -> list[Index]:
    """Tables of the windows inside sentences, and of the windows that each sentence has."""
    n_tokens, n_slots = int(lengths.sum()), int(min(window, lengths.max()))
    n_windows = np.maximum(lengths - window + 1, 1)
    start = np.cumsum(lengths) - lengths
    first = np.repeat(start, n_windows) + _count_up(n_windows)
    size = np.repeat(np.minimum(lengths, window), n_windows)
    slot = np.arange(n_slots)
    member = np.where(slot < size[:, None], first[:, None] + slot, n_tokens)
    # The token at place p stands in slot j of the sentence's window p - j, where there is one.
    nth = _count_up(lengths)[:, None] - slot
    is_window = (nth >= 0) & (nth < np.repeat(n_windows, lengths)[:, None])
    before = np.repeat(np.cumsum(n_windows) - n_windows, lengths)[:, None]
    home = np.where(is_window, (before + nth) * n_slots + slot, len(first) * n_slots)
    return [member, home, *_disjoint(n_windows)]
