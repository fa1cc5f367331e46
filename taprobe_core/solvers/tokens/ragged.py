"""Token sets of unequal length, the index tables that pool them, and who reads which of them.

`RaggedTokens` keeps the states of all sentences end to end, without padding. A batch of sentences
is described by `Slots`: tables that say which items (tokens, windows) each group (sentence, window)
holds. Only head scores, a few numbers per token, are ever laid out by such a table; states are not.

Every fold leaves some sentences out, and another fold needs most of those: a batch holds what any
model learns from. Sentences that the same models read are put next to each other, and neighbouring
models (of one fold, or of folds that follow each other) form a part that reads a few ranges of the
batch. What does not belong here: what is done with the items of a group (`pooling`), the products
over the ranges (`forward`, `backward`) and training (`training`).

Invariants: a sentence has at least one token; the tables are made on the host and go to the device
in one copy per epoch; both directions are gathers, so gradients do not depend on thread order.
Every sentence that a model learns from, or is validated on, is read for it; which others are read
with it changes no number of it but by rounding.

Source:
    None; our own layout. Measured on a CPU beside `segment_reduce`, `index_reduce` and
    `scatter_reduce` on [token, head] scores: softmax by gathered slots takes as long as by segment
    reductions, a maximum half as long, and on CUDA segment sums are not deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from taprobe_core.errors import DataError

Index = NDArray[np.int64]
Shapes = tuple[tuple[int, ...], ...]

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
    def of(cls, X: Any) -> RaggedTokens:
        """Return token sets, one [token, d] array per sentence, or [sentence, d] of one token each.

        Raises:
            DataError: as `from_sentences`.
        """
        if isinstance(X, RaggedTokens):
            return X
        return cls.from_sentences(X if is_ragged(X) else np.asarray(X)[:, None])  # type: ignore[arg-type]

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


def is_ragged(X: Any) -> bool:
    """Whether X holds a [token, d] array per sentence, and not one row per sentence."""
    if getattr(X, "ndim", None) == 3:
        return True
    return isinstance(X, list | tuple) and len(X) > 0 and getattr(X[0], "ndim", None) == 2


class Slots(NamedTuple):
    """Which items each group holds, and where each item went; int64 tensors.

    Attributes:
        member: [group, slot] item in each slot; in a slot that is empty the last row of the items.
        home: [item, copy] flat slots that hold the item; `group * slot` where there is no further
            copy. One column if groups do not overlap.
    """

    member: torch.Tensor
    home: torch.Tensor


class TokenBatch(NamedTuple):
    """Index tables of one batch of sentences.

    Attributes:
        flat: every table, end to end.
        row: [sentence] int64, which sentences; the number of all sentences for one that fills up.
        token: [token] int64, rows of the values; the rows past the sentences' tokens fill up, and
            the last, which always does, is what an empty slot points to.
        stages: one table, tokens of sentences; or two, tokens of windows and windows of sentences.
    """

    flat: torch.Tensor
    row: torch.Tensor
    token: torch.Tensor
    stages: tuple[Slots, ...]

    @classmethod
    def over(cls, flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> TokenBatch:
        """Lay the tables out on a flat tensor: rows, tokens, then members and homes by stage."""
        parts = flat.split_with_sizes([math.prod(shape) for shape in shapes])
        row, token, *tables = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        stages = zip(tables[::2], tables[1::2], strict=True)
        return cls(flat, row, token, tuple(Slots(*stage) for stage in stages))

    @property
    def shapes(self) -> Shapes:
        """Of all tables, as `over` takes them."""
        tables = [self.row, self.token, *(table for stage in self.stages for table in stage)]
        return tuple(tuple(table.shape) for table in tables)

    def copy(self) -> TokenBatch:
        """Return the same tables in memory of their own."""
        return self.over(self.flat.clone(), self.shapes)


class Rounding(NamedTuple):
    """What the sizes of a batch are rounded up to.

    Attributes:
        tokens: token rows, a multiple of this.
        sentences: sentences, a multiple of this, at least one of them without tokens; None: as
            many as there are.
        slots: slots of a sentence, this or twice, four times ... this; None: as many as needed.
    """

    tokens: int
    sentences: int | None = None
    slots: int | None = None

    def n_token_rows(self, n_tokens: int) -> int:
        """Return the token rows of a batch, at least one more than its tokens."""
        return (n_tokens // self.tokens + 1) * self.tokens

    def n_rows(self, n_sentences: int) -> int:
        """Return the sentences of a batch, with those that fill up."""
        if self.sentences is None:
            return n_sentences
        return (n_sentences // self.sentences + 1) * self.sentences

    def n_slots(self, n_items: int) -> int:
        """Return the slots of a sentence."""
        if self.slots is None:
            return n_items
        return self.slots << max(-(-n_items // self.slots) - 1, 0).bit_length()


ALIGNED = Rounding(32)
"""Matrix products of other sizes run at 70 % on a CPU."""
FEW_SHAPES = Rounding(256, 8, 128)
"""For batches whose work is recorded by shape."""


def plan_batches(
    tokens: RaggedTokens,
    batches: Sequence[Index],
    window: int | None,
    device: torch.device | str,
    rounding: Rounding = ALIGNED,
) -> list[TokenBatch]:
    """Make the tables of several batches and bring them to the device in one copy.

    Args:
        tokens: the sets; only their lengths are read.
        batches: sentences of each, [sentence] int64, not empty.
        window: tokens of a window, or None for poolings over whole sentences.
        device: where the tables are wanted.
        rounding: of the sizes.
    """
    made = [_tables(tokens, sentences, window, rounding) for sentences in batches]
    flat = torch.from_numpy(np.concatenate([table.ravel() for each in made for table in each]))
    shapes = [[table.shape for table in each] for each in made]
    parts = flat.to(device).split_with_sizes([sum(map(math.prod, each)) for each in shapes])
    return [TokenBatch.over(part, each) for part, each in zip(parts, shapes, strict=True)]


def _tables(
    tokens: RaggedTokens, sentences: Index, window: int | None, rounding: Rounding
) -> list[Index]:
    """Rows, tokens, and members and homes by stage, of one batch."""
    lengths = tokens.lengths[sentences]
    rows = tokens.token_rows(sentences)
    token = np.zeros(rounding.n_token_rows(len(rows)), dtype=np.int64)
    token[: len(rows)] = rows
    row = np.full(rounding.n_rows(len(sentences)), len(tokens))
    row[: len(sentences)] = sentences
    own = np.pad(lengths, (0, len(row) - len(lengths)))
    n_items = len(rows) if rounding.sentences is None else len(token)
    empty = len(token) - 1
    if window is None:
        return [row, token, *_disjoint(own, rounding, empty, n_items)]
    n_slots = int(min(window, lengths.max())) if rounding.slots is None else window
    count = np.where(own > 0, np.maximum(own - window + 1, 1), 0)
    n_windows = int(count.sum()) if rounding.sentences is None else len(token)
    inner = _windows(own, count, n_slots, empty, n_items, n_windows)
    # An empty slot of a sentence points behind the last window.
    return [row, token, *inner, *_disjoint(count, rounding, n_windows, n_windows)]


def _count_up(lengths: Index) -> Index:
    """0, 1, ... within each group."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _disjoint(lengths: Index, rounding: Rounding, empty: int, n_items: int) -> list[Index]:
    """Tables of groups of these many items each, one after another.

    Args:
        lengths: [group] int64; if there are more items than they sum to, the last is 0.
        rounding: of the slots.
        empty: item of an empty slot.
        n_items: rows of `home`; what is in no group is at home in the last group's last slot.
    """
    n_slots = rounding.n_slots(int(lengths.max()))
    slot = np.arange(n_slots)
    start = np.cumsum(lengths) - lengths
    member = np.where(slot < lengths[:, None], start[:, None] + slot, empty)
    home = np.full(n_items, member.size - 1)
    n_real = int(lengths.sum())
    home[:n_real] = np.repeat(np.arange(len(lengths)) * n_slots, lengths) + _count_up(lengths)
    return [member, home[:, None]]


def _windows(
    lengths: Index, count: Index, n_slots: int, empty: int, n_items: int, n_windows: int
) -> list[Index]:
    """Tables of the windows inside sentences.

    Args:
        lengths: [sentence] int64, tokens.
        count: [sentence] int64, windows.
        n_slots: tokens of a window.
        empty: item of an empty slot.
        n_items: rows of `home`; what is in no window is at home in the last row's last slot.
        n_windows: rows of `member`; if there are more items than tokens, more than windows.
    """
    n_real = int(count.sum())
    start = np.cumsum(lengths) - lengths
    first = np.repeat(start, count) + _count_up(count)
    size = np.repeat(np.minimum(lengths, n_slots), count)
    slot = np.arange(n_slots)
    member = np.full((n_windows, n_slots), empty)
    member[:n_real] = np.where(slot < size[:, None], first[:, None] + slot, empty)
    # The token at place p stands in slot j of the sentence's window p - j, where there is one.
    nth = _count_up(lengths)[:, None] - slot
    is_window = (nth >= 0) & (nth < np.repeat(count, lengths)[:, None])
    before = np.repeat(np.cumsum(count) - count, lengths)[:, None]
    home = np.full((n_items, n_slots), n_windows * n_slots - 1)
    home[: len(nth)] = np.where(is_window, (before + nth) * n_slots + slot, n_windows * n_slots)
    return [member, home]


Mask = NDArray[np.bool_]

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

    As many as if the model were alone, rounded up to 1 to 8, 10, 12, 14, 16, 20, 24, ... so that
    folds of similar size share their batches.

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

        An empty step is kept: the optimiser's number of steps must not depend on which models share
        the stack.
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


class ValidationGroup(NamedTuple):
    """Models that are validated on the same sentences, or nearly: [model] and [sentence] int64."""

    models: Index
    sentences: Index


def validation_groups(
    stopping_weight: NDArray[np.float64], lengths: Index, values: int
) -> Sequence[ValidationGroup]:
    """Group the validation sentences of a stack by the models that they validate.

    Args:
        stopping_weight: [sentence, model], above 0 where the sentence validates the model.
        lengths: [sentence] int64, tokens.
        values: first-layer weights of one model.

    Returns:
        Groups that together hold every validation sentence once, each with every model that it
        counts for.
    """
    is_validated = stopping_weight > 0
    patterns, which = np.unique(is_validated, axis=0, return_inverse=True)
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
        ValidationGroup(np.flatnonzero(models), np.flatnonzero(np.isin(which.reshape(-1), members)))
        for models, _, members in merged
    ]
