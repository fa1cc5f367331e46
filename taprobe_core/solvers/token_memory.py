"""How many token probes are trained at once: bounded by bytes of weights, state and activations.

What does not belong here: training (`token_training`). Invariant: the bound is an upper one, so a
stack of that many models fits; the token states, which all stacks share, are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taprobe_core.solvers.ragged import ALIGNMENT
from taprobe_core.solvers.token_forward import NetworkShape
from taprobe_core.solvers.token_options import TokenProbeOptions

CPU_BYTES = 2 * 2**30
"""Of one stack on a CPU."""

_VALUE = 4
_TRAINING_ARRAYS = 5
"""Weights, gradient, two moments, the weights of the best epoch."""
_POOLING_ARRAYS = 10
"""Scores laid out by slots: queries, values, weights, their gradients, and copies in between."""


class Need(NamedTuple):
    """Bytes of one model of a stack, and of what a stack needs whatever its number of models."""

    per_model: int
    fixed: int

    def models_within(self, n_bytes: int) -> int:
        """Return how many models fit, at least 1."""
        return max((n_bytes - self.fixed) // self.per_model, 1)


def bytes_needed(
    shape: NetworkShape,
    options: TokenProbeOptions,
    n_sentences: int,
    lengths: NDArray[np.int64],
    n_units_scored: int,
    n_tokens_scored: int,
) -> Need:
    """Return what training a stack takes.

    Args:
        shape: of one model.
        options: of all.
        n_sentences: of a batch.
        lengths: [sentence] int64, tokens of every sentence.
        n_units_scored: hidden units times tokens that one scoring pass holds.
        n_tokens_scored: tokens that it reads at most.
    """
    n_parameters = sum(int(np.prod(size)) for size in shape.parameters().values())
    first = shape.width * shape.n_features
    # The batch of the longest sentences, which a random order may draw.
    longest = np.sort(lengths)[-n_sentences:]
    n_tokens = int(longest.sum()) + ALIGNMENT
    slots = n_sentences * int(longest.max())
    if shape.pooling == "rolling_multimax":
        slots += n_tokens * min(options.window, int(longest.max()))
    activations = (shape.depth + 2) * shape.width * n_tokens
    activations += _POOLING_ARRAYS * shape.n_heads * (slots + n_tokens)
    if shape.pooling == "multimax":
        places = n_sentences * shape.n_heads
        activations += places * (shape.n_features + (shape.depth + 1) * shape.width)
    targets = 4 * len(lengths)
    values = _TRAINING_ARRAYS * n_parameters + first + activations + targets
    fixed = (shape.depth + 1) * n_units_scored + 2 * n_tokens_scored * shape.n_features
    return Need(_VALUE * values, _VALUE * fixed)
