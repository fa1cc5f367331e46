"""Where the folds of a logistic batch start, what preconditions them, and Newton for few features.

The *reference* of a group of columns (same labels and C, other folds) is the fit on the rows of all
of them under the scaling of all rows. From it follow the folds' starting points and, factorised,
their preconditioners. With few features a column's Hessian is small, and a handful of exact Newton
steps of all columns at once, in float64, costs less than many cheap iterations; a fold's own
standardisation is a factor of each feature and a change of intercept.

What does not belong here: iterating over text and wide features (`dual_subspace`), deciding which
way is taken (`logistic`). Invariants: a start or a preconditioner changes how soon a column ends,
never where; every Newton step goes down; a finished column leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import NumericsError
from taprobe_core.solvers.linear.dual_subspace import (
    DualProblem,
    DualState,
    Kernel,
    Precondition,
    minimise,
    start,
)
from taprobe_core.solvers.linear.kernel_systems import BorderedInverse, NarrowInverse, cholesky

MAX_STEPS = 60
_MAX_HALVINGS = 30
_VALUES_PER_CHUNK = 1 << 22


def newton(
    shared: Tensor,
    factor: Tensor,
    sign: Tensor,
    weight: Tensor,
    penalty: Tensor,
    *,
    tol: float = 1e-8,
    max_iter: int = MAX_STEPS,
) -> tuple[Tensor, Tensor]:
    """Minimise `sum_i weight_i log(1 + exp(-sign_i z_i)) + sum_j penalty_j v_j^2 / 2`.

    The logits are `z = shared (factor * v)`.

    Args:
        shared: [row, feature + 1] float64, the last column ones, which belong to the intercept.
        factor: [column, feature + 1] of each feature in each column; 0 leaves a penalised one out,
            with a coefficient of 0.
        sign: [column, row] +1 and -1.
        weight: [column, row].
        penalty: [column, feature + 1], 0 for the intercept.
        tol: change of every logit in a step at which a column is done.
        max_iter: Newton steps at most.

    Returns:
        v [column, feature + 1] and the number of steps [column] int64.

    Raises:
        NumericsError: a column did not converge; names it.
    """
    solution = torch.zeros_like(penalty)
    n_iter = torch.zeros(len(sign), dtype=torch.int64, device=sign.device)
    live = torch.arange(len(sign), device=sign.device)
    v, logits = torch.zeros_like(penalty), torch.zeros_like(sign)
    first, second = _slopes(logits, sign, weight)
    for _ in range(max_iter):
        gradient = (first @ shared) * factor + penalty * v
        step = _solve(shared, factor, second, penalty, gradient)
        moved = (step * factor) @ shared.T
        descent = -(gradient * step).sum(1, keepdim=True)
        length = torch.ones_like(descent)
        for _ in range(_MAX_HALVINGS):
            trial = v + length * step
            first, second = _slopes(logits + length * moved, sign, weight)
            slope = (first * moved).sum(1, keepdim=True) + (penalty * trial * step).sum(
                1, keepdim=True
            )
            # The objective is convex: a slope that is still steep behind the step means too far.
            too_far = slope > 0.5 * descent
            if not bool(too_far.any()):
                break
            length = torch.where(too_far, length / 2, length)
        v, logits = v + length * step, logits + length * moved
        n_iter[live] += 1
        done = (length * moved).abs().amax(1) <= tol
        if not bool(done.any()):
            continue
        solution[live[done]] = v[done]
        keep = ~done
        live = live[keep]
        if not len(live):
            return solution, n_iter
        v, logits, first, second = v[keep], logits[keep], first[keep], second[keep]
        sign, weight = sign[keep], weight[keep]
        factor, penalty = factor[keep], penalty[keep]
    raise NumericsError(
        f"{len(live)} logistic columns did not converge in {max_iter} Newton steps",
        f"column {int(live[0])}",
        "lower C",
    )


def _slopes(logits: Tensor, sign: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    other = torch.sigmoid(-logits * sign)
    first = weight * other
    return -first * sign, first * (1 - other)


def _solve(
    shared: Tensor, factor: Tensor, second: Tensor, penalty: Tensor, gradient: Tensor
) -> Tensor:
    """Return Newton steps, in chunks of columns that bound the memory."""
    n_each = max(1, _VALUES_PER_CHUNK // shared.numel())
    steps = []
    for first in range(0, len(second), n_each):
        part = slice(first, first + n_each)
        hessian = torch.matmul(shared.T * second[part, None], shared)
        hessian *= factor[part, :, None] * factor[part, None]
        hessian.diagonal(dim1=1, dim2=2).add_(penalty[part])
        # Where every row is fitted the intercept's curvature underflows; a trace keeps it solvable.
        size = hessian.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        hessian.diagonal(dim1=1, dim2=2).add_(size * 1e-14)
        root = cholesky(hessian, "a Newton system is", "logistic columns", "lower C")
        steps.append(torch.cholesky_solve(-gradient[part, :, None], root)[:, :, 0])
    return torch.cat(steps)


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
