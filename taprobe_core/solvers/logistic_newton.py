"""Newton's method for logistic regression of many columns on few features, in float64.

With few features a column's Hessian is small, and a handful of exact Newton steps of all columns at
once costs less than many cheap iterations. A fold's own standardisation is a factor of each feature
and a change of intercept. What does not belong here: text and wide features (`dual_subspace`).
Invariant: every step goes down; a finished column leaves the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taprobe_core.errors import NumericsError
from taprobe_core.solvers.cholesky import cholesky

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
    for start in range(0, len(second), n_each):
        part = slice(start, start + n_each)
        hessian = torch.matmul(shared.T * second[part, None], shared)
        hessian *= factor[part, :, None] * factor[part, None]
        hessian.diagonal(dim1=1, dim2=2).add_(penalty[part])
        # Where every row is fitted the intercept's curvature underflows; a trace keeps it solvable.
        size = hessian.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        hessian.diagonal(dim1=1, dim2=2).add_(size * 1e-14)
        root = cholesky(hessian, "a Newton system is", "logistic columns", "lower C")
        steps.append(torch.cholesky_solve(-gradient[part, :, None], root)[:, :, 0])
    return torch.cat(steps)
