"""Multilayer perceptrons of one shape side by side: forward, backward, Adam as batched products.

Every tensor has a first axis of models; no operation mixes models. A model reads its own rows of
one feature matrix, which stands there once for every fold, standardised. On CUDA kernels read the
rows where they lie and step the first layer, nearly all of a model, without writing its gradient.

Each model has a stream of random numbers of its own: its draws do not depend on what is trained
beside it. The streams are those of scikit-learn (`RandomState(seed)`, drawn from in its order:
weights, held-out rows, orders), so a model ends as scikit-learn's network of the same seed, up to
float rounding. What does not belong here: which rows when (`solve`), when a model stops
(`options`).

Invariant: float32; nothing here waits for the device.

Source: gradients, losses and draws as in scikit-learn 1.9,
`neural_network/_multilayer_perceptron.py`; initial weights of Glorot and Bengio 2010, eq. 16; Adam
of Kingma and Ba 2015 in the form of their section 2 (epsilon beside the uncorrected second moment),
which scikit-learn has and PyTorch's optimiser has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam

from taprobe_core.devices import has_triton
from taprobe_core.errors import NotEnoughDataError

Parameters = list[NDArray[np.float32]]
MIN_HELD_OUT = 2


class Stream:
    """Random numbers of one column.

    Args:
        seed: in [0, 2^32).
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)

    def parameters(self, sizes: Sequence[int]) -> Parameters:
        """Draw weights [out, in] of every layer, then return them followed by the biases [1, out].

        Args:
            sizes: units of every layer from the features to the output.
        """
        weights, biases = [], []
        for n_in, n_out in pairwise(sizes):
            bound = np.sqrt(6.0 / (n_in + n_out))
            weight = self._random.uniform(-bound, bound, (n_in, n_out)).astype(np.float32)
            weights.append(np.ascontiguousarray(weight.T))
            biases.append(self._random.uniform(-bound, bound, (1, n_out)).astype(np.float32))
        return weights + biases

    def hold_out(
        self, y: NDArray[np.float64], fraction: float, is_classifier: bool, where: str
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Split rows into those that train and those held out, by class where there are classes.

        Args:
            y: [row] float64, targets of the training rows.
            fraction: share held out, rounded up.
            is_classifier: keep the shares of the classes.
            where: names the column in an error.

        Raises:
            NotEnoughDataError: too few rows, or too few of one class, for both sides.
        """
        try:
            kept, held = train_test_split(
                np.arange(len(y)),
                test_size=fraction,
                stratify=y if is_classifier else None,
                random_state=self._random,
            )
        except ValueError as error:
            raise _too_few(len(y), where, str(error)) from error
        if len(held) < MIN_HELD_OUT:
            raise _too_few(len(y), where, f"{len(held)} of them would be held out")
        return kept, held

    def shuffle(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions in the order of the next epoch, drawn upon that of the last."""
        order = np.arange(len(positions))
        self._random.shuffle(order)
        return positions[order]


class Orders:
    """The order in which every column of a batch reads its training rows, epoch by epoch.

    Columns whose streams have been drawn from alike have the same orders; these are drawn once.

    Args:
        streams: of the columns, in the state in which the first order is drawn.
        lengths: [column] int64, training rows of each.
        group: [column] int64; columns of one number share their orders.

    Attributes:
        which: [column] int64, the order that a column reads, of those drawn.
    """

    def __init__(
        self, streams: Sequence[Stream], lengths: NDArray[np.int64], group: NDArray[np.int64]
    ) -> None:
        _, firsts, self.which = np.unique(group, return_index=True, return_inverse=True)
        self._streams = [streams[first] for first in firsts]
        self._positions = [np.arange(lengths[first]) for first in firsts]
        self._lengths = lengths

    @property
    def n_longest(self) -> int:
        """Training rows of the column that has most."""
        return int(self._lengths.max())

    def next(self) -> NDArray[np.int64]:
        """Draw one epoch, [order, longest] int64: positions, then 0 where an order has ended."""
        drawn = np.zeros((len(self._streams), self.n_longest), np.int64)
        for place, stream in enumerate(self._streams):
            order = self._positions[place] = stream.shuffle(self._positions[place])
            drawn[place, : len(order)] = order
        return drawn

    def take(self, kept: NDArray[np.intp]) -> NDArray[np.int64]:
        """Drop all columns but `kept`, and the orders that none of them reads.

        Returns:
            [order] int64, which of the orders stay.
        """
        used, self.which = np.unique(self.which[kept], return_inverse=True)
        self._streams = [self._streams[place] for place in used]
        self._positions = [self._positions[place] for place in used]
        self._lengths = self._lengths[kept]
        return used


def start(
    seeds: NDArray[np.int64], sizes: Sequence[int]
) -> tuple[Parameters, NDArray[np.intp], list[Stream]]:
    """Draw initial parameters, once for columns of one seed, and open a stream for every column.

    Args:
        seeds: [column] int64.
        sizes: units of every layer from the features to the output.

    Returns:
        parameters, each with a first axis of distinct seeds; [column] index into that axis; the
        streams, each behind the draw of its parameters.
    """
    distinct, which = np.unique(seeds, return_inverse=True)
    firsts = [Stream(int(seed)) for seed in distinct]
    drawn = [stream.parameters(sizes) for stream in firsts]
    states = [stream._random.get_state() for stream in firsts]
    streams = [Stream(0) for _ in seeds]
    for stream, index in zip(streams, which, strict=True):
        stream._random.set_state(states[index])
    return [np.stack(each) for each in zip(*drawn, strict=True)], which, streams


def _too_few(n_rows: int, where: str, reason: str) -> NotEnoughDataError:
    return NotEnoughDataError(
        f"{n_rows} training rows cannot be split to stop early: {reason}",
        where,
        'give more rows, or stop by other problems (early_stopping "problems")',
    )


BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Rows:
    """The feature matrix as each fold standardises it, and which fold each model reads.

    Attributes:
        X: [fold * row, feature], the rows of one fold after those of another.
        first: [model, 1] int64, where the model's fold begins.
        buffer: [model * batch * feature], room for a batch of every model; None where kernels read
            the rows in place.
    """

    X: Tensor
    first: Tensor
    buffer: Tensor | None

    @classmethod
    def of(cls, X: Tensor, mean: Tensor, inverse_scale: Tensor, fold: Tensor, at_once: int) -> Rows:
        """Standardise the matrix once for every fold.

        A gather that standardised as it went would pass over a minibatch five times instead of
        twice, at every step.

        Args:
            X: [row, feature], raw.
            mean: [fold, feature].
            inverse_scale: [fold, feature].
            fold: [model] int64.
            at_once: most rows of a gather.
        """
        standardised = torch.empty(len(mean), *X.shape, device=X.device)
        for own, centre, factor in zip(standardised, mean, inverse_scale, strict=True):
            torch.sub(X, centre, out=own).mul_(factor)
        first = (fold * len(X))[:, None]
        buffer = None
        if not reads_in_place(X.device):
            buffer = torch.empty(len(fold) * at_once * X.shape[1], device=X.device)
        return cls(standardised.view(-1, X.shape[1]), first, buffer)

    @property
    def in_place(self) -> bool:
        """Whether kernels read the rows where they lie."""
        return self.buffer is None

    def at(self, index: Tensor) -> Tensor:
        """Return where rows of each model's fold lie in `X`, like `index`."""
        return index + self.first

    def gather(self, index: Tensor) -> Tensor:
        """Return the standardised rows [model, batch, feature]; valid until the next call.

        Args:
            index: [model, batch] int64.
        """
        assert self.buffer is not None  # noqa: S101
        n_models, n_rows = index.shape
        n_features = self.X.shape[1]
        flat = self.buffer[: n_models * n_rows * n_features].view(-1, n_features)
        torch.index_select(self.X, 0, self.at(index).view(-1), out=flat)
        return flat.view(n_models, n_rows, n_features)

    def take(self, kept: Tensor) -> Rows:
        """Return the rows of some models."""
        return Rows(self.X, self.first[kept], self.buffer)


def reads_in_place(device: torch.device) -> bool:
    """Whether kernels read rows where they lie, so that neither minibatch nor gradient is kept."""
    if device.type != "cuda" or not has_triton():
        return False
    # Older tensor cores do not take float32 factors.
    return torch.cuda.get_device_capability(device) >= (8, 0)


class Networks:
    """Weights of every model, their optimiser, and the rows that they read.

    Args:
        parameters: weights [model, out, in] of every layer, then biases [model, 1, out].
        rows: of the feature matrix.
        is_classifier: logistic output and log loss, else identity and half squared error.
        learning_rate: of Adam.
    """

    def __init__(
        self, parameters: list[Tensor], rows: Rows, is_classifier: bool, learning_rate: float
    ) -> None:
        self.parameters = parameters
        self.rows = rows
        self.is_classifier = is_classifier
        self.learning_rate = learning_rate
        self._n_steps = 0
        self._gradients = [torch.empty_like(each) for each in parameters]
        if rows.in_place:
            self._gradients[0] = parameters[0].new_empty(0)
        self._first = [torch.zeros_like(each) for each in parameters]
        self._second = [torch.zeros_like(each) for each in parameters]
        self._steps = [torch.zeros((), device=each.device) for each in parameters]

    @property
    def weights(self) -> list[Tensor]:
        """[model, out, in] of every layer."""
        return self.parameters[: len(self.parameters) // 2]

    @property
    def biases(self) -> list[Tensor]:
        """[model, 1, out] of every layer."""
        return self.parameters[len(self.parameters) // 2 :]

    def output(self, index: Tensor) -> Tensor:
        """Return logits or values [model, batch] of rows [model, batch] int64."""
        return self._forward(index)[-1][..., 0]

    def _forward(self, index: Tensor) -> list[Tensor]:
        """Return the inputs of every layer, then the output [model, batch, 1].

        Rows that kernels read in place are no input: the first is then empty.
        """
        if self.rows.in_place:
            from taprobe_core.solvers.networks.kernels import read_first_layer

            at = self.rows.at(index)
            first = read_first_layer(self.rows.X, at, self.weights[0], self.biases[0])
            states = [first.new_empty(0), first]
        else:
            states = [self.rows.gather(index)]
        for layer in range(len(states) - 1, len(self.weights) - 1):
            weight, bias = self.weights[layer], self.biases[layer]
            states.append(torch.baddbmm(bias, states[-1], weight.transpose(1, 2)).relu_())
        # one output: a batched product of one column is slower than multiplying and adding
        last = (states[-1] * self.weights[-1]).sum(2, keepdim=True)
        states.append(last.add_(self.biases[-1]))
        return states

    def step(
        self, index: Tensor, y: Tensor, weight: Tensor, decay: Tensor, shared_decay: float | None
    ) -> Tensor:
        """Take one step of Adam and return the output [model, batch] before it.

        The loss of a model is the weighted sum of its rows' losses plus half of `decay` times the
        sum of its squared weights (biases not among them).

        Args:
            index: [model, batch] int64, rows of each model.
            y: [model, batch].
            weight: [model, batch], summing to 1 over the batch; 0 for padding.
            decay: [model].
            shared_decay: that of all models, if it is one; the optimiser then adds it as it goes,
                which saves three passes over the weights.
        """
        states = self._forward(index)
        output = states[-1]
        predicted = output.sigmoid() if self.is_classifier else output
        delta = (predicted - y[..., None]).mul_(weight[..., None])
        n_layers, lowest = len(self.weights), int(self.rows.in_place)
        for layer in reversed(range(n_layers)):
            parameters = self.weights[layer]
            torch.sum(delta, 1, keepdim=True, out=self._gradients[n_layers + layer])
            if layer < lowest:
                break
            gradient = self._gradients[layer]
            if layer == n_layers - 1:
                torch.sum(delta * states[layer], 1, keepdim=True, out=gradient)
            else:
                torch.bmm(delta.transpose(1, 2), states[layer], out=gradient)
            if shared_decay is None:
                gradient.addcmul_(parameters, decay[:, None, None])
            if layer:
                delta = delta * parameters if layer == n_layers - 1 else delta.bmm(parameters)
                delta = torch.ops.aten.threshold_backward(delta, states[layer], 0)
        self._n_steps += 1
        if self.rows.in_place:
            self._step_in_place(index, delta, decay)
        self._adam(slice(lowest, n_layers), shared_decay or 0.0)
        self._adam(slice(n_layers, None), 0.0)
        return output[..., 0]

    def row_losses(self, output: Tensor, y: Tensor) -> Tensor:
        """Return log losses of logits, or half squared errors, of the shape of both arguments."""
        if self.is_classifier:
            return functional.softplus(output).sub_(output * y)
        return (output - y).square_().mul_(0.5)

    def squared_weights(self) -> Tensor:
        """Return the sum of squared weights of each model, [model]."""
        norms = [torch.linalg.vector_norm(each, dim=(1, 2)) for each in self.weights]
        return torch.stack(norms).square_().sum(0)

    def take(self, kept: Tensor) -> None:
        """Drop all models but `kept` (indices into the first axis)."""
        self.rows = self.rows.take(kept)
        for name in ("parameters", "_first", "_second"):
            setattr(self, name, [each[kept] for each in getattr(self, name)])
        self._gradients = [each[: len(kept)] for each in self._gradients]

    def _step_in_place(self, index: Tensor, delta: Tensor, decay: Tensor) -> None:
        from taprobe_core.solvers.networks.kernels import AdamStep, step_first_layer

        size, root = self.learning_rate / (1 - BETA_1**self._n_steps), self._root()
        adam = AdamStep(size, root, EPSILON / root, (BETA_1, BETA_2))
        rows, moments = self.rows, (self._first[0], self._second[0])
        step_first_layer(rows.X, rows.at(index), delta, self.weights[0], moments, decay, adam)

    def _adam(self, part: slice, decay: float) -> None:
        """Step some of the parameters along their gradients."""
        adam(
            self.parameters[part],
            self._gradients[part],
            self._first[part],
            self._second[part],
            [],
            self._steps[part],
            fused=True,
            amsgrad=False,
            beta1=BETA_1,
            beta2=BETA_2,
            lr=self.learning_rate,
            weight_decay=decay,
            eps=EPSILON / self._root(),
            maximize=False,
        )

    def _root(self) -> float:
        """By which PyTorch divides the root of the second moment before it adds epsilon."""
        return math.sqrt(1 - BETA_2**self._n_steps)
