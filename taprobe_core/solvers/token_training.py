"""Train a stack of token probes together: one pass over the tokens serves every model.

All models of a stack have one seed: they start from the same weights and see the same batches, and
a sentence that a model must not learn from has weight 0 in its loss. What does not belong here: how
columns are grouped into stacks (`token_probes`) and the network (`token_forward`).

Invariants: the order of the sentences is a function of the seed and their number alone, their cut
into batches of that and the number that the model learns from, so that a model's result does not
depend on the others but for rounding; a sentence that no model of the stack
learns from is not read; a model that has stopped leaves the stack and costs nothing more; the host
waits for the device once per epoch.

Source:
    AdamW: Loshchilov and Hutter 2019. Batches are even, held-out sentences counted, where usual
    loops leave a small last one; a model has about `batch_size` sentences of its own in each. A
    batch without a sentence that a model learns from counts as a step of gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.optim.adamw import adamw

from taprobe_core.solvers.ragged import TokenBatch, plan_batches
from taprobe_core.solvers.token_backward import backward
from taprobe_core.solvers.token_forward import (
    FoldScaling,
    NetworkShape,
    Stack,
    Workspace,
    draw,
    forward,
)
from taprobe_core.solvers.token_options import Loss, TokenProbeOptions
from taprobe_core.solvers.token_reading import Readers, n_batches, watchers
from taprobe_core.solvers.token_states import TokenStates

Floats = NDArray[np.float64]


class Targets(NamedTuple):
    """What a stack learns, [sentence, model] each.

    Attributes:
        y: target.
        weight: of a sentence in the training loss; 0 outside the training sentences.
        watched: of a sentence in the loss that decides when to stop; None: no model stops early.
    """

    y: Floats
    weight: Floats
    watched: Floats | None


class Trained(NamedTuple):
    """A trained stack; arrays are [model].

    Attributes:
        stack: the weights of the best epoch, or of the last without early stopping.
        n_epochs: epochs that the model took part in.
        best_epoch: which of them, from 1, had the lowest watched loss.
        best_loss: that loss; NaN without early stopping.
        is_stopped: whether patience ran out before the last epoch.
    """

    stack: Stack
    n_epochs: NDArray[np.int64]
    best_epoch: NDArray[np.int64]
    best_loss: Floats
    is_stopped: NDArray[np.bool_]


class _Tensors(NamedTuple):
    """The targets of the models that still learn, on the device."""

    y: torch.Tensor
    weight: torch.Tensor
    watched: torch.Tensor | None

    def take(self, models: torch.Tensor) -> _Tensors:
        watched = None if self.watched is None else self.watched.index_select(1, models)
        return _Tensors(
            self.y.index_select(1, models), self.weight.index_select(1, models), watched
        )


def train_stack(
    states: TokenStates,
    scaling: FoldScaling,
    targets: Targets,
    options: TokenProbeOptions,
    seed: int,
) -> Trained:
    """Train one model per column of the targets.

    Args:
        states: token states on the device.
        scaling: of each model's fold.
        targets: of each model; of models whose epochs have equally many batches.
        options: settings.
        seed: of the initial weights and of the order of sentences.
    """
    m = targets.y.shape[1]
    shape = network_shape(states.tokens.n_features, options)
    stack = Stack.zeros(shape, m, states.device, torch.float32)
    stack.fill(draw(shape, seed))
    best = stack.like(stack.flat.clone())
    n_steps = n_batches(int((targets.weight > 0).sum(axis=0).max()), options.batch_size)
    learner = _Learner(states, scaling, targets, options, stack)
    rng = np.random.default_rng([seed, 1])
    active = np.arange(m)
    best_loss = np.full(m, np.nan if targets.watched is None else np.inf)
    best_epoch, n_epochs = np.zeros((2, m), dtype=np.int64)
    for epoch in range(1, options.max_epochs + 1):
        learner.learn(np.array_split(rng.permutation(len(targets.y)), n_steps), active)
        n_epochs[active] = epoch
        if targets.watched is None:
            continue
        loss = learner.watched_loss(active)
        is_better = loss < best_loss[active]
        best_loss[active] = np.where(is_better, loss, best_loss[active])
        best_epoch[active] = np.where(is_better, epoch, best_epoch[active])
        learner.save(best, active, is_better)
        is_left = epoch - best_epoch[active] < options.patience
        if not is_left.all():
            learner.keep(is_left)
            active = active[is_left]
        if not len(active):
            break
    if targets.watched is None:
        best, best_epoch = learner.stack, n_epochs.copy()
    is_stopped = np.isin(np.arange(m), active, invert=True)
    return Trained(best, n_epochs, best_epoch, best_loss, is_stopped)


def network_shape(n_features: int, options: TokenProbeOptions) -> NetworkShape:
    """Return the sizes of one model."""
    return NetworkShape(n_features, options.width, options.depth, options.n_heads, options.pooling)


def score_stack(
    stack: Stack, scaling: FoldScaling, states: TokenStates, options: TokenProbeOptions
) -> torch.Tensor:
    """Score every sentence with every model by hard maxima: [sentence, model] float32."""
    everything = np.arange(len(states.tokens))
    plan = states.batches(everything, stack.n_models * options.width, options.window_or_none)
    logits = torch.empty(len(everything), stack.n_models, device=states.device)
    space = Workspace(stack.flat)
    for batch in plan:
        found, _ = forward(stack, scaling, states.read(batch), batch, False, space)
        logits.index_copy_(0, batch.row, found)
    return logits


class _Adam(NamedTuple):
    """State of AdamW for a stack: gradient, its running mean and square, steps taken."""

    gradient: Stack
    mean: Stack
    square: Stack
    n_steps: torch.Tensor

    @classmethod
    def start(cls, stack: Stack) -> _Adam:
        gradient, mean, square = (stack.like(torch.zeros_like(stack.flat)) for _ in range(3))
        return cls(gradient, mean, square, torch.zeros((), device=stack.flat.device))

    def keep(self, models: torch.Tensor) -> _Adam:
        gradient, mean, square = (
            each.keep(models) for each in (self.gradient, self.mean, self.square)
        )
        return _Adam(gradient, mean, square, self.n_steps)

    def step(self, stack: Stack, options: TokenProbeOptions) -> None:
        """Move the stack along its gradient: one kernel, on the CPU one pass over the memory."""
        adamw(
            [stack.flat],
            [self.gradient.flat],
            [self.mean.flat],
            [self.square.flat],
            [],
            [self.n_steps],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            maximize=False,
        )


class _Watch(NamedTuple):
    """Models, [model] int64, and batches of the sentences that they are watched on."""

    models: torch.Tensor
    batches: list[TokenBatch]


class _Learner:
    """The models that still learn, and the state of their optimiser."""

    def __init__(
        self,
        states: TokenStates,
        scaling: FoldScaling,
        targets: Targets,
        options: TokenProbeOptions,
        stack: Stack,
    ) -> None:
        self.states = states
        self.scaling = scaling
        self.options = options
        self.stack = stack
        self.targets = targets
        watched = None if targets.watched is None else self._placed(targets.watched)
        self.tensors = _Tensors(self._placed(targets.y), self._placed(targets.weight), watched)
        self.adam = _Adam.start(stack)
        self.readers: Readers | None = None
        self.plan: list[_Watch] | None = None
        self.space = Workspace(stack.flat)

    def _placed(self, values: Floats) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.states.device)

    def learn(self, batches: Sequence[NDArray[np.int64]], active: NDArray[np.int64]) -> None:
        """Take one step per batch of sentences."""
        tokens, options = self.states.tokens, self.options
        if self.readers is None:
            learnt, size = self.targets.weight[:, active] > 0, tokens.n_features * options.width
            self.readers = Readers(learnt, tokens.lengths, size, self.states.device.type)
        read = [self.readers.order(batch) for batch in batches]
        planned = plan_batches(tokens, read, options.window_or_none, self.states.device)
        for sentences, batch in zip(read, planned, strict=True):
            states, parts = self.states.read(batch), self.readers.parts(sentences, tokens.lengths)
            logits, trace = forward(
                self.stack, self.scaling, states, batch, options.is_soft, self.space, parts
            )
            y = self.tensors.y.index_select(0, batch.row)
            weight = self.tensors.weight.index_select(0, batch.row)
            n_learnt = (weight > 0).sum(0).clamp_(min=1)
            gradient = _loss_gradient(logits, y, options.loss) * (weight / n_learnt)
            out, space = self.adam.gradient, self.space
            backward(self.stack, self.scaling, batch, trace, gradient, out, space, parts)
            self.adam.step(self.stack, options)

    def watched_loss(self, active: NDArray[np.int64]) -> Floats:
        """Weighted mean loss of each model over its watched sentences."""
        watched, y = self.tensors.watched, self.tensors.y
        assert watched is not None and self.targets.watched is not None  # noqa: S101, PT018
        if self.plan is None:
            self.plan = self._watch(self.targets.watched[:, active])
        total = torch.zeros(self.stack.n_models, device=y.device)
        for models, batches in self.plan:
            stack, scaling = self.stack, self.scaling
            if len(models) < stack.n_models:
                stack, scaling = stack.take(models), scaling.take(models)
            for batch in batches:
                states = self.states.read(batch)
                logits, _ = forward(stack, scaling, states, batch, False, self.space)
                target, weight = (each[batch.row[:, None], models] for each in (y, watched))
                losses = _losses(logits, target, self.options.loss)
                total.index_add_(0, models, (losses * weight).sum(0))
        return np.asarray((total / watched.sum(0)).cpu().numpy(), dtype=np.float64)

    def _watch(self, watched: Floats) -> list[_Watch]:
        plan = []
        tokens = self.states.tokens
        values = tokens.n_features * self.options.width
        for models, sentences in watchers(watched, tokens.lengths, values):
            n_units = len(models) * self.options.width
            batches = self.states.batches(sentences, n_units, self.options.window_or_none)
            plan.append(_Watch(torch.from_numpy(models).to(self.states.device), batches))
        return plan

    def save(self, best: Stack, active: NDArray[np.int64], is_better: NDArray[np.bool_]) -> None:
        """Copy the models that are better than before into the stack of all."""
        if is_better.any():
            device = self.states.device
            chosen = torch.from_numpy(np.flatnonzero(is_better)).to(device)
            best.put(torch.from_numpy(active[is_better]).to(device), self.stack, chosen)

    def keep(self, is_left: NDArray[np.bool_]) -> None:
        """Drop the models that have stopped."""
        models = torch.from_numpy(np.flatnonzero(is_left)).to(self.states.device)
        self.stack, self.adam = self.stack.keep(models), self.adam.keep(models)
        self.scaling = self.scaling.take(models)
        self.tensors = self.tensors.take(models)
        self.readers, self.plan = None, None


def _loss_gradient(logits: torch.Tensor, y: torch.Tensor, loss: Loss) -> torch.Tensor:
    if loss == "logistic":
        return torch.sigmoid(logits).sub_(y)
    if loss == "huber":
        return (logits - y).clamp_(-1, 1)
    return (logits - y).mul_(2)


def _losses(logits: torch.Tensor, y: torch.Tensor, loss: Loss) -> torch.Tensor:
    if loss == "logistic":
        return functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
    if loss == "huber":
        return functional.huber_loss(logits, y, reduction="none")
    return functional.mse_loss(logits, y, reduction="none")
