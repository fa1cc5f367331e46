"""Train one batch of networks to their ends: epochs, held-out scores, removal of finished models.

All models of a batch take the same number of steps in an epoch. Each reads every training row of
its own once an epoch, in its own order; where a last minibatch is shorter than its neighbours',
rows of weight 0 fill it. What does not belong here: which models form a batch (`solve`).

Invariant: the device is waited for once an epoch, and once more when models have left; the next
orders are drawn before that, while it works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import NumericsError
from taprobe_core.solvers.networks.batch import Networks, Orders
from taprobe_core.solvers.networks.options import NetworkOptions, Patience, accuracy, r_squared

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Padded:
    """Rows of each model, filled up to one length.

    Attributes:
        index: [model, row] int64, 0 in the padding.
        y: [model, row] float32.
        weight: [model, row], 0 in the padding.
    """

    index: Tensor
    y: Tensor
    weight: Tensor

    def take(self, kept: Tensor) -> Padded:
        """Return the rows of some models."""
        return Padded(self.index[kept], self.y[kept], self.weight[kept])


@dataclass(frozen=True)
class Plan:
    """How the rows of an epoch count, in the order in which they are read.

    Attributes:
        batches: columns of each minibatch.
        share: [model, row] weight in the minibatch, summing to 1 over it.
        decay: [model, step] penalty in the minibatch.
        shared_decay: of each minibatch, the penalty of all models if it is one, else None.
        loss_share: [model, row] weight in the epoch's loss.
        loss_decay: [model, step] factor of the squared weights in the epoch's loss.
    """

    batches: list[slice]
    share: Tensor
    decay: Tensor
    shared_decay: list[float | None]
    loss_share: Tensor
    loss_decay: Tensor


@dataclass
class Job:
    """Models to be trained together; every list and first axis is in the order of the models.

    Attributes:
        names: for errors.
        networks: initial weights.
        y: [model, row] float32.
        weight: [model, row] float32.
        orders: random orders, as positions in `training`.
        which: [model] int64, the order that a model reads.
        training: [model, row] int64, training rows of each model, then anything.
        lengths: [model, 1] int64, number of training rows.
        held_out: rows of the stopping score and their weight [model, row] float64 summing to 1;
            None: there are none.
        is_even: all training rows weigh the same, so every epoch has one plan.
        plan: of the last epoch.
    """

    names: list[str]
    networks: Networks
    y: Tensor
    weight: Tensor
    orders: Orders
    which: Tensor
    training: Tensor
    lengths: Tensor
    held_out: Padded | None
    is_even: bool
    plan: Plan | None = None


@dataclass
class Trained:
    """What is kept of each model.

    Attributes:
        parameters: as in `Networks`.
        n_iter: [model] int64, epochs.
        is_converged: [model] bool, False where the epochs ran out.
    """

    parameters: list[Tensor]
    n_iter: Indices
    is_converged: NDArray[np.bool_]

    def keep(self, models: NDArray[np.intp], places: NDArray[np.intp], source: Networks) -> None:
        """Copy the weights at some places of the batch to the models they belong to."""
        if not len(models):
            return
        device = self.parameters[0].device
        to, at = (torch.from_numpy(each).to(device) for each in (models, places))
        for kept, now in zip(self.parameters, source.parameters, strict=True):
            kept.index_copy_(0, to, now[at])


def train_job(job: Job, options: NetworkOptions) -> Trained:
    """Train every model of a batch until it stops.

    The job is used up.

    Raises:
        NumericsError: names the models whose loss or held-out output is not finite.
    """
    live = np.arange(len(job.names))
    device = job.y.device
    trained = Trained(
        [each.clone() for each in job.networks.parameters],
        np.full(len(live), options.max_iter),
        np.zeros(len(live), dtype=bool),
    )
    patience = Patience(len(live), options.patience, options.tol, device)
    has_held_out = job.held_out is not None
    order = _next_order(job)
    for epoch in range(1, options.max_iter + 1):
        loss = _run_epoch(job, options, order.to(device, non_blocking=True))
        order = _next_order(job)
        score = _held_out_score(job, options) if loss is None else -loss.double()
        is_best, is_stopped = patience.judge(score)
        flags = torch.stack([is_best, is_stopped, ~score.isfinite()]).cpu().numpy()
        _check_finite(flags[2], job.names, epoch)
        is_done = flags[1] | (epoch == options.max_iter)
        is_kept = flags[0] if has_held_out else is_done
        trained.keep(live[is_kept], np.flatnonzero(is_kept), job.networks)
        trained.n_iter[live[is_done]] = epoch
        trained.is_converged[live[flags[1]]] = True
        if is_done.all():
            break
        if is_done.any():
            kept = np.flatnonzero(~is_done)
            used = _drop(job, kept, patience)
            live = live[kept]
            order = order[torch.from_numpy(used), : job.orders.n_longest]
    return trained


def outputs(networks: Networks, index: Tensor, at_once: int) -> Tensor:
    """Return the output (logit or value) of each model on rows, [model, row] float32.

    Args:
        networks: the models, with room for `at_once` rows of each.
        index: [model, row] int64.
        at_once: rows of a block.
    """
    blocks = torch.split(index, at_once, dim=1)
    return torch.cat([networks.output(each) for each in blocks], dim=1)


def pad(lists: Sequence[Indices]) -> Tensor:
    """Return index lists as one matrix [list, longest] int64, filled with 0."""
    padded = np.zeros((len(lists), max(len(each) for each in lists)), dtype=np.int64)
    for row, each in zip(padded, lists, strict=True):
        row[: len(each)] = each
    return torch.from_numpy(padded)


def plan_epoch(weight: Tensor, size: int, alpha: float) -> Plan:
    """Divide an epoch into minibatches.

    Args:
        weight: [model, row] in the order of reading, 0 behind a model's last row; every model has
            a row in every minibatch.
        size: rows of a minibatch.
        alpha: L2 penalty.
    """
    n_rows = weight.shape[1]
    batches = [slice(at, min(at + size, n_rows)) for at in range(0, n_rows, size)]
    sums = torch.stack([weight[:, each].sum(1) for each in batches], dim=1)
    counts = torch.stack([(weight[:, each] > 0).sum(1) for each in batches], dim=1)
    of_step = torch.arange(n_rows, device=weight.device) // size
    share, decay = weight / sums[:, of_step], alpha / sums
    part = counts / counts.sum(1, keepdim=True)
    least, most = torch.stack(torch.aminmax(decay, dim=0)).tolist()
    shared = [low if low == high else None for low, high in zip(least, most, strict=True)]
    return Plan(batches, share, decay, shared, share * part[:, of_step], 0.5 * decay * part)


def _next_order(job: Job) -> Tensor:
    order = torch.from_numpy(job.orders.next())
    return order.pin_memory() if job.y.is_cuda else order


def _run_epoch(job: Job, options: NetworkOptions, orders: Tensor) -> Tensor | None:
    """Take one pass over the training rows; return the mean loss [model] where that stops models.

    The loss of a minibatch is that before its step.
    """
    order = job.training.gather(1, orders[job.which])
    y = job.y.gather(1, order)
    if job.plan is None or not job.is_even:
        is_row = torch.arange(order.shape[1], device=order.device) < job.lengths
        weight = job.weight.gather(1, order).mul_(is_row)
        job.plan = plan_epoch(weight, options.batch_size, options.alpha)
    plan, by_training_loss = job.plan, job.held_out is None
    outputs, squares = torch.empty_like(y), torch.empty_like(plan.decay)
    for step, batch in enumerate(plan.batches):
        if by_training_loss:
            squares[:, step] = job.networks.squared_weights()
        share, decay = plan.share[:, batch], plan.decay[:, step]
        outputs[:, batch] = job.networks.step(
            order[:, batch], y[:, batch], share, decay, plan.shared_decay[step]
        )
    if not by_training_loss:
        return None
    losses = job.networks.row_losses(outputs, y).mul_(plan.loss_share).sum(1)
    return losses + (squares.mul_(plan.loss_decay)).sum(1)


def _held_out_score(job: Job, options: NetworkOptions) -> Tensor:
    held = job.held_out
    assert held is not None  # noqa: S101
    output = outputs(job.networks, held.index, options.batch_size)
    if options.early_stopping == "problems":
        score = -(job.networks.row_losses(output, held.y) * held.weight).sum(1)
    else:
        score = (accuracy if options.is_classifier else r_squared)(output, held.y, held.weight)
    return torch.where(output.isfinite().all(1), score, torch.nan)


def _drop(job: Job, kept: NDArray[np.intp], patience: Patience) -> NDArray[np.int64]:
    """Drop all models but some; return which of the orders stay."""
    at = torch.from_numpy(kept).to(job.y.device)
    job.networks.take(at)
    patience.take(at)
    used = job.orders.take(kept)
    job.which = torch.from_numpy(job.orders.which).to(job.y.device)
    job.y, job.weight = job.y[at], job.weight[at]
    job.training, job.lengths = job.training[at], job.lengths[at]
    job.held_out = None if job.held_out is None else job.held_out.take(at)
    job.plan = None
    job.names = [job.names[place] for place in kept]
    return used


def _check_finite(is_bad: NDArray[np.bool_], names: Sequence[str], epoch: int) -> None:
    if is_bad.any():
        first = [name for name, is_one in zip(names, is_bad, strict=True) if is_one]
        raise NumericsError(
            f"{len(first)} networks diverged in epoch {epoch}",
            ", ".join(first),
            "lower the learning rate, or look for features of extreme size",
        )
