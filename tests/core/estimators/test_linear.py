from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from taprobe_core.errors import DataError
from taprobe_core.estimators.linear import LogisticProbe, RidgeProbe


def expected_failures(estimator: Any) -> dict[str, str]:
    if not estimator.standardise:
        return {}
    reason = "the scaler ignores weights, as in a pipeline whose last step takes them"
    return {"check_sample_weight_equivalence_on_dense_data": reason}


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        RidgeProbe(),
        RidgeProbe(standardise=False),
        LogisticProbe(),
        LogisticProbe(standardise=False, class_weight="balanced"),
    ],
    expected_failed_checks=expected_failures,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def data(n_features=6, seed=0):
    rng = np.random.default_rng(seed)
    features = 5 + 3 * rng.standard_normal((80, n_features))
    signal = features[:, 0] + rng.standard_normal(80)
    return features, signal, rng


@pytest.mark.parametrize("n_features", [6, 1500])
def test_ridge_is_the_pipeline(n_features):
    features, signal, rng = data(n_features)
    weight = rng.uniform(0.2, 2, 80)
    probe = RidgeProbe(alpha=0.7).fit(features, signal, sample_weight=weight)
    peer = make_pipeline(StandardScaler(), Ridge(0.7))
    peer.fit(features, signal, ridge__sample_weight=weight)
    np.testing.assert_allclose(probe.predict(features), peer.predict(features), atol=1e-8)
    assert probe.coef_.shape == (n_features,)


@pytest.mark.parametrize("n_features", [6, 1500])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_logistic_is_the_converged_pipeline(n_features, class_weight):
    features, signal, _ = data(n_features)
    labels = np.where(signal > np.quantile(signal, 0.8), "anchor", "other")
    probe = LogisticProbe(C=0.5, class_weight=class_weight).fit(features, labels)
    model = LogisticRegression(C=0.5, class_weight=class_weight, tol=1e-9, max_iter=10_000)
    peer = make_pipeline(StandardScaler(), model).fit(features, labels)
    assert probe.classes_.tolist() == ["anchor", "other"]
    np.testing.assert_allclose(
        probe.predict_proba(features), peer.predict_proba(features), atol=1e-4
    )
    assert (probe.predict(features) == peer.predict(features)).all()


def test_probes_can_be_cloned_and_searched_over():
    features, signal, _ = data()
    probe = LogisticProbe(C=3.0, class_weight="balanced", standardise=False)
    assert clone(probe).get_params() == probe.get_params()
    search = GridSearchCV(LogisticProbe(), {"C": [0.01, 1.0]}, cv=3)
    search.fit(features, signal > signal.mean())
    assert search.best_score_ > 0.7


def test_a_penalty_that_is_not_positive_is_refused():
    features, signal, _ = data()
    with pytest.raises(DataError, match="penalty"):
        RidgeProbe(alpha=0.0).fit(features, signal)
    with pytest.raises(DataError, match="penalty"):
        LogisticProbe(C=-1.0).fit(features, signal > signal.mean())
