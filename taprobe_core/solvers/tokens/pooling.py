"""Settings of the probes that read token sets, and their pooling over a sentence's tokens.

Scores come as [token, column of heads]: every head of every model is a column, and all columns are
pooled by the same tables. What does not belong here: the network that makes the scores (`forward`)
and the tables (`ragged`). The study's words for the same settings are `study.probes.TokenProbe`.

Invariants: a sentence's result depends on its own tokens alone; a maximum that several tokens share
gives its gradient to the first of them; everything is a gather or a scatter without collisions.

Source:
    arXiv 2601.11516: attention probe, MultiMax, rolling MultiMax. Theirs sums the heads; ours
    learns a weight per head (`forward`). Gradients are derived by hand: for z = sum_t a_t v_t with
    a = softmax(q), dz/dv_t = a_t and dz/dq_t = a_t (v_t - z); for a = softmax(v) both add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from taprobe_core.devices import has_triton
from taprobe_core.errors import ConfigError
from taprobe_core.solvers.tokens.ragged import Slots, TokenBatch

Pooling = Literal["attention", "multimax", "rolling_multimax"]
POOLINGS: tuple[Pooling, ...] = ("attention", "multimax", "rolling_multimax")

LOWEST = -1e30
"""Score of an empty slot: finite, so that weight 0 times it is 0, and below every real score."""


def n_scores(pooling: Pooling) -> int:
    """Return the scores per head: query and value, or a value alone."""
    return 1 if pooling == "multimax" else 2


class _Mean(NamedTuple):
    """What the gradient of a weighted mean needs: [group, slot, column] and [group, column]."""

    weight: torch.Tensor
    value: torch.Tensor
    mean: torch.Tensor


class _Folded(NamedTuple):
    """The same of a mean that a kernel made, [group, column]; the weights are made again."""

    mean: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor


class _Maximum(NamedTuple):
    """What the gradient of a maximum needs: the item it was found at, [group, column] int64."""

    item: torch.Tensor


Saved = list[_Mean | _Folded | _Maximum]


def pool(
    scores: torch.Tensor, batch: TokenBatch, pooling: Pooling, is_soft: bool
) -> tuple[torch.Tensor, Saved]:
    """Pool every column over the tokens of each sentence.

    Args:
        scores: [query and value | value, token, column]; the last row is `LOWEST`, what stands
            in others that fill up does not matter.
        batch: tables; with windows if the pooling is rolling.
        pooling: attention: mean of the values weighted by softmax(query); multimax: the largest
            value; rolling_multimax: attention inside each window, then the largest.
        is_soft: replace the maximum by the mean weighted by the softmax of the same scores.

    Returns:
        [sentence, column], and what `pool_gradient` needs.
    """
    if pooling == "attention":
        mean = _mean(scores, batch.stages[0])
        return mean.mean, [mean]
    if pooling == "multimax":
        pooled, last = _peak(scores[0], batch.stages[0], is_soft)
        return pooled, [last]
    mean = _mean(scores, batch.stages[0])
    padded = torch.nn.functional.pad(mean.mean, (0, 0, 0, 1), value=LOWEST)
    pooled, last = _peak(padded, batch.stages[1], is_soft)
    return pooled, [mean, last]


def pool_gradient(
    gradient: torch.Tensor, saved: Saved, scores: torch.Tensor, batch: TokenBatch, pooling: Pooling
) -> torch.Tensor:
    """Return the gradient for the scores from that for the pooled values.

    Args:
        gradient: [sentence, column].
        saved: as `pool` returned it.
        scores: as given to `pool`.
        batch: as given to `pool`.
        pooling: as given to `pool`.

    Returns:
        As `scores`; 0 in the rows past the batch's tokens.
    """
    out = torch.zeros_like(scores)
    if pooling == "rolling_multimax":
        n_windows = len(batch.stages[0].member)
        inner = gradient.new_zeros(n_windows + 1, gradient.shape[1])
        _peak_gradient(gradient, saved[1], batch.stages[1], inner)
        _mean_gradient(inner[:-1], saved[0], scores, batch.stages[0], out)
    elif pooling == "attention":
        _mean_gradient(gradient, saved[0], scores, batch.stages[0], out)
    else:
        _peak_gradient(gradient, saved[0], batch.stages[0], out[0])
    return out


def maxima(saved: Saved) -> torch.Tensor | None:
    """Return the item at which each hard maximum was found, [group, column]; None if soft."""
    return saved[-1].item if isinstance(saved[-1], _Maximum) else None


def _slotted(items: torch.Tensor, slots: Slots) -> torch.Tensor:
    """[item, column] -> [group, slot, column]."""
    return items.index_select(0, slots.member.view(-1)).view(*slots.member.shape, -1)


def _collected(slotted: torch.Tensor, slots: Slots, out: torch.Tensor) -> None:
    """Sum each item's copies: [group, slot, column] -> [item, column]; the adjoint of _slotted.

    Rows of `out` behind the items that have a home are left as they are.
    """
    n_items, n_copies = slots.home.shape
    flat, out = slotted.flatten(0, 1), out[:n_items]
    if n_copies == 1:
        torch.index_select(flat, 0, slots.home.view(-1), out=out)
        return
    flat = torch.nn.functional.pad(flat, (0, 0, 0, 1))
    copies = flat.index_select(0, slots.home.view(-1)).view(n_items, n_copies, -1)
    torch.sum(copies, 1, out=out)


def _mean(scores: torch.Tensor, slots: Slots) -> _Mean | _Folded:
    if scores.is_cuda and has_triton():
        from taprobe_core.solvers.tokens.kernels import mean_by_softmax

        return _Folded(*mean_by_softmax(scores, slots.member))
    query, value = scores
    weight = torch.softmax(_slotted(query, slots), 1)
    slotted = _slotted(value, slots)
    return _Mean(weight, slotted, (weight * slotted).sum(1))


def _mean_gradient(
    gradient: torch.Tensor,
    saved: _Mean | _Folded | _Maximum,
    scores: torch.Tensor,
    slots: Slots,
    out: torch.Tensor,
) -> None:
    if isinstance(saved, _Folded):
        from taprobe_core.solvers.tokens.kernels import mean_by_softmax_gradient

        mean_by_softmax_gradient(gradient, scores, slots.home, slots.member.shape[1], saved, out)
        return
    assert isinstance(saved, _Mean)  # noqa: S101  the pooling decides which it is
    to_value = saved.weight * gradient[:, None]
    to_query = (saved.value - saved.mean[:, None]).mul_(to_value)
    _collected(to_value, slots, out[1])
    _collected(to_query, slots, out[0])


def _peak(
    items: torch.Tensor, slots: Slots, is_soft: bool
) -> tuple[torch.Tensor, _Mean | _Maximum]:
    slotted = _slotted(items, slots)
    if is_soft:
        weight = torch.softmax(slotted, 1)
        mean = (weight * slotted).sum(1)
        return mean, _Mean(weight, slotted, mean)
    largest, at = slotted.max(1)
    return largest, _Maximum(slots.member.gather(1, at))


def _peak_gradient(
    gradient: torch.Tensor, saved: _Mean | _Folded | _Maximum, slots: Slots, out: torch.Tensor
) -> None:
    if isinstance(saved, _Maximum):
        # Groups share no item here, so no two gradients meet in one place but those of groups that
        # fill up, which are 0.
        out.scatter_(0, saved.item, gradient)
        return
    assert isinstance(saved, _Mean)  # noqa: S101  a maximum, soft
    weighted = saved.weight * gradient[:, None]
    _collected(weighted.addcmul_(weighted, saved.value - saved.mean[:, None]), slots, out)


Training = Literal["hard", "soft"]
Loss = Literal["logistic", "huber", "squared"]


@dataclass(frozen=True)
class TokenProbeOptions:
    """Settings that all models of a call share.

    Attributes:
        pooling: attention, multimax or rolling_multimax.
        loss: logistic for binary targets; huber (threshold 1) or squared for continuous ones.
        n_heads: heads per model.
        width: units of each layer that reads a token.
        depth: such layers, at least 1.
        window: tokens of a window of rolling_multimax.
        training: soft replaces the maximum by a softmax-weighted mean while training; scores
            always take the maximum.
        learning_rate: of AdamW.
        weight_decay: of AdamW, decoupled.
        batch_size: sentences that a model learns from in a step, at most on average
            (`ragged.n_batches`).
        max_epochs: most passes over the sentences.
        patience: epochs without a better validation loss after which a model stops.

    Raises:
        ConfigError: names every setting that is out of its range.
    """

    pooling: Pooling
    loss: Loss = "logistic"
    n_heads: int = 4
    width: int = 128
    depth: int = 1
    window: int = 10
    training: Training = "hard"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 32
    max_epochs: int = 50
    patience: int = 5

    def __post_init__(self) -> None:
        counts = ("n_heads", "width", "depth", "window", "batch_size", "max_epochs", "patience")
        words = {"pooling": POOLINGS, "loss": get_args(Loss), "training": get_args(Training)}
        is_wrong = {name: getattr(self, name) < 1 for name in counts}
        is_wrong |= {name: getattr(self, name) not in known for name, known in words.items()}
        is_wrong["learning_rate"] = not 0 < self.learning_rate < float("inf")
        is_wrong["weight_decay"] = not 0 <= self.weight_decay < float("inf")
        wrong = [f"{name} {getattr(self, name)!r}" for name, wrong in is_wrong.items() if wrong]
        if wrong:
            raise ConfigError(
                f"a token probe with {', '.join(wrong)}",
                "options",
                "counts are at least 1, learning_rate above 0, weight_decay at least 0; "
                + "; ".join(
                    f"{name} is one of {', '.join(known)}" for name, known in words.items()
                ),
            )

    @property
    def is_binary(self) -> bool:
        """Whether the target has two classes."""
        return self.loss == "logistic"

    @property
    def is_soft(self) -> bool:
        """Whether training replaces maxima."""
        return self.training == "soft"

    @property
    def window_or_none(self) -> int | None:
        """Window of the pooling, None if it has no windows."""
        return self.window if self.pooling == "rolling_multimax" else None
