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
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from taprobe_core.solvers.ragged import ALIGNED, FEW_SHAPES, Shapes, TokenBatch, plan_batches
from taprobe_core.solvers.replay import Recorder, Replays
from taprobe_core.solvers.token_backward import backward
from taprobe_core.solvers.token_forward import (
    FirstLayer,
    FoldScaling,
    NetworkShape,
    Stack,
    Workspace,
    draw,
    forward,
)
from taprobe_core.solvers.token_optimiser import Adam
from taprobe_core.solvers.token_options import Loss, TokenProbeOptions
from taprobe_core.solvers.token_reading import Part, Readers, n_batches, watchers
from taprobe_core.solvers.token_states import TokenStates

Floats = NDArray[np.float64]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


MAX_STOPPED = 0.2
"""Share of the models; recording the steps of the others costs about as much as an epoch."""


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
    recorder: Recorder | None = None,
) -> Trained:
    """Train one model per column of the targets.

    Args:
        states: token states on the device.
        scaling: of each model's fold.
        targets: of each model; of models whose epochs have equally many batches.
        options: settings.
        seed: of the initial weights and of the order of sentences.
        recorder: of the block that this is called in; None: steps are not recorded.
    """
    m = targets.y.shape[1]
    shape = network_shape(states.tokens.n_features, options)
    stack = Stack.zeros(shape, m, states.device, torch.float32)
    stack.fill(draw(shape, seed))
    best = stack.like(stack.flat.clone())
    n_steps = n_batches(int((targets.weight > 0).sum(axis=0).max()), options.batch_size)
    learner = _Learner(states, scaling, targets, options, stack, recorder)
    rng = np.random.default_rng([seed, 1])
    orders = (
        np.array_split(rng.permutation(len(targets.y)), n_steps) for _ in range(options.max_epochs)
    )
    best_loss = np.full(m, np.nan if targets.watched is None else np.inf)
    best_epoch, n_epochs = np.zeros((2, m), dtype=np.int64)
    is_stopped = np.zeros(m, dtype=bool)
    order = next(orders)
    for epoch in range(1, options.max_epochs + 1):
        learner.learn(order)
        if epoch < options.max_epochs:
            order = next(orders)
            learner.prepare(order)
        n_epochs[~is_stopped] = epoch
        if targets.watched is None:
            continue
        here, loss = learner.here, learner.watched_loss()
        is_better = (loss < best_loss[here]) & ~is_stopped[here]
        best_loss[here[is_better]] = loss[is_better]
        best_epoch[here[is_better]] = epoch
        learner.save(best, is_better)
        is_stopped |= n_epochs - best_epoch >= options.patience
        if is_stopped.all():
            break
        learner.drop(is_stopped[here])
    if targets.watched is None:
        best, best_epoch = learner.stack, n_epochs.copy()
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
    first = FirstLayer.of(stack, scaling, space)
    for batch in plan:
        found, _ = forward(stack, first, states.read(batch), batch, False, space)
        logits.index_copy_(0, batch.row, found)
    return logits


class _Step(NamedTuple):
    """A batch of sentences, and which models read what of it."""

    batch: TokenBatch
    parts: list[Part] | None


class _Watch(NamedTuple):
    """Models, [model] int64, and batches of the sentences that they are watched on."""

    models: torch.Tensor
    batches: list[TokenBatch]


class _Learner:
    """The models that still learn, and the state of their optimiser.

    Where steps are recorded a few that have stopped are among them, lest all be recorded anew.

    Attributes:
        here: [model] int64, which of the targets' models these are.
    """

    def __init__(
        self,
        states: TokenStates,
        scaling: FoldScaling,
        targets: Targets,
        options: TokenProbeOptions,
        stack: Stack,
        recorder: Recorder | None,
    ) -> None:
        self.states = states
        self.scaling = scaling
        self.options = options
        self.stack = stack
        self.targets = targets
        watched = None if targets.watched is None else self._placed(targets.watched)
        self.tensors = _Tensors(self._placed(targets.y), self._placed(targets.weight), watched)
        self.adam = Adam(stack, options)
        self.space = Workspace(stack.flat)
        self.replays = None if recorder is None else Replays(recorder)
        self._start(np.arange(stack.n_models))
        if self.replays is not None and watched is not None:
            # This pass takes the largest arrays; what is recorded before they grow is void.
            self._watched_loss()

    def _placed(self, values: Floats) -> torch.Tensor:
        """Bring values to the device, and zeros for the sentence that fills up a batch."""
        filled = np.pad(values.astype(np.float32), ((0, 1), (0, 0)))
        return torch.from_numpy(filled).to(self.states.device)

    def _start(self, here: Index) -> None:
        """Lay out what depends on which models these are."""
        self.here = here
        self.first = FirstLayer.of(self.stack, self.scaling, self.space)
        tokens, kind = self.states.tokens, self.states.device.type
        self.readers = Readers(self.targets.weight[:, here] > 0, tokens.lengths, self._size, kind)
        self.watches = self._watches()
        self.steps: list[_Step] | None = None
        self.places: dict[Shapes, TokenBatch] = {}

    @property
    def _size(self) -> int:
        """First-layer weights of one model."""
        return self.states.tokens.n_features * self.options.width

    def _watches(self) -> list[_Watch]:
        if self.targets.watched is None:
            return []
        plan = []
        watched, lengths = self.targets.watched[:, self.here], self.states.tokens.lengths
        for models, sentences in watchers(watched, lengths, self._size):
            n_units = len(models) * self.options.width
            batches = self.states.batches(sentences, n_units, self.options.window_or_none)
            plan.append(_Watch(torch.from_numpy(models).to(self.states.device), batches))
        return plan

    def prepare(self, order: Sequence[Index]) -> None:
        """Make the tables of an epoch; the device may be busy with the one before.

        Args:
            order: sentences of each batch; none: there is no further epoch.
        """
        tokens, device = self.states.tokens, self.states.device
        read = [self.readers.order(batch) for batch in order]
        rounding = ALIGNED if self.replays is None else FEW_SHAPES
        planned = plan_batches(tokens, read, self.options.window_or_none, device, rounding)
        if planned and self.replays is not None:
            self.space.reserve(self.stack, max(len(batch.token) for batch in planned))
        parts = (self.readers.parts(sentences, tokens.lengths) for sentences in read)
        self.steps = [_Step(*each) for each in zip(planned, parts, strict=True)]

    def learn(self, order: Sequence[Index]) -> None:
        """Take one step per batch of sentences."""
        if self.steps is None:
            self.prepare(order)
        for step in self.steps or ():
            if self.replays is None:
                self._learn(step)
                continue
            shapes = step.batch.shapes
            if shapes not in self.places:
                self.places[shapes] = step.batch.copy()
            place = self.places[shapes]
            place.flat.copy_(step.batch.flat)
            work = partial(self._learn, step._replace(batch=place))
            self.replays.run((self.space.n_grown, shapes), work)
        self.steps = None

    def _learn(self, step: _Step) -> None:
        batch, parts = step
        states, out, space = self.states.read(batch), self.adam.gradient, self.space
        is_soft = self.options.is_soft
        logits, trace = forward(self.stack, self.first, states, batch, is_soft, space, parts)
        y = self.tensors.y.index_select(0, batch.row)
        weight = self.tensors.weight.index_select(0, batch.row)
        n_learnt = (weight > 0).sum(0).clamp_(min=1)
        gradient = _loss_gradient(logits, y, self.options.loss) * (weight / n_learnt)
        backward(self.stack, batch, trace, gradient, out, space, parts)
        self.adam.step(self.stack, self.scaling, self.first)

    def watched_loss(self) -> Floats:
        """Weighted mean loss of each model over its watched sentences."""
        if self.replays is None:
            loss = self._watched_loss()
        else:
            loss = self.replays.run(self.space.n_grown, self._watched_loss)
        return np.asarray(loss.cpu().numpy(), dtype=np.float64)

    def _watched_loss(self) -> torch.Tensor:
        watched, y = self.tensors.watched, self.tensors.y
        assert watched is not None  # noqa: S101
        total = torch.zeros(self.stack.n_models, device=y.device)
        for models, batches in self.watches:
            stack, first = self.stack, self.first
            if len(models) < stack.n_models:
                stack, first = stack.take(models), first.take(models)
            for batch in batches:
                states = self.states.read(batch)
                logits, _ = forward(stack, first, states, batch, False, self.space)
                target, weight = (each[batch.row[:, None], models] for each in (y, watched))
                losses = _losses(logits, target, self.options.loss)
                total.index_add_(0, models, (losses * weight).sum(0))
        return total / watched.sum(0)

    def save(self, best: Stack, is_better: Mask) -> None:
        """Copy the models that are better than before into the stack of all."""
        if is_better.any():
            device = self.states.device
            chosen = torch.from_numpy(np.flatnonzero(is_better)).to(device)
            best.put(torch.from_numpy(self.here[is_better]).to(device), self.stack, chosen)

    def drop(self, is_stopped: Mask) -> None:
        """Drop models that have stopped, where that saves more than it costs."""
        if is_stopped.mean() <= (0 if self.replays is None else MAX_STOPPED):
            return
        is_left = ~is_stopped
        models = torch.from_numpy(np.flatnonzero(is_left)).to(self.states.device)
        self.stack = self.stack.keep(models)
        self.adam.keep(models)
        self.scaling = self.scaling.take(models)
        self.tensors = self.tensors.take(models)
        if self.replays is not None:
            self.replays = Replays(self.replays.recorder, is_warm=True)
        self._start(self.here[is_left])


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
