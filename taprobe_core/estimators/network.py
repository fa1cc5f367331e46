"""scikit-learn wrappers of the batched networks, for one probe at a time.

`MLPProbeClassifier` and `MLPProbeRegressor` standardise their features, then fit one network; with
an integer `random_state` they give what scikit-learn's `StandardScaler` and `MLPClassifier` or
`MLPRegressor` give. Many networks at once are `taprobe_core.solvers.networks.solve`, whose rules
hold.

Where the contract differs from theirs: two classes only, one target only, and a row of weight 0
takes no part in a fit.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from taprobe_core.estimators.linear import BinaryClassifierMixin
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.networks.options import EarlyStopping, NetworkOptions
from taprobe_core.solvers.networks.solve import NetworkSolution, fit_networks

MAX_SEED = 2**32 - 1

_OPTIONS = tuple(each.name for each in fields(NetworkOptions) if each.name != "is_classifier")


class _MLPProbe(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share."""

    _solution: NetworkSolution

    def __init__(
        self,
        *,
        hidden: tuple[int, ...] = (100, 100),
        max_iter: int = 300,
        alpha: float = 1e-4,
        learning_rate: float = 1e-3,
        batch_size: int = 200,
        early_stopping: EarlyStopping = "rows",
        validation_fraction: float = 0.1,
        patience: int = 20,
        tol: float = 1e-4,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
    ) -> None:
        self.hidden = hidden
        self.max_iter = max_iter
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.tol = tol
        self.random_state = random_state
        self.device = device

    def _fit(
        self,
        X: NDArray[np.float32],
        y: NDArray[np.float64],
        sample_weight: ArrayLike | None,
        validation: ArrayLike | None,
        is_classifier: bool,
    ) -> Self:
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        validated = np.zeros(len(X), bool) if validation is None else np.asarray(validation, bool)
        trained = ~validated & (weight > 0)
        if is_classifier and len(np.unique(y[trained])) < 2:
            raise ValueError("the rows to train on, those of weight above 0, have one class only")
        own = {name: getattr(self, name) for name in _OPTIONS} | {"hidden": tuple(self.hidden)}
        options = NetworkOptions(is_classifier=is_classifier, **own)
        columns = FitRequest(
            fold=np.zeros(1, np.int64),
            y=y[:, None],
            weight=np.where(trained, weight, 0.0)[:, None],
            seed=np.array([_seed(self.random_state)]),
        )
        self._solution = fit_networks(
            X,
            trained[None],
            columns,
            options,
            None if validation is None else validated[None],
            self.device,
            validation_weight=weight[:, None],
        )
        self.coefs_ = [each[0] for each in self._solution.weights]
        self.intercepts_ = [each[0] for each in self._solution.biases]
        self.mean_, self.scale_ = self._solution.mean[0], self._solution.scale[0]
        self.n_iter_ = int(self._solution.n_iter[0])
        return self

    def _decide(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=np.float32, reset=False, force_writeable=True)
        return self._solution.decide(rows)[:, 0]


class MLPProbeClassifier(BinaryClassifierMixin, _MLPProbe):
    """Standardisation, then a ReLU network that tells two classes apart.

    Args:
        hidden: units of every hidden layer.
        max_iter: epochs at most.
        alpha: L2 penalty.
        learning_rate: of Adam.
        batch_size: rows of a minibatch.
        early_stopping: `off`, `rows` or `problems`; see `NetworkOptions`.
        validation_fraction: share of the rows that `rows` holds out.
        patience: epochs without a gain of `tol` that are allowed.
        tol: smallest gain that counts.
        random_state: seed, or what draws one.
        device: where to train.

    Attributes:
        classes_: [2], sorted.
        coefs_: [in, out] float32 of every layer, in standardised features.
        intercepts_: [out] float32 of every layer.
        mean_: [feature] float64.
        scale_: [feature] float64.
        n_iter_: epochs trained.
        n_features_in_: number of features.
    """

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        validation: ArrayLike | None = None,
    ) -> Self:
        """Fit.

        Args:
            X: [row, feature].
            y: [row], two classes.
            sample_weight: [row], at least 0; default 1.
            validation: [row] bool, rows to validate on and not to train on, for `problems`.

        Raises:
            ValueError: input that scikit-learn would refuse, or other than two classes.
            TaprobeError: as `fit_networks`.
        """
        rows, labels = validate_data(self, X, y, dtype=np.float32, force_writeable=True)
        codes = self._codes(labels)
        return self._fit(rows, codes.astype(np.float64), sample_weight, validation, True)


class MLPProbeRegressor(RegressorMixin, _MLPProbe):  # type: ignore[misc]
    """Standardisation, then a ReLU network for a continuous target.

    Arguments and attributes are those of `MLPProbeClassifier`, without `classes_`. It stops early
    by the same rule, reading R^2 in place of accuracy.
    """

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        validation: ArrayLike | None = None,
    ) -> Self:
        """Fit.

        Args:
            X: [row, feature].
            y: [row], the target.
            sample_weight: [row], at least 0; default 1.
            validation: [row] bool, rows to validate on and not to train on, for `problems`.

        Raises:
            ValueError: input that scikit-learn would refuse.
            TaprobeError: as `fit_networks`.
        """
        rows, target = validate_data(
            self, X, y, dtype=np.float32, y_numeric=True, force_writeable=True
        )
        return self._fit(rows, target.astype(np.float64), sample_weight, validation, False)

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the predicted target, [row] float64."""
        return self._decide(X)


def _seed(random_state: int | np.random.RandomState | None) -> int:
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(MAX_SEED, dtype=np.uint32))
