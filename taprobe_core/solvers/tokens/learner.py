"""The models of a stack that still learn: steps of AdamW, and the losses that stop them.

What does not belong here: gradients (`backward`), the network (`forward`), epochs and what is kept
of them (`training`).

Invariants: a sentence that no model of the stack learns from is not read; a model that is dropped
costs nothing more; the host waits for the device once per epoch, for the losses. Validation weights
are finite, at least 0, 0 outside the fold's validation sentences, and above 0 somewhere in each
column. On CUDA the first layer, nearly all of a stack, is stepped and scaled in one pass over the
memory, with PyTorch's numbers but for rounding, and steps are recorded by the shape of their batch
and replayed.

Source:
    Loshchilov and Hutter 2019, algorithm 2; as in `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.optim.adamw import adamw

from taprobe_core.devices import has_triton
from taprobe_core.errors import NotEnoughDataError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens.backward import backward, through_scaling
from taprobe_core.solvers.tokens.forward import FirstLayer, FoldScaling, Stack, Workspace, forward
from taprobe_core.solvers.tokens.pooling import Loss, TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import (
    ALIGNED,
    FEW_SHAPES,
    Part,
    Readers,
    Shapes,
    TokenBatch,
    plan_batches,
    validation_groups,
)
from taprobe_core.solvers.tokens.replay import Recorder, Replays
from taprobe_core.solvers.tokens.states import TokenStates

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


def stopping_weights(columns: FitRequest, validation: Mask, is_binary: bool) -> Floats:
    """Return the weight of every sentence in each column's validation loss, [sentence, column].

    It is the mean training weight of the sentence's class, 1 for values; validation is [fold,
    sentence].

    Raises:
        NotEnoughDataError: a column has no validation sentence of weight above 0.
    """
    weight = _class_means(columns) if is_binary else np.ones_like(columns.weight)
    stopping_weight = np.where(validation[columns.fold].T, weight, 0.0)
    empty = np.flatnonzero(~stopping_weight.any(axis=0))
    if len(empty):
        raise NotEnoughDataError(
            "found 0 validation sentences of weight above 0, need 1",
            f"column {int(empty[0])}, fold {int(columns.fold[empty[0]])}",
            "raise splits.val_fraction; token probes stop early on validation problems",
        )
    return stopping_weight


def _class_means(columns: FitRequest) -> Floats:
    """Mean training weight of each sentence's class, 1 for a class without training sentences."""
    is_positive = columns.y > 0.5
    by_class = []
    for is_member in (~is_positive, is_positive):
        n = ((columns.weight > 0) & is_member).sum(axis=0)
        total = (columns.weight * is_member).sum(axis=0)
        by_class.append(np.where(n > 0, total / np.maximum(n, 1), 1.0))
    return np.where(is_positive, by_class[1], by_class[0])


BETAS = (0.9, 0.999)
EPS = 1e-8


class Adam:
    """State of the optimiser of a stack.

    Attributes:
        gradient: of every parameter, to be written before each step.
    """

    def __init__(self, stack: Stack, options: TokenProbeOptions) -> None:
        self.options = options
        self.gradient, self._mean, self._square = (
            stack.like(torch.zeros_like(stack.flat)) for _ in range(3)
        )
        self._n_steps = torch.zeros((), device=stack.flat.device)

    def keep(self, models: torch.Tensor) -> None:
        """Drop all models but some, ascending [model] int64."""
        self.gradient, self._mean, self._square = (
            each.keep(models) for each in (self.gradient, self._mean, self._square)
        )

    def step(self, stack: Stack, scaling: FoldScaling, first: FirstLayer) -> None:
        """Move the stack along its gradient, and the first layer as scaled with it.

        Args:
            stack: the models.
            scaling: of each model's fold.
            first: of `stack`; overwritten.
        """
        if not (stack.flat.is_cuda and has_triton()):
            through_scaling(self.gradient, scaling)
            self._step(stack, 0)
            first.refresh(stack, scaling)
            return
        from taprobe_core.solvers.tokens.kernels import step_first_layer

        name = "token_weight_0"
        self._step(stack, stack.views[name].numel())
        step_first_layer(
            stack.views[name],
            (self._mean.views[name], self._square.views[name]),
            self.gradient.views[name],
            self.gradient.views["token_bias_0"],
            scaling,
            first,
            self._n_steps,
            learning_rate=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            betas=BETAS,
            eps=EPS,
        )

    def _step(self, stack: Stack, start: int) -> None:
        """Step every parameter from a place in the flat tensor on."""
        adamw(
            [stack.flat[start:]],
            [self.gradient.flat[start:]],
            [self._mean.flat[start:]],
            [self._square.flat[start:]],
            [],
            [self._n_steps],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            maximize=False,
        )


Index = NDArray[np.int64]

MAX_STOPPED = 0.2
"""Share of the models; recording the steps of the others costs about as much as an epoch."""


class Targets(NamedTuple):
    """What a stack learns, [sentence, model] each.

    Attributes:
        y: target.
        weight: of a sentence in the training loss; 0 outside the training sentences.
        stopping_weight: of a sentence in the loss that decides when to stop; None: no model stops
            early.
    """

    y: Floats
    weight: Floats
    stopping_weight: Floats | None


class _Tensors(NamedTuple):
    """The targets of the models that still learn, on the device."""

    y: torch.Tensor
    weight: torch.Tensor
    stopping_weight: torch.Tensor | None

    def take(self, models: torch.Tensor) -> _Tensors:
        stopping_weight = (
            None if self.stopping_weight is None else self.stopping_weight.index_select(1, models)
        )
        return _Tensors(
            self.y.index_select(1, models), self.weight.index_select(1, models), stopping_weight
        )


class Step(NamedTuple):
    """A batch of sentences, and which models read what of it."""

    batch: TokenBatch
    parts: list[Part] | None


class _ValidationBatches(NamedTuple):
    """Models, [model] int64, and batches of the sentences that they are validated on."""

    models: torch.Tensor
    batches: list[TokenBatch]


class Learner:
    """The models that still learn, and the state of their optimiser.

    Where steps are recorded a few that have stopped stay among them, so that not all steps need
    to be recorded anew.

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
        stopping_weight = (
            None if targets.stopping_weight is None else self._placed(targets.stopping_weight)
        )
        self.tensors = _Tensors(
            self._placed(targets.y), self._placed(targets.weight), stopping_weight
        )
        self.adam = Adam(stack, options)
        self.space = Workspace(stack.flat)
        self.replays = None if recorder is None else Replays(recorder)
        self._start(np.arange(stack.n_models))
        if self.replays is not None and stopping_weight is not None:
            # This pass takes the largest arrays; what is recorded before they grow is void.
            self._validation_loss()

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
        self.validation = self._validation_batches()
        self.places: dict[Shapes, TokenBatch] = {}

    @property
    def _size(self) -> int:
        """First-layer weights of one model."""
        return self.states.tokens.n_features * self.options.width

    def _validation_batches(self) -> list[_ValidationBatches]:
        if self.targets.stopping_weight is None:
            return []
        plan = []
        stopping_weight, lengths = (
            self.targets.stopping_weight[:, self.here],
            self.states.tokens.lengths,
        )
        for models, sentences in validation_groups(stopping_weight, lengths, self._size):
            n_units = len(models) * self.options.width
            batches = self.states.batches(sentences, n_units, self.options.window_or_none)
            plan.append(
                _ValidationBatches(torch.from_numpy(models).to(self.states.device), batches)
            )
        return plan

    def prepare(self, order: Sequence[Index]) -> list[Step]:
        """Make the tables of an epoch for the models that these are now.

        Args:
            order: sentences of each batch.
        """
        tokens, device = self.states.tokens, self.states.device
        read = [self.readers.order(batch) for batch in order]
        rounding = ALIGNED if self.replays is None else FEW_SHAPES
        planned = plan_batches(tokens, read, self.options.window_or_none, device, rounding)
        if self.replays is not None:
            self.space.reserve(self.stack, max(len(batch.token) for batch in planned))
        parts = (self.readers.parts(sentences, tokens.lengths) for sentences in read)
        return [Step(*each) for each in zip(planned, parts, strict=True)]

    def learn(self, steps: Sequence[Step]) -> None:
        """Take the steps of an epoch."""
        for step in steps:
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

    def _learn(self, step: Step) -> None:
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

    def validation_loss(self) -> Floats:
        """Weighted mean loss of each model over its validation sentences."""
        if self.replays is None:
            loss = self._validation_loss()
        else:
            loss = self.replays.run(self.space.n_grown, self._validation_loss)
        return np.asarray(loss.cpu().numpy(), dtype=np.float64)

    def _validation_loss(self) -> torch.Tensor:
        stopping_weight, y = self.tensors.stopping_weight, self.tensors.y
        assert stopping_weight is not None  # noqa: S101
        total = torch.zeros(self.stack.n_models, device=y.device)
        for models, batches in self.validation:
            stack, first = self.stack, self.first
            if len(models) < stack.n_models:
                stack, first = stack.take(models), first.take(models)
            for batch in batches:
                states = self.states.read(batch)
                logits, _ = forward(stack, first, states, batch, False, self.space)
                target, weight = (each[batch.row[:, None], models] for each in (y, stopping_weight))
                losses = _losses(logits, target, self.options.loss)
                total.index_add_(0, models, (losses * weight).sum(0))
        return total / stopping_weight.sum(0)

    def save(self, best: Stack, is_better: Mask) -> None:
        """Copy the models that are better than before into the stack of all."""
        if is_better.any():
            device = self.states.device
            chosen = torch.from_numpy(np.flatnonzero(is_better)).to(device)
            best.put(torch.from_numpy(self.here[is_better]).to(device), self.stack, chosen)

    def drop(self, is_stopped: Mask) -> bool:
        """Drop models that have stopped, where that saves more than it costs; say whether."""
        if is_stopped.mean() <= (0 if self.replays is None else MAX_STOPPED):
            return False
        is_left = ~is_stopped
        models = torch.from_numpy(np.flatnonzero(is_left)).to(self.states.device)
        self.stack = self.stack.keep(models)
        self.adam.keep(models)
        self.scaling = self.scaling.take(models)
        self.tensors = self.tensors.take(models)
        if self.replays is not None:
            self.replays = Replays(self.replays.recorder, is_warm=True)
        self._start(self.here[is_left])
        return True


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
