"""Many tests to p-values that account for one another.

Holm for the few contrasts that were planned, max-T for the best of many configurations on the same
problems, Benjamini-Hochberg for exploring. What does not belong here: the tests themselves
(`comparison`, `nulls`).

Invariant: NaN stays NaN and does not count as a test; an adjusted p is never below the raw one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taprobe_core.study.evaluation import Correction

Doubles = NDArray[np.float64]

_ROUNDING = 1e-6
"""Draws are kept in single precision; one that equals the observed value must count."""


def adjust(p: ArrayLike, correction: Correction) -> Doubles:
    """Adjust p-values by the named correction; `none` returns them as they are.

    Args:
        p: [test], in [0, 1] or NaN.
        correction: `holm`, `benjamini_hochberg` or `none`.

    Returns:
        [test] float64.
    """
    if correction == "none":
        return np.asarray(p, dtype=np.float64)
    return holm(p) if correction == "holm" else benjamini_hochberg(p)


def holm(p: ArrayLike) -> Doubles:
    """Adjust so that the chance of any false rejection stays below the level.

    The i-th smallest of m values is multiplied by m - i + 1; adjusted values never fall along the
    order, and stop at 1.

    Args:
        p: [test], in [0, 1] or NaN.

    Returns:
        [test] float64.

    Source:
        Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    ranked, order, out = _ranked(p)
    out[order] = np.minimum(np.maximum.accumulate(ranked * np.arange(len(ranked), 0, -1)), 1.0)
    return out


def benjamini_hochberg(p: ArrayLike) -> Doubles:
    """Adjust so that the expected share of false rejections stays below the level.

    The i-th smallest of m values is multiplied by m / i; adjusted values never fall along the
    order. Valid for tests that are independent or positively dependent.

    Args:
        p: [test], in [0, 1] or NaN.

    Returns:
        [test] float64.

    Source:
        Benjamini and Hochberg (1995), Controlling the false discovery rate.
    """
    ranked, order, out = _ranked(p)
    scaled = ranked * len(ranked) / np.arange(1, len(ranked) + 1)
    out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def max_t(observed: ArrayLike, draws: NDArray[np.floating]) -> Doubles:
    """Test each configuration against the best of all configurations under relabelling.

    Statistics are (value - mean of its draws) / standard deviation of its draws, so that metrics
    and base rates may differ. p = (1 + #{b: max over configurations of draw b >= observed}) /
    (1 + B): the chance that the best of as many tries stands so high.

    Args:
        observed: [configuration], NaN where undefined.
        draws: [configuration, draw]; draw b relabels alike in every configuration.

    Returns:
        [configuration] float64; NaN where undefined, or where the draws do not vary.

    Source:
        Westfall and Young (1993), single-step max-T.
    """
    value = np.asarray(observed, dtype=np.float64)
    out = np.full(value.shape, np.nan)
    spread = draws.std(axis=1) if draws.size else np.zeros(len(value))
    counts = np.isfinite(value) & np.isfinite(spread) & (spread > 0)
    if not counts.any():
        return out
    centre = draws[counts].mean(axis=1)
    statistic = (value[counts] - centre) / spread[counts]
    best = ((draws[counts] - centre[:, None]) / spread[counts][:, None]).max(axis=0)
    n_above = best.size - np.searchsorted(np.sort(best), statistic - _ROUNDING, side="left")
    out[counts] = (1 + n_above) / (1 + best.size)
    return out


def _ranked(p: ArrayLike) -> tuple[Doubles, NDArray[np.int64], Doubles]:
    """Return the defined values in rising order, where they stand, and a NaN for every test."""
    values = np.asarray(p, dtype=np.float64)
    defined = np.flatnonzero(~np.isnan(values))
    order = defined[np.argsort(values[defined], kind="stable")]
    return values[order], order, np.full(values.shape, np.nan)
