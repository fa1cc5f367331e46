"""The named peer of the token probes: the reference module, one per model, trained by autograd.

A loop written for this comparison after the earlier system's description: sentences padded per
batch of 32 with a mask, AdamW, validation after every epoch. It gets the states standardised
beforehand, outside the clock. What does not belong here: timing (`tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from taprobe_core.solvers.tokens.reference import ReferenceProbe

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Padded states, mask, targets and weights of some sentences."""


class PaddedSet:
    """Standardised sentences of one model's fold, padded when a batch is asked for."""

    def __init__(
        self,
        sentences: Sequence[torch.Tensor],
        y: NDArray[np.float64],
        weight: NDArray[np.float64],
        device: torch.device,
    ) -> None:
        self.sentences = [each.to(device) for each in sentences]
        self.y = torch.from_numpy(y).float().to(device)
        self.weight = torch.from_numpy(weight).float().to(device)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Pad some sentences to the longest of them."""
        parts = [self.sentences[row] for row in rows]
        states = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts], device=states.device)
        mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        at = torch.from_numpy(rows).to(states.device)
        return states, mask, self.y[at], self.weight[at]


def train_epoch(
    model: ReferenceProbe,
    optimizer: torch.optim.Optimizer,
    data: PaddedSet,
    batches: Sequence[NDArray[np.int64]],
) -> None:
    """Take one AdamW step per batch."""
    for rows in batches:
        states, mask, y, weight = data.batch(rows)
        optimizer.zero_grad()
        logits = model(states, mask)
        functional.binary_cross_entropy_with_logits(logits, y, weight=weight).backward()
        optimizer.step()


@torch.no_grad()
def scores(model: ReferenceProbe, data: PaddedSet, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return logits of some sentences, 32 at a time."""
    parts = np.array_split(rows, -(-len(rows) // 32))
    return torch.cat([model(*data.batch(part)[:2]) for part in parts])


@torch.no_grad()
def watched_loss(model: ReferenceProbe, data: PaddedSet, rows: NDArray[np.int64]) -> float:
    """Return the weighted mean loss of some sentences."""
    states, mask, y, weight = data.batch(rows)
    loss = functional.binary_cross_entropy_with_logits(
        model(states, mask), y, weight=weight, reduction="sum"
    )
    return float(loss / weight.sum())
