"""Settings of the networks of one call, what a call must satisfy, and when a network stops.

After every epoch a model has a score that rises as it gets better. A score that does not beat the
best one by `tol` is a miss; a model with more than `patience` misses in a row stops. What does not
belong here: folds, targets and seeds, which differ by column (`columns`), how rows are held out
(`batch`) and how weights are kept (`training`).

Invariant: each model is judged by its own scores alone.

Source: scikit-learn 1.9, `_update_no_improvement_count` and the scores it reads (accuracy, R^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import ConfigError, DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.solvers.columns import FitRequest


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
        early_stopping: `off` reads the training loss and keeps the last epoch. `rows` holds out
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


N_SEEDS = 2**32


def describe(columns: FitRequest, column: int | np.intp) -> str:
    """Return the name of a column for an error."""
    return f"column {column} (fold {columns.fold[column]}, seed {seeds_of(columns)[column]})"


def seeds_of(columns: FitRequest) -> NDArray[np.int64]:
    """Return the seeds, [column] int64.

    Raises:
        DataError: the columns have none.
    """
    if columns.seed is None:
        raise DataError("networks need seeds", "FitRequest.seed", "give every column one")
    return columns.seed


def check_seeds(columns: FitRequest) -> None:
    """Check that the seeds are there and that scikit-learn would take them.

    Raises:
        DataError: a seed is missing or outside [0, 2^32).
    """
    seeds = seeds_of(columns)
    if ((seeds < 0) | (seeds >= N_SEEDS)).any():
        raise DataError(
            f"seeds from {seeds.min()} to {seeds.max()}",
            "FitRequest.seed",
            "give seeds in [0, 2^32)",
        )


def check_features(X: NDArray[np.float32], train: NDArray[np.bool_]) -> None:
    """Check shapes, and that features are finite and folds not empty.

    Args:
        X: [row, feature].
        train: [fold, row] bool.

    Raises:
        DataError: the shapes do not fit, or a fold has no training row.
        NonFiniteError: names the first feature that is NaN or infinite.
    """
    if X.ndim != 2 or train.ndim != 2 or train.shape[1] != len(X):
        raise DataError(
            f"X is {X.shape} and train {train.shape}",
            "fit_networks",
            "give X [row, feature] and train [fold, row]",
        )
    if not train.any(axis=1).all():
        first = int(np.flatnonzero(~train.any(axis=1))[0])
        raise DataError("no training row", f"fold {first}", "leave such folds out")
    is_finite = np.isfinite(X)
    if not is_finite.all():
        row, feature = (int(each[0]) for each in np.nonzero(~is_finite))
        raise NonFiniteError(
            f"{int((~is_finite).sum())} features are NaN or infinite",
            f"row {row}, feature {feature}",
            "store the activations in a type that holds them",
        )


def check_classes(columns: FitRequest) -> None:
    """Check that targets are 0 and 1, and that every column trains on both.

    Raises:
        DataError: another target.
        NotEnoughDataError: one class only.
    """
    y, has_weight = columns.y, columns.weight > 0
    is_other = (has_weight & (y != 0) & (y != 1)).any(axis=0)
    if is_other.any():
        raise DataError(
            f"{int(is_other.sum())} classifiers have targets other than 0 and 1",
            _first(columns, is_other),
            "give classes as 0 and 1, or fit regressors (is_classifier=False)",
        )
    has_both = (has_weight & (y == 0)).any(axis=0) & (has_weight & (y == 1)).any(axis=0)
    if not has_both.all():
        raise NotEnoughDataError(
            f"{int((~has_both).sum())} classifiers have training rows of one class only",
            _first(columns, ~has_both),
            "use more problems, or a target with both classes in every fold",
        )


def stopping_weights(
    columns: FitRequest,
    train: NDArray[np.bool_],
    validation: NDArray[np.bool_] | None,
    weight: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Return the weights of each column's validation rows, [row, column] float64, else 0.

    Args:
        columns: of the call.
        train: [fold, row] bool.
        validation: [fold, row] bool.
        weight: [row, column] float64; None for 1.

    Raises:
        DataError: no validation rows, or rows that are trained on, or weights that are no weights.
    """
    if validation is None or validation.shape != train.shape:
        raise DataError(
            f"early stopping by problems needs validation rows of the shape {train.shape}",
            "fit_networks, validation",
            "give the validation rows of every fold",
        )
    is_shared = (validation & train).any(axis=1)
    if is_shared.any():
        raise DataError(
            "rows that are trained on and validated on",
            f"fold {int(np.flatnonzero(is_shared)[0])}",
            "validate on rows of problems that the fold does not train on",
        )
    is_validated = validation[columns.fold].T
    if weight is not None and weight.shape != is_validated.shape:
        raise DataError(
            f"validation weights are {weight.shape}, expected {is_validated.shape}",
            "fit_networks, validation_weight",
            "give one row per sentence and one column per model",
        )
    found = np.where(is_validated, 1.0 if weight is None else weight, 0.0)
    is_bad = ~(np.isfinite(found) & (found >= 0)).all(axis=0)
    is_bad |= ~(found > 0).any(axis=0)
    if is_bad.any():
        raise DataError(
            f"{int(is_bad.sum())} columns have no validation row, or weights that are none",
            _first(columns, is_bad),
            "give every fold validation rows, of finite weights not all 0",
        )
    return found


def _first(columns: FitRequest, is_meant: NDArray[np.bool_] | np.bool_) -> str:
    return describe(columns, int(np.flatnonzero(is_meant)[0]))


EarlyStopping = Literal["off", "rows", "problems"]
"""What early stopping reads: training loss; score on held-out rows; loss on validation rows."""


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
