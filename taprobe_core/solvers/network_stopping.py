"""When a network stops, and which of its epochs is kept: one rule for every target.

After every epoch a model has a score that rises as it gets better. A score that does not beat the
best one by `tol` is a miss; a model with more than `patience` misses in a row stops. What does not
belong here: how rows are held out (`network_draws`), how weights are kept (`network_training`).

Invariant: each model is judged by its own scores alone.

Source: scikit-learn 1.9, `_update_no_improvement_count` and the scores it watches (accuracy, R^2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EarlyStopping = Literal["off", "rows", "problems"]
"""What is watched: training loss; score on held-out rows; loss on the fold's validation rows."""


class Patience:
    """Best score and misses of every model.

    Args:
        n_models: of the batch.
        patience: misses in a row that are allowed.
        tol: what a score must gain to be no miss.
        device: of the scores.
    """

    def __init__(self, n_models: int, patience: int, tol: float, device: torch.device) -> None:
        self._patience = patience
        self._tol = tol
        self._best = torch.full((n_models,), -torch.inf, dtype=torch.float64, device=device)
        self._misses = torch.zeros(n_models, dtype=torch.int64, device=device)

    def judge(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the scores of an epoch.

        Args:
            score: [model] float64, higher is better.

        Returns:
            [model] bool, whether the score is the best so far; [model] bool, whether to stop.
        """
        is_miss = score < self._best + self._tol
        self._misses = torch.where(is_miss, self._misses + 1, 0)
        is_best = score > self._best
        self._best = torch.where(is_best, score, self._best)
        return is_best, self._misses > self._patience

    def take(self, kept: Tensor) -> None:
        """Drop all models but `kept`."""
        self._best, self._misses = self._best[kept], self._misses[kept]


def accuracy(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted share of rows on the right side of logit 0, [model].

    Args:
        output: [model, row] logits.
        y: [model, row], 0 or 1.
        weight: [model, row] float64, summing to 1 over rows; 0 for padding.
    """
    return (((output > 0) == (y > 0)) * weight).sum(1)


def r_squared(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted coefficient of determination, [model]; arguments as in `accuracy`.

    A target without variance gives 1 if it is met exactly, else 0 (as scikit-learn's `r2_score`).
    """
    y = y.double()
    residual = ((y - output) ** 2 * weight).sum(1)
    mean = (y * weight).sum(1, keepdim=True)
    total = ((y - mean) ** 2 * weight).sum(1)
    undefined = (residual == 0).double()
    return torch.where(total > 0, 1 - residual / total, undefined)
