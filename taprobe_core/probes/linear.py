"""Ridge and logistic regression, solved to their optimum.

Both minimise what scikit-learn's `Ridge` and `LogisticRegression` minimise, and reach the same
coefficients; they differ in where they stop. scikit-learn's default tolerance stops the logistic
solver so early that scores move in the first digit, and a first-order solver may need thousands of
steps on activations, whose directions differ in spread by orders of magnitude. Newton's method
needs about ten whatever the spread. With more features than rows the unknowns are one weight per
row (w = X^T a), so the equations have the size of the smaller side of X.

What does not belong here: scaling of features and choice of rows. Invariant: deterministic, no
random start, no global state; the intercept is never penalised.

Source: for the logistic steps in row weights, Rasmussen and Williams, Gaussian Processes for
Machine Learning (2006), section 3.4 and algorithm 3.1, to which the intercept is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.sparse import issparse
from scipy.special import expit

from taprobe_core.errors import NumericsError
from taprobe_core.probes.inputs import Matrix

Doubles = NDArray[np.float64]

MAX_STEPS = 100
MAX_HALVINGS = 40
LOGIT_TOLERANCE = 1e-7
"""Stop after a full step that moves no training logit by more; the error left is its square."""


class Line(NamedTuple):
    """A fitted linear map, `X @ coef + intercept`; coef is [feature] float64."""

    coef: Doubles
    intercept: float
    n_iter: int


def fit_ridge(X: Matrix, y: Doubles, alpha: float) -> Line:
    """Minimise |y - X w - b|^2 + alpha |w|^2.

    Args:
        X: [row, feature] float64, dense or sparse.
        y: [row].
        alpha: penalty, above 0.

    Raises:
        NumericsError: the equations are singular in float64.
    """
    mean = np.asarray(X.mean(axis=0)).ravel()
    centred = y - y.mean()
    if X.shape[1] <= X.shape[0]:
        dense = _densify(X) - mean
        coef = _solve(dense.T @ dense, dense.T @ centred, alpha)
    else:
        gram = _gram(X)
        side = gram.mean(axis=0)
        coef = X.T @ _solve(gram - side - side[:, None] + side.mean(), centred, alpha)
    return Line(coef, float(y.mean() - mean @ coef), 1)


def fit_logistic(X: Matrix, y: Doubles, C: float) -> Line:
    """Minimise C sum_i c_i log(1 + exp(-s_i (x_i w + b))) + |w|^2 / 2, s_i = +1 or -1.

    The classes weigh the same: c_i = n / (2 n_class), as `class_weight="balanced"`.

    Args:
        X: [row, feature] float64, dense or sparse.
        y: [row], 1 or 0, both present.
        C: inverse penalty, above 0.

    Raises:
        NumericsError: no optimum within `MAX_STEPS` steps.
    """
    n, n_positive = len(y), y.sum()
    weight = C * np.where(y > 0, n / (2 * n_positive), n / (2 * (n - n_positive)))
    if X.shape[1] <= n:
        dense = np.column_stack([_densify(X), np.ones(n)])
        state, n_iter = _newton(_InFeatures(dense), y, weight)
        return Line(state.unknowns[:-1], float(state.unknowns[-1]), n_iter)
    state, n_iter = _newton(_InRows(_gram(X)), y, weight)
    return Line(X.T @ state.unknowns[:-1], float(state.unknowns[-1]), n_iter)


@dataclass(frozen=True, eq=False)
class _State:
    """Unknowns with the intercept last, their logits [row], and the penalty |w|^2 / 2."""

    unknowns: Doubles
    logits: Doubles
    penalty: float


class _Space(Protocol):
    """A way to write the unknowns."""

    def start(self) -> _State: ...

    def full_step(self, state: _State, gradient: Doubles, curvature: Doubles) -> Doubles: ...

    def state(self, unknowns: Doubles, logits: Doubles | None = None) -> _State: ...


class _InFeatures:
    """One unknown per feature; X is [row, feature + 1], the last column of ones."""

    def __init__(self, X: Doubles) -> None:
        self._X = X
        self._penalised = np.append(np.ones(X.shape[1] - 1), 0.0)

    def start(self) -> _State:
        return _State(np.zeros(self._X.shape[1]), np.zeros(len(self._X)), 0.0)

    def full_step(self, state: _State, gradient: Doubles, curvature: Doubles) -> Doubles:
        hessian = self._X.T @ (curvature[:, None] * self._X)
        hessian[np.diag_indices_from(hessian)] += self._penalised
        slope = self._X.T @ gradient + self._penalised * state.unknowns
        step: Doubles = cho_solve(cho_factor(hessian, overwrite_a=True), slope)
        return state.unknowns - step

    def state(self, unknowns: Doubles, logits: Doubles | None = None) -> _State:
        logits = self._X @ unknowns if logits is None else logits
        return _State(unknowns, logits, 0.5 * float(unknowns[:-1] @ unknowns[:-1]))


class _InRows:
    """One unknown per row, w = X^T a; `gram` is X X^T."""

    def __init__(self, gram: Doubles) -> None:
        self._gram = gram
        self._buffer = np.empty_like(gram)

    def start(self) -> _State:
        n = len(self._gram)
        return _State(np.zeros(n + 1), np.zeros(n), 0.0)

    def full_step(self, state: _State, gradient: Doubles, curvature: Doubles) -> Doubles:
        root = np.sqrt(curvature)
        system = np.multiply(self._gram, root, out=self._buffer)
        system *= root[:, None]
        system[np.diag_indices_from(system)] += 1.0
        # Solved for the change, whose rounding fades as it does. At the optimum a = -gradient.
        rows = state.unknowns[:-1]
        sides = np.column_stack([(gradient + rows) / root, root])
        # The transpose of a symmetric matrix is itself, and saves LAPACK a copy.
        factor = cho_factor(system.T, lower=True, overwrite_a=True, check_finite=False)
        residual, ones = cho_solve(factor, sides, check_finite=False).T
        # The intercept is free, so the row weights sum to zero.
        shift = (rows.sum() - root @ residual) / (root @ ones)
        change: Doubles = np.append(-root * (residual + shift * ones), shift)
        return state.unknowns + change

    def state(self, unknowns: Doubles, logits: Doubles | None = None) -> _State:
        if logits is None:
            logits = self._gram @ unknowns[:-1] + unknowns[-1]
        return _State(unknowns, logits, 0.5 * float(unknowns[:-1] @ (logits - unknowns[-1])))


def _newton(space: _Space, y: Doubles, weight: Doubles) -> tuple[_State, int]:
    """Return the optimum and the number of steps; steps that do not descend are halved."""
    state = space.start()
    for step in range(1, MAX_STEPS + 1):
        p, q = expit(state.logits), expit(-state.logits)
        # Beyond a logit of 30 no curvature is left in float64; without some, steps divide by zero.
        curvature = weight * np.maximum(p * q, 1e-13)
        try:
            target = space.full_step(state, weight * np.where(y > 0, -q, p), curvature)
        except LinAlgError as error:
            raise _unsolved(f"step {step} is singular") from error
        goal = space.state(target)
        moved = _descend(space, state, goal, y, weight)
        change = float(np.abs(moved.logits - state.logits).max())
        is_full = moved is goal
        state = moved
        if is_full and change <= LOGIT_TOLERANCE * max(1.0, float(np.abs(state.logits).max())):
            return state, step
    raise _unsolved(f"{MAX_STEPS} steps did not reach it")


def _descend(space: _Space, state: _State, goal: _State, y: Doubles, weight: Doubles) -> _State:
    before = _objective(state, y, weight)
    # Near the optimum the objective changes by less than its own rounding.
    slack = 1e-10 * max(1.0, abs(before))
    moved, share = goal, 1.0
    for _ in range(MAX_HALVINGS + 1):
        if _objective(moved, y, weight) <= before + slack:
            return moved
        share /= 2
        moved = space.state(
            state.unknowns + share * (goal.unknowns - state.unknowns),
            state.logits + share * (goal.logits - state.logits),
        )
    raise _unsolved("no step descends")


def _objective(state: _State, y: Doubles, weight: Doubles) -> float:
    losses = np.logaddexp(0.0, np.where(y > 0, -state.logits, state.logits))
    return float(weight @ losses) + state.penalty


def _solve(square: Doubles, side: Doubles, alpha: float) -> Doubles:
    square[np.diag_indices_from(square)] += alpha
    try:
        solution: Doubles = cho_solve(cho_factor(square, overwrite_a=True), side)
    except LinAlgError as error:
        raise _unsolved("the equations are singular") from error
    return solution


def _gram(X: Matrix) -> Doubles:
    gram = X @ X.T
    return _densify(gram)


def _densify(X: Matrix) -> Doubles:
    dense: Doubles = X.toarray() if issparse(X) else X  # type: ignore[union-attr]
    return dense


def _unsolved(what: str) -> NumericsError:
    return NumericsError(
        f"the linear probe has no optimum in float64: {what}",
        "probes.recipes",
        "penalise more: lower regularization of a binary target, raise it of a continuous one",
    )
