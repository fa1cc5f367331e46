"""Fit many multilayer perceptrons on one feature matrix: ReLU layers, one output each.

Models whose epochs have equally many steps are trained in batches (`training`) as large as memory
or cache allows. What does not belong here: one minibatch and the random draws (`batch`), stopping
(`options`).

Invariant: given the seed, a column's result does not depend on the other columns, up to float
rounding, and is scikit-learn's of the same seed (`StandardScaler`, then `MLPClassifier` or
`MLPRegressor`) until rounding has grown. One rule stops classifiers and regressors alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.devices import free_bytes
from taprobe_core.errors import NumericsError
from taprobe_core.solvers.columns import FitRequest, fold_moments
from taprobe_core.solvers.networks.batch import (
    Networks,
    Orders,
    Rows,
    Stream,
    reads_in_place,
    start,
)
from taprobe_core.solvers.networks.options import (
    NetworkOptions,
    check_classes,
    check_features,
    check_seeds,
    describe,
    seeds_of,
    stopping_weights,
)
from taprobe_core.solvers.networks.training import Job, Padded, outputs, pad, train_job

__all__ = ["NetworkOptions", "NetworkSolution", "fit_networks"]

MAX_MODELS = 2**16 - 1
"""Of a batch: a kernel's grid has no more places on its last axis."""

CPU_BYTES = 8 * 2**20
"""Of a batch on a CPU, for each thread: with more, rows leave the cache between two products."""


@dataclass(frozen=True, eq=False)
class NetworkSolution:
    """Fitted networks, in the order of the columns.

    Attributes:
        weights: [column, in, out] float32 of every layer, in the fold's standardised features;
            empty where they were not asked for.
        biases: [column, out] float32 of every layer; empty with the weights.
        fold: [column] int64, whose mean and scale a column has.
        mean: [fold, feature] float64.
        scale: [fold, feature] float64.
        n_iter: [column] int64, epochs trained.
        is_converged: [column] bool, False where `max_iter` ended the training.
        decision: [row, column] float64, logit or value of every row, training rows or not.
    """

    weights: list[NDArray[np.float32]]
    biases: list[NDArray[np.float32]]
    fold: NDArray[np.int64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    is_converged: NDArray[np.bool_]
    decision: NDArray[np.float64]


def fit_networks(
    X: NDArray[np.float32],
    train: NDArray[np.bool_],
    columns: FitRequest,
    options: NetworkOptions,
    validation: NDArray[np.bool_] | None = None,
    device: str | torch.device = "cpu",
    *,
    validation_weight: NDArray[np.float64] | None = None,
    keep_weights: bool = True,
    max_bytes: int | None = None,
) -> NetworkSolution:
    """Fit one network per column, standardised within the column's fold.

    The training rows of a column are those of weight above 0. Weights count in the loss as
    scikit-learn's `sample_weight` does: a minibatch is averaged by weight.

    Args:
        X: [row, feature] float32, raw.
        train: [fold, row] bool; mean and scale are those of these rows.
        columns: what to fit, with seeds in [0, 2^32). A classifier's targets are 0 and 1. With
            early stopping by problems, `y` is read on validation rows too.
        options: of all columns.
        validation: [fold, row] bool, disjoint from `train`, for early stopping by problems.
        device: where to train.
        validation_weight: [row, column] float64, weights of the validation rows; default 1.
        keep_weights: False saves memory where the decision on the rows of `X` is enough.
        max_bytes: of one batch of models; default 8 MiB for each thread of a CPU, half of the
            free memory of an accelerator. At least one model is trained at a time.

    Returns:
        The networks, and the decision of each on all rows.

    Raises:
        DataError: shapes, targets or seeds that cannot be fitted.
        NonFiniteError: a feature is NaN or infinite.
        NotEnoughDataError: a classifier's column with one class, or rows that cannot be split.
        NumericsError: networks whose loss or output is not finite; names their columns.

    Source:
        scikit-learn 1.9, `MLPClassifier`, `MLPRegressor` with solver `adam`.
    """
    check_features(X, train)
    columns.check(train)
    check_seeds(columns)
    if options.is_classifier:
        check_classes(columns)
    stopping_weight = None
    if options.early_stopping == "problems":
        stopping_weight = stopping_weights(columns, train, validation, validation_weight)
    mean, scale = fold_moments(X, train)
    fit = _Fit(X, mean, 1 / scale, columns, options, stopping_weight, torch.device(device))
    m, layers = len(columns), list(pairwise(fit.sizes)) if keep_weights else []
    solution = NetworkSolution(
        weights=[np.empty((m, *shape), np.float32) for shape in layers],
        biases=[np.empty((m, n_out), np.float32) for _, n_out in layers],
        fold=columns.fold,
        mean=mean,
        scale=scale,
        n_iter=np.empty(m, np.int64),
        is_converged=np.empty(m, np.bool_),
        decision=np.empty((len(X), m)),
    )
    for chosen in fit.batches(max_bytes):
        fit.run(chosen, solution)
    bad = np.flatnonzero(~np.isfinite(solution.decision).all(axis=0))
    if len(bad):
        raise NumericsError(
            f"{len(bad)} networks give scores that are not finite",
            ", ".join(describe(columns, column) for column in bad),
            "lower the learning rate, or look for features of extreme size",
        )
    return solution


class _Fit:
    """One call: the arguments, of which the device holds the features and their moments."""

    def __init__(
        self,
        X: NDArray[np.float32],
        mean: NDArray[np.float64],
        inverse_scale: NDArray[np.float64],
        columns: FitRequest,
        options: NetworkOptions,
        stopping_weight: NDArray[np.float64] | None,
        device: torch.device,
    ) -> None:
        self.columns, self.options, self.stopping_weight = columns, options, stopping_weight
        self.device = device
        self.X, self.mean = self._send(X), self._send(mean)
        self.inverse_scale = self._send(inverse_scale)
        self.sizes: tuple[int, ...] = (X.shape[1], *options.hidden, 1)

    def _send(self, values: NDArray[np.float64] | NDArray[np.float32]) -> Tensor:
        """Copy to the device as float32."""
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)

    def batches(self, max_bytes: int | None) -> Iterator[NDArray[np.intp]]:
        """Yield the columns of each batch: equally many steps, of nearly equally many rows."""
        options = self.options
        counts = (self.columns.weight > 0).sum(axis=0)
        if options.early_stopping == "rows":
            counts = counts - np.ceil(counts * options.validation_fraction).astype(np.int64)
        steps = -(-counts // options.batch_size)
        if max_bytes is None:
            max_bytes = free_bytes(self.device, CPU_BYTES * torch.get_num_threads())
        per_model = self._bytes_per_model()
        seeds = seeds_of(self.columns)
        for n_steps in np.unique(steps):
            chosen = np.flatnonzero(steps == n_steps)
            fold = self.columns.fold[chosen]
            # Columns of one fold and seed read the same minibatches: side by side, from the cache.
            chosen = chosen[np.lexsort((seeds[chosen], fold, counts[chosen]))]
            # A CPU reads standardised rows from memory; an accelerator's must hold them.
            standardised = len(np.unique(fold)) * self.X.nbytes * (self.device.type == "cuda")
            size = min(max(1, (max_bytes - standardised) // per_model), MAX_MODELS)
            yield from np.array_split(chosen, -(-len(chosen) // size))

    def _bytes_per_model(self) -> int:
        """Weights, two moments, the epoch kept, gradient; a minibatch; targets and orders.

        The gradient and the minibatch's features only where they are written.
        """
        n_rows, sizes, is_written = len(self.X), self.sizes, not reads_in_place(self.device)
        n_parameters = sum((n_in + 1) * n_out for n_in, n_out in pairwise(sizes))
        minibatch = min(self.options.batch_size, n_rows)
        minibatch *= is_written * sizes[0] + 3 * sum(sizes[1:])
        return 4 * ((4 + is_written) * n_parameters + minibatch + 8 * n_rows)

    def run(self, chosen: NDArray[np.intp], solution: NetworkSolution) -> None:
        """Train one batch of columns and write it into the solution."""
        options, columns = self.options, self.columns
        n_rows = len(self.X)
        at_once = min(options.batch_size, n_rows)
        folds, place = np.unique(columns.fold[chosen], return_inverse=True)
        own = torch.from_numpy(folds).to(self.device)
        fold = torch.from_numpy(place).to(self.device)
        rows = Rows.of(self.X, self.mean[own], self.inverse_scale[own], fold, at_once)
        seeds = seeds_of(columns)[chosen]
        drawn, which, streams = start(seeds, self.sizes)
        of_seed = torch.from_numpy(which).to(self.device)
        # Rows held out by class are drawn by what the targets are; else streams of one seed stay
        # alike as long as they shuffle equally many rows.
        counts = (columns.weight[:, chosen] > 0).sum(axis=0)
        group = np.unique(np.stack([seeds, counts]), axis=1, return_inverse=True)[1]
        if options.early_stopping == "rows" and options.is_classifier:
            group = np.arange(len(chosen))
        training, held_out = self._split(chosen, streams, group)
        lengths = np.array([len(each) for each in training])
        orders = Orders(streams, lengths, group)
        job = Job(
            names=[describe(columns, column) for column in chosen],
            networks=Networks(
                [self._send(each)[of_seed] for each in drawn],
                rows,
                options.is_classifier,
                options.learning_rate,
            ),
            y=self._send(columns.y[:, chosen].T),
            weight=self._send(columns.weight[:, chosen].T),
            orders=orders,
            which=torch.from_numpy(orders.which).to(self.device),
            training=pad(training).to(self.device),
            lengths=torch.from_numpy(lengths).to(self.device)[:, None],
            held_out=held_out,
            is_even=self._is_even(chosen),
        )
        trained = train_job(job, options)
        solution.n_iter[chosen] = trained.n_iter
        solution.is_converged[chosen] = trained.is_converged
        networks = Networks(trained.parameters, rows, options.is_classifier, options.learning_rate)
        every = torch.arange(n_rows, device=self.device).expand(len(chosen), n_rows)
        solution.decision[:, chosen] = outputs(networks, every, at_once).T.cpu().numpy()
        if solution.weights:
            for kept, weight in zip(solution.weights, networks.weights, strict=True):
                kept[chosen] = weight.transpose(1, 2).cpu().numpy()
            for kept, bias in zip(solution.biases, networks.biases, strict=True):
                kept[chosen] = bias[:, 0].cpu().numpy()

    def _is_even(self, chosen: NDArray[np.intp]) -> bool:
        weight = self.columns.weight[:, chosen]
        return bool((weight[weight > 0] == 1).all())

    def _split(
        self, chosen: NDArray[np.intp], streams: list[Stream], group: NDArray[np.int64]
    ) -> tuple[list[NDArray[np.int64]], Padded | None]:
        """Return the rows each column trains on and those that its early stopping reads.

        Columns of one group hold out the same of their rows, drawn from the stream of the first.
        """
        options, y = self.options, self.columns.y[:, chosen]
        weight = self.columns.weight[:, chosen]
        training = [np.flatnonzero(each) for each in weight.T]
        if options.early_stopping == "off":
            return training, None
        if self.stopping_weight is not None:
            weight = self.stopping_weight[:, chosen]
            held = [np.flatnonzero(each) for each in weight.T]
        else:
            splits = {
                own: streams[place].hold_out(
                    y[training[place], place],
                    options.validation_fraction,
                    options.is_classifier,
                    describe(self.columns, chosen[place]),
                )
                for own, place in zip(*np.unique(group, return_index=True), strict=True)
            }
            held = [rows[splits[own][1]] for rows, own in zip(training, group, strict=True)]
            training = [rows[splits[own][0]] for rows, own in zip(training, group, strict=True)]
        index = pad(held)
        is_row = np.arange(index.shape[1]) < np.array([len(each) for each in held])[:, None]
        weights = np.take_along_axis(weight.T, index.numpy(), axis=1) * is_row
        weights /= weights.sum(axis=1, keepdims=True)
        return training, Padded(
            index.to(self.device),
            self._send(np.take_along_axis(y.T, index.numpy(), axis=1)),
            torch.from_numpy(weights).to(self.device),
        )
