"""Random designs of every awkward kind for the logistic solver, seed by seed.

python -m tests.core.solvers.linear_designs [N]     all of the first N (1,000) beside scikit-learn
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from taprobe_core.metrics import pr_auc
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import balanced_weights, solve_logistic

STATES = ("walk", "low rank", "tokens")
KINDS = ("wide", "narrow", "doubled", "constant", "separable", "one positive", "offset", "float16")


class Compared(NamedTuple):
    """What one design came to.

    Attributes:
        kind: of `KINDS`.
        is_converged: whether all columns are certified.
        bound: the largest of theirs.
        peer_converged: folds on which scikit-learn converges.
        n_equal: of these, those whose PR-AUC over all rows is equal to six digits.
    """

    kind: str
    is_converged: bool
    bound: float
    peer_converged: int
    n_equal: int


def design(seed: int) -> tuple[str, NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
    """Return kind, features, labels and training masks [fold, row]; the seed decides everything."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    n = int(rng.integers(24, 70))
    d = int(rng.integers(n, 3 * n)) if kind == "wide" else int(rng.integers(1, n))
    X = rng.standard_normal((n, d)) * rng.lognormal(0, 1, d)
    y = (X[:, 0] / X[:, 0].std() + rng.standard_normal(n) > rng.uniform(-0.5, 1.2)).astype(float)
    if kind == "doubled":
        X = np.concatenate([X, X, -X[:, :1]], axis=1)
    elif kind == "constant":
        X[:, ::2] = rng.normal(size=X[:, ::2].shape[1])
    elif kind == "separable":
        y = (X[:, 0] > np.quantile(X[:, 0], 0.7)).astype(float)
        X[:, 0] += 5 * y * X[:, 0].std()
    elif kind == "offset":
        X = X + 1e4 * rng.choice([-1, 1], d)
    elif kind == "float16":
        X = np.cumsum(X, axis=0).astype(np.float16).astype(np.float64)
    train = rng.random((3, n)) < 0.8
    if kind == "one positive":
        y[:] = 0
        y[rng.integers(n)] = 1
    if seed % 29 == 0:  # one row a class
        rows = rng.permutation(n)[:2]
        y[rows] = 0, 1
        train[:] = np.isin(np.arange(n), rows)
    for value in (0, 1):
        if not (y == value).any():
            y[value] = value
        train[:, np.flatnonzero(y == value)[0]] = True
    return kind, X.astype(np.float32), y, train


def compared(seed: int, tol: float = 1e-7) -> Compared:
    """Fit one design on three folds by ours and scikit-learn, in one batch and one by one."""
    kind, X, y, train = design(seed)
    C = float(np.random.default_rng(seed).choice([0.01, 0.1, 1.0, 1.0, 10.0, 100.0]))
    fold = np.arange(len(train))
    labels = np.repeat(y[:, None], len(fold), axis=1)
    columns = FitRequest(fold, labels, balanced_weights(labels, train, fold))
    found = solve_logistic(FoldMatrix(train, X), columns, np.full(len(fold), C), tol=tol)
    n_converged = n_equal = 0
    for index, rows in enumerate(train):
        values = StandardScaler().fit(X[rows].astype(np.float64)).transform(X.astype(np.float64))
        peer = LogisticRegression(C=C, tol=1e-8, max_iter=20_000, class_weight="balanced")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            peer.fit(values[rows], y[rows])
        if any(issubclass(each.category, ConvergenceWarning) for each in caught):
            continue
        n_converged += 1
        scores = (found.decision[:, index], peer.decision_function(values))
        # Equal rows tie in one and differ by rounding in the other: five decimals tell apart.
        ours, theirs = (pr_auc(y, np.round(each, 5)) for each in scores)
        n_equal += round(ours, 6) == round(theirs, 6)
    return Compared(
        kind, bool(found.is_converged.all()), float(found.bound.max()), n_converged, n_equal
    )


def stand_in_states(problem: NDArray[np.int64], d_model: int, seed: int) -> NDArray[np.float32]:
    """Draw states of the rows of problems.

    Args:
        problem: [row], rows of a problem together.
        d_model: width.
        seed: decides everything, the kind too.

    Returns:
        [row, d_model] float32, each a float16 number.
    """
    rng = np.random.default_rng(seed)
    kind, n = STATES[seed % len(STATES)], len(problem)
    offset = rng.standard_normal(d_model) * rng.choice([0.0, 1.0, 30.0])
    if kind == "walk":  # sentences that resemble the one before
        states = rng.standard_normal((n, d_model)) * rng.choice([0.02, 0.2])
        for each in np.unique(problem):
            states[problem == each] = np.cumsum(states[problem == each], axis=0)
    elif kind == "low rank":
        rank = int(rng.integers(4, 40))
        states = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d_model))
        states += rng.standard_normal((n, d_model)) * rng.choice([1e-3, 1e-2, 1e-1])
    else:  # means over a small vocabulary, of very different numbers of tokens
        counts = rng.poisson(rng.lognormal(-2, 1.5, 300), (n, 300)) + np.eye(n, 300)
        states = (counts / counts.sum(1, keepdims=True)) @ rng.standard_normal((300, d_model))
    return (states + offset).astype(np.float16).astype(np.float32)


def problems(seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw eight problems of unequal length with heavy-tailed values: problem and value, [row]."""
    rng = np.random.default_rng(1000 + seed)
    problem = np.repeat(np.arange(8), rng.integers(30, 120, 8))
    return problem, rng.standard_t(3, len(problem))


def anchor_columns(
    problem: NDArray[np.int64], value: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], FitRequest]:
    """Return masks that leave one problem out, and anchors at three percentiles on each fold."""
    every = np.unique(problem)
    train = np.stack([problem != each for each in every])
    labels = np.zeros((len(value), 3))
    for each in every:
        rows = problem == each
        labels[rows] = value[rows, None] >= np.percentile(value[rows], (90, 85, 80))
    fold = np.repeat(np.arange(len(every)), 3)
    y = np.tile(labels, len(every))
    return train, FitRequest(fold, y, balanced_weights(y, train, fold))


def main() -> None:
    """Print one line a kind, and every design that disagrees."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    start = time.process_time()
    every = [compared(seed) for seed in range(n)]
    for seed, each in enumerate(every):
        if not each.is_converged or each.n_equal < each.peer_converged:
            print(f"seed {seed}: {each}")
    for kind in KINDS:
        own = [each for each in every if each.kind == kind]
        print(
            f"{kind:14} {len(own):4} designs, {sum(each.is_converged for each in own)} certified, "
            f"PR-AUC equal on {sum(each.n_equal for each in own)} of "
            f"{sum(each.peer_converged for each in own)} folds"
        )
    print(f"{time.process_time() - start:.1f} CPU s")


if __name__ == "__main__":
    main()
