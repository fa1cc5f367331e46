"""Attention mass from softmax weights that a model has already made.

For models whose own way of attending is not known here: their eager attention hands out its
weights, [head, query token, key token], and those are summed. What does not belong here: plain
causal attention, which needs no matrix of tokens (mass).

The invariant: sums are float32 for any input type.
"""

from __future__ import annotations

import numpy as np
import torch

from taprobe_core.attention.mass import SentenceMass, TailMass
from taprobe_core.attention.tiles import Bounds, Spans, span_bounds


def sentence_mass_of(weights: torch.Tensor, spans: Spans) -> SentenceMass:
    """Sum weights over every pair of sentences.

    Args:
        weights: [head, token, token], queries before keys, any float type.
        spans: half-open token ranges, [sentence, 2], on the CPU; may leave gaps and may overlap.

    Returns:
        Mass [head, sentence, sentence] and BOS mass [head, sentence], float32.

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.
    """
    bounds = span_bounds(spans, weights.shape[-1])
    return SentenceMass(*_summed(weights, bounds, bounds))


def tail_mass_of(weights: torch.Tensor, spans: Spans, last_n: int) -> TailMass:
    """Sum the weights of each of the last tokens over every sentence.

    Args:
        weights: [head, token, token], queries before keys, any float type.
        spans: half-open token ranges, [sentence, 2], on the CPU.
        last_n: query tokens, counted from the end; a shorter text gives all of its own.

    Returns:
        Mass [head, query, sentence], BOS mass and eligibility, with query = min(last_n, token).

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.
    """
    n_tokens = weights.shape[-1]
    bounds = span_bounds(spans, n_tokens)
    position = np.arange(max(0, n_tokens - last_n), n_tokens)
    mass, bos_mass = _summed(weights, np.stack([position, position + 1], axis=1), bounds)
    is_after = torch.from_numpy(position[:, None] >= bounds[:, 1])
    return TailMass(mass, bos_mass, is_after.to(weights.device))


def _summed(
    weights: torch.Tensor, rows: Bounds, columns: Bounds
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = (_members(each, weights) for each in (rows, columns))
    mass, bos_mass = [], []
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
        for head in weights:
            by_query = queries @ head.float()
            mass.append(by_query @ keys.T)
            bos_mass.append(by_query[:, 0])
    return torch.stack(mass), torch.stack(bos_mass)


def _members(bounds: Bounds, weights: torch.Tensor) -> torch.Tensor:
    """Which token is in which range, float32 [range, token]."""
    position = torch.arange(weights.shape[-1], device=weights.device)
    edges = torch.from_numpy(np.ascontiguousarray(bounds)).to(weights.device)
    return ((position >= edges[:, :1]) & (position < edges[:, 1:])).float()
