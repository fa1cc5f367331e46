"""Random draws of a network: initial weights, held-out rows, order of the rows in every epoch.

Each column has a stream of its own: its draws do not depend on what is trained beside it. The
streams are those of scikit-learn (`RandomState(seed)`, drawn from in its order: weights, held-out
rows, orders), so a column ends as scikit-learn's network of the same seed, up to float rounding.
What does not belong here: arithmetic on weights (`network_batch`).

Source: scikit-learn 1.9, `neural_network/_multilayer_perceptron.py`; initial weights of Glorot and
Bengio 2010, eq. 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

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
        'give more rows, or watch other problems (early_stopping "problems")',
    )
