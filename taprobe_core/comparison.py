"""Paired differences over problems to an interval and a test.

The problem is the unit of inference: sentences of one trace share rollouts and are not independent,
so the inputs are one difference per problem, seeds already averaged. What does not belong here:
metrics, and which two recipes to compare (`evaluation`, `selection`).

Invariant: no interval without enough problems to resample; a note then says why there is none.

Source: percentile bootstrap, Efron and Tibshirani (1993), section 13.3; sign-flip test, Fisher
(1935), exact over all sign patterns up to 20 problems.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_PROBLEMS = 6
"""Fewer problems give no interval: five have 126 distinct resamples, three have ten."""

_EXACT_UP_TO = 20
_N_RANDOM_FLIPS = 20_000
_ROUNDING = 1e-12


class Comparison(NamedTuple):
    """What paired differences say; None where they say nothing.

    Attributes:
        n_problems: problems where both sides are defined.
        n_better: problems with a difference above zero.
        delta: mean difference.
        delta_low: lower end of the 95 % interval.
        delta_high: upper end of the 95 % interval.
        p_sign_flip: two-sided; the smallest value n problems can reach is 2 / 2^n.
        interval_note: why there is no interval, or None.
    """

    n_problems: int
    n_better: int
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    p_sign_flip: float | None
    interval_note: str | None


def compare(differences: NDArray[np.float64], n_bootstrap: int, seed: int) -> Comparison:
    """Summarise paired differences.

    Args:
        differences: metric of one recipe minus the other's, [problem], finite.
        n_bootstrap: resamples of problems; 0 asks for no interval.
        seed: of the resamples, and of the sign flips above 20 problems.

    Returns:
        Mean, 95 % percentile bootstrap interval over problems, sign-flip p.
    """
    n = differences.size
    if n == 0:
        nothing = "no problem where both are defined"
        return Comparison(0, 0, None, None, None, None, nothing)
    low, high, note = _interval(differences, n_bootstrap, seed)
    better = int((differences > 0).sum())
    p = sign_flip_p(differences, seed)
    return Comparison(n, better, float(differences.mean()), low, high, p, note)


def sign_flip_p(differences: NDArray[np.float64], seed: int = 0) -> float:
    """Test that differences are symmetric about zero.

    p is the share of sign patterns whose absolute sum is at least the observed one: over all 2^n
    patterns up to 20 problems, over 20,000 seeded random ones (plus the observed) above.

    Args:
        differences: [problem], finite, at least one.
        seed: of the random patterns.

    Returns:
        p in (0, 1].
    """
    observed = abs(differences.sum()) - _ROUNDING
    if differences.size <= _EXACT_UP_TO:
        # The first sign may stay fixed: a pattern and its mirror have the same absolute sum.
        sums = differences[:1]
        for difference in differences[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
        return float((np.abs(sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(_N_RANDOM_FLIPS, differences.size))
    n_extreme = int((np.abs(signs @ differences) >= observed).sum())
    return (1 + n_extreme) / (1 + _N_RANDOM_FLIPS)


def _interval(
    differences: NDArray[np.float64], n_bootstrap: int, seed: int
) -> tuple[float | None, float | None, str | None]:
    n = differences.size
    if n < MIN_PROBLEMS:
        distinct = comb(2 * n - 1, n)
        return None, None, f"{n} problems have only {distinct} distinct resamples"
    if n_bootstrap == 0:
        return None, None, "no interval asked for (n_bootstrap is 0)"
    drawn = np.random.default_rng(seed).integers(0, n, size=(n_bootstrap, n))
    low, high = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high), None
