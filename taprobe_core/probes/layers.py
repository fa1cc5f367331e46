"""ReLU layers: the forward pass, its gradient, and Adam's steps on mini-batches.

What does not belong here: when to stop, and on which rows to judge that (`network`). Invariant:
float32 throughout; initial weights, batches, loss and updates are those of scikit-learn's
multilayer perceptron, drawn from the same random stream.

Source: Kingma and Ba, Adam (2015), algorithm 1; initial weights Glorot and Bengio (2010), eq. 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from taprobe_core.probes.inputs import Matrix

Singles = NDArray[np.float32]
Layer = tuple[Singles, Singles]
"""Weight [in, out] and bias [out]."""

ALPHA = 1e-4
LEARNING_RATE = 1e-3
BATCH_ROWS = 200
_DECAY_MEAN, _DECAY_SQUARE, _EPSILON = 0.9, 0.999, 1e-8


def forward(X: Matrix, layers: Sequence[Layer]) -> Singles:
    """Return the output layer before its link, [row] float32."""
    output: Singles = _activations(X, layers)[-1][:, 0]
    return output


def _activations(X: Matrix, layers: Sequence[Layer]) -> list[Any]:
    values: list[Any] = [X]
    for depth, (weight, bias) in enumerate(layers, start=1):
        value = values[-1] @ weight
        value += bias
        if depth < len(layers):
            np.maximum(value, 0, out=value)
        values.append(value)
    return values


@dataclass(frozen=True)
class _Shape:
    """Where a layer lies in the flat vector of all weights."""

    start: int
    n_in: int
    n_out: int

    def views(self, flat: Singles) -> Layer:
        middle = self.start + self.n_in * self.n_out
        return (
            flat[self.start : middle].reshape(self.n_in, self.n_out),
            flat[middle : middle + self.n_out],
        )


class Trainer:
    """Weights, gradients and moments, each one flat vector, so that a step is a few array calls."""

    def __init__(
        self,
        X: Matrix,
        y: Singles,
        hidden: tuple[int, ...],
        is_binary: bool,
        rng: np.random.RandomState,
    ) -> None:
        self._X, self._y, self._is_binary, self._rng = X, y, is_binary, rng
        self._order = np.arange(len(y))
        sizes = [X.shape[1], *hidden, 1]
        shapes, start = [], 0
        for n_in, n_out in pairwise(sizes):
            shapes.append(_Shape(start, n_in, n_out))
            start += (n_in + 1) * n_out
        self.weights, self._gradient, self._mean, self._square, self._buffer = np.zeros(
            (5, start), dtype=np.float32
        )
        self.layers = [shape.views(self.weights) for shape in shapes]
        self._slopes = [shape.views(self._gradient) for shape in shapes]
        self._n_steps = 0
        for weight, bias in self.layers:
            bound = np.sqrt(6.0 / sum(weight.shape))
            weight[:] = rng.uniform(-bound, bound, weight.shape)
            bias[:] = rng.uniform(-bound, bound, bias.shape)

    def loss(self, X: Matrix, y: Singles) -> float:
        """Mean log loss, or half the mean squared error, without penalty."""
        return self._loss(_activations(X, self.layers)[-1], y)

    def epoch(self) -> float:
        """Pass over the rows once in a new order; return the mean loss with penalty."""
        self._order = self._order[self._rng.permutation(len(self._order))]
        total = 0.0
        for start in range(0, len(self._order), BATCH_ROWS):
            rows = self._order[start : start + BATCH_ROWS]
            total += self._batch(self._X[rows], self._y[rows]) * len(rows)
            self._adam()
        return total / len(self._order)

    def _loss(self, output: Singles, y: Singles) -> float:
        if self._is_binary:
            return float((np.logaddexp(0, output) - y * output).mean())
        return 0.5 * float(((output - y) ** 2).mean())

    def _batch(self, X: Matrix, y: Singles) -> float:
        values = _activations(X, self.layers)
        n, squares = len(y), 0.0
        delta = (expit(values[-1]) if self._is_binary else values[-1]) - y
        delta /= np.float32(n)
        for depth in range(len(self.layers) - 1, -1, -1):
            weight, (slope, bias_slope) = self.layers[depth][0], self._slopes[depth]
            slope[:] = values[depth].T @ delta
            slope += np.float32(ALPHA / n) * weight
            delta.sum(axis=0, out=bias_slope)
            flat = weight.ravel()
            squares += float(flat @ flat)
            if depth:
                delta = delta @ weight.T
                delta *= values[depth] > 0
        return self._loss(values[-1], y) + 0.5 * ALPHA * squares / n

    def _adam(self) -> None:
        self._n_steps += 1
        gradient, buffer = self._gradient, self._buffer
        self._mean *= _DECAY_MEAN
        self._mean += np.multiply(gradient, 1 - _DECAY_MEAN, out=buffer)
        self._square *= _DECAY_SQUARE
        np.multiply(gradient, gradient, out=buffer)
        buffer *= 1 - _DECAY_SQUARE
        self._square += buffer
        rate = LEARNING_RATE * np.sqrt(1 - _DECAY_SQUARE**self._n_steps)
        rate /= 1 - _DECAY_MEAN**self._n_steps
        np.sqrt(self._square, out=buffer)
        buffer += _EPSILON
        np.divide(self._mean, buffer, out=buffer)
        buffer *= np.float32(rate)
        self.weights -= buffer
