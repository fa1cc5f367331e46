"""The named peer of the token probes: one padded torch module per model, trained by autograd.

Written for this comparison after the earlier system's description: sentences padded per batch of
32 with a mask, AdamW, validation after every epoch. It gets the states standardised beforehand,
outside the clock. What does not belong here: timing (`tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from taprobe_core.solvers.tokens.pooling import TokenProbeOptions

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Padded states, mask, targets and weights of some sentences."""


class PaddedProbe(nn.Module):
    """Attention, MultiMax or rolling MultiMax probe over padded sentences; one model."""

    def __init__(self, d: int, options: TokenProbeOptions) -> None:
        super().__init__()
        self.options = options
        sizes = [d] + [options.width] * options.depth
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs)
            for inputs, outputs in zip(sizes, sizes[1:], strict=False)  # noqa: RUF007
        )
        self.query = nn.Parameter(torch.zeros(options.n_heads, options.width))
        self.value = nn.Parameter(torch.zeros(options.n_heads, options.width))
        self.mixer = nn.Linear(options.n_heads, 1)

    @torch.no_grad()
    def load(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over weights under the names that our solver gives them."""
        named = {name: torch.from_numpy(np.asarray(each)) for name, each in arrays.items()}
        for at, layer in enumerate(self.layers):
            layer.weight.copy_(named[f"token_weight_{at}"])
            layer.bias.copy_(named[f"token_bias_{at}"])
        self.query.copy_(named.get("query", self.query))
        self.value.copy_(named["value"])
        self.mixer.weight.copy_(named["mixer"][None])
        self.mixer.bias.copy_(named["bias"])

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw Xavier-uniform weights by the library's own generator; zero biases."""
        generator = torch.Generator().manual_seed(seed)
        for name, each in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(each)
            else:
                nn.init.xavier_uniform_(each, generator=generator)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits [sentence] of padded states [sentence, token, d]."""
        for layer in self.layers:
            states = torch.relu(layer(states))
        outside = ~mask[..., None]
        value = states @ self.value.T
        if self.options.pooling == "multimax":
            return self.mixer(value.masked_fill(outside, -torch.inf).amax(1))[:, 0]
        query = (states @ self.query.T).masked_fill(outside, -torch.inf)
        if self.options.pooling == "attention":
            return self.mixer((torch.softmax(query, 1) * value).sum(1))[:, 0]
        return self.mixer(self._rolled(query, value, mask))[:, 0]

    def _rolled(self, query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        window = min(self.options.window, mask.shape[1])
        is_whole = mask.unfold(1, window, 1).all(2)
        is_whole[:, 0] = True
        lowest = ~is_whole[..., None]
        inside = query.unfold(1, window, 1).masked_fill(lowest[..., None], 0.0)
        mean = (torch.softmax(inside, 3) * value.unfold(1, window, 1)).sum(3)
        return mean.masked_fill(lowest, -torch.inf).amax(1)


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
    model: PaddedProbe,
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
def scores(model: PaddedProbe, data: PaddedSet, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return logits of some sentences, 32 at a time."""
    parts = np.array_split(rows, -(-len(rows) // 32))
    return torch.cat([model(*data.batch(part)[:2]) for part in parts])


@torch.no_grad()
def watched_loss(model: PaddedProbe, data: PaddedSet, rows: NDArray[np.int64]) -> float:
    """Return the weighted mean loss of some sentences."""
    states, mask, y, weight = data.batch(rows)
    loss = functional.binary_cross_entropy_with_logits(
        model(states, mask), y, weight=weight, reduction="sum"
    )
    return float(loss / weight.sum())
