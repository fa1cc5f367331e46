"""Train a stack of token probes together: one pass over the tokens serves every model.

All models of a stack have one seed: they start from the same weights and see the same batches, and
a sentence that a model must not learn from has weight 0 in its loss. What does not belong here: how
columns are grouped into stacks (`states`), a step (`learner`), the network (`forward`).

Invariants: the order of the sentences is a function of the seed and their number alone, their cut
into batches of that and the number that the model learns from, so that a model's result does not
depend on the others but for rounding; what is kept of a model is its best epoch.

Source:
    Batches are even, held-out sentences counted, where usual loops leave a small last one; a model
    has about `batch_size` sentences of its own in each. A batch without a sentence that a model
    learns from counts as a step of gradient 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.solvers.tokens.forward import (
    FirstLayer,
    FoldScaling,
    NetworkShape,
    Stack,
    Workspace,
    draw,
    forward,
)
from taprobe_core.solvers.tokens.learner import Learner, Targets
from taprobe_core.solvers.tokens.pooling import TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import n_batches
from taprobe_core.solvers.tokens.replay import Recorder
from taprobe_core.solvers.tokens.states import TokenStates

Floats = NDArray[np.float64]


class Trained(NamedTuple):
    """A trained stack; arrays are [model].

    Attributes:
        stack: the weights of the best epoch, or of the last without early stopping.
        n_epochs: epochs that the model took part in.
        best_epoch: which of them, from 1, had the lowest validation loss.
        best_loss: that loss; NaN without early stopping.
        is_stopped: whether patience ran out before the last epoch.
    """

    stack: Stack
    n_epochs: NDArray[np.int64]
    best_epoch: NDArray[np.int64]
    best_loss: Floats
    is_stopped: NDArray[np.bool_]


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
    learner = Learner(states, scaling, targets, options, stack, recorder)
    rng = np.random.default_rng([seed, 1])
    orders = (
        np.array_split(rng.permutation(len(targets.y)), n_steps) for _ in range(options.max_epochs)
    )
    best_loss = np.full(m, np.nan if targets.stopping_weight is None else np.inf)
    best_epoch, n_epochs = np.zeros((2, m), dtype=np.int64)
    is_stopped = np.zeros(m, dtype=bool)
    order = next(orders)
    steps = learner.prepare(order)
    for epoch in range(1, options.max_epochs + 1):
        learner.learn(steps)
        if epoch < options.max_epochs:
            # While the device is busy.
            order = next(orders)
            steps = learner.prepare(order)
        n_epochs[~is_stopped] = epoch
        if targets.stopping_weight is None:
            continue
        here, loss = learner.here, learner.validation_loss()
        is_better = (loss < best_loss[here]) & ~is_stopped[here]
        best_loss[here[is_better]] = loss[is_better]
        best_epoch[here[is_better]] = epoch
        learner.save(best, is_better)
        is_stopped |= n_epochs - best_epoch >= options.patience
        if is_stopped.all():
            break
        if learner.drop(is_stopped[here]):
            steps = learner.prepare(order)
    if targets.stopping_weight is None:
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
