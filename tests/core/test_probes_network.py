from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

from taprobe_core.errors import NumericsError
from taprobe_core.probes import network
from taprobe_core.probes.layers import forward
from taprobe_core.probes.network import train_network
from taprobe_core.study.config import ProbeRecipe

N_PROBLEMS, N_SENTENCES = 12, 25
PROBLEM_ID = np.repeat(np.arange(N_PROBLEMS), N_SENTENCES)


def _recipe(**settings: object) -> ProbeRecipe:
    common = {"name": "p", "features": ("activations",), "estimator": "mlp", "hidden": (16, 8)}
    return ProbeRecipe.model_validate({**common, **settings})


def _rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(len(PROBLEM_ID), 10))
    value = X[:, 0] * X[:, 1] + X[:, 2]
    return X, value, (value > 1).astype(float)


def _reference(model: type, recipe: ProbeRecipe) -> MLPClassifier | MLPRegressor:
    return model(
        hidden_layer_sizes=recipe.hidden, max_iter=recipe.max_iter, n_iter_no_change=20,
        random_state=7, tol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("max_iter", [1, 30])
def test_without_early_stopping_it_is_scikit_learns_classifier(max_iter: int) -> None:
    X, _, y = _rows()
    recipe = _recipe(early_stopping=False, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = _reference(MLPClassifier, recipe).fit(X.astype(np.float32), y)

    trained = train_network(X, y, PROBLEM_ID, recipe, is_binary=True, seed=7)

    assert (trained.n_iter, trained.is_converged) == (max_iter, False)
    score = expit(forward(X.astype(np.float32), trained.layers))
    np.testing.assert_allclose(score, expected.predict_proba(X)[:, 1], atol=1e-5)


def test_without_early_stopping_it_is_scikit_learns_regressor_on_a_standardised_target() -> None:
    X, value, _ = _rows()
    recipe = _recipe(early_stopping=False, max_iter=30)
    shift, spread = value.mean(), value.std()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = _reference(MLPRegressor, recipe).fit(
            X.astype(np.float32), ((value - shift) / spread).astype(np.float32)
        )

    trained = train_network(X, value, PROBLEM_ID, recipe, is_binary=False, seed=7)

    score = forward(X.astype(np.float32), trained.layers)
    np.testing.assert_allclose(score, expected.predict(X) * spread + shift, atol=1e-5)


def test_it_stops_at_the_epoch_at_which_scikit_learn_stops() -> None:
    X, _, y = _rows()
    recipe = _recipe(early_stopping=False, max_iter=2000, hidden=(4,))
    y[:] = X[:, 0] > 0
    model = _reference(MLPClassifier, recipe).set_params(learning_rate_init=1e-3)

    trained = train_network(X, y, PROBLEM_ID, recipe, is_binary=True, seed=7)

    assert trained.is_converged
    # Rounding grows over a thousand epochs; the rule is the same.
    assert trained.n_iter == pytest.approx(model.fit(X.astype(np.float32), y).n_iter_, rel=0.02)


class _Script:
    """A trainer whose weights are the number of its epochs, and whose losses are given."""

    def __init__(self, losses: Iterable[float]) -> None:
        self._losses = iter(losses)
        self._last = np.nan
        self.weights = np.zeros(1, dtype=np.float32)

    def epoch(self) -> float:
        self.weights += 1
        self._last = next(self._losses)
        return self._last

    def loss(self) -> float:
        return self._last


@pytest.mark.parametrize(
    ("losses", "kept", "n_iter", "is_converged"),
    [
        ([0.5, 0.4, *[0.6] * 40], 2, 23, True),
        ([0.5, 0.4, *[0.39995] * 40], 3, 23, True),  # a gain below the tolerance is none
        (np.linspace(1.0, 0.1, 30), 30, 30, False),
    ],
)
def test_early_stopping_keeps_the_weights_of_the_best_epoch(
    losses: Iterable[float], kept: int, n_iter: int, is_converged: bool
) -> None:
    script = _Script(losses)

    assert network._run(script, (), max_iter=30) == (n_iter, is_converged)  # type: ignore[arg-type]
    assert script.weights.tolist() == [kept]


def test_without_held_out_rows_the_last_weights_stay() -> None:
    script = _Script([0.5, 0.4, *[0.6] * 40])

    assert network._run(script, None, max_iter=30) == (23, True)  # type: ignore[arg-type]
    assert script.weights.tolist() == [23]


@pytest.mark.parametrize("is_binary", [True, False])
def test_noise_ends_training_early(is_binary: bool) -> None:
    X, value, y = _rows()
    noise = np.random.default_rng(1).permutation(y if is_binary else value)

    trained = train_network(X, noise, PROBLEM_ID, _recipe(), is_binary, seed=3)

    assert trained.early_stopping == "on: 2 of 12 training problems held out"
    assert trained.is_converged
    assert trained.n_iter < 200


def test_whole_problems_are_held_out() -> None:
    X, _, y = _rows()
    recipe = _recipe(max_iter=5)
    trained = train_network(X, y, PROBLEM_ID, recipe, is_binary=True, seed=3)
    touched = []
    for problem_id in range(N_PROBLEMS):
        other = X.copy()
        # Rows of other sizes change the weights unless the problem is held out and only watched.
        other[problem_id == PROBLEM_ID] *= 1.01
        again = train_network(other, y, PROBLEM_ID, recipe, is_binary=True, seed=3)
        touched.append(not np.array_equal(again.layers[0][0], trained.layers[0][0]))

    assert touched.count(False) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("recipe", "off: the recipe says so"),
        ("problems", "off: 4 training problems, 5 needed"),
        ("classes", "off: the held-out or the remaining problems have one class only"),
    ],
)
def test_early_stopping_is_off_for_a_stated_reason(change: str, reason: str) -> None:
    X, _, y = _rows()
    problem_id = PROBLEM_ID % 4 if change == "problems" else PROBLEM_ID
    if change == "classes":
        y[:] = PROBLEM_ID == 0
    recipe = _recipe(early_stopping=change != "recipe", max_iter=3)

    trained = train_network(X, y, problem_id, recipe, is_binary=True, seed=0)

    assert trained.early_stopping == reason


def test_the_seed_decides_and_nothing_else() -> None:
    X, _, y = _rows()
    first, again, other = (
        train_network(X, y, PROBLEM_ID, _recipe(max_iter=3), is_binary=True, seed=seed)
        for seed in (1, 1, 2)
    )

    for layer, same, different in zip(first.layers, again.layers, other.layers, strict=True):
        np.testing.assert_array_equal(layer[0], same[0])
        np.testing.assert_array_equal(layer[1], same[1])
        assert not np.array_equal(layer[0], different[0])


def test_sparse_rows_train_the_same_network() -> None:
    X, _, y = _rows()
    X[np.abs(X) < 0.5] = 0.0
    dense, sparse = (
        train_network(rows, y, PROBLEM_ID, _recipe(max_iter=5), is_binary=True, seed=1)
        for rows in (X, csr_matrix(X))
    )

    np.testing.assert_allclose(dense.layers[0][0], sparse.layers[0][0], atol=1e-6)


def test_a_constant_target_is_not_blown_up() -> None:
    X, value, _ = _rows()
    first, second = (
        forward(
            X.astype(np.float32),
            train_network(
                X, np.full_like(value, constant), PROBLEM_ID, _recipe(), is_binary=False, seed=0
            ).layers,
        )
        for constant in (0.0, 0.1)
    )

    np.testing.assert_allclose(second - first, 0.1, atol=1e-6)


@pytest.mark.parametrize("early_stopping", [True, False])
def test_divergence_is_an_error(early_stopping: bool) -> None:
    X, value, _ = _rows()
    recipe = _recipe(max_iter=3, early_stopping=early_stopping)

    with pytest.raises(NumericsError, match="diverged in epoch 1"):
        train_network(X * 1e30, value, PROBLEM_ID, recipe, is_binary=False, seed=0)
