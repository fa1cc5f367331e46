"""Gradients of a stack of token probes, written out by hand.

What does not belong here: the forward pass (`forward`) and what is done with a gradient
(`training`). Invariant: equal to automatic differentiation of the same network on states that were
standardised by the model's own fold.

Where hard maxima leave most tokens without a gradient, each model's tokens that have one are
gathered and the rest is skipped: for sentences of 22 tokens and 4 heads a fifth of the work. The
numbers differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from taprobe_core.solvers.tokens.forward import (
    FoldScaling,
    Stack,
    Trace,
    Workspace,
    heads,
    products,
)
from taprobe_core.solvers.tokens.pooling import maxima, pool_gradient
from taprobe_core.solvers.tokens.ragged import Part, TokenBatch

GATHER_BELOW = 0.5
"""Share of the tokens; gathering costs about as much as the products it saves here."""


class _Upstream(NamedTuple):
    """Gradient where it enters the layers, and the values of the forward pass there.

    Attributes:
        to_heads: [model, score * head, width], gradient of queries and values.
        to_hidden: [model, width, place], gradient of the last layer's output.
        hidden: of each layer, [model, width, place].
        states: [token, d] if the places are all tokens, else [model, place, d].
    """

    to_heads: torch.Tensor
    to_hidden: torch.Tensor
    hidden: list[torch.Tensor]
    states: torch.Tensor


def backward(
    stack: Stack,
    batch: TokenBatch,
    trace: Trace,
    gradient: torch.Tensor,
    out: Stack,
    space: Workspace,
    parts: Sequence[Part] | None = None,
) -> None:
    """Write the gradient of every parameter, that of the first layer for its weights as scaled.

    `through_scaling` makes it that for the weights of the stack.

    Args:
        stack: as given to `forward`.
        batch: as given to `forward`.
        trace: from `forward`.
        gradient: [sentence, m], of the loss for the logits; 0 where a model does not learn.
        out: overwritten, the models of `stack`.
        space: as given to `forward`.
        parts: as given to `forward`; `gradient` is 0 where a model does not read.
    """
    shape, views, m = stack.shape, out.views, stack.n_models
    by_head = gradient[..., None]
    torch.sum(by_head * trace.pooled.view(-1, m, shape.n_heads), 0, out=views["mixer"])
    torch.sum(gradient, 0, out=views["bias"].view(-1))
    to_pooled = (by_head * stack.views["mixer"]).flatten(1)
    at = maxima(trace.saved) if shape.pooling == "multimax" else None
    if at is not None and shape.n_heads * len(at) < GATHER_BELOW * len(batch.token):
        upstream = _at_maxima(stack, trace, to_pooled, at)
    else:
        upstream = _at_all_tokens(stack, batch, trace, to_pooled, space)
    if "query" in views:
        views["query"].copy_(upstream.to_heads[:, : shape.n_heads])
    views["value"].copy_(upstream.to_heads[:, -shape.n_heads :])
    _through_layers(stack, upstream, out, parts)


def through_scaling(out: Stack, scaling: FoldScaling) -> None:
    """Turn the gradient for the first layer as scaled into that for the weights themselves.

    d/dW of W ((x - mean) * inverse): the mean's share is one outer product per model.

    Args:
        out: as `backward` wrote it; overwritten.
        scaling: of each model's fold.
    """
    weight = out.views["token_weight_0"]
    weight.addcmul_(out.views["token_bias_0"][..., None], scaling.mean[:, None], value=-1)
    weight.mul_(scaling.inverse)


def _at_all_tokens(
    stack: Stack, batch: TokenBatch, trace: Trace, to_pooled: torch.Tensor, space: Workspace
) -> _Upstream:
    shape, m, n_tokens = stack.shape, stack.n_models, len(trace.states)
    to_scores = pool_gradient(to_pooled, trace.saved, trace.scores, batch, shape.pooling)
    by_model = to_scores.view(-1, n_tokens, m, shape.n_heads).permute(2, 0, 3, 1)
    by_model = by_model.reshape(m, -1, n_tokens)
    to_heads = torch.bmm(by_model, trace.hidden[-1].mT)
    to_hidden = space.take("to_hidden", m, shape.width, n_tokens)
    torch.bmm(heads(stack).mT, by_model, out=to_hidden)
    return _Upstream(to_heads, to_hidden, trace.hidden, trace.states)


def _at_maxima(stack: Stack, trace: Trace, to_pooled: torch.Tensor, at: torch.Tensor) -> _Upstream:
    """Only the tokens where a head has its maximum: [model, sentence * head] places."""
    shape, m = stack.shape, stack.n_models
    place = at.view(-1, m, shape.n_heads).transpose(0, 1).reshape(m, -1)
    by_model = to_pooled.view(-1, m, shape.n_heads).transpose(0, 1)
    spread = place[:, None].expand(-1, shape.width, -1)
    hidden = [each.gather(2, spread) for each in trace.hidden]
    by_head = hidden[-1].view(m, shape.width, -1, shape.n_heads)
    to_heads = (by_head * by_model[:, None]).sum(2).mT
    to_hidden = (stack.views["value"].mT[:, :, None] * by_model[:, None]).flatten(2)
    states = trace.states.index_select(0, place.view(-1)).view(m, place.shape[1], -1)
    return _Upstream(to_heads, to_hidden, hidden, states)


def _through_layers(
    stack: Stack, upstream: _Upstream, out: Stack, parts: Sequence[Part] | None
) -> None:
    shape, views, hidden = stack.shape, out.views, upstream.hidden
    to_hidden = upstream.to_hidden
    for layer in range(shape.depth - 1, -1, -1):
        torch.ops.aten.threshold_backward.grad_input(
            to_hidden, hidden[layer], 0, grad_input=to_hidden
        )
        torch.sum(to_hidden, 2, out=views[f"token_bias_{layer}"])
        if layer:
            torch.bmm(to_hidden, hidden[layer - 1].mT, out=views[f"token_weight_{layer}"])
            to_hidden = torch.bmm(stack.views[f"token_weight_{layer}"].mT, to_hidden)
    weight = views["token_weight_0"]
    if upstream.states.ndim == 2:
        _first_layer(to_hidden, upstream.states, weight, parts)
    else:
        torch.bmm(to_hidden, upstream.states, out=weight)


def _first_layer(
    to_hidden: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    parts: Sequence[Part] | None,
) -> None:
    """Write the gradient of the first layer's weights, [model, width, d], over scaled states."""
    m, width, n_tokens = to_hidden.shape
    flat, out = to_hidden.view(-1, n_tokens), weight.view(m * width, -1)
    if parts is not None:
        for part in parts:
            if not part.ranges:
                weight[part.models[0] : part.models[1]].zero_()
    written = 0
    for rows, at in products(parts, m, width, n_tokens):
        # Ranges of one part follow each other: the first writes, the others add.
        if rows.stop > written:
            torch.mm(flat[rows, at], states[at], out=out[rows])
            written = rows.stop
        else:
            out[rows].addmm_(flat[rows, at], states[at])
