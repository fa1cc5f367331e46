"""Platt scaling against scikit-learn's one-column fit and against a numerical minimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.calibration import _sigmoid_calibration
from sklearn.metrics import log_loss

from taprobe_core.errors import NumericsError
from taprobe_core.solvers.tokens import platt
from taprobe_core.solvers.tokens.platt import calibrate, probabilities


def drawn(n, m, seed=0, slope=1.5, offset=-1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, m)) * np.geomspace(0.01, 100, m)
    scaled = logits / np.geomspace(0.01, 100, m)
    return logits, (rng.random((n, m)) < expit(slope * scaled + offset)).astype(float)


def test_each_column_equals_the_one_column_fit_of_scikit_learn():
    logits, y = drawn(300, 8)
    is_used = np.random.default_rng(1).random((300, 8)) < 0.6
    found = calibrate(logits, y, is_used)
    assert found.is_fitted.all()
    ours = probabilities(logits, found.coefficients)
    for at, used in enumerate(is_used.T):
        a, b = _sigmoid_calibration(logits[used, at], y[used, at])
        np.testing.assert_allclose(ours[:, at], expit(-(a * logits[:, at] + b)), atol=2e-4)


def test_the_smoothed_loss_is_at_its_minimum():
    logits, y = drawn(60, 3, seed=2)
    found = calibrate(logits, y, np.ones((60, 3), dtype=bool)).coefficients
    for at in range(3):
        positives = y[:, at].sum()
        target = np.where(y[:, at] > 0.5, (positives + 1) / (positives + 2),
                          1 / (60 - positives + 2))  # fmt: skip

        def loss(ab, at=at, target=target):
            f = ab[0] * logits[:, at] / logits[:, at].std() + ab[1]
            return (np.logaddexp(0, f) - target * f).sum()

        best = minimize(loss, [1.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
        expected = [best[0] / logits[:, at].std(), best[1]]
        np.testing.assert_allclose(found[at], expected, rtol=1e-5)


def test_calibration_lowers_the_log_loss_of_overconfident_logits():
    logits, y = drawn(500, 1, seed=3)
    logits = 6 * logits / logits.std()
    found = calibrate(logits[:250], y[:250], np.ones((250, 1), dtype=bool))
    before = log_loss(y[250:, 0], expit(logits[250:, 0]))
    after = log_loss(y[250:, 0], probabilities(logits, found.coefficients)[250:, 0])
    assert after < before - 0.2


def test_separable_classes_get_a_finite_slope():
    logits = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    found = calibrate(logits, (logits > 0).astype(float), np.ones((4, 1), dtype=bool))
    assert found.is_fitted.all()
    p = probabilities(logits, found.coefficients)[:, 0]
    assert 0.1 < p[0] < p[1] < 0.5 < p[2] < p[3] < 0.9


def test_what_cannot_be_calibrated_keeps_the_identity_and_says_so():
    rng = np.random.default_rng(4)
    good = rng.normal(size=40)
    y = (good + rng.normal(size=40) > 0).astype(float)
    logits = np.stack([good, good, -good, np.full(40, 3.7), good, good], axis=1)
    labels = np.stack([y, np.ones(40), y, y, np.zeros(40), y], axis=1)
    is_used = np.ones((40, 6), dtype=bool)
    is_used[:, 5] = False
    found = calibrate(logits, labels, is_used)
    assert found.is_fitted.tolist() == [True, False, False, False, False, False]
    assert (found.coefficients[1:] == [1.0, 0.0]).all()


def test_columns_do_not_touch_each_other_and_unused_rows_do_not_count():
    logits, y = drawn(80, 4, seed=5)
    is_used = np.random.default_rng(6).random((80, 4)) < 0.5
    together = calibrate(logits, y, is_used).coefficients
    junk = np.where(is_used, logits, 1e12)
    for at in range(4):
        one = [each[:, at : at + 1] for each in (junk, y, is_used)]
        np.testing.assert_allclose(calibrate(*one).coefficients[0], together[at], rtol=1e-9)


def test_no_column_is_no_calibration():
    found = calibrate(np.empty((5, 0)), np.empty((5, 0)), np.empty((5, 0), dtype=bool))
    assert found.coefficients.shape == (0, 2)


def test_running_out_of_steps_is_said(monkeypatch):
    monkeypatch.setattr(platt, "MAX_STEPS", 1)
    logits, y = drawn(50, 2)
    with pytest.raises(NumericsError, match="column 0"):
        calibrate(logits, y, np.ones((50, 2), dtype=bool))


@pytest.mark.parametrize("seed", range(5))
def test_extreme_logits_converge(seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_cauchy(size=(30, 200)) * 1e4
    y = (rng.random((30, 200)) < 0.3).astype(float)
    found = calibrate(logits, y, np.ones((30, 200), dtype=bool))
    assert np.isfinite(found.coefficients).all()
    assert 0.1 < found.is_fitted.mean() < 0.9
