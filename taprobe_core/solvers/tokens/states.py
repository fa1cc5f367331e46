"""Token states on the device, scaled once for all folds, and which probes train on them at once.

Models of a stack have one seed and equally many steps an epoch, as many as the device's memory
takes. What does not belong here: training (`training`).

Invariants: the states that a fold's models see are those of its own standardisation (training
tokens' mean and population standard deviation, a constant feature keeps scale 1); the scaling that
all folds share is undone exactly by the fold's part, and only keeps the digits of features with
large means. The bound on memory is an upper one, so a stack of that many models fits (the token
states, which all stacks share, are not counted).

Source:
    scikit-learn's `StandardScaler` for scale and the rule for constant features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.devices import free_bytes, has_triton
from taprobe_core.errors import NonFiniteError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens.forward import FoldScaling, NetworkShape
from taprobe_core.solvers.tokens.pooling import TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import (
    ALIGNED,
    FEW_SHAPES,
    RaggedTokens,
    TokenBatch,
    n_batches,
    plan_batches,
)

Mask = NDArray[np.bool_]
Moments = NDArray[np.float64]

TOKENS_AT_ONCE = 4096
UNITS_AT_ONCE = {"cpu": 2**21}
"""Hidden units times tokens that one scoring pass holds; a CPU's fit its cache."""
UNITS_AT_ONCE_ELSEWHERE = 2**27
MAX_TOKENS_SCORED = 2**14
"""Of one scoring pass, which copies their states."""


@dataclass(frozen=True, eq=False)
class TokenStates:
    """Token sets on a device and their scaling.

    Attributes:
        tokens: the sets, values on the device as stored.
        centre: [d] float32, subtracted from every state.
        inverse: [d] float32, multiplies every state.
        mean: [fold, d] float64, of each fold's training tokens.
        scale: [fold, d] float64, their standard deviation; 1 where constant.
    """

    tokens: RaggedTokens
    centre: torch.Tensor
    inverse: torch.Tensor
    mean: Moments
    scale: Moments

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.tokens.values.device

    def read(self, batch: TokenBatch) -> torch.Tensor:
        """Return the states of a batch, [token, d] float32, as all folds share them."""
        values = self.tokens.values
        if values.is_cuda and has_triton():
            from taprobe_core.solvers.tokens.kernels import read_states

            return read_states(values, batch.token, self.centre, self.inverse)
        return values.index_select(0, batch.token).float().sub_(self.centre).mul_(self.inverse)

    def scaling(self, fold: NDArray[np.int64]) -> FoldScaling:
        """Return what is left to do of each model's scaling.

        Args:
            fold: [model] int64.
        """
        centre, inverse = (each.cpu().double().numpy() for each in (self.centre, self.inverse))
        mean = (self.mean[fold] - centre) * inverse
        rest = 1 / (self.scale[fold] * inverse)
        return FoldScaling(self._placed(mean), self._placed(rest[:, None]))

    def _placed(self, values: Moments) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self.device)

    def batches(
        self, sentences: NDArray[np.int64], n_units: int, window: int | None
    ) -> list[TokenBatch]:
        """Cut sentences into batches for scoring: alike in length, small enough for the memory.

        Args:
            sentences: [sentence] int64; the batches hold them in another order.
            n_units: hidden units of all models together.
            window: tokens of a window, None without windows.
        """
        limit = min(units_at_once(self.device) / n_units, MAX_TOKENS_SCORED)
        ordered = sentences[np.argsort(self.tokens.lengths[sentences], kind="stable")]
        nth = np.cumsum(self.tokens.lengths[ordered]) // max(limit, 1)
        parts = np.split(ordered, np.flatnonzero(np.diff(nth)) + 1)
        return plan_batches(self.tokens, parts, window, self.device)


def units_at_once(device: torch.device) -> int:
    """Return the hidden units times tokens that one scoring pass holds on a device."""
    return UNITS_AT_ONCE.get(device.type, UNITS_AT_ONCE_ELSEWHERE)


def check_finite(tokens: RaggedTokens) -> None:
    """Refuse states that are not numbers.

    Raises:
        NonFiniteError: a state is NaN or infinite; names sentence and token.
    """
    sums = tokens.values.sum(1, dtype=torch.float64)
    bad = torch.nonzero(~torch.isfinite(sums)).flatten().tolist()
    if bad:
        sentence = int(np.searchsorted(tokens.offsets, bad[0], side="right")) - 1
        raise NonFiniteError(
            f"{len(bad)} token states with a value that is NaN or infinite",
            f"token sets, sentence {sentence}, token {bad[0] - int(tokens.offsets[sentence])}",
            "extract the activations again, in a type that holds their range",
        )


def token_states(tokens: RaggedTokens, train: Mask, device: torch.device | str) -> TokenStates:
    """Bring token sets to a device and measure every fold's training tokens.

    Args:
        tokens: the sets.
        train: [fold, sentence] bool, at least one sentence in each fold.
        device: where to compute.

    Raises:
        NonFiniteError: a state is NaN or infinite; names the sentence.
    """
    tokens = tokens.to(device)
    check_finite(tokens)
    everything = np.ones((1, len(tokens)), dtype=bool)
    mean, scale = _moments(tokens, everything, np.zeros(tokens.n_features))
    centre = mean[0].astype(np.float32)
    shared = torch.from_numpy(1 / scale[0].astype(np.float32))
    fold_mean, fold_scale = _moments(tokens, train, centre.astype(np.float64))
    return TokenStates(
        tokens, torch.from_numpy(centre).to(device), shared.to(device), fold_mean, fold_scale
    )


def _moments(tokens: RaggedTokens, train: Mask, centre: Moments) -> tuple[Moments, Moments]:
    """Mean and scale of each fold's tokens, [fold, d]; sums of differences from `centre`."""
    device = tokens.values.device
    by_token = torch.from_numpy(np.repeat(train, tokens.lengths, axis=1)).to(device)
    start = torch.from_numpy(centre).to(device)
    first, second = torch.zeros(
        2, len(train), tokens.n_features, dtype=torch.float64, device=device
    ).unbind()
    for at in range(0, len(tokens.values), TOKENS_AT_ONCE):
        states = tokens.values[at : at + TOKENS_AT_ONCE].double() - start
        is_in = by_token[:, at : at + TOKENS_AT_ONCE].double()
        first.addmm_(is_in, states)
        second.addmm_(is_in, states.square_())
    n = by_token.sum(1).cpu().numpy().astype(np.float64)[:, None]
    shift = first.cpu().numpy() / n
    variance = np.maximum(second.cpu().numpy() / n - shift**2, 0.0)
    mean, eps = centre + shift, np.finfo(np.float64).eps
    # The last term is what the difference of squares can lose.
    bound = n * eps * variance + (n * mean * eps) ** 2 + n * eps * shift**2
    return mean, np.where(variance <= bound, 1.0, np.sqrt(variance))


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


def steps_of(columns: FitRequest, options: TokenProbeOptions) -> NDArray[np.int64]:
    """Return the batches of each column's epoch, [column] int64."""
    learnt = (columns.weight > 0).sum(axis=0).tolist()
    return np.array([n_batches(n, options.batch_size) for n in learnt], dtype=np.int64)


def stacks(
    columns: FitRequest, steps: NDArray[np.int64], at_once: int
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
