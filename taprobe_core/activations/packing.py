"""Texts side by side in one forward pass: which stand together, and where each one lies.

In: token counts. Out: packs of at most a token budget, and the layout that attention and pooling
read. What does not belong here: running a pack (`forward`, `fused`).

The invariant: every text is in exactly one pack, whole; a text longer than the budget stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch


def plan_packs(n_tokens: Sequence[int], token_budget: int) -> list[list[int]]:
    """Share texts out over packs: longest first, each into the first pack with room (first fit).

    The longest text is in the first pack, so one too long for the memory fails at the start. The
    shortest of the last pack stands alone: while it runs, the shards of the others are written.

    Args:
        n_tokens: tokens of each text.
        token_budget: most tokens of a pack; below the shortest text, every text stands alone.

    Returns:
        Indices into `n_tokens`, one list a pack.

    Example:
        >>> plan_packs([3, 9, 5, 2], 10)
        [[1], [2, 0], [3]]
    """
    packs: list[list[int]] = []
    rooms: list[int] = []
    for text in sorted(range(len(n_tokens)), key=lambda at: (-n_tokens[at], at)):
        at = next((i for i, room in enumerate(rooms) if room >= n_tokens[text]), None)
        if at is None:
            packs.append([])
            rooms.append(token_budget)
            at = len(packs) - 1
        packs[at].append(text)
        rooms[at] -= n_tokens[text]
    if packs and len(packs[-1]) > 1:
        packs.append([packs[-1].pop()])
    return packs


QUERY_BLOCK = 64
"""Queries that an attention kernel takes at once."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the texts of one pack lie.

    Attributes:
        bounds: half-open token range of each text in the pack, gapless, from 0.
        blocks: int32 [block, 3], on the device: `query_blocks` of the texts.
        positions: int64 [1, token], on the device: position of each token in its own text.
        attended: layers whose attention ran through this layout, in order of running.
    """

    bounds: tuple[tuple[int, int], ...]
    blocks: torch.Tensor
    positions: torch.Tensor
    attended: list[int] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(end - start for start, end in self.bounds)

    def to(self, device: torch.device) -> Layout:
        """Return the layout with its tensors on `device`; `attended` stays shared."""
        blocks, positions = self.blocks.to(device), self.positions.to(device)
        return Layout(self.bounds, blocks, positions, self.attended)


def lay_out(n_tokens: Sequence[int], device: torch.device) -> Layout:
    """Lay texts side by side in the order given.

    Args:
        n_tokens: tokens of each text, each at least 1.
        device: where the layout's tensors are wanted.
    """
    ends = torch.tensor([0, *n_tokens]).cumsum(0)
    starts = ends[:-1].repeat_interleave(torch.tensor(n_tokens))
    positions = torch.arange(int(ends[-1])) - starts
    edges = ends.tolist()
    return Layout(
        tuple(pairwise(edges)),
        to_device(query_blocks(edges), device),
        to_device(positions[None], device),
    )


def query_blocks(edges: Sequence[int]) -> torch.Tensor:
    """Divide the texts of a pack into blocks of at most `QUERY_BLOCK` queries.

    Args:
        edges: where each text starts, and the end of the last.

    Returns:
        int32 [block, 3], on the CPU: start of the text, first query, end of the text. The blocks
        with most keys before them come first, as the longest of a list of jobs should.

    Example:
        >>> query_blocks([0, 70, 100]).tolist()
        [[0, 64, 70], [0, 0, 70], [70, 70, 100]]
    """
    parts = []
    for start, end in pairwise(edges):
        first = torch.arange(start, end, QUERY_BLOCK)
        parts.append(
            torch.stack([torch.full_like(first, start), first, torch.full_like(first, end)], dim=1)
        )
    blocks = torch.cat(parts)
    order = torch.argsort(blocks[:, 0] - blocks[:, 1], stable=True)
    return blocks[order].to(torch.int32)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device; to an accelerator without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
