"""Multilayer perceptrons of one shape side by side: forward, backward and Adam as batched products.

Every tensor has a first axis of models; no operation mixes models. A model reads its own rows of
one shared feature matrix, which stands there as each fold standardises it; where products may be
rounded, kernels read them where they lie. What does not belong here: which rows when (`networks`),
when a model stops (`network_stopping`).

Invariant: float32; nothing here waits for the device.

Source: gradients and losses as in scikit-learn 1.9, `neural_network/_multilayer_perceptron.py`;
Adam of Kingma and Ba 2015 in the form of their section 2 (epsilon beside the uncorrected second
moment), which scikit-learn has and PyTorch's optimiser has not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam

from taprobe_core.kernels import has_triton

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class Rows:
    """The feature matrix as each fold standardises it, and which fold each model reads.

    Attributes:
        X: [fold * row, feature], the rows of one fold after those of another.
        first: [model, 1] int64, where the model's fold begins.
        at_once: most rows of a gather.
    """

    X: Tensor
    first: Tensor
    at_once: int
    _buffer: Tensor | None = None

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
        return cls(standardised.view(-1, X.shape[1]), (fold * len(X))[:, None], at_once)

    def gather(self, at: Tensor) -> Tensor:
        """Return standardised rows [model, batch, feature]; valid until the next call.

        Args:
            at: [model, batch] int64, of `X`.
        """
        n_features = self.X.shape[1]
        if self._buffer is None:
            size = len(self.first) * self.at_once * n_features
            self._buffer = torch.empty(size, device=self.X.device)
        flat = self._buffer[: at.numel() * n_features].view(-1, n_features)
        torch.index_select(self.X, 0, at.view(-1), out=flat)
        return flat.view(*at.shape, n_features)

    def take(self, kept: Tensor) -> Rows:
        """Return the rows of some models."""
        return Rows(self.X, self.first[kept], self.at_once, self._buffer)


class Networks:
    """Weights of every model, and their optimiser.

    Args:
        parameters: weights [model, out, in] of every layer, then biases [model, 1, out].
        is_classifier: logistic output and log loss, else identity and half squared error.
        learning_rate: of Adam.
    """

    def __init__(self, parameters: list[Tensor], is_classifier: bool, learning_rate: float) -> None:
        self.parameters = parameters
        self.is_classifier = is_classifier
        self.learning_rate = learning_rate
        self._n_steps = 0
        self._gradients = [torch.empty_like(each) for each in parameters]
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

    def output(self, rows: Rows, index: Tensor) -> Tensor:
        """Return logits or values, [model, batch].

        Args:
            rows: of the feature matrix.
            index: [model, batch] int64, rows of each model's fold.
        """
        return self._forward(rows, index + rows.first)[-1][..., 0]

    def _forward(self, rows: Rows, at: Tensor) -> list[Tensor]:
        """Return the inputs of every layer, then the output [model, batch, 1].

        Rows that are read in place are no input: the first is then empty.
        """
        if self._reads_in_place(rows):
            from taprobe_core.solvers.network_kernels import first_layer

            states = [at.new_empty(0), first_layer(rows.X, at, self.weights[0], self.biases[0])]
        else:
            states = [rows.gather(at)]
        for layer in range(len(states) - 1, len(self.weights) - 1):
            weight, bias = self.weights[layer], self.biases[layer]
            states.append(torch.baddbmm(bias, states[-1], weight.transpose(1, 2)).relu_())
        # one output: a batched product of one column is slower than multiplying and adding
        last = (states[-1] * self.weights[-1]).sum(2, keepdim=True)
        states.append(last.add_(self.biases[-1]))
        return states

    def _reads_in_place(self, rows: Rows) -> bool:
        """Whether kernels take the first layer: the tensor cores have no float32."""
        may_round = rows.X.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return may_round and has_triton() and len(self.weights) > 1

    def step(
        self,
        rows: Rows,
        index: Tensor,
        y: Tensor,
        weight: Tensor,
        decay: Tensor,
        shared_decay: float | None,
    ) -> Tensor:
        """Take one step of Adam and return the output [model, batch] before it.

        The loss of a model is the weighted sum of its rows' losses plus half of `decay` times the
        sum of its squared weights (biases not among them).

        Args:
            rows: of the feature matrix.
            index: [model, batch] int64, rows of each model's fold.
            y: [model, batch].
            weight: [model, batch], summing to 1 over the batch; 0 for padding.
            decay: [model].
            shared_decay: that of all models, if it is one; the optimiser then adds it as it goes,
                which saves three passes over the weights.
        """
        at = index + rows.first
        states = self._forward(rows, at)
        output = states[-1]
        predicted = output.sigmoid() if self.is_classifier else output
        delta = (predicted - y[..., None]).mul_(weight[..., None])
        n_layers, n_done = len(self.weights), int(self._reads_in_place(rows))
        self._n_steps += 1
        for layer in reversed(range(n_layers)):
            parameters, gradient = self.weights[layer], self._gradients[layer]
            torch.sum(delta, 1, keepdim=True, out=self._gradients[n_layers + layer])
            if layer < n_done:
                self._step_in_place(rows, at, delta, decay)
                break
            if layer == n_layers - 1:
                torch.sum(delta * states[layer], 1, keepdim=True, out=gradient)
            else:
                torch.bmm(delta.transpose(1, 2), states[layer], out=gradient)
            if shared_decay is None:
                gradient.addcmul_(parameters, decay[:, None, None])
            if layer:
                delta = delta * parameters if layer == n_layers - 1 else delta.bmm(parameters)
                delta = torch.ops.aten.threshold_backward(delta, states[layer], 0)
        self._adam(slice(n_done, n_layers), shared_decay or 0.0)
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
        for name in ("parameters", "_first", "_second"):
            setattr(self, name, [each[kept] for each in getattr(self, name)])
        self._gradients = [each[: len(kept)] for each in self._gradients]

    def _root(self) -> float:
        """By which PyTorch divides the root of the second moment before it adds epsilon."""
        return math.sqrt(1 - BETA_2**self._n_steps)

    def _step_in_place(self, rows: Rows, at: Tensor, delta: Tensor, decay: Tensor) -> None:
        from taprobe_core.solvers.network_kernels import AdamStep, step_first_layer

        size, root = self.learning_rate / (1 - BETA_1**self._n_steps), self._root()
        adam = AdamStep(size, root, EPSILON / root, (BETA_1, BETA_2))
        moments = self._first[0], self._second[0]
        step_first_layer(rows.X, at, delta, self.weights[0], moments, decay, adam)

    def _adam(self, part: slice, decay: float) -> None:
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
