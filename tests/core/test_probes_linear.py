from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge

from taprobe_core.errors import NumericsError
from taprobe_core.probes import linear
from taprobe_core.probes.linear import fit_logistic, fit_ridge

# Both sides of rows = features, where the unknowns change from features to rows.
shapes = st.tuples(st.integers(4, 40), st.integers(1, 60))
strengths = st.floats(0.01, 100.0)


def _rows(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features whose spread falls off, and two classes."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.5
    y = (X[:, 0] + rng.normal(size=shape[0]) > 0.5).astype(float)
    y[:2] = 0.0, 1.0
    return X, y


@settings(max_examples=40)
@given(shapes, st.integers(0, 999), strengths)
def test_logistic_is_scikit_learns_optimum(shape: tuple[int, int], seed: int, C: float) -> None:
    X, y = _rows(shape, seed)
    reference = LogisticRegression(
        C=C, class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000
    ).fit(X, y)

    line = fit_logistic(X, y, C)

    expected = reference.predict_proba(X)[:, 1]
    np.testing.assert_allclose(expit(X @ line.coef + line.intercept), expected, atol=1e-6)


@settings(max_examples=40)
@given(shapes, st.integers(0, 999), strengths, st.booleans())
def test_the_slope_of_the_objective_is_zero_at_the_solution(
    shape: tuple[int, int], seed: int, C: float, is_sparse: bool
) -> None:
    X, y = _rows(shape, seed)
    X[np.abs(X) < 0.3] = 0.0

    line = fit_logistic(csr_matrix(X) if is_sparse else X, y, C)

    balance = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    residual = C * balance * (expit(X @ line.coef + line.intercept) - y)
    assert np.abs(X.T @ residual + line.coef).max() < 1e-8 * max(1.0, C)
    assert abs(residual.sum()) < 1e-8 * max(1.0, C)


@settings(max_examples=40)
@given(shapes, st.integers(0, 999), strengths, st.booleans())
def test_ridge_is_scikit_learns(
    shape: tuple[int, int], seed: int, alpha: float, is_sparse: bool
) -> None:
    X, _ = _rows(shape, seed)
    X += 3.0
    y = X @ np.ones(shape[1]) + np.random.default_rng(seed).normal(size=shape[0])
    reference = Ridge(alpha=alpha, solver="svd").fit(X, y)

    line = fit_ridge(csr_matrix(X) if is_sparse else X, y, alpha)

    np.testing.assert_allclose(line.coef, reference.coef_, atol=1e-8)
    assert line.intercept == pytest.approx(reference.intercept_, abs=1e-6)


def test_separable_classes_with_hardly_any_penalty_still_have_an_optimum() -> None:
    X = np.linspace(-1, 1, 20)[:, None]
    y = (X[:, 0] > 0).astype(float)

    line = fit_logistic(X, y, C=1e6)

    assert line.n_iter < linear.MAX_STEPS
    assert ((expit(X @ line.coef + line.intercept) > 0.5) == (y == 1)).all()


@pytest.mark.parametrize(("n_features", "seed"), [(3, 2815), (9, 2443)])
def test_a_step_that_overshoots_is_halved(
    n_features: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    X, y = np.round(rng.standard_t(1, size=(6, n_features)), 2), np.array([0.0, 1, 0, 1, 1, 0])

    line = fit_logistic(X, y, C=1e3)

    residual = 1e3 * (expit(X @ line.coef + line.intercept) - y)
    assert np.abs(X.T @ residual + line.coef).max() < 1e-6
    monkeypatch.setattr(linear, "MAX_HALVINGS", 0)
    with pytest.raises(NumericsError, match="no step descends"):
        fit_logistic(X, y, C=1e3)


def test_features_that_repeat_share_their_weight() -> None:
    X, y = _rows((30, 3), seed=1)

    line = fit_logistic(np.column_stack([X, X]), y, C=1.0)

    np.testing.assert_allclose(line.coef[:3], line.coef[3:], atol=1e-10)


@pytest.mark.parametrize("shape", [(30, 3), (6, 20)])
def test_too_few_steps_are_an_error_that_says_so(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "MAX_STEPS", 1)

    with pytest.raises(NumericsError, match="1 steps did not reach it") as error:
        fit_logistic(*_rows(shape, seed=0), C=1.0)

    assert error.value.fix is not None
    assert "regularization" in error.value.fix


def test_equations_that_float64_cannot_solve_are_an_error() -> None:
    column = np.arange(8.0)[:, None]

    with pytest.raises(NumericsError, match="singular"):
        fit_ridge(np.column_stack([column, 3 * column, 7 * column]), column[:, 0], alpha=1e-300)
    with pytest.raises(NumericsError, match="singular"):
        fit_logistic(np.column_stack([column, column]), column[:, 0] % 2, C=1e300)
