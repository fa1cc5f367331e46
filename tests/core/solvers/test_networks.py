from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, r2_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from torch import cuda, from_numpy

from taprobe_core.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    NotEnoughDataError,
    NumericsError,
)
from taprobe_core.solvers.columns import FitRequest, fold_moments
from taprobe_core.solvers.networks.batch import Orders, Rows, Stream
from taprobe_core.solvers.networks.options import Patience, accuracy, r_squared
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

N_ROWS, N_FEATURES, N_FOLDS = 130, 9, 4


class Data:
    """Rows of problems of unequal size, folds that leave one problem out, two kinds of target."""

    def __init__(self, seed: int = 0, noise: float = 0.5) -> None:
        rng = np.random.default_rng(seed)
        scale = rng.uniform(0.1, 5, N_FEATURES)
        latent = rng.normal(size=(N_ROWS, N_FEATURES))
        self.X = (latent * scale + rng.normal(size=N_FEATURES) * 3).astype(np.float32)
        self.value = np.sin(latent[:, 0]) + latent[:, 1] * latent[:, 2]
        self.value += noise * rng.normal(size=N_ROWS)
        self.label = (self.value > np.quantile(self.value, 0.75)).astype(np.float64)
        problem = np.searchsorted([30, 55, 95], np.arange(N_ROWS), side="right")
        self.train = problem != np.arange(N_FOLDS)[:, None]
        self.rng = rng

    def columns(self, y, seeds=(0, 1), weight=None) -> FitRequest:
        fold = np.repeat(np.arange(N_FOLDS), len(seeds))
        inside = self.train[fold].T.astype(np.float64)
        return FitRequest(
            fold,
            np.repeat(y[:, None], len(fold), axis=1),
            inside if weight is None else inside * weight[:, None],
            np.tile(seeds, N_FOLDS),
        )


def reference(data, y, column, columns, options):
    """The same model as scikit-learn's, and its output on all rows."""
    rows = columns.weight[:, column] > 0
    scaler = StandardScaler().fit(data.X[data.train[columns.fold[column]]])
    is_watched = options.early_stopping == "rows"
    n_training = int(rows.sum()) - (int(np.ceil(0.1 * rows.sum())) if is_watched else 0)
    kind = MLPClassifier if options.is_classifier else MLPRegressor
    model = kind(
        hidden_layer_sizes=options.hidden,
        max_iter=options.max_iter,
        alpha=options.alpha,
        batch_size=min(options.batch_size, n_training),
        learning_rate_init=options.learning_rate,
        early_stopping=is_watched,
        n_iter_no_change=options.patience,
        random_state=int(columns.seed[column]),
    )
    target = y[rows].astype(int if options.is_classifier else np.float32)
    model.fit(scaler.transform(data.X[rows]), target, columns.weight[rows, column])
    state = scaler.transform(data.X)
    for layer, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        state = (np.maximum(state, 0) if layer else state) @ weight + bias
    return model, state[:, 0]


@pytest.mark.parametrize("is_classifier", [True, False])
@pytest.mark.parametrize("early_stopping", ["off", "rows"])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_a_network_is_scikit_learns_of_the_same_seed(is_classifier, early_stopping, is_weighted):
    data = Data()
    y = data.label if is_classifier else data.value
    weight = data.rng.uniform(0.2, 3, N_ROWS) if is_weighted else None
    columns = data.columns(y, weight=weight)
    options = NetworkOptions(
        hidden=(12, 6),
        is_classifier=is_classifier,
        max_iter=15,
        batch_size=40,
        alpha=0.3,
        learning_rate=5e-3,
        early_stopping=early_stopping,
    )
    found = fit_networks(data.X, data.train, columns, options)
    for column in range(len(columns)):
        model, decision = reference(data, y, column, columns, options)
        for ours, theirs in zip(found.weights, model.coefs_, strict=True):
            np.testing.assert_allclose(ours[column], theirs, atol=1e-4)
        for ours, theirs in zip(found.biases, model.intercepts_, strict=True):
            np.testing.assert_allclose(ours[column], theirs, atol=1e-4)
        np.testing.assert_allclose(found.decision[:, column], decision, atol=1e-4)
        assert found.n_iter[column] == model.n_iter_


@pytest.mark.parametrize("is_classifier", [True, False])
@pytest.mark.parametrize("early_stopping", ["off", "rows"])
def test_a_network_stops_where_scikit_learns_does(is_classifier, early_stopping):
    data = Data(1, noise=0.1)
    y = data.label if is_classifier else data.value
    columns = data.columns(y, seeds=(3,))
    options = NetworkOptions(
        hidden=(10,),
        is_classifier=is_classifier,
        max_iter=170,
        learning_rate=0.02,
        early_stopping=early_stopping,
        patience=4,
        tol=1e-4,
    )
    found = fit_networks(data.X, data.train, columns, options)
    n_iter = [reference(data, y, each, columns, options)[0].n_iter_ for each in range(N_FOLDS)]
    assert found.n_iter.tolist() == n_iter
    assert found.is_converged.tolist() == [each < 170 for each in n_iter]
    assert min(n_iter) < 170


def test_classifiers_and_regressors_stop_by_one_rule():
    data = Data(2, noise=3)
    for is_classifier, y in ((True, data.label), (False, data.value)):
        options = NetworkOptions(hidden=(10,), is_classifier=is_classifier, learning_rate=0.01)
        found = fit_networks(data.X, data.train, data.columns(y), options)
        assert found.is_converged.all()
        assert (found.n_iter > options.patience).all()
        assert (found.n_iter < options.max_iter).all()


@pytest.mark.parametrize("is_classifier", [True, False])
@pytest.mark.parametrize("early_stopping", ["off", "rows", "problems"])
def test_a_result_does_not_depend_on_the_other_columns(early_stopping, is_classifier):
    data = Data(3)
    targets = (data.label, 1 - data.label) if is_classifier else (data.value, np.abs(data.value))
    # Both targets of a fold and seed are split and shuffled alike, if not by class.
    one, two = (data.columns(target, seeds=(5, 6, 7)) for target in targets)
    validation = np.roll(~data.train, 1, axis=0)
    train = data.train & ~validation
    fold, y = np.tile(one.fold, 2), np.hstack([one.y, two.y])
    columns = FitRequest(fold, y, train[fold].T.astype(np.float64), np.tile(one.seed, 2))
    options = NetworkOptions(
        hidden=(8,),
        is_classifier=is_classifier,
        max_iter=40,
        batch_size=32,
        learning_rate=0.01,
        early_stopping=early_stopping,
        patience=3,
    )

    def fit(chosen, **more):
        return fit_networks(data.X, train, columns.take(chosen), options, validation, **more)

    every = np.arange(24)
    together = fit(every)
    assert len(set(together.n_iter.tolist())) > 1 or early_stopping == "off"
    again = fit(every)
    np.testing.assert_array_equal(again.decision, together.decision)
    mixed = np.random.default_rng(0).permutation(24)
    shuffled = fit(mixed)
    np.testing.assert_allclose(shuffled.decision, together.decision[:, mixed], atol=2e-5)
    single = fit(every, max_bytes=1)
    np.testing.assert_allclose(single.decision, together.decision, atol=2e-5)
    alone = fit(np.array([19]))
    np.testing.assert_allclose(alone.decision[:, 0], together.decision[:, 19], atol=2e-5)
    assert alone.n_iter[0] == together.n_iter[19]


@pytest.mark.parametrize("is_classifier", [True, False])
def test_watching_problems_keeps_the_epoch_of_the_lowest_weighted_loss(is_classifier):
    data = Data(4, noise=2)
    y = data.label if is_classifier else data.value
    validation = np.roll(~data.train, 1, axis=0)
    train = data.train & ~validation
    fold = np.arange(N_FOLDS)
    columns = FitRequest(
        fold, np.repeat(y[:, None], N_FOLDS, 1), train.T.astype(float), np.full(N_FOLDS, 9)
    )
    weight = data.rng.uniform(0, 2, (N_ROWS, N_FOLDS))

    def options(early_stopping, max_iter, patience):
        return NetworkOptions(
            hidden=(10,),
            is_classifier=is_classifier,
            max_iter=max_iter,
            learning_rate=0.02,
            early_stopping=early_stopping,
            patience=patience,
        )

    found = fit_networks(
        data.X, train, columns, options("problems", 60, 5), validation, validation_weight=weight
    )
    epochs = [
        fit_networks(data.X, train, columns, options("off", epoch, 1000)).decision
        for epoch in range(1, 41)
    ]
    for column in range(N_FOLDS):
        rows, w = validation[column], weight[validation[column], column]
        losses = [
            log_loss(y[rows], 1 / (1 + np.exp(-each[rows, column])), sample_weight=w)
            if is_classifier
            else np.average((y[rows] - each[rows, column]) ** 2, weights=w) / 2
            for each in epochs
        ]
        n_iter, kept = by_hand([-each for each in losses], 5, 1e-4)
        assert found.n_iter[column] == n_iter
        np.testing.assert_allclose(found.decision[:, column], epochs[kept][:, column], atol=1e-4)


def by_hand(scores, patience, tol):
    """Epochs trained, and the place of the best one among them."""
    best, misses, kept = -np.inf, 0, 0
    for epoch, score in enumerate(scores):
        misses = misses + 1 if score < best + tol else 0
        if score > best:
            best, kept = score, epoch
        if misses > patience:
            return epoch + 1, kept
    return len(scores), kept


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1, max_size=25),
    st.integers(0, 4),
)
def test_patience_judges_each_model_by_its_own_scores(scores, patience):
    values = np.array(scores) / 8
    judge = Patience(3, patience, 0.2, from_numpy(values).device)
    stopped, kept = np.zeros(3, int), np.zeros(3, int)
    for epoch, row in enumerate(from_numpy(values)):
        is_best, is_stopped = (each.numpy() for each in judge.judge(row))
        going = stopped == 0
        kept[going & is_best] = epoch
        stopped[going & is_stopped] = epoch + 1
    for model in range(3):
        n_iter, best = by_hand(values[:, model], patience, 0.2)
        assert (stopped[model] or len(values), kept[model]) == (n_iter, best)


def test_held_out_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    output, y, weight = (
        rng.normal(size=(3, 11)),
        rng.normal(size=(3, 11)),
        rng.uniform(size=(3, 11)),
    )
    y[2] = 1.5
    output[2] = 1.5
    y[1] = 0.5
    share = from_numpy(weight / weight.sum(1, keepdims=True))
    squares = r_squared(from_numpy(output), from_numpy(y), share).tolist()
    expected = [r2_score(a, b, sample_weight=w) for a, b, w in zip(y, output, weight, strict=True)]
    assert squares == pytest.approx(expected)
    label = (y > 0.3).astype(float)
    shares = accuracy(from_numpy(output), from_numpy(label), share).tolist()
    assert shares == pytest.approx(
        [
            accuracy_score(a, b > 0, sample_weight=w)
            for a, b, w in zip(label, output, weight, strict=True)
        ]
    )


def test_an_epoch_reads_every_row_once_and_columns_that_are_alike_read_alike():
    lengths = np.array([7, 5, 7])
    orders = Orders([Stream(1), Stream(1), Stream(1)], lengths, np.array([0, 1, 0]))
    epochs = [orders.next() for _ in range(6)]
    for epoch in epochs:
        for row, length in zip(epoch[orders.which], lengths, strict=True):
            assert sorted(row[:length]) == list(range(length))
            assert (row[length:] == 0).all()
    assert len({tuple(epoch[0]) for epoch in epochs}) > 1
    assert orders.which.tolist() == [0, 1, 0]
    assert orders.take(np.array([1, 2])).tolist() == [0, 1]
    assert orders.which.tolist() == [1, 0]
    assert orders.take(np.array([0])).tolist() == [1]
    assert orders.next().shape == (1, 5)


def test_a_finished_network_stops_costing(monkeypatch):
    sizes = []
    gather = Rows.gather

    def counted(self, index):
        sizes.append(index.shape[0])
        return gather(self, index)

    monkeypatch.setattr(Rows, "gather", counted)
    data = Data(5, noise=2)
    options = NetworkOptions(hidden=(8,), learning_rate=0.02, patience=3)
    found = fit_networks(data.X, data.train, data.columns(data.label), options)
    rows_of_all = sizes.pop()  # the scores of every row, at the end
    assert rows_of_all == 8
    assert sizes == sorted(sizes, reverse=True)
    # one step and one look at the held-out rows in each epoch
    assert sum(sizes) == 2 * found.n_iter.sum()


@pytest.mark.parametrize("max_bytes", [1, 200_000, None])
def test_batches_hold_what_memory_allows(monkeypatch, max_bytes):
    sizes = set()
    gather = Rows.gather
    monkeypatch.setattr(
        Rows, "gather", lambda self, index: (sizes.add(len(index)), gather(self, index))[1]
    )
    data = Data()
    options = NetworkOptions(hidden=(8,), max_iter=1, early_stopping="off")
    fit_networks(data.X, data.train, data.columns(data.label), options, max_bytes=max_bytes)
    assert max(sizes) == {1: 1, 200_000: 8, None: 8}[max_bytes]


def test_twenty_seeds_are_not_distinguishable_from_twenty_others_of_scikit_learn():
    data = Data(6)
    fold = np.zeros(20, np.int64)
    test = ~data.train[0]
    options = NetworkOptions(hidden=(16,), learning_rate=0.01, patience=8)
    columns = FitRequest(
        fold,
        np.repeat(data.label[:, None], 20, axis=1),
        data.train[fold].T.astype(np.float64),
        np.arange(1000, 1020),
    )
    ours = fit_networks(data.X, data.train, columns, options)
    others = FitRequest(columns.fold, columns.y, columns.weight, np.arange(20))
    fits = [reference(data, data.label, each, others, options) for each in range(20)]
    precision = [
        [average_precision_score(data.label[test], each[test]) for each in decisions]
        for decisions in (ours.decision.T, [decision for _, decision in fits])
    ]
    assert mannwhitneyu(*precision).pvalue > 0.01
    assert mannwhitneyu(ours.n_iter, [model.n_iter_ for model, _ in fits]).pvalue > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("early_stopping", ["off", "rows", "problems"])
def test_an_accelerator_gives_the_cpus_networks(early_stopping):
    data = Data(8)
    validation = ~data.train
    options = NetworkOptions(
        hidden=(12, 6), max_iter=20, batch_size=40, patience=4, early_stopping=early_stopping
    )
    columns = data.columns(data.label)
    here, there = (
        fit_networks(data.X, data.train, columns, options, validation, device)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(there.decision, here.decision, atol=1e-3)
    assert there.n_iter.tolist() == here.n_iter.tolist()


def test_moments_are_the_standard_scalers():
    data = Data(7)
    X = np.concatenate([data.X, np.full((N_ROWS, 3), 0.1, np.float32)], axis=1)
    X[~data.train[1], -1] = 7  # constant in one fold only
    X[:, -2] = 1e4 + data.rng.normal(size=N_ROWS) * 1e-2  # float32 leaves a few steps
    mean, scale = fold_moments(X, data.train)
    for fold, train in enumerate(data.train):
        scaler = StandardScaler().fit(X[train])
        np.testing.assert_allclose(mean[fold], scaler.mean_, rtol=1e-9)
        np.testing.assert_allclose(scale[fold], scaler.scale_, rtol=1e-6)
    assert (scale[1, -1], scale[0, -3]) == (1, 1)
    assert scale[0, -1] > 1


def test_a_diverged_network_is_named():
    data = Data()
    columns = data.columns(data.value)
    columns.y[:, 5] *= 1e30
    options = NetworkOptions(hidden=(8,), is_classifier=False, max_iter=3, early_stopping="off")
    with pytest.raises(NumericsError, match=r"1 networks diverged in epoch 1 in column 5 \(fold 2"):
        fit_networks(data.X, data.train, columns, options)
    columns.y[:, 5] = np.where(data.train[2], data.value, 1e38)
    fit_networks(data.X, data.train, columns, options)


def test_what_cannot_be_fitted_is_refused():
    data = Data()
    good = data.columns(data.label)
    options = NetworkOptions(hidden=(4,), max_iter=1)

    def fails(kind, match, X=data.X, columns=good, options=options, **more):
        with pytest.raises(kind, match=match):
            fit_networks(X, data.train, columns, options, **more)

    bad = data.X.copy()
    bad[3, 2] = np.inf
    fails(NonFiniteError, "row 3, feature 2", bad)
    fails(DataError, "shape|X is", data.X[1:])
    fails(DataError, "need seeds", columns=FitRequest(good.fold, good.y, good.weight))
    negative = FitRequest(good.fold, good.y, good.weight, good.seed - 1)
    fails(DataError, "seeds from -1", columns=negative)
    fails(DataError, "other than 0 and 1", columns=data.columns(data.value))
    fails(NotEnoughDataError, "8 .* one class only.*column 0", columns=data.columns(data.label * 0))
    single = np.zeros(N_ROWS)
    single[5] = single[70] = 1
    fails(NotEnoughDataError, r"cannot be split.*column \d", columns=data.columns(single))
    few = data.columns(data.value, weight=(np.arange(N_ROWS) % 20 == 0).astype(float))
    values = NetworkOptions(hidden=(4,), is_classifier=False)
    fails(NotEnoughDataError, "cannot be split", columns=few, options=values)
    watching = NetworkOptions(hidden=(4,), early_stopping="problems")
    fails(DataError, "needs validation rows", options=watching)
    fails(DataError, "trained on and validated on", options=watching, validation=data.train)
    fails(
        DataError,
        "8 columns have no validation row",
        options=watching,
        validation=np.zeros_like(data.train),
    )
    fails(
        DataError,
        "validation weights are",
        options=watching,
        validation=~data.train,
        validation_weight=np.ones((3, 2)),
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"hidden": ()},
        {"hidden": (4, 0)},
        {"max_iter": 0},
        {"alpha": -1.0},
        {"learning_rate": 0.0},
        {"batch_size": 0},
        {"early_stopping": "never"},
        {"validation_fraction": 1.0},
        {"patience": -1},
        {"tol": -1.0},
    ],
)
def test_options_without_sense_are_refused(fault):
    with pytest.raises(ConfigError, match=next(iter(fault))):
        NetworkOptions(**fault)


def test_weights_that_are_not_kept_change_no_decision():
    data = Data()
    options = NetworkOptions(hidden=(4,), max_iter=2, early_stopping="off")
    columns = data.columns(data.label)
    kept = fit_networks(data.X, data.train, columns, options)
    slim = fit_networks(data.X, data.train, columns, options, keep_weights=False)
    assert slim.weights == slim.biases == []
    np.testing.assert_array_equal(slim.decision, kept.decision)
    assert [each.shape for each in kept.weights] == [(8, N_FEATURES, 4), (8, 4, 1)]
    assert [each.shape for each in kept.biases] == [(8, 4), (8, 1)]


def test_a_constant_target_and_a_constant_feature_are_learned():
    data = Data()
    data.X[:, 0] = 3
    options = NetworkOptions(
        hidden=(8,), is_classifier=False, learning_rate=0.02, early_stopping="off"
    )
    found = fit_networks(data.X, data.train, data.columns(np.full(N_ROWS, 0.5)), options)
    inside = data.train[found.fold].T
    np.testing.assert_allclose(found.decision[inside], 0.5, atol=0.2)
