from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from taprobe_core.errors import NumericsError
from taprobe_core.probes import pipeline as module
from taprobe_core.probes.pipeline import (
    early_stopping_of,
    extract_arrays,
    fit_pipeline,
    make_pipeline,
)
from taprobe_core.study.config import ProbeRecipe, Target


def _recipe(**settings: object) -> ProbeRecipe:
    return ProbeRecipe.model_validate({"name": "p", "features": ("activations",), **settings})


def _network(**settings: object) -> ProbeRecipe:
    return _recipe(**{"estimator": "mlp", "hidden": (4,), "max_iter": 5, **settings})


def _rows(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, pl.DataFrame, np.ndarray]:
    """Features whose spread falls off, as values and as a frame, and two classes."""
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5).astype(np.float32)
    y = (X[:, 0] + rng.normal(size=n) > 0.5).astype(float)
    y[:2] = 0.0, 1.0
    return X, pl.DataFrame([pl.Series("activations", X)]), y


@pytest.mark.parametrize(
    ("settings", "target", "expected"),
    [
        ({}, "anchor_binary", LogisticRegression),
        ({}, "importance_abs", Ridge),
        ({"estimator": "mlp"}, "anchor_binary", MLPClassifier),
        ({"estimator": "mlp"}, "importance_signed", MLPRegressor),
    ],
)
def test_settings_of_the_recipe_reach_the_estimator(
    settings: dict[str, object], target: Target, expected: type
) -> None:
    estimator = make_pipeline(_recipe(regularization=3.0, **settings), target, seed=7)["estimator"]

    assert type(estimator) is expected
    params = estimator.get_params()
    if settings:
        assert params["hidden_layer_sizes"] == (100, 100)
        assert (params["max_iter"], params["early_stopping"]) == (300, True)
        assert (params["n_iter_no_change"], params["random_state"]) == (20, 7)
    else:
        assert params["C" if target == "anchor_binary" else "alpha"] == 3.0
        assert params.get("class_weight", "balanced") == "balanced"


def test_blocks_stand_in_one_order_whatever_the_recipe_says() -> None:
    recipe = _recipe(features=("position", "activations", "text"))

    inputs = make_pipeline(recipe, "importance_abs", seed=0)["inputs"]

    assert [name for name, _, _ in inputs.transformers] == ["text", "activations", "position"]


# More rows than features, and fewer: the classes of the second can be told apart.
@pytest.mark.parametrize("shape", [(120, 6), (30, 60)])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_logistic_scores_are_those_of_the_optimum(shape: tuple[int, int], C: float) -> None:
    X, frame, y = _rows(*shape)
    scaled = StandardScaler().fit_transform(X.astype(np.float64))
    optimum = LogisticRegression(
        C=C, class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=500
    ).fit(scaled, y)

    fitted, training = fit_pipeline(_recipe(regularization=C), "anchor_binary", frame, y, 0, "x")

    expected = optimum.predict_proba(scaled)[:, 1]
    np.testing.assert_allclose(fitted.predict_proba(frame)[:, 1], expected, atol=5e-6)
    assert training.is_converged
    assert training.early_stopping is None


def test_ridge_on_sparse_rows_is_ridge_on_dense_rows() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["so", "we", "add", "carry", "then"], 4)) for _ in range(40)]
    frame, y = pl.DataFrame({"text": texts}), rng.normal(size=40)

    fitted, training = fit_pipeline(_recipe(features=("text",)), "importance_abs", frame, y, 0, "x")

    dense = fitted["inputs"].transform(frame).toarray()
    np.testing.assert_allclose(
        fitted.predict(frame), Ridge(alpha=1.0).fit(dense, y).predict(dense), atol=1e-7
    )
    assert training.n_iter == 1


def test_too_few_steps_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ITER", 2)
    _, frame, y = _rows(60, 6)

    with pytest.raises(NumericsError, match=r"did not converge: .*recipe 'p', fold 3") as error:
        fit_pipeline(_recipe(), "anchor_binary", frame, y, 0, "recipe 'p', fold 3")

    assert error.value.fix == "lower the recipe's regularization, which penalises more"


def test_equations_that_float64_cannot_solve_are_an_error() -> None:
    # 20 directions in 60 features of 40 rows, and no penalty to speak of.
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(40, 20)) @ rng.normal(size=(20, 60))).astype(np.float32)
    frame = pl.DataFrame([pl.Series("activations", X)])

    with pytest.raises(NumericsError, match=r"did not converge: (Singular|An ill-cond)") as error:
        fit_pipeline(
            _recipe(regularization=1e-300), "importance_abs", frame, rng.normal(size=40), 0, "x"
        )

    assert error.value.fix == "raise the recipe's regularization, which penalises more"


@pytest.mark.parametrize("estimator", ["linear", "mlp"])
def test_a_training_feature_that_is_no_number_is_an_error(estimator: str) -> None:
    X, _, y = _rows(30, 3)
    X[4, 1] = np.nan
    frame = pl.DataFrame([pl.Series("activations", X)])

    with pytest.raises(NumericsError, match="cannot be fitted: Input X contains NaN") as error:
        fit_pipeline(_recipe(estimator=estimator), "importance_abs", frame, y, 0, "x")

    assert ("estimator: linear" in str(error.value.fix)) is (estimator == "mlp")


def test_a_network_that_diverges_is_an_error() -> None:
    _, frame, y = _rows(30, 3)

    with pytest.raises(NumericsError, match="non-finite parameter weights"):
        fit_pipeline(_network(early_stopping=False), "importance_abs", frame, y * 1e308, 0, "x")


@pytest.mark.parametrize(
    ("target", "early_stopping"),
    [("anchor_binary", True), ("importance_abs", True), ("importance_abs", False)],
)
def test_a_network_says_whether_patience_or_the_last_epoch_ended_it(
    target: Target, early_stopping: bool
) -> None:
    _, frame, y = _rows(60, 3)
    noise = np.random.default_rng(1).permutation(y) * (1.0 if target == "anchor_binary" else 0.01)
    short, long = (
        fit_pipeline(
            _network(max_iter=max_iter, early_stopping=early_stopping), target, frame, noise, 0, "x"
        )[1]
        for max_iter in (5, 5000)
    )

    assert (short.n_iter, short.is_converged) == (5, False)
    assert long.is_converged
    assert long.n_iter < 5000
    assert str(long.early_stopping).startswith("on" if early_stopping else "off: the recipe")


# Sizes on both sides of every limit; a split that scikit-learn refuses would be an error.
@pytest.mark.parametrize("n_rows", [2, 10, 11, 20])
@pytest.mark.parametrize("n_rare", [1, 2])
def test_one_rule_for_both_targets_says_when_early_stopping_is_off(
    n_rows: int, n_rare: int
) -> None:
    _, frame, _ = _rows(n_rows, 3)
    y = np.zeros(n_rows)
    y[:n_rare] = 1.0
    if n_rows == n_rare:
        y[0] = 0.0
    few, rare = n_rows < 11, n_rare < 2
    words: dict[Target, str] = {
        "anchor_binary": "training rows, 11" if few else "one training row" if rare else "accuracy",
        "importance_abs": "training rows, 11" if few else "R^2",
    }
    for target, expected in words.items():
        fitted, training = fit_pipeline(_network(), target, frame, y, 0, "x")

        assert expected in str(training.early_stopping)
        is_on = str(training.early_stopping).startswith("on")
        assert fitted["estimator"].early_stopping is is_on
        assert (is_on, training.early_stopping) == early_stopping_of(_network(), target, y)


def test_weights_of_a_network_take_half_the_space() -> None:
    _, frame, y = _rows(30, 3)
    fitted, _ = fit_pipeline(_network(hidden=(4, 2)), "anchor_binary", frame, y, 0, "x")

    arrays, terms = extract_arrays(fitted)

    layers = {name: array for name, array in arrays.items() if name[:4] in ("weig", "bias")}
    assert [layers[f"weight_{depth}"].shape for depth in range(3)] == [(3, 4), (4, 2), (2, 1)]
    assert [layers[f"bias_{depth}"].shape for depth in range(3)] == [(4,), (2,), (1,)]
    assert {array.dtype for array in layers.values()} == {np.dtype(np.float32)}
    assert arrays["mean"].dtype == np.float64
    assert terms is None
