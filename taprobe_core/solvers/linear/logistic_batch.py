"""Fit a batch of logistic columns on one feature matrix: phases, precisions and the certificate.

Solved in dual variables (`dual_subspace`), `w = X_f' alpha`, so that a column costs one product
with the feature matrix and its transpose an iteration. Columns that differ in their fold only (same
labels, same C) form a group. A group's *reference* is the fit on all its rows under the scaling of
all rows; it costs one row of a kernel product an iteration and gives the folds their start. Where
the reference was easy, folds use a diagonal preconditioner. Where it was hard (few large
eigenvalues, as activations have), the Newton system at the reference is factorised once per group,
and cut down to each fold's rows (`kernel_systems`) gives both the start, one Newton step from the
reference, and the preconditioner.

What does not belong here: checks on the request, which columns share a batch (`logistic`).
Invariant: precision decides speed, not the result. A column is accepted only when its gradient, at
logits computed in float64, bounds the relative error of its coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import NumericsError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.dual_subspace import (
    DualProblem,
    DualState,
    Precondition,
    best_intercept,
    minimise,
    start,
)
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.kernel_systems import BorderedInverse, NarrowInverse
from taprobe_core.solvers.linear.logistic_phases import (
    Batch,
    Patterns,
    diagonal,
    factored,
    factorise,
    group_mean,
    newton_start,
    plain,
    reference_problem,
    solve_narrow_reference,
    solve_reference,
)
from taprobe_core.solvers.linear.solution import as_rows, row_patterns

MAX_FACTOR_BYTES = 1 << 30
MIN_COLUMNS_FOR_REFERENCE = 3
MAX_NARROW_FEATURES = 512

_EASY_ITERATIONS = 45
_DIAGONAL_ITERATIONS = 60
_FACTOR_ITERATIONS = 30
_MAX_PHASES = 8
_CERTIFIED = 3e-4
_ALWAYS_FACTORISED_ROWS = 1024
_ROWS_PER_FEATURE = 3

_T = TypeVar("_T", DualProblem, DualState)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A batch: coef [column, feature], intercept, logits [column, row], n_iter, is_certified."""

    coef: Tensor
    intercept: Tensor
    logits: Tensor
    n_iter: Tensor
    is_certified: Tensor


class BatchSolver:
    """Solves batches of columns on one matrix; the shared Gram matrix is made at most once."""

    def __init__(self, matrix: FoldMatrix, dtype: torch.dtype, tol: float, max_iter: int) -> None:
        self.matrix, self.dtype, self.tol, self.max_iter = matrix, dtype, tol, max_iter
        bytes_each = matrix.n_rows**2 * torch.finfo(dtype).bits // 8
        self.max_groups = max(1, MAX_FACTOR_BYTES // max(bytes_each, 1))
        self._grams: dict[torch.dtype, Tensor] = {}

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return the kernel under the scaling of all rows, [row, row]."""
        if dtype not in self._grams:
            self._grams[dtype] = self.matrix.shared_gram(dtype)
        return self._grams[dtype]

    @property
    def is_narrow(self) -> bool:
        """Whether systems of the features are cheaper to factorise than those of the rows."""
        wide = self.matrix.text is not None or self.matrix.n_dense > MAX_NARROW_FEATURES
        return not wide and self.matrix.n_dense * _ROWS_PER_FEATURE <= self.matrix.n_rows

    def shared_kernel(self, _: Tensor, dual: Tensor) -> Tensor:
        """Return products with the kernel under the scaling of all rows, [column, row]."""
        text = self.matrix.text
        if text is None or self.matrix.n_dense or dual.device.type != "cpu":
            return dual @ self.gram(dual.dtype)
        # Counts are sparse: the Gram matrix would cost a CPU more than all products with them.
        one = np.zeros(len(dual), dtype=np.int64)
        terms = text.shared.backward(one, dual.cpu().numpy())
        return torch.as_tensor(text.shared.forward(one, terms)).to(dual)

    def inverse(
        self, ridge: Tensor, patterns: Patterns, chosen: Patterns
    ) -> BorderedInverse | NarrowInverse:
        """Invert the kernel under the scaling of all rows, with a ridge, on the chosen subsets."""
        if self.is_narrow:
            return NarrowInverse(self.matrix.shared_values()[0], ridge, patterns, chosen)
        return BorderedInverse(self.gram(ridge.dtype), ridge, patterns, chosen)

    def solve(
        self,
        columns: FitRequest,
        penalty: NDArray[np.float64],
        group: NDArray[np.int64],
        index: NDArray[np.intp],
    ) -> Fitted:
        """Fit one batch.

        Args:
            columns: the batch.
            penalty: [column] C.
            group: [column], equal where columns differ in their fold only.
            index: [column] numbers to call the columns by in an error.

        Raises:
            NumericsError: a column did not converge; names it.
        """
        _, group = np.unique(group, return_inverse=True)
        patterns, pattern = row_patterns(columns.weight > 0)
        batch = Batch(columns.fold, group.astype(np.int64), patterns, pattern)
        problem = self._problem(columns, penalty)
        state = self._first_phase(problem, batch)
        fitted, state = self._certify(problem, batch, state)
        for phase in range(1, _MAX_PHASES):
            open_ = np.flatnonzero(~fitted.is_certified.cpu().numpy())
            if not len(open_) or int(state.n_iter[open_].max()) >= self.max_iter:
                break
            self._later_phase(phase, problem, batch, state, open_)
            fitted, state = self._certify(problem, batch, state)
        bad = np.flatnonzero(~fitted.is_certified.cpu().numpy())
        if bad.size:
            raise NumericsError(
                f"{bad.size} logistic columns did not converge in {self.max_iter} iterations",
                f"column {index[bad[0]]}, fold {columns.fold[bad[0]]}, C {penalty[bad[0]]:g}",
                "lower C, or raise max_iter",
            )
        return fitted

    def _problem(self, columns: FitRequest, penalty: NDArray[np.float64]) -> DualProblem:
        device = self.matrix.device
        weight = as_rows(columns.weight, device)
        sign = torch.where(as_rows(columns.y, device) > 0.5, 1.0, -1.0).double()
        own = torch.as_tensor(penalty, device=device)[:, None]
        return DualProblem(sign, weight, (weight > 0).double(), own)

    def _first_phase(self, problem64: DualProblem, batch: Batch) -> DualState:
        """Start every column and iterate in the working precision; returns float64."""
        problem = _in_type(problem64, self.dtype)
        zero = torch.zeros_like(problem.weight)
        if len(batch.fold) < MIN_COLUMNS_FOR_REFERENCE * batch.n_groups:
            state, way = start(problem, zero, zero), self._diagonal(problem)
            return self._iterate(problem, batch, state, way, _DIAGONAL_ITERATIONS)
        reference = reference_problem(problem, batch)
        if self.is_narrow:
            found = solve_narrow_reference(reference, self.matrix.shared_values()[0])
        else:
            found = solve_reference(reference, self.shared_kernel)
        is_easy = float(found.n_iter.double().median()) <= _EASY_ITERATIONS
        if is_easy and not self.is_narrow:
            group = torch.as_tensor(batch.group, device=zero.device)
            alpha = problem.project(found.alpha[group])
            way, n_steps = self._diagonal(problem), _DIAGONAL_ITERATIONS
        else:
            _, curvature = reference.slopes(found.z + found.intercept)
            factors = factorise(curvature, problem.penalty, batch, self.inverse)
            alpha = newton_start(reference, found, factors, problem, batch)
            way, n_steps = factored(factors, batch), _FACTOR_ITERATIONS
        state = start(problem, alpha, self.matrix.kernel(batch.fold, alpha))
        return self._iterate(problem, batch, state, way, n_steps)

    def _later_phase(
        self, phase: int, problem64: DualProblem, batch: Batch, state: DualState,
        open_: NDArray[np.intp],
    ) -> None:  # fmt: skip
        """Improve the columns that are not certified, in place; float64 from the second time."""
        dtype = self.dtype if phase == 1 else torch.float64
        at = torch.as_tensor(open_, device=self.matrix.device)
        part, problem = batch.take(open_), _in_type(problem64.take(at), dtype)
        current = _in_type(state.take(at), dtype)
        is_shared = len(open_) >= MIN_COLUMNS_FOR_REFERENCE * len(np.unique(part.group))
        if phase == 1 and not is_shared and batch.patterns.shape[1] > _ALWAYS_FACTORISED_ROWS:
            way, n_steps = plain(problem), self.max_iter // 2
        else:
            _, second = problem.slopes(current.z + current.intercept)
            logs = second.clamp(min=torch.finfo(dtype).tiny).log()
            curvature = group_mean(logs, problem.inside, part.group).exp()
            trained = group_mean(problem.inside, problem.inside, part.group)
            curvature = torch.where(trained > 0, curvature, 0.0)
            factors = factorise(curvature, problem.penalty, part, self.inverse)
            way, n_steps = factored(factors, part), _FACTOR_ITERATIONS
        state.put(at, self._iterate(problem, part, current, way, n_steps))

    def _diagonal(self, problem: DualProblem) -> Precondition:
        return diagonal(problem, self.matrix.shared_lengths().to(problem.weight))

    def _iterate(
        self, problem: DualProblem, batch: Batch, state: DualState, way: Precondition, n_steps: int
    ) -> DualState:
        def kernel(live: Tensor, dual: Tensor) -> Tensor:
            return self.matrix.kernel(batch.fold[live.cpu().numpy()], dual)

        n_steps = min(n_steps, self.max_iter - int(state.n_iter.max()))
        found = minimise(problem, state, kernel, way, tol=self.tol, max_iter=n_steps)
        return _in_type(found, torch.float64)

    def _certify(
        self, problem: DualProblem, batch: Batch, state: DualState
    ) -> tuple[Fitted, DualState]:
        """Compute logits in float64 and bound the coefficients' error by the gradient.

        The penalty makes the objective 1/C-convex: `||w - w*|| <= C ||gradient||`.
        """
        coef = self.matrix.backward(batch.fold, state.alpha)
        z = self.matrix.forward(batch.fold, coef)
        intercept = best_intercept(problem, z, state.intercept)
        first, _ = problem.slopes(z + intercept)
        rho = problem.rho(first, state.alpha).to(self.dtype)
        size = rho.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        gradient = self.matrix.backward(batch.fold, rho / size).double() * size
        error = problem.penalty[:, 0] * gradient.norm(dim=1)
        certified = (error <= _CERTIFIED * coef.norm(dim=1)) & (state.step <= self.tol)
        state = replace(state, z=z, intercept=intercept)
        return Fitted(coef, intercept[:, 0], z + intercept, state.n_iter, certified), state


def _in_type(values: _T, dtype: torch.dtype) -> _T:
    """Return a problem or a state with its real members in another precision."""
    return type(values)(
        *(each.to(dtype) if each.is_floating_point() else each for each in vars(values).values())
    )
