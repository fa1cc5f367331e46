"""Ridge and logistic probes as scikit-learn estimators: one model, standardised inside.

`RidgeProbe()` is `Pipeline(StandardScaler(), Ridge())` and `LogisticProbe()` is
`Pipeline(StandardScaler(), LogisticRegression())` at its converged optimum, each a single estimator
that can be cloned, searched over and put into pipelines. What every probe of two classes has in
common stands here too. What does not belong here: fits of many models, which ask the solvers
directly.

Invariants: the scaler ignores sample weights, as in a pipeline whose last step takes them; the
second class is said where its log-odds are above 0, and both probabilities add up to 1; errors in
what the caller passed are `ValueError`, as scikit-learn's contract demands, and failures of the
numbers are the solvers' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import solve_logistic
from taprobe_core.solvers.linear.ridge import solve_ridge
from taprobe_core.solvers.linear.solution import LinearSolution


class BinaryClassifierMixin(ClassifierMixin):  # type: ignore[misc] # scikit-learn is untyped
    """Mixin of a classifier of two classes that has `_decide(X)`, the log-odds of the second.

    Attributes:
        classes_: [2], sorted.
    """

    classes_: NDArray[Any]

    if TYPE_CHECKING:

        def _decide(self, X: Any) -> NDArray[np.float64]: ...

    def _codes(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Learn the classes; return 0 or 1 for each label.

        Raises:
            ValueError: no classes, or other than two of them.
        """
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported. y has {len(self.classes_)} class(es), "
                "the classifier needs 2 classes"
            )
        return np.asarray(codes, dtype=np.int64)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return the log-odds of the second class, [row] float64."""
        return self._decide(X)

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probabilities of both classes, [row, 2] float64."""
        logit = self._decide(X)
        return np.stack([expit(-logit), expit(logit)], axis=1)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the likelier class, [row]."""
        is_second = self._decide(X) > 0
        return np.take(self.classes_, is_second.astype(int))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class _LinearProbe(BaseEstimator):  # type: ignore[misc]
    """What both probes share: the solution in the units of the features as given."""

    standardise: bool
    device: str

    def _matrix(self, features: NDArray[Any]) -> FoldMatrix:
        train = np.ones((1, len(features)), dtype=bool)
        scaling: Literal["fold", "none"] = "fold" if self.standardise else "none"
        return FoldMatrix(train, features, scaling=scaling, device=self.device)

    def _keep(self, matrix: FoldMatrix, solution: LinearSolution) -> None:
        coef = solution.coef[0] / matrix.scale[0]
        self.coef_: NDArray[np.float64] = coef
        self.intercept_ = float(solution.intercept[0] - coef @ matrix.mean[0])
        self.n_iter_ = max(1, int(solution.n_iter[0]))

    def _decide(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self)
        features = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return np.asarray(features @ self.coef_ + self.intercept_, dtype=np.float64)


def _column(y: NDArray[np.float64], weight: NDArray[np.float64]) -> FitRequest:
    return FitRequest(np.zeros(1, dtype=np.int64), y[:, None], weight[:, None])


class RidgeProbe(RegressorMixin, _LinearProbe):  # type: ignore[misc]
    """Ridge regression on standardised features.

    Args:
        alpha: penalty on the coefficients of the standardised features, positive.
        standardise: False leaves the features as they are: `sklearn.linear_model.Ridge(alpha)`.
        device: where a wide problem is solved, "cpu" or "cuda".

    Attributes:
        coef_: [feature] float64, for features as given.
        intercept_: float.
        n_iter_: iterations; 1 for a direct solution.
        n_features_in_: features.
    """

    def __init__(
        self, alpha: float = 1.0, *, standardise: bool = True, device: str = "cpu"
    ) -> None:
        self.alpha = alpha
        self.standardise = standardise
        self.device = device

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to [row, feature] features and [row] targets.

        Raises:
            ValueError: what was passed is not a regression problem.
            DataError: alpha is not positive, or all weights are 0.
            NumericsError: the solution did not converge.
        """
        features, target = validate_data(
            self, X, y, dtype=[np.float64, np.float32], y_numeric=True, ensure_min_samples=2
        )
        weight = _check_sample_weight(sample_weight, features, dtype=np.float64)
        matrix = self._matrix(features)
        columns = _column(np.asarray(target, dtype=np.float64), weight)
        self._keep(matrix, solve_ridge(matrix, columns, np.array([self.alpha], dtype=np.float64)))
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return predictions, [row] float64."""
        return self._decide(X)


class LogisticProbe(BinaryClassifierMixin, _LinearProbe):
    """Logistic regression with two classes on standardised features, converged.

    Args:
        C: inverse penalty on the coefficients of the standardised features, positive.
        class_weight: None, or "balanced" as in scikit-learn.
        standardise: False leaves the features as they are.
        tol: largest relative error of the coefficients.
        max_iter: iterations at most.
        device: where a wide problem is solved, "cpu" or "cuda".

    Attributes:
        classes_: the two classes, sorted.
        coef_: [feature] float64, for features as given; towards `classes_[1]`.
        intercept_: float.
        n_iter_: iterations.
        n_features_in_: features.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: Literal["balanced"] | None = None,
        standardise: bool = True,
        tol: float = 1e-6,
        max_iter: int = 400,
        device: str = "cpu",
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardise = standardise
        self.tol = tol
        self.max_iter = max_iter
        self.device = device

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to [row, feature] features and [row] labels of two classes.

        Raises:
            ValueError: what was passed is not a classification problem of two classes.
            DataError: C is not positive.
        """
        features, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        code = self._codes(labels)
        weight = _check_sample_weight(sample_weight, features, dtype=np.float64)
        if len(np.unique(code[weight > 0])) < 2:
            raise ValueError("LogisticProbe needs samples of two classes, found one class only")
        balance = compute_class_weight(
            self.class_weight, classes=self.classes_, y=labels, sample_weight=weight
        )
        weight = weight * balance[code]
        matrix = self._matrix(features)
        solution = solve_logistic(
            matrix,
            _column(code.astype(np.float64), weight),
            np.array([self.C], dtype=np.float64),
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self._keep(matrix, solution)
        return self
