"""What a call of `fit_networks` must satisfy, and how its columns are named in errors.

What does not belong here: the shape of the columns themselves (`Columns.check`) and of the settings
(`NetworkOptions`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.solvers.columns import Columns

N_SEEDS = 2**32


def describe(columns: Columns, column: int | np.intp) -> str:
    """Return the name of a column for an error."""
    return f"column {column} (fold {columns.fold[column]}, seed {seeds_of(columns)[column]})"


def seeds_of(columns: Columns) -> NDArray[np.int64]:
    """Return the seeds, [column] int64.

    Raises:
        DataError: the columns have none.
    """
    if columns.seed is None:
        raise DataError("networks need seeds", "Columns.seed", "give every column one")
    return columns.seed


def check_seeds(columns: Columns) -> None:
    """Check that the seeds are there and that scikit-learn would take them.

    Raises:
        DataError: a seed is missing or outside [0, 2^32).
    """
    seeds = seeds_of(columns)
    if ((seeds < 0) | (seeds >= N_SEEDS)).any():
        raise DataError(
            f"seeds from {seeds.min()} to {seeds.max()}",
            "Columns.seed",
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


def check_classes(columns: Columns) -> None:
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


def watched_weight(
    columns: Columns,
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
            "rows that are trained on and watched",
            f"fold {int(np.flatnonzero(is_shared)[0])}",
            "watch rows of problems that the fold does not train on",
        )
    is_watched = validation[columns.fold].T
    if weight is not None and weight.shape != is_watched.shape:
        raise DataError(
            f"validation weights are {weight.shape}, expected {is_watched.shape}",
            "fit_networks, validation_weight",
            "give one row per sentence and one column per model",
        )
    found = np.where(is_watched, 1.0 if weight is None else weight, 0.0)
    is_bad = ~(np.isfinite(found) & (found >= 0)).all(axis=0)
    is_bad |= ~(found > 0).any(axis=0)
    if is_bad.any():
        raise DataError(
            f"{int(is_bad.sum())} columns have no validation row, or weights that are none",
            _first(columns, is_bad),
            "give every fold validation rows, of finite weights not all 0",
        )
    return found


def _first(columns: Columns, is_meant: NDArray[np.bool_] | np.bool_) -> str:
    return describe(columns, int(np.flatnonzero(is_meant)[0]))
