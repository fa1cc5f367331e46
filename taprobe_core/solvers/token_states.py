"""Token states on the device, scaled once for all folds, and each fold's own mean and scale.

What does not belong here: what the states are used for. Invariant: the states that a fold's models
see are those of its own standardisation (training tokens' mean and population standard deviation, a
constant feature keeps scale 1); the scaling that all folds share is undone exactly by the fold's
part, and only keeps the digits of features with large means.

Source:
    scikit-learn's `StandardScaler` for scale and the rule for constant features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.errors import NonFiniteError
from taprobe_core.kernels import has_triton
from taprobe_core.solvers.ragged import RaggedTokens, TokenBatch, plan_batches
from taprobe_core.solvers.token_forward import FoldScaling

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
            from taprobe_core.solvers.token_kernels import read_states

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
