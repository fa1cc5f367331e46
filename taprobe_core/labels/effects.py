"""True effects behind noisy measurements, by empirical Bayes: adaptive shrinkage.

A measured effect x_i with standard error e_i is a true effect t_i and normal noise; the true
effects come from a mixture of normals around zero whose weights are found by maximum likelihood:

    t ~ sum over g of w_g N(0, s_g^2),    x_i | t_i ~ N(t_i, e_i^2),

s_0 = 0 being no effect at all. The posterior of one effect then says how likely it is to be large,
or of the sign seen. What an effect is (importance, a change) and which rows are measured belongs
in `probes.targets`. Invariant: every standard error is positive and finite; an unmeasured effect is
not a row here.

The prior is one for all rows it is fitted to, so one row's posterior depends on the others, through
at most as many numbers as there are scales.

Source: Stephens, False discovery rates: a new deal, Biostatistics 18 (2017), sections 2.2-2.3,
without the penalty on the other weights there, so that the estimate is the plain maximum; solved
as in Kim, Carbonetto, Stephens and Anitescu, Journal of Computational and Graphical Statistics 29
(2020): many steps of expectation-maximisation in one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from scipy.special import ndtr

from taprobe_core.errors import DataError, NotEnoughDataError

FloatArray = NDArray[np.float64]

SCALES = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
"""Standard deviations of the mixture's parts, for effects that are differences of two shares."""

MAX_ITER = 200
TOLERANCE = 1e-9
"""Largest gap to the best mean log-likelihood per row that counts as converged."""


@dataclass(frozen=True, eq=False)
class EffectPrior:
    """Where true effects come from.

    Attributes:
        scale: [part] float64, standard deviations, the first 0.
        weight: [part] float64, at least 0, sum 1.
        log_likelihood: [iteration] float64 of the fitted rows, before each step and at the end;
            never falls.
        gap: bound on how far the last one is below the best there is, per row.
    """

    scale: FloatArray
    weight: FloatArray
    log_likelihood: FloatArray
    gap: float

    @property
    def variance(self) -> float:
        """Variance of the true effects, sum over g of w_g s_g^2."""
        return float(self.weight @ self.scale**2)


@dataclass(frozen=True, eq=False)
class EffectPosterior:
    """Posterior of each effect: a mixture of normals, one per part of the prior.

    Attributes:
        weight: [sentence, part] float64, rows sum to 1.
        mean: [sentence, part] float64.
        sd: [sentence, part] float64; 0 in the part without effect.
    """

    weight: FloatArray
    mean: FloatArray
    sd: FloatArray

    def expected(self) -> FloatArray:
        """Return the posterior mean of each effect, [sentence]: the measurement, shrunk."""
        return np.asarray((self.weight * self.mean).sum(axis=1))

    def above(self, bound: float) -> FloatArray:
        """Return P(t > bound | data) of each effect, [sentence]."""
        return self._share(self.mean - bound)

    def below(self, bound: float) -> FloatArray:
        """Return P(t < bound | data) of each effect, [sentence]."""
        return self._share(bound - self.mean)

    def exceeds(self, threshold: float) -> FloatArray:
        """Return P(|t| > threshold | data) of each effect, [sentence], for threshold >= 0."""
        return np.asarray(self.above(threshold) + self.below(-threshold))

    def local_false_sign_rate(self) -> FloatArray:
        """Return the chance that the likelier sign of each effect is wrong, [sentence] in [0, 1].

        min(P(t >= 0 | data), P(t <= 0 | data)): the effect may also be none.
        """
        return np.asarray(1 - np.maximum(self.above(0.0), self.below(0.0)))

    def _share(self, distance: FloatArray) -> FloatArray:
        """Mass on the far side, `distance` being that of each part's mean beyond the bound."""
        is_point = self.sd == 0
        z = distance / np.where(is_point, 1.0, self.sd)
        share = np.where(is_point, distance > 0, ndtr(z))
        return np.asarray((self.weight * share).sum(axis=1))


def fit_effects(
    effect: ArrayLike,
    se: ArrayLike,
    scale: ArrayLike = SCALES,
    *,
    tolerance: float = TOLERANCE,
    max_iter: int = MAX_ITER,
) -> EffectPrior:
    """Fit the weights of the mixture by maximum likelihood.

    The likelihood is concave in the weights, so the bound that stops the iteration is exact: with
    L_ig the likelihood of row i under part g, no weights are better than these by more than
    max over g of mean over i of (L_ig / sum over h of w_h L_ih) - 1 per row.

    Args:
        effect: [sentence], measured effects, finite.
        se: [sentence], their standard errors, positive and finite.
        scale: [part], distinct standard deviations, at least 0.
        tolerance: gap per row at which to stop.
        max_iter: steps at which to stop in any case; `gap` says how near the best they came.

    Raises:
        NotEnoughDataError: no row.
        DataError: an effect is not finite, or a standard error not positive and finite.
    """
    x, e = _checked(effect, se)
    if not len(x):
        raise NotEnoughDataError(
            "no measured effect to learn a prior from",
            "effects",
            "choose another target, or rollouts whose counts are known",
        )
    scales = np.asarray(scale, dtype=np.float64)
    log_parts = _log_density(x, e, scales)
    top = log_parts.max(axis=1)
    parts = np.exp(log_parts - top[:, None])
    weight = np.full(len(scales), 1 / len(scales))
    likelihoods: list[float] = []
    while True:
        mixed = parts @ weight
        likelihoods.append(float(np.log(mixed).sum() + top.sum()))
        ratio = parts / mixed[:, None]
        slope = ratio.mean(axis=0)
        gap = float(slope.max() - 1)
        if gap <= tolerance or len(likelihoods) > max_iter:
            return EffectPrior(scales, weight, np.array(likelihoods), gap)
        weight = _step(parts, weight, ratio, slope)


def _step(
    parts: FloatArray, weight: FloatArray, ratio: FloatArray, slope: FloatArray
) -> FloatArray:
    """Go to where the second-order model of the likelihood is best, as far as that is better.

    With the penalty sum(w) - 1 the weights sum to 1 at the maximum by themselves, so the model is
    a least-squares problem over weights that are not negative.
    """
    curvature = ratio.T @ ratio / len(ratio)
    # Neighbouring scales are almost the same where errors are large.
    curvature[np.diag_indices_from(curvature)] += 1e-10 * np.trace(curvature)
    root = np.linalg.cholesky(curvature).T
    best = nnls(root, solve_triangular(root, 2 * slope - 1, trans="T"))[0]
    direction = best / best.sum() - weight
    stepped = weight * slope  # expectation-maximisation, which never makes it worse
    bar = float(np.log(parts @ stepped).mean())
    for halvings in range(20):
        tried = weight + 0.5**halvings * direction
        mixed = parts @ tried
        if mixed.min() > 0 and np.log(mixed).mean() >= bar:
            return np.asarray(tried)
    return np.asarray(stepped / stepped.sum())


def posterior(prior: EffectPrior, effect: ArrayLike, se: ArrayLike) -> EffectPosterior:
    """Return the posterior of each effect.

    Args:
        prior: from `fit_effects`, of these or other rows.
        effect: [sentence], measured effects, finite.
        se: [sentence], their standard errors, positive and finite.

    Raises:
        DataError: an effect is not finite, or a standard error not positive and finite.
    """
    x, e = _checked(effect, se)
    log_parts = _log_density(x, e, prior.scale)
    parts = prior.weight * np.exp(log_parts - log_parts.max(axis=1, keepdims=True))
    variance = prior.scale**2 / (prior.scale**2 + e[:, None] ** 2)
    return EffectPosterior(
        weight=parts / parts.sum(axis=1, keepdims=True),
        mean=variance * x[:, None],
        sd=np.sqrt(variance) * e[:, None],
    )


def _checked(effect: ArrayLike, se: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, e = np.asarray(effect, dtype=np.float64), np.asarray(se, dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(x) & np.isfinite(e) & (e > 0)))
    if bad.size:
        raise DataError(
            f"{bad.size} of {len(x)} effects have no finite value and positive standard error",
            f"row {int(bad[0])}, effect {x[bad[0]]}, standard error {e[bad[0]]}",
            "leave out what was not measured",
        )
    return x, e


def _log_density(x: FloatArray, e: FloatArray, scale: FloatArray) -> FloatArray:
    """Log of N(x_i; 0, s_g^2 + e_i^2), [sentence, part]."""
    variance = scale**2 + e[:, None] ** 2
    return np.asarray(-0.5 * (x[:, None] ** 2 / variance + np.log(2 * np.pi * variance)))
