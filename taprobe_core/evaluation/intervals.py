"""Paired differences over problems to intervals and tests, and corrections for many tests.

The problem is the unit of inference: sentences of one trace share rollouts and are not independent,
so the inputs are one difference per problem, seeds already averaged. Corrections are Holm's for the
few contrasts that were planned, max-T for the best of many configurations on the same problems, and
Benjamini-Hochberg's for exploring. What does not belong here: metrics, and which two recipes to
compare (`contrasts`, `selection`).

Invariants: no interval without enough problems to resample, and none without width; a note then
says why there is none. NaN stays NaN and does not count as a test; an adjusted p is never below the
raw one.

Source: bootstrap, Efron and Tibshirani (1993), sections 13.3 (percentile) and 14.3 (BCa);
sign-flip test, Fisher (1935), exact over all sign patterns up to 30 problems; Wilcoxon (1945).
"""

from __future__ import annotations

from functools import lru_cache
from math import comb, sqrt
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from taprobe_core.study.evaluation import Correction, Evaluation, Interval

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
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")[: np.isfinite(values).sum()]  # NaN stands last
    out = np.full(values.shape, np.nan)
    scaled = values[order] * np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return out


def benjamini_hochberg(p: ArrayLike) -> Doubles:
    """Adjust by Benjamini and Hochberg (1995); SciPy's, where p [test] is not NaN."""
    adjusted = np.array(p, dtype=np.float64)
    is_test = ~np.isnan(adjusted)
    if is_test.any():
        adjusted[is_test] = stats.false_discovery_control(adjusted[is_test])
    return adjusted


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


MIN_PROBLEMS = 6
"""Fewer problems give no interval: five have 126 distinct resamples, three have ten."""

_LEVELS = (0.025, 0.975)
_EXACT_UP_TO = 30
_N_RANDOM_FLIPS = 20_000
_COMPARISON_ROUNDING = 1e-12


class Comparison(NamedTuple):
    """What paired differences say; None where they say nothing.

    Attributes:
        n_problems: problems where both sides are defined.
        n_better: problems with a difference above zero.
        delta: mean difference.
        delta_low: lower end of the 95 % bootstrap interval.
        delta_high: upper end of the 95 % bootstrap interval.
        t_low: lower end of the 95 % interval of Student's t on n - 1 degrees of freedom.
        t_high: upper end of it.
        p_sign_flip: two-sided; the smallest value n problems can reach is 2 / 2^n.
        p_wilcoxon: two-sided signed-rank test, as a check; 1 if every difference is zero.
        interval_note: why there is no interval, or None.
    """

    n_problems: int
    n_better: int
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    t_low: float | None
    t_high: float | None
    p_sign_flip: float | None
    p_wilcoxon: float | None
    interval_note: str | None


def no_comparison(note: str) -> Comparison:
    """Return a comparison that says nothing but why."""
    return Comparison(0, 0, None, None, None, None, None, None, None, note)


def compare(
    differences: Doubles, n_bootstrap: int, seed: int, interval: Interval = "bca"
) -> Comparison:
    """Summarise paired differences.

    Args:
        differences: metric of one recipe minus the other's, [problem], finite.
        n_bootstrap: resamples of problems; 0 asks for no interval.
        seed: of the resamples, and of the sign flips above 30 problems.
        interval: `bca` corrects the percentiles for bias and skewness, `percentile` does not.

    Returns:
        Mean, 95 % intervals over problems, tests.
    """
    n = differences.size
    if n == 0:
        return no_comparison("no problem where both are defined")
    low, high, note = _interval(differences, n_bootstrap, seed, interval)
    t_low, t_high = t_interval(differences)
    return Comparison(
        n_problems=n,
        n_better=int((differences > 0).sum()),
        delta=float(differences.mean()),
        delta_low=low,
        delta_high=high,
        t_low=t_low,
        t_high=t_high,
        p_sign_flip=sign_flip_p(differences, seed),
        p_wilcoxon=wilcoxon_p(differences),
        interval_note=note,
    )


def compare_values(
    values: pl.DataFrame, baseline_values: pl.DataFrame, evaluation: Evaluation
) -> Comparison:
    """Compare two recipes on the problems where both are defined.

    Args:
        values: problem_id, value.
        baseline_values: problem_id, value.
        evaluation: bootstrap settings.

    Returns:
        The comparison of `values` minus `baseline_values`.
    """
    paired = values.join(
        baseline_values, on="problem_id", suffix="_baseline", maintain_order="left"
    ).drop_nulls(["value", "value_baseline"])
    differences = paired.select(pl.col("value") - pl.col("value_baseline")).to_series()
    return compare(
        differences.to_numpy(),
        evaluation.n_bootstrap,
        evaluation.bootstrap_seed,
        evaluation.interval,
    )


def bootstrap_interval(
    differences: Doubles, n_bootstrap: int, seed: int, interval: Interval
) -> tuple[float, float]:
    """Resample problems for the 95 % interval of their mean.

    BCa takes the quantiles at Phi(z0 + (z0 + z) / (1 - a (z0 + z))) for z = -1.96 and 1.96, with
    z0 the normal quantile of the share of resampled means below the mean (ties count half) and
    a = sum(d^3) / (6 sum(d^2)^1.5) of the centred differences d, the jackknife's acceleration.

    Args:
        differences: [problem], finite, not all equal.
        n_bootstrap: resamples, at least 1.
        seed: of the resamples.
        interval: `bca` or `percentile`.

    Returns:
        Lower and upper end.

    Source:
        Efron and Tibshirani (1993), equations 14.9, 14.14 and 14.15.
    """
    means = _resample_counts(differences.size, n_bootstrap, seed) @ differences / differences.size
    levels = np.array(_LEVELS)
    if interval == "bca":
        mean, centred = differences.mean(), differences - differences.mean()
        # Sums in another order differ in the last bits; that is a tie, not a rank.
        slack = _COMPARISON_ROUNDING * max(1.0, float(np.abs(differences).max()))
        below = ((means < mean - slack).mean() + (means <= mean + slack).mean()) / 2
        z0 = stats.norm.ppf(np.clip(below, 0.5 / n_bootstrap, 1 - 0.5 / n_bootstrap))
        acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
        z = z0 + stats.norm.ppf(levels)
        levels = stats.norm.cdf(z0 + z / (1 - acceleration * z))
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def t_interval(differences: Doubles) -> tuple[float | None, float | None]:
    """Return the 95 % interval of Student's t on n - 1 degrees of freedom.

    Args:
        differences: [problem], finite.

    Returns:
        Lower and upper end; None below `MIN_PROBLEMS` or if all differences are equal.
    """
    n = differences.size
    if n < MIN_PROBLEMS or np.ptp(differences) == 0:
        return None, None
    half = stats.t.ppf(_LEVELS[1], n - 1) * differences.std(ddof=1) / sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def sign_flip_p(differences: Doubles, seed: int = 0) -> float:
    """Test that differences are symmetric about zero.

    p is the share of sign patterns whose absolute sum is at least the observed one: over all 2^n
    patterns up to 30 problems, over 20,000 seeded random ones (plus the observed) above. All
    patterns are counted without listing them: the sums of the two halves are sorted, and each sum
    of one half finds by bisection how many of the other complete it.

    Args:
        differences: [problem], finite, at least one.
        seed: of the random patterns.

    Returns:
        p in (0, 1].
    """
    observed = abs(differences.sum()) - _COMPARISON_ROUNDING
    if differences.size <= _EXACT_UP_TO:
        half = differences.size // 2
        first, second = _signed_sums(differences[:half]), np.sort(_signed_sums(differences[half:]))
        below = np.searchsorted(second, -observed - first, side="right")
        above = second.size - np.searchsorted(second, observed - first, side="left")
        # A threshold of zero or less is reached by every pattern, once.
        n_extreme = (below + above).sum() if observed > 0 else first.size * second.size
        return float(n_extreme / (first.size * second.size))
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(_N_RANDOM_FLIPS, differences.size))
    n_extreme = int((np.abs(signs @ differences) >= observed).sum())
    return (1 + n_extreme) / (1 + _N_RANDOM_FLIPS)


def wilcoxon_p(differences: Doubles) -> float:
    """Test by signed ranks that differences are symmetric about zero.

    Args:
        differences: [problem], finite.

    Returns:
        Two-sided p of `scipy.stats.wilcoxon`, zeros left out: exact up to 50 differences without
        ties, else normal; 1 if every difference is zero.
    """
    moved = differences[differences != 0]
    if not moved.size:
        return 1.0
    has_ties = len(np.unique(np.abs(moved))) < moved.size
    method = "asymptotic" if has_ties or moved.size > 50 else "exact"
    return float(stats.wilcoxon(moved, method=method).pvalue)


def _interval(
    differences: Doubles, n_bootstrap: int, seed: int, interval: Interval
) -> tuple[float | None, float | None, str | None]:
    n = differences.size
    if n < MIN_PROBLEMS:
        distinct = comb(2 * n - 1, n)
        return None, None, f"{n} problems have only {distinct} distinct resamples"
    if n_bootstrap == 0:
        return None, None, "no interval asked for (n_bootstrap is 0)"
    equal = f"all {n} differences are equal, so resampling cannot tell their spread"
    if np.ptp(differences) == 0:
        return None, None, equal
    low, high = bootstrap_interval(differences, n_bootstrap, seed, interval)
    return (low, high, None) if low < high else (None, None, equal.replace("all", "nearly all"))


@lru_cache(maxsize=8)
def _resample_counts(n: int, n_bootstrap: int, seed: int) -> Doubles:
    """How often each problem is drawn, [resample, problem]: the same for every comparison."""
    drawn = np.random.default_rng(seed).integers(0, n, size=(n_bootstrap, n))
    drawn += n * np.arange(n_bootstrap)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n_bootstrap * n)
    return counts.reshape(n_bootstrap, n).astype(np.float64)


def _signed_sums(values: Doubles) -> Doubles:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
