"""Logistic regression of many columns by batched L-BFGS: the converged optimum of scikit-learn.

Each column minimises `sum_i weight_i log(1 + exp(-s_i (x_i' w + b))) + ||w||^2 / (2 C)` with x
standardised on its fold's training rows and b free: scikit-learn's
`Pipeline(StandardScaler(), LogisticRegression(C))` with class balance in the weights
(`balanced_weights`).

    reference: one column for all that differ in their fold only ─► where these start
      └─► took long: its Newton system, cut down to each fold's rows, is the initial inverse Hessian
    L-BFGS: two-loop recursion, exact line search ─► certificate ─┬─► done, leaves the batch
                                                                  └─► Newton, one column at a time

A column ends when a float64 gradient bounds its error by `tol`; else it is marked with its bound.

What does not belong here: penalties, thresholds. Invariants: precision decides
speed, not the result; a column's result does not depend on its neighbours up to that bound; no
column ends the fits of others. Source: Liu and Nocedal (1989) for L-BFGS.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import DataError, NotEnoughDataError, NumericsError
from taprobe_core.solvers.columns import FitRequest, class_sizes
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.kernel_systems import BorderedInverse
from taprobe_core.solvers.linear.solution import (
    LinearSolution,
    agreeing_groups,
    as_rows,
    check_request,
    finish,
    group_batches,
    row_patterns,
)

MAX_COLUMNS_PER_BATCH = 240

_FACTOR_BYTES = 1 << 30
_FLOAT64_VALUES = 1 << 20
_MEMORY = 10
_SEARCH_STEPS = 2
_CHECKED_EVERY = 2
_TRUSTED = {torch.float32: 1e-4, torch.float64: 1e-11}
"""How far a gradient that products update by differences may fall before it is computed anew."""
_CURVED = 1e-6
_COLUMNS_PER_REFERENCE = 3
_REFERENCE_TOL = 0.1
_EASY_ITERATIONS = 45
_LIGHT = 1e30
_FLAT = 1e-300
_MAX_INTERCEPT_STEPS = 60
_MAX_NEWTON_STEPS = 100
_NEWTON_ENDS = 1e-13


def balanced_weights(
    y: NDArray[np.float64], train: NDArray[np.bool_], fold: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return scikit-learn's `class_weight="balanced"` on each column's training rows.

    `y` [row, column] is 0 and 1 there, `train` [fold, row], `fold` [column]; the result [row,
    column] float64 is n / (2 n_class), and 0 on other rows.
    Raises NotEnoughDataError where a column has one class only.
    """
    inside = train[fold].T
    negative, positive = class_sizes(y, inside)
    _require_two_classes(negative, positive, fold)
    count = negative + positive
    weight = np.where(y > 0.5, count / (2.0 * positive), count / (2.0 * negative))
    return np.asarray(np.where(inside, weight, 0.0))


def _require_two_classes(
    negative: NDArray[np.int64], positive: NDArray[np.int64], fold: NDArray[np.int64]
) -> None:
    bad = np.flatnonzero((negative == 0) | (positive == 0))
    if bad.size:
        raise NotEnoughDataError(
            f"{bad.size} columns have one class only among their training rows",
            f"column {bad[0]}, fold {fold[bad[0]]}, class {int(positive[bad[0]] > 0)}",
            "use more problems, or another percentile",
        )


def solve_logistic(
    matrix: FoldMatrix,
    columns: FitRequest,
    C: NDArray[np.float64],
    *,
    tol: float = 1e-6,
    max_iter: int = 400,
) -> LinearSolution:
    """Fit all columns; one that cannot be certified comes back marked, beside its bound.

    Args:
        matrix: features; its scaling decides in which space the penalty acts.
        columns: folds, labels 0 and 1, weights (class balance included).
        C: [column] float64 inverse penalty, positive.
        tol: largest relative error of the coefficients, as bounded by the float64 gradient.
        max_iter: L-BFGS iterations of a column before Newton's method takes over.

    Returns:
        Coefficients, intercepts, logits, bounds, and which columns are within `tol`.

    Raises:
        DataError: faulty columns, penalties, or labels other than 0 and 1; names the first.
        NotEnoughDataError: a column has one class only; names it.
    """
    inverse_penalty = np.asarray(C, dtype=np.float64)
    check_request(matrix, columns, inverse_penalty)
    support = columns.weight > 0
    _check_labels(columns, support)
    _, key = np.unique(
        np.column_stack([inverse_penalty, matrix.visible_sets[columns.fold]]),
        axis=0,
        return_inverse=True,
    )
    group = agreeing_groups(support, columns.y, key.reshape(-1).astype(np.float64))
    solver = _Solver(matrix, tol, max_iter)
    max_groups = max(1, _FACTOR_BYTES // (4 * matrix.n_rows**2))
    order = group_batches(group, max_groups, MAX_COLUMNS_PER_BATCH)
    parts = [solver.fit(columns.take(at), inverse_penalty[at], group[at]) for at in order]
    back = torch.as_tensor(np.argsort(np.concatenate(order)), device=matrix.device)
    w, b, z, bound, n_iter = (torch.cat(each)[back] for each in zip(*parts, strict=True))
    steps = n_iter.cpu().numpy()
    bounds = np.nan_to_num(bound.cpu().numpy(), nan=np.inf)
    return finish(matrix, columns, w, b[:, 0], steps, z + b, bounds, bounds <= tol)


def _check_labels(columns: FitRequest, support: NDArray[np.bool_]) -> None:
    other = (support & (columns.y != 0) & (columns.y != 1)).any(axis=0)
    if other.any():
        first = int(np.flatnonzero(other)[0])
        raise DataError(
            f"{int(other.sum())} columns have labels other than 0 and 1",
            f"column {first}, fold {int(columns.fold[first])}",
            "use solve_ridge for continuous targets",
        )
    positive = ((columns.y == 1) & support).sum(axis=0)
    _require_two_classes(support.sum(axis=0) - positive, positive, columns.fold)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Columns of one batch: sign and weight (column, row), penalty 1 / C (column, 1); float64."""

    fold: NDArray[np.int64]
    sign: Tensor
    weight: Tensor
    penalty: Tensor

    def take(self, at: Tensor) -> _Problem:
        fold = self.fold[at.cpu().numpy()]
        return _Problem(fold, self.sign[at], self.weight[at], self.penalty[at])

    def slopes(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivatives of the weighted losses by the logits."""
        other = torch.sigmoid(-logits * self.sign)
        first = self.weight * other
        return -first * self.sign, first * (1 - other)


@dataclass(eq=False)
class _State:
    """Where columns stand, in float64 but for g, the gradient by w.

    w, g (column, feature), b (column, 1), z = X w, r and h the derivatives at z + b (column, row).
    """

    w: Tensor
    b: Tensor
    z: Tensor
    r: Tensor
    h: Tensor
    g: Tensor

    def take(self, at: Tensor) -> _State:
        return _State(*(each[at] for each in vars(self).values()))

    def put(self, at: Tensor, other: _State) -> None:
        for name, values in vars(other).items():
            getattr(self, name)[at] = values.to(getattr(self, name))


class _Solver:
    """L-BFGS, its certificate and its successor on one matrix."""

    def __init__(self, matrix: FoldMatrix, tol: float, max_iter: int) -> None:
        self.matrix, self.tol, self.max_iter = matrix, tol, max_iter
        is_small = matrix.n_rows * max(matrix.n_features, matrix.n_rows) <= _FLOAT64_VALUES
        self.dtype = torch.float64 if is_small else torch.float32
        self.lengths = matrix.shared_lengths().sqrt()

    def fit(
        self, columns: FitRequest, C: NDArray[np.float64], group: NDArray[np.int64]
    ) -> tuple[Tensor, ...]:
        device = self.matrix.device
        sign = torch.where(as_rows(columns.y, device) > 0.5, 1.0, -1.0).double()
        penalty = torch.as_tensor(1 / C, device=device)[:, None]
        problem = _Problem(columns.fold, sign, as_rows(columns.weight, device), penalty)
        _, first, group = np.unique(group, return_index=True, return_inverse=True)
        start, precondition = self.zero(problem), None
        if len(first) * _COLUMNS_PER_REFERENCE <= len(C):
            at = torch.as_tensor(group.reshape(-1), device=device)
            reference = _reference(problem, at, first)
            state, _, n_iter = self.lbfgs(reference, self.zero(reference), None, _REFERENCE_TOL)
            if int(n_iter.max()) > _EASY_ITERATIONS:
                precondition = self.newton_system(problem, reference, state, at)
            w, b = state.w[at], state.b[at]
            z = self.matrix.forward(problem.fold, w.to(self.dtype)).double()
            start = self.at(problem, w, _best_intercept(problem, z, b), z)
        state, bound, n_iter = self.lbfgs(problem, start, precondition, self.tol)
        for column in torch.nonzero(~(bound <= self.tol))[:, 0].tolist():
            self.newton(problem, state, bound, n_iter, torch.tensor([column], device=device))
        return state.w, state.b, state.z, bound, n_iter

    def zero(self, problem: _Problem) -> _State:
        """Coefficients of 0 with the best intercept, which are the log-odds."""
        positive = (problem.weight * (problem.sign > 0)).sum(1, keepdim=True)
        b = torch.log(positive / (problem.weight.sum(1, keepdim=True) - positive))
        w = problem.penalty.new_zeros(len(b), self.matrix.n_features)
        return self.at(problem, w, b, torch.zeros_like(problem.weight))

    def at(self, problem: _Problem, w: Tensor, b: Tensor, z: Tensor) -> _State:
        """State at w, b and z, with its gradient from products in the working precision."""
        r, h = problem.slopes(z + b)
        g = self.matrix.backward(problem.fold, r.to(self.dtype))
        return _State(w, b, z, r, h, g + (w * problem.penalty).to(self.dtype))

    def certify(self, problem: _Problem, w: Tensor, b: Tensor) -> tuple[_State, Tensor]:
        """State at w in float64, and a bound on the relative error of w.

        With the intercept at its best the objective is 1/C-convex in w: ||w - w*|| <= C ||g||. A
        gradient that rounding cannot tell from 0 counts as 0.
        """
        z = self.matrix.forward(problem.fold, w)
        b = _best_intercept(problem, z, b)
        r, h = problem.slopes(z + b)
        g = self.matrix.backward(problem.fold, r) + w * problem.penalty
        size = g.norm(dim=1)
        rounding = 64 * torch.finfo(torch.float64).eps * (r.abs() * self.lengths).sum(1)
        bound = size / (problem.penalty[:, 0] * w.norm(dim=1))
        return _State(w, b, z, r, h, g), torch.where(size <= rounding, 0.0, bound)

    def lbfgs(
        self, problem: _Problem, state: _State, precondition: _NewtonSystem | None, tol: float
    ) -> tuple[_State, Tensor, Tensor]:
        """Iterate until columns are certified, or `max_iter`; returns states, bounds, iterations.

        Products in float32 only ever update margins and gradient by differences; a float64
        gradient (`certify`) takes their place once they say that a column is done or that it has
        come so far that their rounding may show.
        """
        out = _State(*(each.clone() for each in vars(state).values()))
        out.g = out.g.double()
        bounds = problem.penalty.new_full((len(state.b),), torch.inf)
        n_iter = torch.zeros(len(bounds), dtype=torch.int64, device=bounds.device)
        live = torch.arange(len(bounds), device=bounds.device)
        known = state.g.norm(dim=1)
        trusted = _TRUSTED[self.dtype]
        pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MEMORY)
        scale = torch.ones_like(state.b).to(self.dtype)
        for iteration in range(1, self.max_iter + 1):
            q = -state.g  # (column, feature)
            shares = []
            for s, y, inverse in reversed(pairs):
                shares.append(inverse * (s * q).sum(1, keepdim=True))
                q = q - shares[-1] * y
            q = scale * q if precondition is None else precondition(live, q)
            for (s, y, inverse), share in zip(pairs, reversed(shares), strict=True):
                q = q + s * (share - inverse * (y * q).sum(1, keepdim=True))
            moved = self.matrix.forward(problem.fold, q).double()  # (column, row)
            before, q64 = state.r, q.double()
            length = _search(problem, state, moved, q64)
            s64 = length * q64
            state.w, state.z = state.w + s64, state.z + length * moved
            s = s64.to(self.dtype)
            y = self.matrix.backward(problem.fold, (state.r - before).to(self.dtype))
            y = y + s * problem.penalty.to(self.dtype)
            state.g = state.g + y
            sy, yy = (s * y).sum(1, keepdim=True), (y * y).sum(1, keepdim=True)
            is_curved = sy > _CURVED * (yy * (s * s).sum(1, keepdim=True)).sqrt()
            scale = torch.where(is_curved, sy / yy, scale)
            pairs.append((s, y, torch.where(is_curved, 1 / sy, 0.0)))
            is_last = iteration == self.max_iter
            if iteration % _CHECKED_EVERY and not is_last:
                continue
            norm = state.g.norm(dim=1)
            bound = norm / (problem.penalty[:, 0] * state.w.norm(dim=1))
            is_broken = ~norm.isfinite()
            is_due = (bound <= tol) | (norm <= trusted * known) | is_broken | is_last
            if int(is_due.sum()) * 2 < len(live) or not bool(is_due.any()):
                continue
            due = torch.nonzero(is_due)[:, 0]
            exact, bound = self.certify(problem.take(due), state.w[due], state.b[due])
            state.put(due, exact)
            known[due] = exact.g.norm(dim=1).to(known)
            out.put(live[due], exact)
            bounds[live[due]], n_iter[live[due]] = bound, iteration
            done = due[(bound <= tol) | is_broken[due]]
            if is_last or len(done) == len(live):
                break
            if len(done):
                is_kept = torch.ones_like(is_due)
                is_kept[done] = False
                keep = torch.nonzero(is_kept)[:, 0]
                problem, state, live = problem.take(keep), state.take(keep), live[keep]
                known, scale = known[keep], scale[keep]
                kept = [(s[keep], y[keep], inverse[keep]) for s, y, inverse in pairs]
                pairs = deque(kept, maxlen=_MEMORY)
        return out, bounds, n_iter

    def newton_system(
        self, problem: _Problem, reference: _Problem, state: _State, group: Tensor
    ) -> _NewtonSystem | None:
        """Factorise the groups' Newton systems at their references; None where it cannot be."""
        if self.matrix.text is not None:
            return None
        patterns, pattern = row_patterns((problem.weight > 0).cpu().numpy().T)
        try:
            return _NewtonSystem(
                self.matrix, problem, reference.penalty, state.h, group, patterns, pattern,
                self.dtype,
            )  # fmt: skip
        except NumericsError:  # rounding of a weak penalty: L-BFGS does without
            return None

    def newton(
        self, problem: _Problem, state: _State, bound: Tensor, n_iter: Tensor, at: Tensor
    ) -> None:
        """Exact damped Newton for one column, kept where its bound is the better one."""
        own = problem.take(at)
        w, b, n_steps = _newton(self.matrix, own)
        exact, found = self.certify(own, w, b)
        n_iter[at] += n_steps
        if bool(found < bound[at]) or not bool(bound[at].isfinite()):
            state.put(at, exact)
            bound[at] = found


def _reference(problem: _Problem, group: Tensor, first: NDArray[np.intp]) -> _Problem:
    """One column a group, on the rows of all its columns, under the scaling of its first."""
    inside = (problem.weight > 0).double()
    total = inside.new_zeros(len(first), inside.shape[1])
    count = total.index_add(0, group, inside).clamp(min=1)
    # The sign of a row is that of any column that trains on it: they agree.
    sign = torch.where(total.index_add(0, group, problem.sign * inside) > 0, 1.0, -1.0).double()
    weight = total.index_add(0, group, problem.weight) / count
    at = torch.as_tensor(first, device=group.device)
    return _Problem(problem.fold[first], sign, weight, problem.penalty[at])


def _damping(largest: Tensor) -> Tensor:
    """The share of a Newton step whose largest change of a logit is `largest` that surely descends.

    Along a step the third derivative of a logistic loss is at most `largest` times the second, so
    the slope is still negative at log(1 + largest) / largest (Bach 2010, "Self-concordant analysis
    for logistic regression").
    """
    largest = largest.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.log1p(largest) / largest


def _best_intercept(problem: _Problem, z: Tensor, b: Tensor) -> Tensor:
    """Minimise over the intercept, (column, 1)."""
    for _ in range(_MAX_INTERCEPT_STEPS):
        first, second = problem.slopes(z + b)
        step = -first.sum(1, keepdim=True) / second.sum(1, keepdim=True).clamp(min=_FLAT)
        step = step * _damping(step.abs())
        b = b + step
        if bool((step.abs() <= 4 * torch.finfo(torch.float64).eps * (1 + b.abs())).all()):
            break
    return b


def _search(problem: _Problem, state: _State, moved: Tensor, direction: Tensor) -> Tensor:
    """Minimise along a direction and over the intercept by damped Newton steps on the margins.

    `moved` is X direction (column, row). Returns the length of the step (column, 1); intercept and
    derivatives of the state are then those behind it.
    """
    length = torch.zeros_like(state.b)
    slope = (state.w * direction).sum(1, keepdim=True) * problem.penalty
    curvature = direction.square().sum(1, keepdim=True) * problem.penalty
    curvature = curvature.clamp(min=_FLAT)
    for _ in range(_SEARCH_STEPS):
        total = state.h.sum(1, keepdim=True).clamp(min=_FLAT)
        share = state.h * moved
        mean = share.sum(1, keepdim=True) / total
        rest = state.r.sum(1, keepdim=True)
        along = (state.r * moved).sum(1, keepdim=True) + slope + length * curvature
        second = (share * (moved - mean)).sum(1, keepdim=True) + curvature
        d_length = (mean * rest - along) / second
        d_b = -rest / total - mean * d_length
        damping = _damping((d_length * moved + d_b).abs().amax(1, keepdim=True))
        length, state.b = length + damping * d_length, state.b + damping * d_b
        state.r, state.h = problem.slopes(state.z + length * moved + state.b)
    return length


class _NewtonSystem:
    """The inverse Newton system of each group's reference, cut down to the columns' rows.

    H^-1 q = C (q - X' P X q), where P inverts `K + 1 / (C h)` bordered by the intercept, K and X
    under the scaling of all rows. Rows whose curvature h adds less than the penalty are left out.
    """

    def __init__(
        self, matrix: FoldMatrix, problem: _Problem, penalty: Tensor, curvature: Tensor,
        group: Tensor, patterns: NDArray[np.bool_], pattern: NDArray[np.int64], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._shared = matrix.shared_dense(dtype)
        self._seen = matrix.seen(problem.fold)
        self._group, self._pattern = group.cpu().numpy(), pattern
        self._penalty = problem.penalty.to(dtype)
        gram = matrix.shared_gram(dtype)
        is_heavy = curvature * gram.diagonal() > penalty  # (group, row)
        ridge = (penalty / curvature.clamp(min=_FLAT)).clamp(max=_LIGHT).to(dtype)
        self._inside = (problem.weight > 0) & is_heavy[group]
        self._inverse = []
        for index, heavy in enumerate(is_heavy.cpu().numpy()):
            used = np.zeros(len(patterns), dtype=bool)
            used[pattern[self._group == index]] = True
            self._inverse.append(BorderedInverse(gram, ridge[index], patterns & heavy, used))

    def __call__(self, live: Tensor, q: Tensor) -> Tensor:
        right = (q @ self._shared.T) * self._inside[live]
        left = torch.zeros_like(right)
        at = live.cpu().numpy()
        for index in np.unique(self._group[at]):
            chosen = np.flatnonzero(self._group[at] == index)
            where = torch.as_tensor(chosen, device=q.device)
            left[where] = self._inverse[index].solve(right[where], self._pattern[at[chosen]])
        out = (q - left @ self._shared) / self._penalty[live]
        return out if self._seen is None else out * self._seen[live]


def _newton(matrix: FoldMatrix, own: _Problem) -> tuple[Tensor, Tensor, int]:
    """Fit one column from 0 by exact Newton steps in float64, dual or primal, whichever is smaller.

    With features centred by the curvature h the intercept falls out of the system. Returns w (1,
    feature), b (1, 1) and the number of steps.
    """
    inside = own.weight[0] > 0
    rows = torch.nonzero(inside)[:, 0]
    penalty = float(own.penalty)
    is_dual = len(rows) < matrix.n_features
    # The kernel (row, row), or the features (row, feature).
    X = matrix.fold_gram(int(own.fold[0]), rows) if is_dual else matrix.rows(int(own.fold[0]))[rows]
    problem = _Problem(own.fold, own.sign[:, rows], own.weight[:, rows], own.penalty)
    v = X.new_zeros(X.shape[1])
    positive = float((problem.weight * (problem.sign > 0)).sum())
    b = X.new_full((1,), np.log(positive / (float(problem.weight.sum()) - positive)))
    z = torch.zeros_like(problem.weight[0])
    n_steps = 0
    while n_steps < _MAX_NEWTON_STEPS:
        n_steps += 1
        first, second = problem.slopes((z + b)[None])
        r, h = first[0], second[0]
        total = h.sum().clamp(min=_FLAT)
        if is_dual:
            rho, mean = r + penalty * v, X @ h / total
            root = h.sqrt()
            centred = X - mean - mean[:, None] + (h @ mean) / total
            system = root[:, None] * centred * root / penalty
            system.diagonal().add_(1.0)
            factor, failed = torch.linalg.cholesky_ex(system)
            inner = torch.cholesky_solve((root * (centred @ rho))[:, None], factor)[:, 0]
            step = (root * inner / penalty - rho) / penalty
            step = step - h * (step.sum() / total)
        else:
            mean = h @ X / total
            centred = X - mean
            system = (centred * h[:, None]).T @ centred
            system.diagonal().add_(penalty)
            factor, failed = torch.linalg.cholesky_ex(system)
            gradient = X.T @ r + penalty * v - mean * r.sum()
            step = -torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        moved = X @ step
        d_b = -r.sum() / total - (h @ moved) / total
        largest = (moved + d_b).abs().max()
        damping = _damping(largest)
        if int(failed) or not bool(torch.isfinite(largest)):
            break
        v, b, z = v + damping * step, b + damping * d_b, z + damping * moved
        if float(largest) <= _NEWTON_ENDS * (1 + float((z + b).abs().max())):
            break
    if is_dual:
        alpha = torch.zeros_like(own.weight)
        alpha[0, rows] = v
        return matrix.backward(own.fold, alpha), b[None], n_steps
    return v[None], b[None], n_steps
