from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import kstest, norm

from taprobe_core.errors import DataError, NotEnoughDataError
from taprobe_core.labels.effects import SCALES, EffectPrior, fit_effects, posterior

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def simulated(weight: dict[float, float], n: int, seed: int = 0) -> Arrays:
    """True effects, measurements and standard errors, errors as uneven as real ones."""
    rng = np.random.default_rng(seed)
    scale = rng.choice(list(weight), p=list(weight.values()), size=n)
    true = scale * rng.standard_normal(n)
    se = rng.uniform(0.02, 0.12, n)
    return true, true + se * rng.standard_normal(n), se


def prior_of(weight: dict[float, float]) -> EffectPrior:
    return EffectPrior(
        np.array(list(weight)), np.array(list(weight.values())), np.zeros(1), gap=0.0
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.sampled_from([1e-4, 0.03, 1.0]),
    st.sampled_from([0.0, 0.1, 5.0]),
)
def test_the_likelihood_never_falls_and_ends_at_the_maximum(
    seed: int, n: int, se: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    errors = se * rng.uniform(0.5, 2, n)
    effects = spread * rng.standard_normal(n) + errors * rng.standard_normal(n)

    prior = fit_effects(effects, errors)

    steps = np.diff(prior.log_likelihood)
    assert (steps >= -1e-9 * np.abs(prior.log_likelihood[1:])).all()
    assert prior.gap <= 1e-9
    assert prior.weight.min() >= 0
    assert prior.weight.sum() == pytest.approx(1)


def test_no_other_optimiser_finds_better_weights() -> None:
    _, effects, errors = simulated({0.0: 0.8, 0.1: 0.2}, 400)
    parts = norm.pdf(effects[:, None], 0, np.hypot(SCALES, errors[:, None]))

    def loss(weight: np.ndarray) -> float:
        return -float(np.log(parts @ weight).sum())

    start = np.full(len(SCALES), 1 / len(SCALES))
    other = minimize(
        loss,
        start,
        method="SLSQP",
        bounds=[(0, 1)] * len(SCALES),
        constraints={"type": "eq", "fun": lambda weight: weight.sum() - 1},
        options={"maxiter": 500, "ftol": 1e-12},
    )

    prior = fit_effects(effects, errors)

    assert prior.log_likelihood[-1] == pytest.approx(-loss(prior.weight), abs=1e-6)
    assert -other.fun <= prior.log_likelihood[-1] + 1e-6
    assert -other.fun == pytest.approx(prior.log_likelihood[-1], abs=0.05)


def test_a_planted_mixture_is_found_again() -> None:
    _, effects, errors = simulated({0.0: 0.7, 0.08: 0.2, 0.32: 0.1}, 20_000)

    prior = fit_effects(effects, errors)

    found = dict(zip(SCALES, prior.weight, strict=True))
    # Scales far below the errors cannot be told from no effect.
    assert sum(weight for scale, weight in found.items() if scale < 0.03) == pytest.approx(
        0.7, abs=0.05
    )
    assert found[0.04] + found[0.08] + found[0.16] == pytest.approx(0.2, abs=0.05)
    assert found[0.32] == pytest.approx(0.1, abs=0.02)
    assert prior.variance == pytest.approx(0.2 * 0.08**2 + 0.1 * 0.32**2, rel=0.1)


def test_no_effect_at_all_is_seen_as_none() -> None:
    _, effects, errors = simulated({0.0: 1.0}, 5000)

    prior = fit_effects(effects, errors)

    assert prior.variance < 1e-4
    assert posterior(prior, effects, errors).exceeds(0.1).mean() < 1e-3


def test_posterior_probabilities_come_true() -> None:
    true, effects, errors = simulated({0.0: 0.6, 0.1: 0.3, 0.4: 0.1}, 20_000, seed=1)

    after = posterior(fit_effects(effects, errors), effects, errors)

    for threshold in (0.05, 0.1, 0.3):
        probability = after.exceeds(threshold)
        came = np.abs(true) > threshold
        for low in np.arange(0, 1, 0.2):
            own = (probability >= low) & (probability < low + 0.2)
            assert own.sum() > 100
            # Five standard errors of a share, and what the estimated prior may be off.
            slack = 5 * np.sqrt(0.25 / own.sum()) + 0.01
            assert came[own].mean() == pytest.approx(probability[own].mean(), abs=slack)
    sure = after.local_false_sign_rate() < 0.05
    wrong = np.sign(true) != np.sign(after.expected())
    assert sure.sum() > 500
    assert wrong[sure].mean() == pytest.approx(after.local_false_sign_rate()[sure].mean(), abs=0.02)
    assert ((true - after.expected()) ** 2).mean() < 0.7 * ((true - effects) ** 2).mean()


def test_true_effects_fall_uniformly_into_their_posteriors() -> None:
    true, effects, errors = simulated({0.0: 0.5, 0.2: 0.5}, 20_000, seed=2)
    prior, n = fit_effects(effects, errors), 1500
    after = posterior(prior, effects[:n], errors[:n])

    below = np.array([after.below(bound)[row] for row, bound in enumerate(true[:n])])
    above = np.array([after.above(bound)[row] for row, bound in enumerate(true[:n])])

    # At the point 0 the distribution jumps; any place within the jump is as good.
    place = below + np.random.default_rng(0).random(n) * (1 - below - above)
    assert kstest(place, "uniform").pvalue > 0.01
    assert ((place > 0.025) & (place < 0.975)).mean() == pytest.approx(0.95, abs=0.015)


def test_the_posterior_of_one_normal_is_the_textbook_one() -> None:
    prior, effects, errors = prior_of({0.3: 1.0}), np.array([0.5, -0.2]), np.array([0.1, 0.3])
    shrink = 0.09 / (0.09 + errors**2)
    mean, sd = shrink * effects, np.sqrt(shrink) * errors

    after = posterior(prior, effects, errors)

    np.testing.assert_allclose(after.expected(), mean)
    np.testing.assert_allclose(after.above(0.1), norm.sf(0.1, mean, sd))
    np.testing.assert_allclose(
        after.exceeds(0.1), norm.sf(0.1, mean, sd) + norm.cdf(-0.1, mean, sd)
    )
    lesser = np.minimum(norm.cdf(0, mean, sd), norm.sf(0, mean, sd))
    np.testing.assert_allclose(after.local_false_sign_rate(), lesser)


def test_the_posterior_agrees_with_integration() -> None:
    prior, x, e = prior_of({0.0: 0.4, 0.05: 0.35, 0.3: 0.25}), 0.17, 0.08
    t = np.linspace(-3, 3, 600_001)
    density = 0.35 * norm.pdf(t, 0, 0.05) + 0.25 * norm.pdf(t, 0, 0.3)
    smooth = density * norm.pdf(x, t, e) * (t[1] - t[0])
    point = 0.4 * norm.pdf(x, 0, e)
    total = smooth.sum() + point

    after = posterior(prior, [x], [e])

    assert after.expected()[0] == pytest.approx((t * smooth).sum() / total, rel=1e-6)
    assert after.exceeds(0.1)[0] == pytest.approx(smooth[np.abs(t) > 0.1].sum() / total, rel=1e-4)
    wrong_sign = (smooth[t < 0].sum() + point) / total
    assert after.local_false_sign_rate()[0] == pytest.approx(wrong_sign, rel=1e-4)


def test_without_an_effect_no_bound_is_passed() -> None:
    after = posterior(prior_of({0.0: 1.0}), [0.5, -0.5], [0.1, 0.1])

    assert after.exceeds(0.0).tolist() == [0, 0]
    assert after.local_false_sign_rate().tolist() == [1, 1]
    assert after.expected().tolist() == [0, 0]


def test_an_effect_far_out_does_not_underflow() -> None:
    after = posterior(prior_of({0.0: 0.99, 0.005: 0.01}), [1.0], [1e-3])

    assert after.weight.sum() == pytest.approx(1)
    assert after.weight[0, 1] > 0.999
    assert np.isfinite(fit_effects([1.0, -1.0], [1e-4, 1e-4]).log_likelihood).all()


@pytest.mark.parametrize(
    ("effect", "se"), [(np.nan, 0.1), (np.inf, 0.1), (0.1, 0.0), (0.1, np.nan), (0.1, np.inf)]
)
def test_what_was_not_measured_is_refused(effect: float, se: float) -> None:
    for made in (
        lambda: fit_effects([0.1, effect], [0.1, se]),
        lambda: posterior(prior_of({0.0: 1.0}), [0.1, effect], [0.1, se]),
    ):
        with pytest.raises(DataError, match=r"1 of 2 effects .* in row 1"):
            made()


def test_a_prior_needs_a_row() -> None:
    with pytest.raises(NotEnoughDataError):
        fit_effects([], [])
