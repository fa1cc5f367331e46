"""Kernel logistic regression of many columns by subspace Newton steps in dual variables.

A column's model is `z = K alpha`, logits `z + b`; its coefficients `X' alpha` are not formed here.
With `r` the derivative of the weighted losses by the logits, the optimum is where
`rho = r + alpha / C` vanishes. An iteration adds one direction, the preconditioned `rho`, which
costs the one kernel product of the iteration, and minimises the exact objective over the span of
that direction, the last steps and the intercept: a Newton problem of a dozen unknowns per column,
linear in vectors that are known. On a quadratic this is conjugate gradients; unlike quasi-Newton
methods it stays right when the preconditioner follows the current weights or is not symmetric.

Columns share iterations and nothing else; a finished column leaves the batch. What does not belong
here: features, kernels, preconditioners. Invariant: alpha is 0 outside a column's rows and sums to
0. Source: sequential subspace optimisation (Narkiss and Zibulevsky 2005); the dual parametrisation
is that of kernel logistic regression (Zhu and Hastie 2005).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MEMORY = 8
_MAX_NEWTON = 3
_MAX_CUTS = 14
_CUT = 0.25
_FLAT_INTERCEPT = 1e-7
_GRADIENT_LEFT = 0.1
_OVERSHOOT = 0.5
_COMPACT_BELOW = 0.8

Kernel = Callable[[Tensor, Tensor], Tensor]
Precondition = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class DualProblem:
    """Data of all columns; members are [column, row] unless said otherwise.

    Attributes:
        sign: +1 and -1, the class.
        weight: at least 0; 0 leaves the row out.
        inside: 1 where the weight is positive, else 0.
        penalty: [column, 1], C of scikit-learn.
    """

    sign: Tensor
    weight: Tensor
    inside: Tensor
    penalty: Tensor

    def take(self, chosen: Tensor) -> DualProblem:
        """Return some columns."""
        return DualProblem(*(each[chosen] for each in vars(self).values()))

    def project(self, values: Tensor) -> Tensor:
        """Return values that are 0 outside the column's rows and sum to 0."""
        mean = (values * self.inside).sum(1, keepdim=True) / self.inside.sum(1, keepdim=True)
        return (values - mean) * self.inside

    def slopes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return first and second derivatives of the weighted losses by the logits."""
        other = torch.sigmoid(-logits * self.sign)
        first = self.weight * other
        return -first * self.sign, first * (1 - other)

    def rho(self, first: Tensor, alpha: Tensor) -> Tensor:
        """Return what vanishes at the optimum, `first + alpha / C` inside the column's rows."""
        return torch.addcdiv(first, alpha, self.penalty.expand_as(alpha)) * self.inside


@dataclass(frozen=True, eq=False)
class DualState:
    """Where each column stands.

    Attributes:
        alpha: [column, row] dual variables.
        z: [column, row] K alpha.
        intercept: [column, 1].
        step: [column] largest change of a logit in the last iteration.
        n_iter: [column] int64.
    """

    alpha: Tensor
    z: Tensor
    intercept: Tensor
    step: Tensor
    n_iter: Tensor

    def take(self, chosen: Tensor) -> DualState:
        """Return some columns."""
        return DualState(*(each[chosen] for each in vars(self).values()))

    def put(self, chosen: Tensor, other: DualState) -> None:
        """Overwrite some columns in place."""
        for name, values in vars(self).items():
            values[chosen] = getattr(other, name)


def start(problem: DualProblem, alpha: Tensor, z: Tensor) -> DualState:
    """Return a state with the best intercept for the given alpha and z = K alpha."""
    state = DualState(
        alpha=alpha,
        z=z,
        intercept=alpha.new_zeros(len(alpha), 1),
        step=alpha.new_full((len(alpha),), torch.inf),
        n_iter=torch.zeros(len(alpha), dtype=torch.int64, device=alpha.device),
    )
    return replace(state, intercept=best_intercept(problem, z, state.intercept))


def best_intercept(problem: DualProblem, z: Tensor, intercept: Tensor, n_steps: int = 60) -> Tensor:
    """Minimise over the intercept by Newton steps inside a bracket, [column, 1]."""
    low, high = torch.full_like(intercept, -torch.inf), torch.full_like(intercept, torch.inf)
    smallest = torch.finfo(z.dtype).tiny
    for count in range(n_steps):
        # Where the curvature has vanished a Newton step is endless: reach out in growing steps.
        reach = 4.0 * 1.5**count
        first, second = problem.slopes(z + intercept)
        slope, curvature = first.sum(1, keepdim=True), second.sum(1, keepdim=True)
        high = torch.where(slope > 0, intercept, high)
        low = torch.where(slope < 0, intercept, low)
        following = intercept - (slope / curvature.clamp(min=smallest)).clamp(-reach, reach)
        is_bracketed = low.isfinite() & high.isfinite()
        is_outside = (following > high) | (following < low)
        following = torch.where(is_bracketed & is_outside, (low + high) / 2, following)
        move = (following - intercept).abs()
        intercept = following
        if bool((move <= 4 * torch.finfo(z.dtype).eps * (1 + intercept.abs())).all()):
            break
    return intercept


class _Subspace:
    """The last directions of each column and the intercept, [column, direction, row].

    Directions are scaled so that the largest change of a logit is 1; the last one, constant in the
    logits and 0 in alpha, is the intercept.
    """

    def __init__(self, like: Tensor, memory: int) -> None:
        self.alpha = like.new_zeros(len(like), memory + 2, like.shape[1])
        self.z = torch.zeros_like(self.alpha)
        self.z[:, -1] = 1.0
        self.slot = 0

    def take(self, chosen: Tensor) -> None:
        self.alpha, self.z = self.alpha[chosen], self.z[chosen]

    def put(self, alpha: Tensor, z: Tensor) -> None:
        size = torch.maximum(z.amax(1), -z.amin(1)).clamp(min=torch.finfo(z.dtype).tiny * 1e8)
        self.alpha[:, self.slot] = alpha / size[:, None]
        self.z[:, self.slot] = z / size[:, None]

    def advance(self) -> None:
        self.slot = (self.slot + 1) % (self.alpha.shape[1] - 1)

    def slope(self, rho: Tensor) -> Tensor:
        """Derivatives of the objective along all directions, [column, direction]."""
        return torch.bmm(self.z, rho[:, :, None])[:, :, 0]

    def newton(self, slope: Tensor, second: Tensor, penalised: Tensor) -> Tensor:
        """Return the Newton step in the coordinates of the directions, [column, direction]."""
        hessian = torch.bmm(self.z * second[:, None], self.z.transpose(1, 2)) + penalised
        hessian, slope64 = hessian.double(), slope.double()
        scale = hessian.diagonal(dim1=1, dim2=2).clamp(min=1e-30).rsqrt()
        hessian = hessian * scale[:, :, None] * scale[:, None]
        # Directions may be dependent up to rounding; the shift then shares the step among them.
        hessian.diagonal(dim1=1, dim2=2).add_(100 * torch.finfo(slope.dtype).eps)
        step: Tensor = torch.linalg.solve(hessian, -(slope64 * scale)[:, :, None])[:, :, 0] * scale
        return step.to(slope.dtype)

    def combine(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return changes of alpha and of the logits, intercept included."""
        across = step[:, None]
        return torch.bmm(across, self.alpha)[:, 0], torch.bmm(across, self.z)[:, 0]


@dataclass(frozen=True, eq=False)
class _Point:
    """A trial point: changes so far, derivatives of the losses, rho and slopes."""

    d_alpha: Tensor
    d_logits: Tensor
    d_intercept: Tensor
    second: Tensor
    rho: Tensor
    slope: Tensor


def _minimise_in_span(
    problem: DualProblem, state: DualState, span: _Subspace, first: Tensor, second: Tensor
) -> _Point:
    """Minimise the objective over the span by damped Newton steps."""
    logits = state.z + state.intercept
    penalised = torch.bmm(span.alpha, span.z.transpose(1, 2)) / problem.penalty[:, :, None]
    penalised = (penalised + penalised.transpose(1, 2)) / 2
    # Far from the optimum every row can be flat, and with it the unpenalised intercept.
    penalised[:, -1, -1] += _FLAT_INTERCEPT * problem.weight.sum(1)
    rho = problem.rho(first, state.alpha)
    zero = torch.zeros_like(rho)
    point = _Point(zero, zero, torch.zeros_like(state.intercept), second, rho, span.slope(rho))
    initial = point.slope.abs().amax(1)
    for _ in range(_MAX_NEWTON):
        step = span.newton(point.slope, point.second, penalised)
        alpha, logit = span.combine(step)
        descent = -(point.slope * step).sum(1, keepdim=True)
        length = torch.ones_like(state.intercept)
        for cut in range(_MAX_CUTS + 1):
            d_alpha = torch.addcmul(point.d_alpha, length, alpha)
            d_logits = torch.addcmul(point.d_logits, length, logit)
            first, second = problem.slopes(logits + d_logits)
            rho = problem.rho(first, state.alpha + d_alpha)
            slope = span.slope(rho)
            # The objective is convex: a slope that is still steep behind the step means too far.
            too_far = (slope * step).sum(1, keepdim=True) > _OVERSHOOT * descent
            if not bool(too_far.any()):
                break
            # A column that no cut helps stays where it is; its certificate will tell.
            length = torch.where(too_far, length * _CUT if cut < _MAX_CUTS - 1 else 0.0, length)
        d_intercept = point.d_intercept + length * step[:, -1:]
        point = _Point(d_alpha, d_logits, d_intercept, second, rho, slope)
        if bool((slope.abs().amax(1) <= _GRADIENT_LEFT * initial).all()):
            break
    return point


def minimise(
    problem: DualProblem,
    state: DualState,
    kernel: Kernel,
    precondition: Precondition,
    *,
    tol: float,
    max_iter: int,
    memory: int = MEMORY,
) -> DualState:
    """Iterate until an iteration moves no logit by more than `tol`, column by column.

    Args:
        problem: data of all columns.
        state: where to start; not changed.
        kernel: (columns [k] int64, dual [k, row]) -> K dual.
        precondition: (columns, rho, second derivatives) -> about the Newton step in alpha, without
            its sign; 0 outside the columns' rows, summing to 0.
        tol: on the change of every logit, training row or not.
        max_iter: iterations at most.
        memory: steps kept.

    Returns:
        The state of all columns; `step` tells which have not reached `tol`.
    """
    out = DualState(*(each.clone() for each in vars(state).values()))
    live = torch.arange(len(state.alpha), device=state.alpha.device)
    is_live = torch.ones_like(live, dtype=torch.bool)
    first, second = problem.slopes(state.z + state.intercept)
    rho = problem.rho(first, state.alpha)
    span = _Subspace(rho, memory)
    for _ in range(max_iter):
        direction = precondition(live, rho, second)
        span.put(direction, kernel(live, direction))
        point = _minimise_in_span(problem, state, span, first, second)
        moved = point.d_logits - point.d_intercept
        # Successive steps span more than successive directions do.
        span.put(point.d_alpha, moved)
        span.advance()
        state = DualState(
            state.alpha + point.d_alpha,
            state.z + moved,
            state.intercept + point.d_intercept,
            torch.maximum(point.d_logits.amax(1), -point.d_logits.amin(1)),
            state.n_iter + 1,
        )
        first, second = problem.slopes(state.z + state.intercept)
        rho = problem.rho(first, state.alpha)
        done = (state.step <= tol) & is_live
        if not bool(done.any()):
            continue
        out.put(live[done], state.take(done))
        is_live &= ~done
        n_live = int(is_live.sum())
        if n_live == 0:
            return out
        if n_live <= _COMPACT_BELOW * len(live):
            keep = torch.nonzero(is_live)[:, 0]
            problem, state, live, is_live = (
                problem.take(keep),
                state.take(keep),
                live[keep],
                is_live[keep],
            )
            first, second, rho = first[keep], second[keep], rho[keep]
            span.take(keep)
    out.put(live[is_live], state.take(is_live))
    return out
