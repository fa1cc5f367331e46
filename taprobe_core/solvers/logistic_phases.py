"""Where the folds of a logistic batch start, and what preconditions them.

The *reference* of a group of columns (same labels and C, other folds) is the fit on the rows of all
of them under the scaling of all rows. From it follow the folds' starting points and, factorised,
their preconditioners. What does not belong here: iterating (`dual_subspace`), deciding which way is
taken (`logistic`). Invariant: nothing here changes where a column ends, only how soon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.solvers.bordered import BorderedInverse
from taprobe_core.solvers.dual_subspace import (
    DualProblem,
    DualState,
    Kernel,
    Precondition,
    minimise,
    start,
)
from taprobe_core.solvers.logistic_newton import newton
from taprobe_core.solvers.narrow_inverse import NarrowInverse

Patterns = NDArray[np.bool_]

REFERENCE_TOL = 1e-2
_REFERENCE_ITERATIONS = 300
_SMALLEST_CURVATURE = 1e-5


@dataclass(frozen=True, eq=False)
class Batch:
    """Which columns belong together.

    Attributes:
        fold: [column].
        group: [column], numbered from 0 without gaps.
        patterns: [pattern, row] bool, distinct sets of training rows.
        pattern: [column].
    """

    fold: NDArray[np.int64]
    group: NDArray[np.int64]
    patterns: NDArray[np.bool_]
    pattern: NDArray[np.int64]

    @property
    def n_groups(self) -> int:
        """Groups."""
        return int(self.group.max()) + 1

    def take(self, chosen: NDArray[np.intp]) -> Batch:
        """Return some columns, groups and patterns numbered as before."""
        return Batch(self.fold[chosen], self.group[chosen], self.patterns, self.pattern[chosen])


@dataclass(frozen=True, eq=False)
class Factor:
    """The Newton system of one group, factorised at one curvature of the losses, [row]."""

    inverse: BorderedInverse | NarrowInverse
    curvature: Tensor


def group_mean(values: Tensor, inside: Tensor, group: NDArray[np.int64]) -> Tensor:
    """Average over the columns of each group that have the row, [group, row]; 0 where none has."""
    index = torch.as_tensor(group, device=values.device)
    shape = (int(group.max()) + 1, values.shape[1])
    total = values.new_zeros(shape).index_add_(0, index, values * inside)
    count = values.new_zeros(shape).index_add_(0, index, inside)
    return total / count.clamp(min=1)


def reference_problem(problem: DualProblem, batch: Batch) -> DualProblem:
    """Return one column per group, on the rows of all its columns."""
    weight = group_mean(problem.weight, problem.inside, batch.group)
    _, first = np.unique(batch.group, return_index=True)
    # The sign of a row is that of any column that trains on it: they agree.
    sign = group_mean(problem.sign, problem.inside, batch.group)
    return DualProblem(
        torch.where(sign > 0, 1.0, -1.0).to(sign),
        weight,
        (weight > 0).to(weight),
        problem.penalty[torch.as_tensor(first, device=weight.device)],
    )


def solve_reference(reference: DualProblem, kernel: Kernel) -> DualState:
    """Fit the references, roughly, by plain conjugate directions.

    Args:
        reference: one column per group.
        kernel: products with the kernel under the scaling of all rows.
    """
    zero = torch.zeros_like(reference.weight)
    return minimise(
        reference,
        start(reference, zero, zero),
        kernel,
        plain(reference),
        tol=REFERENCE_TOL,
        max_iter=_REFERENCE_ITERATIONS,
    )


def solve_narrow_reference(reference: DualProblem, shared: Tensor) -> DualState:
    """Fit the references, roughly, by Newton's method on few features.

    Args:
        reference: one column per group.
        shared: [row, feature] float64 under the scaling of all rows.
    """
    penalty = (1 / reference.penalty.double()).repeat(1, shared.shape[1] + 1)
    penalty[:, -1] = 0.0
    inputs = torch.cat([shared, shared.new_ones(len(shared), 1)], dim=1)
    sign, weight = reference.sign.double(), reference.weight.double()
    factor = torch.ones_like(penalty)
    v, n_iter = newton(inputs, factor, sign, weight, penalty, tol=REFERENCE_TOL)
    z, intercept = (v[:, :-1] @ shared.T).to(reference.weight), v[:, -1:].to(reference.weight)
    first, _ = reference.slopes(z + intercept)
    alpha = reference.project(-first * reference.penalty)
    return DualState(alpha, z, intercept, torch.full_like(z[:, 0], REFERENCE_TOL), n_iter)


def plain(problem: DualProblem) -> Precondition:
    """Return the projection onto admissible directions: no preconditioner."""

    def apply(live: Tensor, rho: Tensor, _: Tensor) -> Tensor:
        return problem.take(live).project(-rho)

    return apply


def diagonal(problem: DualProblem, kernel_diagonal: Tensor) -> Precondition:
    """Return the diagonal of the Newton system at the current curvature.

    Args:
        problem: the columns.
        kernel_diagonal: [row] squared lengths of the rows.
    """

    def apply(live: Tensor, rho: Tensor, second: Tensor) -> Tensor:
        own = problem.take(live)
        return own.project(-rho / (kernel_diagonal * second + 1 / own.penalty))

    return apply


def factored(factors: dict[int, Factor], batch: Batch) -> Precondition:
    """Return the factorised Newton systems of the groups, cut down to the columns' rows."""

    def apply(live: Tensor, rho: Tensor, _: Tensor) -> Tensor:
        at = live.cpu().numpy()
        out = torch.zeros_like(rho)
        for group in np.unique(batch.group[at]):
            chosen = np.flatnonzero(batch.group[at] == group)
            where = torch.as_tensor(chosen, device=rho.device)
            factor = factors[int(group)]
            right = -rho[where] / factor.curvature
            out[where] = factor.inverse.solve(right, batch.pattern[at[chosen]])
        return out

    return apply


def factorise(
    curvature: Tensor,
    penalty: Tensor,
    batch: Batch,
    inverse_of: Callable[[Tensor, Patterns, Patterns], BorderedInverse | NarrowInverse],
) -> dict[int, Factor]:
    """Factorise the Newton system of every group that has columns in `batch`.

    Args:
        curvature: [group, row] second derivatives of the losses.
        penalty: [column, 1] C.
        batch: the columns.
        inverse_of: (ridge [row], patterns, [pattern] which of them) -> the inverse of the kernel
            under the scaling of all rows, with that ridge.
    """
    factors: dict[int, Factor] = {}
    for group in np.unique(batch.group):
        members = np.flatnonzero(batch.group == group)
        own = curvature[group].clamp(min=_SMALLEST_CURVATURE * float(curvature[group].max()))
        ridge = 1 / (own * float(penalty[members[0], 0]))
        used = np.zeros(len(batch.patterns), dtype=bool)
        used[batch.pattern[members]] = True
        factors[int(group)] = Factor(inverse_of(ridge, batch.patterns, used), own)
    return factors


def newton_start(
    reference: DualProblem, state: DualState, factors: dict[int, Factor], problem: DualProblem,
    batch: Batch,
) -> Tensor:  # fmt: skip
    """Return alpha of every column: one Newton step on its rows from its group's reference."""
    alpha = torch.zeros_like(problem.weight)
    for group, factor in factors.items():
        chosen = np.flatnonzero(batch.group == group)
        where = torch.as_tensor(chosen, device=alpha.device)
        first, _ = reference.slopes(state.z[group] + state.intercept[group])
        # The working response of iteratively reweighted least squares.
        response = state.z[group] - first[group] / factor.curvature
        right = response * problem.inside[where]
        alpha[where] = factor.inverse.solve(right, batch.pattern[chosen])
    return alpha
