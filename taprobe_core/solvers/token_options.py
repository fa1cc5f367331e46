"""Settings of the probes that read token sets.

What does not belong here: how they act (`token_forward`, `token_pooling`, `token_training`). The
study's words for the same settings are `taprobe_core.study.probes.TokenProbe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from taprobe_core.errors import ConfigError
from taprobe_core.solvers.token_pooling import POOLINGS, Pooling

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
            (`token_reading.n_batches`).
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
