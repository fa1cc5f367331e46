"""The network of a token probe, for a stack of models at once.

r_t = ReLU network of the standardised state of token t; each head scores a token by q.r_t and
v.r_t; `pooling` pools the scores of a sentence; logit = w.z + b over the heads. What does not
belong here: gradients (`backward`), optimisation and stopping (`training`).

Invariants: models of a stack share no parameter, so a model's numbers do not depend on the others
but for rounding; states come scaled by one affine map that all folds share, and a fold's own mean
and scale are folded into the first layer, exactly, so that tokens are never copied per fold and no
digit is lost to features with large means. Gradients are for weights of the fold's standardised
states, as if each fold had been standardised by itself.

Source:
    arXiv 2601.11516 for the shared form (two layers of width 100, 10 heads, heads summed); the
    weight w per head is ours. Glorot and Bengio 2010 for the initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.solvers.tokens.pooling import LOWEST, Pooling, Saved, n_scores, pool
from taprobe_core.solvers.tokens.ragged import Part, TokenBatch


class NetworkShape(NamedTuple):
    """Sizes of one model: features, hidden width and layers, heads, and how they pool."""

    n_features: int
    width: int
    depth: int
    n_heads: int
    pooling: Pooling

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of one model, [out, in] for weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.depth):
            inputs = self.width if layer else self.n_features
            shapes[f"token_weight_{layer}"] = (self.width, inputs)
            shapes[f"token_bias_{layer}"] = (self.width,)
        if n_scores(self.pooling) == 2:
            shapes["query"] = (self.n_heads, self.width)
        shapes["value"] = (self.n_heads, self.width)
        shapes["mixer"] = (self.n_heads,)
        shapes["bias"] = (1,)
        return shapes


def draw(shape: NetworkShape, seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw the initial weights of one model: Xavier-uniform weights, zero biases.

    Args:
        shape: sizes.
        seed: at least 0; models of one seed start from equal weights, whatever their fold.

    Returns:
        Parameters by name, in the order of `shape.parameters()`.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = {}
    for name, size in shape.parameters().items():
        if "bias" in name:
            drawn[name] = np.zeros(size, np.float32)
            continue
        outputs, inputs = size if len(size) == 2 else (1, size[0])
        bound = float(np.sqrt(6 / (inputs + outputs)))
        drawn[name] = rng.uniform(-bound, bound, size).astype(np.float32)
    return drawn


class Stack:
    """Parameters of several models, or anything of their shape, in one flat tensor.

    Attributes:
        flat: [value], one block per parameter, in it one model after another.
        views: parameter by name, [model, ...], views of `flat`.
    """

    def __init__(self, shape: NetworkShape, flat: torch.Tensor, n_models: int) -> None:
        self.shape = shape
        self.flat = flat
        self.n_models = n_models
        sizes = shape.parameters()
        counts = [n_models * int(np.prod(size)) for size in sizes.values()]
        parts = flat.split_with_sizes(counts)
        self.views = {
            name: part.view(n_models, *size)
            for (name, size), part in zip(sizes.items(), parts, strict=True)
        }

    @classmethod
    def zeros(
        cls, shape: NetworkShape, n_models: int, device: torch.device, dtype: torch.dtype
    ) -> Stack:
        """Return a stack of zeros."""
        size = n_models * sum(int(np.prod(each)) for each in shape.parameters().values())
        return cls(shape, torch.zeros(size, device=device, dtype=dtype), n_models)

    def like(self, flat: torch.Tensor) -> Stack:
        """Return a stack of the same models over another flat tensor."""
        return Stack(self.shape, flat, self.n_models)

    def take(self, models: torch.Tensor) -> Stack:
        """Return some of the models, [model] int64, as a stack of its own."""
        parts = [view.index_select(0, models).flatten() for view in self.views.values()]
        return Stack(self.shape, torch.cat(parts), len(models))

    def put(self, models: torch.Tensor, other: Stack, chosen: torch.Tensor) -> None:
        """Overwrite some models, [model] int64, with as many chosen ones of another stack."""
        for name, view in self.views.items():
            view.index_copy_(0, models, other.views[name].index_select(0, chosen))

    def keep(self, models: torch.Tensor) -> Stack:
        """Drop all models but some, ascending [model] int64, in place; this stack is lost."""
        size = sum(view[0].numel() for view in self.views.values()) * len(models)
        kept = Stack(self.shape, self.flat[:size], len(models))
        for name, view in kept.views.items():
            # What is written lies at or before what is read, and no later parameter before it.
            view.copy_(self.views[name].index_select(0, models))
        return kept

    def fill(self, drawn: dict[str, NDArray[np.float32]]) -> None:
        """Give every model the same parameters."""
        for name, view in self.views.items():
            view.copy_(torch.from_numpy(drawn[name]).to(view).expand_as(view))


class FoldScaling(NamedTuple):
    """How each model's training tokens were scaled, beyond what all folds share.

    Attributes:
        mean: [model, d], mean of the shared scaling's states.
        inverse: [model, 1, d], one over their standard deviation.
    """

    mean: torch.Tensor
    inverse: torch.Tensor

    def take(self, models: torch.Tensor) -> FoldScaling:
        """Return that of some models, [model] int64."""
        return FoldScaling(self.mean.index_select(0, models), self.inverse.index_select(0, models))


class FirstLayer(NamedTuple):
    """The first layer as it reads states that all folds share.

    Attributes:
        weight: [model, width, d], with each fold's scale folded in.
        shift: [model, width], what the fold's mean takes off the bias.
    """

    weight: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, stack: Stack, scaling: FoldScaling, space: Workspace) -> FirstLayer:
        """Fold the scaling into a stack's first layer; arrays of the workspace."""
        own = stack.views["token_weight_0"]
        weight = space.take("weight", *own.shape)
        first = cls(weight, space.take("shift", *own.shape[:2]))
        first.refresh(stack, scaling)
        return first

    def refresh(self, stack: Stack, scaling: FoldScaling) -> None:
        """Follow weights that have changed."""
        torch.mul(stack.views["token_weight_0"], scaling.inverse, out=self.weight)
        torch.bmm(scaling.mean[:, None], self.weight.mT, out=self.shift[:, None])

    def take(self, models: torch.Tensor) -> FirstLayer:
        """Return that of some models, [model] int64."""
        return FirstLayer(self.weight.index_select(0, models), self.shift.index_select(0, models))


class Workspace:
    """Large arrays that every step needs again, so that memory is not asked for anew.

    Attributes:
        n_grown: how often an array was replaced by a larger one; what was recorded before is void.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self.n_grown = 0
        self._flat: dict[str, torch.Tensor] = {}

    def reserve(self, stack: Stack, n_tokens: int) -> None:
        """Make room for the units of a batch, forward and backward, and of somewhat larger ones."""
        shape = stack.shape
        room = stack.n_models * shape.width << (n_tokens - 1).bit_length()
        for name in ("to_hidden", *(f"hidden_{layer}" for layer in range(shape.depth))):
            self.take(name, room)

    def take(self, name: str, *size: int) -> torch.Tensor:
        """Return an array of a size; what was taken before under the name is lost."""
        n = math.prod(size)
        if name not in self._flat or len(self._flat[name]) < n:
            # Finite from the start: what no model reads is multiplied by 0, never skipped.
            self._flat[name] = self._like.new_zeros(n)
            self.n_grown += 1
        return self._flat[name][:n].view(size)


class Trace(NamedTuple):
    """What the gradient needs of a forward pass.

    Attributes:
        states: [token, d].
        hidden: of each layer, [model, width, token], after ReLU; arrays of the workspace.
        scores: [query and value | value, token, model * head].
        saved: what the gradient of the pooling needs.
        pooled: [sentence, model * head].
    """

    states: torch.Tensor
    hidden: list[torch.Tensor]
    scores: torch.Tensor
    saved: Saved
    pooled: torch.Tensor


def forward(
    stack: Stack,
    first: FirstLayer,
    states: torch.Tensor,
    batch: TokenBatch,
    is_soft: bool,
    space: Workspace,
    parts: Sequence[Part] | None = None,
) -> tuple[torch.Tensor, Trace]:
    """Score the sentences of a batch with every model.

    Args:
        stack: m models.
        first: their first layer.
        states: [token, d] by the batch's token rows, scaled as all folds share.
        batch: index tables.
        is_soft: the softmax-weighted mean in place of maxima, for training.
        space: overwritten.
        parts: which models read what; None: all models read everything. The logit of a sentence
            that a model does not read is finite and means nothing.

    Returns:
        Logits [sentence, m], and what `backward.backward` needs.
    """
    shape, views, m, n_tokens = stack.shape, stack.views, stack.n_models, len(states)
    units = space.take("hidden_0", m * shape.width, n_tokens)
    weight = first.weight.view(-1, shape.n_features)
    bias = (views["token_bias_0"] - first.shift).view(-1, 1)
    for rows, at in products(parts, m, shape.width, n_tokens):
        torch.addmm(bias[rows], weight[rows], states[at].t(), out=units[rows, at])
    hidden = [units.relu_().view(m, shape.width, n_tokens)]
    for layer in range(1, shape.depth):
        bias = views[f"token_bias_{layer}"][..., None]
        out = space.take(f"hidden_{layer}", m, shape.width, n_tokens)
        torch.baddbmm(bias, views[f"token_weight_{layer}"], hidden[-1], out=out)
        hidden.append(out.relu_())
    by_model = torch.bmm(heads(stack), hidden[-1]).view(m, -1, shape.n_heads, n_tokens)
    # Of a single model this would be a view: kernels need the columns side by side.
    scores = by_model.permute(1, 3, 0, 2).reshape(by_model.shape[1], n_tokens, -1).contiguous()
    scores[:, -1] = LOWEST
    pooled, saved = pool(scores, batch, shape.pooling, is_soft)
    logits = (pooled.view(-1, m, shape.n_heads) * views["mixer"]).sum(2)
    return logits.add_(views["bias"].view(-1)), Trace(states, hidden, scores, saved, pooled)


def products(
    parts: Sequence[Part] | None, n_models: int, width: int, n_tokens: int
) -> Iterator[tuple[slice, slice]]:
    """Yield the products of the first layer: rows of its units, and token rows."""
    if parts is None:
        yield slice(0, n_models * width), slice(0, n_tokens)
        return
    for part in parts:
        low, high = part.models
        for start, end in part.ranges:
            yield slice(low * width, high * width), slice(start, end)


def heads(stack: Stack) -> torch.Tensor:
    """Queries and values of every model, [model, (query and value | value) * head, width]."""
    views = stack.views
    return torch.cat([views["query"], views["value"]], 1) if "query" in views else views["value"]
