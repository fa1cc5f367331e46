"""Settings of the networks of one call, the same for every column.

What does not belong here: folds, targets and seeds, which differ by column (`columns`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from taprobe_core.errors import ConfigError
from taprobe_core.solvers.network_stopping import EarlyStopping


@dataclass(frozen=True)
class NetworkOptions:
    """Settings in scikit-learn's sense, with its defaults where they are not the probes'.

    Attributes:
        hidden: units of every hidden layer.
        is_classifier: log loss and logits, else half squared error and values.
        max_iter: epochs at most.
        alpha: L2 penalty; a minibatch adds `alpha / 2 * sum of squared weights / its weight sum`.
        learning_rate: of Adam.
        batch_size: rows of a minibatch; all training rows where there are fewer.
        early_stopping: `off` watches the training loss and keeps the last epoch. `rows` holds out
            rows, by class for a classifier, and keeps the epoch of the best accuracy or R^2 on
            them. `problems` keeps the epoch of the lowest loss on the fold's validation rows.
        validation_fraction: share of the training rows that `rows` holds out.
        patience: epochs without a gain of `tol` that are allowed; one more stops.
        tol: smallest gain that counts.
    """

    hidden: tuple[int, ...] = (100, 100)
    is_classifier: bool = True
    max_iter: int = 300
    alpha: float = 1e-4
    learning_rate: float = 1e-3
    batch_size: int = 200
    early_stopping: EarlyStopping = "rows"
    validation_fraction: float = 0.1
    patience: int = 20
    tol: float = 1e-4

    def __post_init__(self) -> None:
        is_sound = {
            "hidden": bool(self.hidden) and min(self.hidden) > 0,
            "max_iter": self.max_iter > 0,
            "alpha": self.alpha >= 0,
            "learning_rate": self.learning_rate > 0,
            "batch_size": self.batch_size > 0,
            "early_stopping": self.early_stopping in get_args(EarlyStopping),
            "validation_fraction": 0 < self.validation_fraction < 1,
            "patience": self.patience >= 0,
            "tol": self.tol >= 0,
        }
        for name, is_good in is_sound.items():
            if not is_good:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}",
                    "NetworkOptions",
                    "give sizes above 0, rates not below 0, and a fraction inside (0, 1)",
                )
