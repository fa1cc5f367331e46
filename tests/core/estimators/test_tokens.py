"""scikit-learn wrappers of the token probes, and its own checks where they apply.

scikit-learn's checks hand over [sentence, feature] arrays, read as sentences of one token. Not
applicable, for both estimators: equivalence of weights and repetitions, because a share of the
sentences is held out at random. Checks that hand over token sets do not exist; the tests below
stand in for them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import GroupKFold, cross_val_predict, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from taprobe_core.errors import ConfigError, NonFiniteError
from taprobe_core.estimators.tokens import TokenProbeClassifier, TokenProbeRegressor
from taprobe_core.solvers.tokens.ragged import RaggedTokens

QUICK = {"width": 16, "max_epochs": 30, "learning_rate": 0.03, "random_state": 0}


def not_applicable(estimator):
    why = "sentences are held out at random, so that a weight of 2 is not a repetition"
    return {"check_sample_weight_equivalence_on_dense_data": why}


@parametrize_with_checks(
    [TokenProbeClassifier(**QUICK), TokenProbeRegressor(**QUICK)],
    expected_failed_checks=not_applicable,
    xfail_strict=True,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def sentences(n=160, d=5, seed=0):
    rng = np.random.default_rng(seed)
    X = [rng.normal(size=(length, d)).astype(np.float32) for length in rng.integers(1, 20, n)]
    y = rng.random(n) < 0.4
    for at in np.flatnonzero(y):
        X[at][rng.integers(len(X[at])), 1] += 6.0
    return X, np.where(y, "anchor", "other")


@pytest.mark.parametrize("pooling", ["attention", "multimax", "rolling_multimax"])
def test_token_sets_are_fitted_scored_and_cloned(pooling):
    X, y = sentences()
    probe = TokenProbeClassifier(pooling=pooling, window=4, **QUICK).fit(X[:120], y[:120])
    assert probe.classes_.tolist() == ["anchor", "other"]
    p = probe.predict_proba(X[120:])
    np.testing.assert_allclose(p.sum(axis=1), 1.0)
    assert average_precision_score(y[120:] == "other", p[:, 1]) > 0.95
    assert (probe.predict(X[120:]) == probe.classes_[p.argmax(axis=1)]).all()
    assert probe.is_calibrated_
    assert probe.n_iter_ >= probe.best_epoch_
    again = clone(probe).fit(X[:120], y[:120])
    assert (again.predict_proba(X[120:]) == p).all()
    assert again.get_params() == probe.get_params()


def test_every_form_of_token_sets_gives_the_same():
    X, y = sentences(40)
    X = [np.resize(each, (6, 5)) for each in X]
    forms = [X, np.stack(X), [torch.from_numpy(each) for each in X], RaggedTokens.from_sentences(X)]
    found = [TokenProbeClassifier(**QUICK).fit(form, y).decision_function(form) for form in forms]
    for each in found[1:]:
        assert (each == found[0]).all()


def test_groups_are_held_out_whole():
    X, y = sentences()
    groups = np.arange(160) // 16
    probe = TokenProbeClassifier(validation_fraction=0.3, **QUICK).fit(X, y, groups=groups)
    by_group = probe.is_held_out_.reshape(10, 16)
    assert (by_group.all(axis=1) | ~by_group.any(axis=1)).all()
    assert by_group.any(axis=1).sum() == 3


def test_cross_validation_over_lists_of_arrays_works():
    X, y = sentences(90)
    probe = TokenProbeClassifier(pooling="multimax", **QUICK)
    groups = np.arange(90) // 10
    p = cross_val_predict(probe, X, y, groups=groups, cv=GroupKFold(3), method="predict_proba")
    assert log_loss(y, p) < 0.4
    assert cross_val_score(probe, X, y, cv=3).mean() > 0.8


def test_nothing_held_out_trains_on_everything_uncalibrated():
    X, y = sentences(60)
    probe = TokenProbeClassifier(validation_fraction=0, **QUICK).fit(X, y)
    assert not probe.is_held_out_.any()
    assert not probe.is_calibrated_
    assert (probe.n_iter_, probe.best_epoch_) == (30, 30)


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_a_continuous_target_is_learnt(loss):
    X, _ = sentences(300, seed=2)
    y = np.array([each[:, 0].max() for each in X])
    probe = TokenProbeRegressor(pooling="multimax", loss=loss, **QUICK).fit(X[:240], y[:240])
    assert probe.score(X[240:], y[240:]) > 0.8
    assert not probe.is_calibrated_


def test_weights_of_zero_take_sentences_out():
    X, y = sentences(80)
    junk = [each * 100 for each in X]
    weight = np.r_[np.ones(80), np.zeros(80)]
    options = {**QUICK, "validation_fraction": 0}
    alone = TokenProbeClassifier(batch_size=200, **options).fit(X, y)
    both = TokenProbeClassifier(batch_size=200, **options).fit(X + junk, np.r_[y, y[::-1]], weight)
    np.testing.assert_allclose(
        both.decision_function(X), alone.decision_function(X), rtol=2e-3, atol=2e-3
    )


def test_what_cannot_be_fitted_is_refused():
    X, y = sentences(30)
    with pytest.raises(ValueError, match="Only binary classification"):
        TokenProbeClassifier(**QUICK).fit(X, np.arange(30) % 3)
    with pytest.raises(ConfigError, match="pooling"):
        TokenProbeClassifier(pooling="mean").fit(X, y)
    with pytest.raises(ValueError, match="inconsistent"):
        TokenProbeClassifier(**QUICK).fit(X, y[:-1])
    with pytest.raises(ValueError, match="validation_fraction"):
        TokenProbeRegressor(validation_fraction=1.0).fit(X, np.arange(30.0))
    with pytest.raises(ValueError, match="one class only"):
        TokenProbeClassifier(**QUICK).fit(X, y, sample_weight=(y == "other").astype(float))
    with pytest.raises(NonFiniteError, match="sentence 1"):
        TokenProbeClassifier(**QUICK).fit([X[0], X[1] * np.nan, *X[2:]], y)
    probe = TokenProbeClassifier(**QUICK).fit(X, y)
    with pytest.raises(ValueError, match="7 features"):
        probe.predict([np.zeros((2, 7))])
