"""scikit-learn wrappers of the token probes, for one probe at a time.

`TokenProbeClassifier` and `TokenProbeRegressor` read token sets: `RaggedTokens`, a list of
[token, d] arrays, or one [sentence, token, d] array. A [sentence, d] array is read as sentences of
one token, so that scikit-learn's own checks can run. Many probes at once, what they compute and
where it comes from are `taprobe_core.solvers.tokens.solve`.

Where the contract differs from scikit-learn's: two classes only, one target only; NaN and infinite
states among ragged tokens raise the project's own error; part of the sentences is held out to stop
early and to calibrate, so that repeating a sentence is not the same as giving it weight 2.

Invariant: other arguments are refused with scikit-learn's own errors and words wherever it has
some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from taprobe_core.estimators.linear import BinaryClassifierMixin
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens.pooling import Loss, Pooling, TokenProbeOptions, Training
from taprobe_core.solvers.tokens.ragged import RaggedTokens
from taprobe_core.solvers.tokens.solve import fit_token_probes, positive_weights, score_token_probe

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


MAX_SEED = 2**31 - 1

_OPTIONS = tuple(each.name for each in fields(TokenProbeOptions) if each.name != "loss")


class _TokenProbe(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share."""

    arrays_: dict[str, NDArray[np.float32]]

    def _options(self, loss: Loss) -> TokenProbeOptions:
        own = {name: getattr(self, name) for name in _OPTIONS}
        return TokenProbeOptions(loss=loss, **own)

    def _fit(
        self,
        tokens: RaggedTokens,
        y: NDArray[np.float64],
        weight: NDArray[np.float64],
        held: NDArray[np.bool_],
        seed: int,
        loss: Loss,
    ) -> Self:
        train = ~held & (weight > 0)
        columns = FitRequest(
            np.zeros(1, np.int64),
            y[:, None],
            np.where(train, weight, 0.0)[:, None],
            np.array([seed]),
        )
        self._trained = self._options(loss)
        found = fit_token_probes(
            tokens,
            train[None],
            held[None] if held.any() else None,
            columns,
            self._trained,
            self.device,
            validation_weight=weight[:, None],
        )
        self.arrays_ = found.column(0)
        self.n_iter_, self.best_epoch_ = int(found.n_iter[0]), int(found.best_epoch[0])
        self.calibration_ = found.calibration[0]
        self.is_calibrated_ = bool(found.is_calibrated[0])
        self.is_held_out_ = held
        return self

    def _decide(self, X: TokenSets) -> NDArray[np.float64]:
        check_is_fitted(self)
        tokens = read_tokens(self, X, reset=False)
        scores = score_token_probe(tokens, self.arrays_, self._trained, self.device)
        slope, offset = self.calibration_
        return np.asarray(slope * scores + offset)


class TokenProbeClassifier(BinaryClassifierMixin, _TokenProbe):
    """Attention, MultiMax or rolling MultiMax probe that tells two classes apart.

    Args:
        pooling: attention, multimax or rolling_multimax.
        n_heads: heads.
        width: units of each layer that reads a token.
        depth: such layers.
        window: tokens of a window of rolling_multimax.
        training: soft replaces the maximum by a softmax-weighted mean while training.
        balanced: weigh the classes alike, on top of `sample_weight`; calibration undoes it.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: most sentences of a step.
        max_epochs: most passes over the sentences.
        patience: epochs without a better validation loss before training stops.
        validation_fraction: share of the sentences, or groups, held out to stop and to calibrate;
            0: train for max_epochs and do not calibrate.
        random_state: seed, or what draws one.
        device: where to compute.

    Attributes:
        classes_: [2], sorted.
        arrays_: weights by name, as `score_token_probe` reads them.
        calibration_: [2] float64, slope and offset of Platt scaling; (1, 0) if not calibrated.
        is_calibrated_: False if the held-out sentences gave no rising slope.
        is_held_out_: [sentence] bool, not trained on.
        n_iter_: epochs trained.
        best_epoch_: the epoch whose weights are kept.
        n_features_in_: width of a token state.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = [rng.normal(size=(n, 4)) for n in rng.integers(1, 9, 60)]
        >>> y = [each[:, 0].max() > 1 for each in X]
        >>> probe = TokenProbeClassifier(pooling="multimax", width=8, random_state=0)
        >>> probe.fit(X, y).predict_proba(X).shape
        (60, 2)
    """

    def __init__(
        self,
        *,
        pooling: Pooling = "attention",
        n_heads: int = 4,
        width: int = 128,
        depth: int = 1,
        window: int = 10,
        training: Training = "hard",
        balanced: bool = True,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 32,
        max_epochs: int = 50,
        patience: int = 5,
        validation_fraction: float = 0.15,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
    ) -> None:
        self.pooling = pooling
        self.n_heads = n_heads
        self.width = width
        self.depth = depth
        self.window = window
        self.training = training
        self.balanced = balanced
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device

    def fit(
        self,
        X: TokenSets,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Fit.

        Args:
            X: token sets; see the module.
            y: [sentence], two classes.
            sample_weight: [sentence], at least 0; default 1.
            groups: [sentence], what must not be split between training and held-out sentences,
                such as problems.

        Raises:
            ValueError: input that scikit-learn would refuse, or other than two classes.
            TaprobeError: as `fit_token_probes`.
        """
        tokens = read_tokens(self, X, reset=True)
        labels = read_target(self, tokens, y)
        codes = self._codes(labels)
        weight = read_weight(sample_weight, tokens)
        random = check_random_state(self.random_state)
        seed = int(random.randint(MAX_SEED))
        held = held_out(codes, groups, self.validation_fraction, random)
        train = (~held & (weight > 0))[None]
        if len(np.unique(codes[train[0]])) < 2:
            raise ValueError("the sentences to train on, of weight above 0, have one class only")
        if self.balanced:
            # Held-out sentences are weighed as if they were trained on.
            balance = positive_weights(codes[:, None].astype(float), np.zeros(1, np.int64), train)
            weight = weight * np.where(codes == 1, balance.max(), 1.0)
        return self._fit(tokens, codes.astype(np.float64), weight, held, seed, "logistic")


class TokenProbeRegressor(RegressorMixin, _TokenProbe):  # type: ignore[misc]
    """Attention, MultiMax or rolling MultiMax probe for a continuous target.

    Arguments and attributes are those of `TokenProbeClassifier`, with `loss` (huber or squared) in
    place of `balanced`, without `classes_` and without calibration.
    """

    def __init__(
        self,
        *,
        pooling: Pooling = "attention",
        n_heads: int = 4,
        width: int = 128,
        depth: int = 1,
        window: int = 10,
        training: Training = "hard",
        loss: Literal["huber", "squared"] = "huber",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: int = 32,
        max_epochs: int = 50,
        patience: int = 5,
        validation_fraction: float = 0.15,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
    ) -> None:
        self.pooling = pooling
        self.n_heads = n_heads
        self.width = width
        self.depth = depth
        self.window = window
        self.training = training
        self.loss = loss
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device

    def fit(
        self,
        X: TokenSets,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Fit.

        Args:
            X: token sets; see the module.
            y: [sentence], the target.
            sample_weight: [sentence], at least 0; default 1.
            groups: [sentence], what must not be split between training and held-out sentences.

        Raises:
            ValueError: input that scikit-learn would refuse.
            TaprobeError: as `fit_token_probes`.
        """
        tokens = read_tokens(self, X, reset=True)
        target = read_target(self, tokens, y, is_numeric=True)
        weight = read_weight(sample_weight, tokens)
        random = check_random_state(self.random_state)
        seed = int(random.randint(MAX_SEED))
        held = held_out(np.zeros(len(tokens), np.int64), groups, self.validation_fraction, random)
        return self._fit(tokens, target.astype(np.float64), weight, held, seed, self.loss)

    def predict(self, X: TokenSets) -> NDArray[np.float64]:
        """Return the predicted target, [sentence] float64."""
        return self._decide(X)
