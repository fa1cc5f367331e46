from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from taprobe_core.errors import ConfigError, DataError, NotEnoughDataError
from taprobe_core.estimators.network import MLPProbeClassifier, MLPProbeRegressor

QUICK = {"hidden": (20,), "learning_rate": 0.02, "max_iter": 60, "random_state": 0}
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "a repeated row is shuffled apart from its "
    "twin, a row of weight 2 cannot be",
}


@parametrize_with_checks(
    [kind(**QUICK, early_stopping="off") for kind in (MLPProbeClassifier, MLPProbeRegressor)],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
    xfail_strict=True,
)
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


def data(n=120, seed=0):
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, 6)) * [1, 5, 0.1, 2, 1, 1] + [0, 9, 0, 0, -3, 0]).astype(np.float32)
    value = np.sin(X[:, 0]) + X[:, 2] * 10 + 0.2 * rng.normal(size=n)
    return X, value, np.where(value > 0.5, "anchor", "other")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("early_stopping", ["off", "rows"])
def test_the_estimators_are_scikit_learns_pipelines(early_stopping):
    X, value, label = data()
    options = {"max_iter": 30, "random_state": 3}
    theirs = {"early_stopping": early_stopping == "rows", "n_iter_no_change": 20, **options}
    ours = MLPProbeClassifier(hidden=(7, 5), early_stopping=early_stopping, **options)
    model = make_pipeline(StandardScaler(), MLPClassifier((7, 5), **theirs)).fit(X, label)
    found = ours.fit(X, label).predict_proba(X)
    np.testing.assert_allclose(found, model.predict_proba(X), atol=1e-5)
    assert (ours.predict(X) == model.predict(X)).all()
    assert ours.classes_.tolist() == ["anchor", "other"]
    assert ours.n_iter_ == model[-1].n_iter_
    ours = MLPProbeRegressor(hidden=(7, 5), early_stopping=early_stopping, **options)
    model = make_pipeline(StandardScaler(), MLPRegressor(hidden_layer_sizes=(7, 5), **theirs))
    model.fit(X, value.astype(np.float32))
    np.testing.assert_allclose(ours.fit(X, value).predict(X), model.predict(X), atol=1e-4)
    np.testing.assert_allclose(ours.mean_, model[0].mean_)
    np.testing.assert_allclose(ours.coefs_[0], model[-1].coefs_[0], atol=1e-4)


def test_rows_of_weight_zero_might_as_well_be_away():
    X, _, label = data()
    weight = np.where(np.arange(len(X)) % 3 == 0, 0.0, 1.5)
    model = MLPProbeClassifier(**QUICK)
    with_zero = clone(model).fit(X, label, sample_weight=weight)
    without = clone(model).fit(X[weight > 0], label[weight > 0], weight[weight > 0])
    np.testing.assert_allclose(with_zero.decision_function(X), without.decision_function(X))


def test_watched_rows_stop_the_training_and_are_not_trained_on():
    X, _, label = data()
    watched = np.arange(len(X)) >= 90
    model = MLPProbeClassifier(**QUICK | {"max_iter": 300, "patience": 5}).set_params(
        early_stopping="problems"
    )
    model.fit(X, label, validation=watched)
    assert model.n_iter_ < 300
    np.testing.assert_allclose(model.mean_, X[~watched].mean(axis=0, dtype=np.float64))
    with pytest.raises(DataError, match="needs validation rows"):
        model.fit(X, label)


def test_an_integer_seed_repeats_and_a_generator_goes_on():
    X, value, _ = data()
    model = MLPProbeRegressor(**QUICK)
    first, second = (clone(model).fit(X, value).predict(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    model = MLPProbeRegressor(**QUICK | {"random_state": np.random.RandomState(0)})
    first, second = (model.fit(X, value).predict(X) for _ in range(2))
    assert abs(first - second).max() > 1e-3


def test_they_can_be_searched():
    X, _, label = data()
    search = GridSearchCV(MLPProbeClassifier(**QUICK), {"alpha": [1e-4, 1.0]}, cv=3)
    assert search.fit(X, label).best_score_ > 0.7


def test_what_cannot_be_fitted_is_refused():
    X, value, label = data()
    with pytest.raises(ValueError, match="3 class"):
        MLPProbeClassifier().fit(X, np.arange(len(X)) % 3)
    with pytest.raises(ValueError, match="one class only"):
        MLPProbeClassifier().fit(X, label, (label == "other").astype(float))
    with pytest.raises(NotEnoughDataError, match="cannot be split"):
        MLPProbeRegressor().fit(X[:10], value[:10])
    with pytest.raises(ConfigError, match="alpha"):
        MLPProbeRegressor(alpha=-1).fit(X, value)
