"""Synthetic features and labels with the shape of sentence activations, for the probe benchmarks.

Two kinds. "iid": standard normal features. "ill": eigenvalues of the covariance fall as 1/rank in
a rotated basis, two dimensions are massive (a hundred times the rest, off centre) as in the
residual streams of language models, and every problem has an offset of its own. Importance is a
sparse-ish linear signal plus noise; anchors are the sentences of a problem at or above a percentile
of its value. What does not belong here: timing. Invariant: the seed decides everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.fft
from numpy.typing import NDArray

Kind = Literal["iid", "ill"]


@dataclass(frozen=True, eq=False)
class SyntheticProbeData:
    """Rows sorted by problem.

    Attributes:
        features: [row, feature] float32.
        problem: [row] int64, ascending from 0.
        importance: [row] float64, signed.
    """

    features: NDArray[np.float32]
    problem: NDArray[np.int64]
    importance: NDArray[np.float64]

    def anchors(self, percentile: float) -> NDArray[np.float64]:
        """Return 1 for sentences at or above `percentile` of importance in their problem."""
        found = np.zeros(len(self.importance))
        for problem in np.unique(self.problem):
            rows = self.problem == problem
            value = self.importance[rows]
            found[rows] = value >= np.percentile(value, percentile)
        return found

    def lopo_train(self, n_folds: int, n_val: int = 3) -> NDArray[np.bool_]:
        """Return training masks [fold, row]: one test problem, then the first `n_val` others out.

        Folds are spread evenly over the problems when there are fewer folds than problems.
        """
        problems = np.unique(self.problem)
        tests = problems[np.linspace(0, len(problems) - 1, n_folds).round().astype(int)]
        masks = []
        for test in tests:
            val = problems[problems != test][:n_val]
            masks.append(~np.isin(self.problem, [test, *val]))
        return np.stack(masks)

    def test_rows(self, n_folds: int) -> list[NDArray[np.intp]]:
        """Return the rows of each fold's test problem, in the order of `lopo_train`."""
        problems = np.unique(self.problem)
        tests = problems[np.linspace(0, len(problems) - 1, n_folds).round().astype(int)]
        return [np.flatnonzero(self.problem == test) for test in tests]


def make_probe_data(
    kind: Kind, n_rows: int, n_features: int, n_problems: int = 20, seed: int = 0
) -> SyntheticProbeData:
    """Draw features, problems of unequal size and importance.

    Args:
        kind: "iid" or "ill".
        n_rows: sentences.
        n_features: width of the activations.
        n_problems: problems; the largest has about four times the sentences of the smallest.
        seed: decides everything.
    """
    rng = np.random.default_rng(seed)
    shares = np.geomspace(1, 4, n_problems)
    edges = np.round(np.cumsum(shares) / shares.sum() * n_rows).astype(int)
    problem = np.searchsorted(edges, np.arange(n_rows), side="right").astype(np.int64)
    problem = rng.permutation(n_problems)[problem]
    problem.sort()
    latent = rng.standard_normal((n_rows, n_features), dtype=np.float32)
    signal_width = min(n_features, 64)
    weight = np.zeros(n_features, dtype=np.float32)
    weight[rng.choice(signal_width, signal_width, replace=False)] = rng.standard_normal(
        signal_width
    ) / np.sqrt(signal_width)
    share = 0.9 if kind == "ill" else 0.7
    noise = rng.standard_normal(n_rows)
    importance = share * (latent @ weight).astype(np.float64) + np.sqrt(1 - share**2) * noise
    if kind == "iid":
        return SyntheticProbeData(latent, problem, importance)
    features = latent * np.arange(1, n_features + 1, dtype=np.float32) ** -0.5
    features = _rotate(features, rng)
    scale = features.std()
    features += (
        0.5 * scale * rng.standard_normal((n_problems, n_features), dtype=np.float32)[problem]
    )
    massive = rng.choice(n_features, 2, replace=False)
    features[:, massive] = features[:, massive] * 100 + np.float32(500 * scale)
    return SyntheticProbeData(features, problem, importance)


def _rotate(features: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Apply a random rotation in O(d log d): two rounds of random signs and a cosine transform."""
    for _ in range(2):
        signs = rng.choice(np.array([-1, 1], dtype=np.float32), features.shape[1])
        features = scipy.fft.dct(features * signs, norm="ortho", axis=1)
    return np.ascontiguousarray(features, dtype=np.float32)
