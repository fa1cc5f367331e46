"""What the token probe estimators make of their arguments: tokens, targets, weights, a hold-out.

What does not belong here: fitting (`tokens`). Invariant: arguments are refused with scikit-learn's
own errors and words wherever it has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    column_or_1d,
    validate_data,
)

from taprobe_core.solvers.ragged import RaggedTokens

TokenSets = RaggedTokens | Sequence[ArrayLike | torch.Tensor] | ArrayLike


def read_tokens(estimator: BaseEstimator, X: TokenSets, reset: bool) -> RaggedTokens:
    """Return token sets as such, and note or check the width of a token state.

    Args:
        estimator: whose `n_features_in_` is set or read.
        X: token sets, a list of [token, d] arrays, a [sentence, token, d] array, or a
            [sentence, d] array of sentences of one token.
        reset: set the width, as in `fit`.

    Raises:
        ValueError: another width than in `fit`, or a [sentence, d] array that scikit-learn refuses.
        DataError: sentences of several widths, or an empty one.
    """
    if isinstance(X, RaggedTokens):
        tokens = X
    elif _is_ragged(X):
        tokens = RaggedTokens.from_sentences(X)  # type: ignore[arg-type]
    else:
        rows = validate_data(estimator, X, dtype=np.float32, reset=reset, force_writeable=True)
        one_each = np.arange(len(rows) + 1, dtype=np.int64)
        return RaggedTokens(torch.from_numpy(np.ascontiguousarray(rows)), one_each)
    if reset:
        estimator.n_features_in_ = tokens.n_features
    elif tokens.n_features != estimator.n_features_in_:
        raise ValueError(
            f"X has {tokens.n_features} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input"
        )
    return tokens


def read_target(
    estimator: BaseEstimator, tokens: RaggedTokens, y: ArrayLike, is_numeric: bool = False
) -> NDArray[Any]:
    """Check a target as scikit-learn does: one finite value per sentence, [sentence]."""
    labels = validate_data(estimator, X="no_validation", y=y, y_numeric=is_numeric)
    labels = column_or_1d(labels, warn=True)
    check_consistent_length(np.empty(len(tokens)), labels)
    return np.asarray(labels)


def read_weight(sample_weight: ArrayLike | None, tokens: RaggedTokens) -> NDArray[np.float64]:
    """Check weights as scikit-learn does: at least 0, 1 by default, [sentence]."""
    rows = np.empty((len(tokens), 1))
    checked = _check_sample_weight(sample_weight, rows, dtype=np.float64, ensure_non_negative=True)
    return np.asarray(checked)


def held_out(
    strata: NDArray[np.int64],
    groups: ArrayLike | None,
    share: float,
    random: np.random.RandomState,
) -> NDArray[np.bool_]:
    """Draw the sentences to hold out: whole groups if there are some, else of each stratum alike.

    Args:
        strata: [sentence] int64.
        groups: [sentence] or None.
        share: of the groups or of the sentences of a stratum; at least one of them, never all.
        random: what draws.

    Returns:
        [sentence] bool; all False if the share is 0.

    Raises:
        ValueError: the share is below 0 or not below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation_fraction is {share}, expected at least 0 and below 1")
    if groups is not None:
        return _drawn(np.unique(np.asarray(groups), return_inverse=True)[1], share, random)
    held = np.zeros(len(strata), dtype=bool)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        held[rows] = _drawn(np.arange(len(rows)), share, random)
    return held


def _is_ragged(X: Any) -> bool:
    if getattr(X, "ndim", None) == 3:
        return True
    return isinstance(X, list | tuple) and len(X) > 0 and getattr(X[0], "ndim", None) == 2


def _drawn(
    unit: NDArray[np.int64], share: float, random: np.random.RandomState
) -> NDArray[np.bool_]:
    n_units = int(unit.max()) + 1
    n_held = min(max(round(share * n_units), 1), n_units - 1) if share else 0
    return np.isin(unit, random.permutation(n_units)[:n_held])
