"""How much each validation sentence counts in the loss that decides when a token probe stops.

What does not belong here: training weights, which come with the columns. Invariant: weights are
finite, at least 0, 0 outside the fold's validation sentences, and above 0 somewhere in each column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NotEnoughDataError
from taprobe_core.solvers.columns import Columns

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


def watched_weights(
    columns: Columns, validation: Mask, is_binary: bool, given: Floats | None
) -> Floats:
    """Return the weight of every sentence in each column's validation loss.

    Args:
        columns: the models.
        validation: [fold, sentence] bool.
        is_binary: whether targets are 0 and 1.
        given: [sentence, column], or None for the mean training weight of the sentence's class if
            targets are binary, else 1.

    Returns:
        [sentence, column] float64.

    Raises:
        DataError: weights of another shape, negative or not finite.
        NotEnoughDataError: a column has no validation sentence of weight above 0.
    """
    weight = given
    if weight is None:
        weight = _class_means(columns) if is_binary else np.ones_like(columns.weight)
    if weight.shape != columns.y.shape or not (np.isfinite(weight) & (weight >= 0)).all():
        raise DataError(
            f"validation weights {weight.shape} for targets {columns.y.shape}",
            "token probes",
            "give one finite weight of at least 0 per sentence and column",
        )
    watched = np.where(validation[columns.fold].T, weight, 0.0)
    empty = np.flatnonzero(~watched.any(axis=0))
    if len(empty):
        raise NotEnoughDataError(
            "found 0 validation sentences of weight above 0, need 1",
            f"column {int(empty[0])}, fold {int(columns.fold[empty[0]])}",
            "raise splits.val_fraction; token probes stop early on validation problems",
        )
    return watched


def _class_means(columns: Columns) -> Floats:
    """Mean training weight of each sentence's class, 1 for a class without training sentences."""
    is_positive = columns.y > 0.5
    by_class = []
    for is_member in (~is_positive, is_positive):
        n = ((columns.weight > 0) & is_member).sum(axis=0)
        total = (columns.weight * is_member).sum(axis=0)
        by_class.append(np.where(n > 0, total / np.maximum(n, 1), 1.0))
    return np.where(is_positive, by_class[1], by_class[0])
