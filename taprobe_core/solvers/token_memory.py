"""Which token probes are trained at once: bounded by bytes of weights, state and activations.

What does not belong here: training (`token_training`). Invariants: the bound is an upper one, so a
stack of that many models fits (the token states, which all stacks share, are not counted); models
of a stack have one seed and equally many steps an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taprobe_core.solvers.columns import Columns
from taprobe_core.solvers.device_memory import free_bytes
from taprobe_core.solvers.ragged import ALIGNED, FEW_SHAPES
from taprobe_core.solvers.token_forward import NetworkShape
from taprobe_core.solvers.token_options import TokenProbeOptions
from taprobe_core.solvers.token_reading import n_batches
from taprobe_core.solvers.token_states import MAX_TOKENS_SCORED, TokenStates, units_at_once

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
    *,
    is_recorded: bool = False,
) -> Need:
    """Return what training a stack takes.

    Args:
        shape: of one model.
        options: of all.
        n_sentences: of a batch.
        lengths: [sentence] int64, tokens of every sentence.
        n_units_scored: hidden units times tokens that one scoring pass holds.
        n_tokens_scored: tokens that it reads at most.
        is_recorded: whether steps are recorded by shape (`replay`), in memory of their own.
    """
    n_parameters = sum(int(np.prod(size)) for size in shape.parameters().values())
    first = shape.width * shape.n_features
    # The batch of the longest sentences, which a random order may draw.
    longest = np.sort(lengths)[-n_sentences:]
    rounding = FEW_SHAPES if is_recorded else ALIGNED
    n_tokens = rounding.n_token_rows(int(longest.sum()))
    slots = rounding.n_rows(n_sentences) * rounding.n_slots(int(longest.max()))
    if shape.pooling == "rolling_multimax":
        slots += n_tokens * min(options.window, int(longest.max()))
    activations = (shape.depth + 2) * shape.width * n_tokens
    activations += _POOLING_ARRAYS * shape.n_heads * (slots + n_tokens)
    if shape.pooling == "multimax":
        places = n_sentences * shape.n_heads
        activations += places * (shape.n_features + (shape.depth + 1) * shape.width)
    activations *= 1 + is_recorded
    targets = 4 * len(lengths)
    values = _TRAINING_ARRAYS * n_parameters + first + activations + targets
    fixed = (shape.depth + 1) * n_units_scored + 2 * n_tokens_scored * shape.n_features
    return Need(_VALUE * values, _VALUE * fixed)


def models_at_once(
    states: TokenStates,
    shape: NetworkShape,
    options: TokenProbeOptions,
    n_steps: int,
    max_bytes: int | None,
) -> int:
    """Return how many models are trained at once, at least 1.

    Args:
        states: on the device.
        shape: of one model.
        options: of all.
        n_steps: batches of an epoch, at least.
        max_bytes: that they may take; None: 2 GiB on a CPU, half of the free memory of a GPU.
    """
    need = bytes_needed(
        shape,
        options,
        -(-len(states.tokens) // n_steps),
        states.tokens.lengths,
        units_at_once(states.device),
        min(MAX_TOKENS_SCORED, len(states.tokens.values)),
        is_recorded=states.device.type == "cuda",
    )
    n_bytes = free_bytes(states.device, CPU_BYTES) if max_bytes is None else max_bytes
    return need.models_within(n_bytes)


def steps_of(columns: Columns, options: TokenProbeOptions) -> NDArray[np.int64]:
    """Return the batches of each column's epoch, [column] int64."""
    learnt = (columns.weight > 0).sum(axis=0).tolist()
    return np.array([n_batches(n, options.batch_size) for n in learnt], dtype=np.int64)


def stacks(
    columns: Columns, steps: NDArray[np.int64], at_once: int
) -> Iterator[tuple[NDArray[np.intp], int]]:
    """Yield the columns of each stack, and their seed.

    Stacks of one seed and number of steps are even; models of a fold stand together.

    Args:
        columns: with seeds.
        steps: [column] int64, as `steps_of` returns them.
        at_once: most models of a stack.
    """
    assert columns.seed is not None  # noqa: S101  checked
    kinds = np.unique(np.stack([columns.seed, steps], axis=1), axis=0)
    for seed, n_steps in kinds.tolist():
        chosen = np.flatnonzero((columns.seed == seed) & (steps == n_steps))
        chosen = chosen[np.argsort(columns.fold[chosen], kind="stable")]
        for part in np.array_split(chosen, -(-len(chosen) // at_once)):
            yield part, seed
