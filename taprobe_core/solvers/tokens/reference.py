"""What a token probe computes: one plain module over padded sentences, trained by autograd.

The definition of the attention, MultiMax and rolling MultiMax probe (arXiv 2601.11516, with a
learned weight per head). `solve` trains many at once without padding; tests and benchmarks compare
it with this.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from taprobe_core.solvers.tokens.pooling import TokenProbeOptions


class ReferenceProbe(nn.Module):
    """One probe of states of width d; `forward` gives the logit, or value, of each sentence."""

    def __init__(self, d: int, options: TokenProbeOptions, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        sizes = [d] + [options.width] * options.depth
        self.layers = nn.ModuleList(nn.Linear(*each) for each in pairwise(sizes))
        self.query = nn.Parameter(torch.empty(options.n_heads, options.width))
        self.value = nn.Parameter(torch.empty(options.n_heads, options.width))
        self.mixer = nn.Linear(options.n_heads, 1)
        generator = torch.Generator().manual_seed(seed)
        for name, each in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(each)
            else:
                nn.init.xavier_uniform_(each, generator=generator)

    @torch.no_grad()
    def load(self, arrays: Mapping[str, Any]) -> None:
        """Take over the weights of one trained model, named as `TokenSolution.column` does."""
        named = {name: torch.as_tensor(each) for name, each in arrays.items()}
        for at, layer in enumerate(self.layers):
            own = {"weight": named[f"token_weight_{at}"], "bias": named[f"token_bias_{at}"]}
            layer.load_state_dict(own)
        self.query.copy_(named.get("query", self.query))
        self.value.copy_(named["value"])
        self.mixer.weight.copy_(named["mixer"][None])
        self.mixer.bias.copy_(named["bias"])

    def forward(self, states: Tensor, mask: Tensor, is_soft: bool = False) -> Tensor:
        """Score sentences: standardised states [S, T, d], mask [S, T] False where padded -> [S]."""
        for layer in self.layers:
            states = torch.relu(layer(states))  # [S, T, width]
        value = states @ self.value.T  # [S, T, head]
        if self.options.pooling == "multimax":
            return self._mix(_largest(value, mask, is_soft))
        query = (states @ self.query.T).masked_fill(~mask[..., None], -torch.inf)  # [S, T, head]
        if self.options.pooling == "attention":
            return self._mix((torch.softmax(query, 1) * value).sum(1))
        size = min(self.options.window, mask.shape[1])
        is_whole = mask.unfold(1, size, 1).all(2)  # [S, window]
        is_whole[:, 0] = True  # a sentence shorter than a window is one
        inside = query.unfold(1, size, 1).masked_fill(~is_whole[..., None, None], 0.0)
        mean = (torch.softmax(inside, 3) * value.unfold(1, size, 1)).sum(3)  # [S, window, head]
        return self._mix(_largest(mean, is_whole, is_soft))

    def _mix(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.mixer(pooled)[:, 0]
        return logits


def _largest(items: Tensor, mask: Tensor, is_soft: bool) -> Tensor:
    """Largest item of each sentence, or the mean weighted by the items' softmax, [S, head]."""
    lowered = items.masked_fill(~mask[..., None], -torch.inf)
    if not is_soft:
        return lowered.amax(1)
    return (torch.softmax(lowered, 1) * items.masked_fill(~mask[..., None], 0.0)).sum(1)
