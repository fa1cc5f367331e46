"""Token probes trained together, against the reference module trained one at a time."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import ks_2samp, mannwhitneyu
from sklearn.metrics import average_precision_score, log_loss
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from taprobe_core.errors import ConfigError, DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens import (
    learner,
    ragged,
    solve,
)
from taprobe_core.solvers.tokens.backward import backward, through_scaling
from taprobe_core.solvers.tokens.forward import (
    FirstLayer,
    FoldScaling,
    Stack,
    Workspace,
    draw,
    forward,
)
from taprobe_core.solvers.tokens.learner import Targets
from taprobe_core.solvers.tokens.pooling import POOLINGS, TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import RaggedTokens, plan_batches
from taprobe_core.solvers.tokens.reference import ReferenceProbe
from taprobe_core.solvers.tokens.solve import fit_token_probes, positive_weights, score_token_probe
from taprobe_core.solvers.tokens.states import bytes_needed, models_at_once, token_states
from taprobe_core.solvers.tokens.training import network_shape, train_stack

SMALL = TokenProbeOptions("attention", n_heads=2, width=8, window=4, max_epochs=3, batch_size=16)


def pad(tokens, rows, mean, scale):
    parts = [
        (tokens.values[tokens.offsets[row] : tokens.offsets[row + 1]].double() - mean) / scale
        for row in rows
    ]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts],
                                     batch_first=True)  # fmt: skip
    return nn.utils.rnn.pad_sequence(parts, batch_first=True).float(), mask


def losses(logits, y, kind):
    if kind == "logistic":
        return functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return {"huber": functional.huber_loss, "squared": functional.mse_loss}[kind](
        logits, y, reduction="none"
    )


def train_alone(model, tokens, train, watched, y, weight, orders):
    """Train one module; `orders`: lists of batches per epoch. Returns the best epoch."""
    options, raw = model.options, tokens.values.double()
    by_token = torch.from_numpy(np.repeat(train, tokens.lengths))
    mean, scale = raw[by_token].mean(0), raw[by_token].std(0, correction=0)
    y, weight, watched = (torch.from_numpy(each).float() for each in (y, weight, watched))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    rows = np.flatnonzero(watched.numpy())
    best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), np.inf, 0
    for epoch, batches in enumerate(orders, 1):
        for order in batches:
            batch = order[weight[order].numpy() > 0]
            logits = model(*pad(tokens, batch, mean, scale), options.is_soft)
            optimizer.zero_grad()
            (losses(logits, y[batch], options.loss) * weight[batch]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            found = losses(model(*pad(tokens, rows, mean, scale), False), y[rows], options.loss)
            loss = float((found * watched[rows]).sum() / watched[rows].sum())
        if loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), loss, epoch
        if epoch - best_epoch >= options.patience:
            break
    model.load_state_dict(best)
    with torch.no_grad():
        scores = model(*pad(tokens, np.arange(len(tokens)), mean, scale), False)
    return scores.double().numpy(), best_epoch, epoch


def orders_of(seed, n, n_learnt, options):
    """The batches that the solver promises for a seed."""
    rng = np.random.default_rng([seed, 1])
    n_parts = -(-n_learnt // options.batch_size)
    return [np.array_split(rng.permutation(n), n_parts) for _ in range(options.max_epochs)]


def planted(n=72, d=6, seed=0, low=1, high=12, dtype=torch.float32):
    """Sentences of 6 problems in 3 folds; a hot token decides the label."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high + 1, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = rng.normal(size=(offsets[-1], d)) * np.linspace(0.5, 3, d) + np.linspace(-5, 50, d)
    is_hot = rng.random(n) < 0.4
    at = offsets[:-1] + (rng.random(n) * lengths).astype(int)
    values[at, 1] += np.where(is_hot, 6.0, 0.0)
    problem = np.arange(n) * 6 // n
    train = np.stack([~np.isin(problem, held) for held in ([0, 1], [2, 3], [4, 5])])
    validation = np.stack([problem == held for held in (0, 2, 4)])
    tokens = RaggedTokens(torch.from_numpy(values.astype(np.float32)).to(dtype), offsets)
    return tokens, train, validation, is_hot.astype(float)


def columns_of(train, y, folds, seeds, is_binary=True):
    fold, seed = np.array(folds), np.array(seeds)
    y = np.tile(y[:, None], len(fold)) if y.ndim == 1 else y
    weight = positive_weights(y, fold, train) if is_binary else train[fold].T.astype(float)
    return FitRequest(fold, y, weight, seed)


@pytest.mark.parametrize("is_soft", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("high", [3, 40])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_equal_autograd_on_states_standardised_by_the_fold(pooling, high, depth, is_soft):
    options = replace(SMALL, pooling=pooling, depth=depth)
    tokens, *_ = planted(n=12, high=high)
    shape = network_shape(tokens.n_features, options)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    inverse = torch.rand(3, 1, 6, generator=generator, dtype=torch.float64) + 0.5
    stack = Stack.zeros(shape, 3, torch.device("cpu"), torch.float64)
    stack.flat.normal_(generator=generator).mul_(0.4)
    (batch,) = plan_batches(tokens, [np.arange(12)], options.window_or_none, "cpu")
    states = tokens.values.double()[batch.token] / 10
    scaling = FoldScaling(mean, inverse)
    space = Workspace(stack.flat)
    logits, trace = forward(
        stack, FirstLayer.of(stack, scaling, space), states, batch, is_soft, space
    )
    weight = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    found = stack.like(torch.full_like(stack.flat, torch.nan))
    backward(stack, batch, trace, weight, found, space)
    through_scaling(found, scaling)
    for at in range(3):
        model = ReferenceProbe(6, options, 0).double()
        arrays = {name: view[at] for name, view in stack.views.items()}
        model.load(arrays)
        parts = [
            (states[low:high] - mean[at]) * inverse[at, 0] for low, high in pairwise(tokens.offsets)
        ]
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(part), dtype=torch.bool) for part in parts], batch_first=True
        )
        alone = model(nn.utils.rnn.pad_sequence(parts, batch_first=True), mask, is_soft)
        torch.testing.assert_close(logits[:, at], alone.detach(), rtol=1e-10, atol=1e-10)
        (alone * weight[:, at]).sum().backward()
        gradient = {"value": model.value.grad, "mixer": model.mixer.weight.grad[0],
                    "bias": model.mixer.bias.grad, "query": model.query.grad}  # fmt: skip
        for nth, layer in enumerate(model.layers):
            gradient[f"token_weight_{nth}"] = layer.weight.grad
            gradient[f"token_bias_{nth}"] = layer.bias.grad
        for name, view in found.views.items():
            torch.testing.assert_close(view[at], gradient[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", ["logistic", "huber", "squared"])
@pytest.mark.parametrize(
    ("pooling", "training"),
    [
        ("attention", "hard"),
        ("multimax", "hard"),
        ("multimax", "soft"),
        ("rolling_multimax", "hard"),
        ("rolling_multimax", "soft"),
    ],
)
def test_models_trained_together_equal_modules_trained_alone(pooling, loss, training):
    options = replace(SMALL, pooling=pooling, loss=loss, training=training, weight_decay=0.01,
                      max_epochs=4, learning_rate=3e-3)  # fmt: skip
    tokens, train, validation, y = planted(high=15)
    if not options.is_binary:
        y = y * 2 + np.random.default_rng(5).normal(size=len(y))
    columns = columns_of(train, y, [0, 1, 2, 0], [3, 3, 3, 4], options.is_binary)
    found = fit_token_probes(tokens, train, validation, columns, options)
    for at in range(4):
        fold, seed = int(columns.fold[at]), int(columns.seed[at])
        model = ReferenceProbe(6, options, 0)
        model.load(draw(network_shape(6, options), seed))
        watched = validation[fold].astype(float)
        if options.is_binary:
            watched *= np.where(y > 0.5, columns.weight[:, at].max(), 1.0)
        scores, best, n_epochs = train_alone(
            model, tokens, train[fold], watched, y, columns.weight[:, at],
            orders_of(seed, len(y), int(train[fold].sum()), options),
        )  # fmt: skip
        np.testing.assert_allclose(found.decision[:, at], scores, atol=1e-5)
        assert (found.best_epoch[at], found.n_iter[at]) == (best, n_epochs)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_column_does_not_depend_on_those_it_is_solved_with(pooling):
    options = replace(SMALL, pooling=pooling, max_epochs=12, patience=2, learning_rate=0.01)
    tokens, train, validation, y = planted()
    noise = np.random.default_rng(8).permutation(y)
    both = np.stack([y, y, y, noise, noise, noise], axis=1)
    columns = columns_of(train, both, [0, 1, 2, 2, 1, 0], [0, 0, 1, 1, 0, 0])
    together = fit_token_probes(tokens, train, validation, columns, options)
    assert len(set(together.n_iter)) > 1
    for at in range(6):
        alone = fit_token_probes(tokens, train, validation, columns.take(np.array([at])), options)
        np.testing.assert_allclose(alone.decision[:, 0], together.decision[:, at], atol=1e-5)
        np.testing.assert_allclose(alone.calibration[0], together.calibration[at], atol=1e-3)
        assert alone.n_iter[0] == together.n_iter[at]


class Unrecorded:
    """Stands for `Replays`: does the work, and watches what would make a record wrong."""

    def __init__(self, recorder, *, is_warm=False):
        self.recorder = recorder
        self.is_warm = is_warm
        self.memory = {}

    def run(self, name, work):
        found = work()
        if isinstance(work, partial):  # a step, of a batch
            (step,) = work.args
            memory = step.batch.flat.data_ptr(), step.batch.shapes
            assert self.memory.setdefault(name, memory) == memory
            self.recorder.append(len(step.batch.row))
        return found


@pytest.mark.parametrize("training", ["hard", "soft"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_steps_that_could_be_recorded_are_the_same_steps(monkeypatch, pooling, training):
    monkeypatch.setattr(learner, "Replays", Unrecorded)
    options = replace(SMALL, pooling=pooling, training=training, max_epochs=12, patience=2,
                      learning_rate=0.01)  # fmt: skip
    tokens, train, validation, y = planted(high=40)
    noise = np.random.default_rng(8).permutation(y)
    columns = columns_of(train, np.stack([y, y, y, noise, noise, noise], 1), [0, 1, 2] * 2, [0] * 6)
    states = token_states(tokens, train, "cpu")
    watched = validation[columns.fold].T.astype(float)
    targets = Targets(columns.y, columns.weight, watched)
    scaling, sizes = states.scaling(columns.fold), []
    plain = train_stack(states, scaling, targets, options, 0)
    found = train_stack(states, scaling, targets, options, 0, sizes)
    assert max(sizes) == 32  # 24 of 72 and one that fills up, rounded
    assert {size % 8 for size in sizes} == {0}
    assert len(set(found.n_epochs)) > 1
    assert found.n_epochs.tolist() == plain.n_epochs.tolist()
    assert found.best_epoch.tolist() == plain.best_epoch.tolist()
    torch.testing.assert_close(found.stack.flat, plain.stack.flat, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(("n_fit", "sizes"), [(0, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_the_bytes_given_bound_the_models_trained_at_once(monkeypatch, n_fit, sizes):
    tokens, train, validation, y = planted()
    columns = columns_of(train, y, [0, 1, 2, 1, 0], [0] * 5)
    whole = fit_token_probes(tokens, train, validation, columns, SMALL)
    seen = []

    def counted(states, scaling, targets, *args):
        seen.append(targets.y.shape[1])
        return train_stack(states, scaling, targets, *args)

    monkeypatch.setattr(solve, "train_stack", counted)
    states = token_states(tokens, train, "cpu")
    shape, n_bytes = network_shape(6, SMALL), 0
    while n_fit and models_at_once(states, shape, SMALL, 3, n_bytes) < n_fit:
        n_bytes += 1000
    cut = fit_token_probes(tokens, train, validation, columns, SMALL, max_bytes=n_bytes)
    assert seen == sizes
    np.testing.assert_allclose(cut.decision, whole.decision, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_stack_takes_no_more_memory_than_was_counted(pooling):
    options = replace(SMALL, pooling=pooling, width=64, max_epochs=2)
    tokens, train, validation, y = planted(d=300, high=30)
    columns = columns_of(train, y, [0, 1, 2] * 8, [0] * 24)
    shape = network_shape(300, options)
    need = bytes_needed(shape, options, 24, tokens.lengths, 2**21, len(tokens.values))
    states = token_states(tokens, train, "cpu")
    targets = Targets(columns.y, columns.weight, columns.weight * 0 + validation[columns.fold].T)
    counter = Allocations()
    with counter:
        train_stack(states, states.scaling(columns.fold), targets, options, 0)
    assert counter.peak < need.fixed + 24 * need.per_model
    # and is no guess far above it either
    assert counter.peak > 0.3 * 24 * need.per_model
    # half of a GPU's 78 GiB takes hundreds of models of 5,120 features on sentences of real length
    wide = TokenProbeOptions(pooling)
    real = np.full(3000, 25)
    need = bytes_needed(network_shape(5120, wide), wide, 40, real, 2**27, 2**14)
    assert 500 < need.models_within(39 * 2**30) < 3000


class Allocations(TorchDispatchMode):
    """Peak bytes of tensors that are alive and were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known[storage.data_ptr()] = size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._freed, storage.data_ptr())
        self.peak = max(self.peak, self.now)
        return found

    def _freed(self, pointer: int) -> None:
        self.now -= self.known.pop(pointer, 0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_host_does_not_wait_within_an_epoch(pooling):
    """Reading a value from a device waits for it: as often for many steps as for few."""
    tokens, train, validation, y = planted()
    columns = columns_of(train, y, [0, 1, 2], [0, 0, 0])
    counts = []
    for batch_size in (8, 72):
        options = replace(SMALL, pooling=pooling, batch_size=batch_size)
        with Waits() as waits:
            fit_token_probes(tokens, train, validation, columns, options)
        counts.append(waits.n)
    assert counts[0] == counts[1]


class Waits(TorchDispatchMode):
    """Calls that hand a value to the host, or whose size depends on values."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.n += name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_models_that_read_parts_of_a_batch_learn_what_they_learn_alone(monkeypatch, pooling, depth):
    options = replace(SMALL, pooling=pooling, depth=depth, max_epochs=8, patience=1,
                      learning_rate=0.02, batch_size=24)  # fmt: skip
    tokens, _, _, y = planted(n=96, high=20)
    y = np.where(np.random.default_rng(2).random(96) < 0.25, 1 - y, y)
    problem = np.arange(96) // 12
    # Fold i tests problem i and watches the two that follow; a random fold fits no pattern.
    held = [np.isin(problem, [i, (i + 1) % 8, (i + 2) % 8]) for i in range(8)]
    train = np.stack([*(~each for each in held), np.random.default_rng(0).random(96) < 0.5])
    watched = [(problem == (i + 1) % 8) | (problem == (i + 2) % 8) for i in range(8)]
    validation = np.stack([*watched, ~train[8]])
    columns = columns_of(train, y, [*range(9), 3, 8], [0] * 11)
    whole = fit_token_probes(tokens, train, validation, columns, options)
    monkeypatch.setitem(ragged.PART_VALUES, "cpu", 1)
    monkeypatch.setattr(ragged, "MIN_GAP", 10)
    monkeypatch.setattr(ragged, "PRODUCTS_OF_A_PASS", 0)
    readers = ragged.Readers(columns.weight > 0, tokens.lengths, 48, "cpu")
    sentences = readers.order(np.arange(96))
    parts = readers.parts(sentences, tokens.lengths)
    assert max(len(part.ranges) for part in parts) > 1
    assert sum(high - low for low, high in parts[0].ranges) < 0.75 * len(tokens.values)
    cut = fit_token_probes(tokens, train, validation, columns, options)
    assert len(set(cut.n_iter)) > 1
    assert (cut.n_iter == whole.n_iter).all()
    np.testing.assert_allclose(cut.decision, whole.decision, atol=2e-5)


def test_watched_sentences_are_grouped_by_the_models_that_they_count_for():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 400, 60)
    for watched in (np.kron(np.eye(6), np.ones((10, 2))), rng.random((60, 12)) < 0.1):
        found = ragged.validation_groups(watched, lengths, 2**20)
        rows = np.concatenate([each.sentences for each in found])
        assert sorted(rows) == np.flatnonzero(watched.any(axis=1)).tolist()
        for each in found:
            rest = np.delete(watched[each.sentences], each.models, axis=1)
            assert not rest.any()
    found = ragged.validation_groups(np.kron(np.eye(6), np.ones((10, 2))), lengths, 2**20)
    assert [len(each.models) for each in found] == [2] * 6


def test_weights_that_nobody_stores_are_not_kept():
    tokens, train, validation, y = planted()
    columns = columns_of(train, y, [0, 1], [0, 7])
    kept = fit_token_probes(tokens, train, validation, columns, SMALL)
    slim = fit_token_probes(tokens, train, validation, columns, SMALL, keep_weights=False)
    assert not slim.arrays
    assert not slim.column(0)
    assert (slim.decision == kept.decision).all()
    assert (slim.calibration == kept.calibration).all()


def test_held_out_tokens_and_targets_change_nothing():
    tokens, train, validation, y = planted()
    columns = columns_of(train, y, [0, 0], [0, 1])
    before = fit_token_probes(tokens, train, validation, columns, SMALL)
    test = ~(train[0] | validation[0])
    values = tokens.values.clone()
    values[np.repeat(test, tokens.lengths)] += 7.0
    changed = FitRequest(columns.fold, np.where(test[:, None], 1 - columns.y, columns.y),
                      columns.weight, columns.seed)  # fmt: skip
    moved = RaggedTokens(values, tokens.offsets)
    after = fit_token_probes(moved, train, validation, changed, SMALL)
    np.testing.assert_allclose(after.decision[~test], before.decision[~test], atol=2e-5)
    np.testing.assert_allclose(after.mean[0], before.mean[0], rtol=1e-12)
    assert np.abs(after.decision[test] - before.decision[test]).max() > 0.01


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    tokens, train, validation, y = planted()
    columns = columns_of(train, y, [0, 1], [0, 7])
    first, second = (fit_token_probes(tokens, train, validation, columns, SMALL) for _ in range(2))
    assert (first.decision == second.decision).all()
    other = columns_of(train, y, [0, 1], [1, 8])
    different = fit_token_probes(tokens, train, validation, other, SMALL)
    assert (different.decision != first.decision).any(axis=0).all()


def test_early_stopping_restores_the_best_epoch():
    options = replace(SMALL, pooling="multimax", max_epochs=40, patience=3, learning_rate=0.05)
    tokens, train, validation, y = planted(seed=3)
    noisy = np.where(np.random.default_rng(0).random(len(y)) < 0.25, 1 - y, y)
    columns = columns_of(train, noisy, [0, 1, 2], [0, 0, 0])
    found = fit_token_probes(tokens, train, validation, columns, options)
    assert found.is_converged.any()
    for at in range(3):
        assert found.best_epoch[at] <= found.n_iter[at] - (3 if found.is_converged[at] else 0)
        # Trained for exactly the best number of epochs, nothing is left to restore.
        short = replace(options, max_epochs=int(found.best_epoch[at]), patience=100)
        again = fit_token_probes(tokens, train, validation, columns.take(np.array([at])), short)
        np.testing.assert_allclose(again.decision[:, 0], found.decision[:, at], atol=1e-5)


def test_without_validation_every_epoch_is_trained_and_the_last_is_kept():
    tokens, train, _, y = planted()
    columns = columns_of(train, y, [0, 1], [0, 0])
    options = replace(SMALL, pooling="multimax", max_epochs=60, learning_rate=0.02, width=16)
    found = fit_token_probes(tokens, train, None, columns, options)
    assert (found.n_iter == 60).all()
    assert (found.best_epoch == 60).all()
    assert not found.is_converged.any()
    assert not found.is_calibrated.any()
    assert average_precision_score(y[train[0]], found.decision[train[0], 0]) > 0.99


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_hot_token_is_found_where_the_mean_of_the_tokens_is_not_enough(pooling):
    rng = np.random.default_rng(0)
    n, d = 240, 8
    lengths = rng.integers(15, 61, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = rng.normal(size=(offsets[-1], d)).astype(np.float32)
    y = (rng.random(n) < 0.5).astype(float)
    at = offsets[:-1] + (rng.random(n) * lengths).astype(int)
    # Hot sentences have one large token; the others lift every token a little, to the same mean.
    values[at, 2] += np.where(y > 0, 9.0, 0.0)
    values[:, 2] += np.repeat(np.where(y > 0, 0.0, 9.0 / lengths), lengths)
    train, validation, test = (np.arange(n) % 6 < 4, np.arange(n) % 6 == 4, np.arange(n) % 6 == 5)
    tokens = RaggedTokens(torch.from_numpy(values), offsets)
    options = TokenProbeOptions(pooling, width=16, max_epochs=40, learning_rate=0.01, window=5)
    columns = columns_of(train[None], y, [0], [0])
    found = fit_token_probes(tokens, train[None], validation[None], columns, options)
    means = np.add.reduceat(values, offsets[:-1], axis=0) / lengths[:, None]
    single = RaggedTokens(
        torch.from_numpy(means.astype(np.float32)), np.arange(n + 1, dtype=np.int64)
    )
    of_means = fit_token_probes(single, train[None], validation[None], columns, options)
    assert average_precision_score(y[test], found.decision[test, 0]) > 0.9
    assert average_precision_score(y[test], of_means.decision[test, 0]) < 0.75


def test_half_precision_storage_is_read_as_it_is():
    tokens, train, validation, y = planted(dtype=torch.bfloat16)
    columns = columns_of(train, y, [0, 1], [0, 0])
    found = fit_token_probes(tokens, train, validation, columns, SMALL)
    wide = RaggedTokens(tokens.values.float(), tokens.offsets)
    expected = fit_token_probes(wide, train, validation, columns, SMALL)
    assert (found.decision == expected.decision).all()


def test_large_means_cost_no_digits():
    tokens, train, validation, y = planted()
    exact = RaggedTokens(torch.round(tokens.values * 64) / 64, tokens.offsets)
    moved = RaggedTokens(exact.values + 4096.0, exact.offsets)
    columns = columns_of(train, y, [0, 1], [0, 0])
    near, far = (fit_token_probes(each, train, validation, columns, SMALL)
                 for each in (exact, moved))  # fmt: skip
    np.testing.assert_allclose(far.decision, near.decision, atol=2e-4)


def test_a_feature_that_is_constant_in_training_keeps_its_scale():
    tokens, train, _, _ = planted()
    values = tokens.values.clone()
    values[:, 0] = 3.25
    values[:, 3] = torch.from_numpy(np.repeat(train[0], tokens.lengths)).float() * 1e-3 + 7.0
    states = token_states(RaggedTokens(values, tokens.offsets), train, "cpu")
    assert states.scale[0, [0, 3]].tolist() == [1.0, 1.0]
    raw = values.double().numpy()[np.repeat(train[1], tokens.lengths)]
    np.testing.assert_allclose(states.mean[1], raw.mean(0), rtol=1e-12)
    np.testing.assert_allclose(states.scale[1][1:], raw.std(0)[1:], rtol=1e-6)
    assert states.scale[1, 0] == 1.0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_stored_probe_scores_as_it_did(pooling):
    options = replace(SMALL, pooling=pooling, depth=2)
    tokens, train, validation, y = planted()
    columns = columns_of(train, y, [0, 2], [0, 5])
    found = fit_token_probes(tokens, train, validation, columns, options)
    for at in range(2):
        scores = score_token_probe(tokens, found.column(at), options)
        np.testing.assert_allclose(scores, found.decision[:, at], atol=2e-6)
    some = np.array([7, 3, 60])
    few = score_token_probe(tokens.take(some), found.column(0), options)
    np.testing.assert_allclose(few, found.decision[some, 0], atol=2e-6)


def test_calibration_on_validation_lowers_the_log_loss_of_weighted_logits():
    tokens, train, validation, _ = planted(n=360, seed=4)
    rng = np.random.default_rng(9)
    states = np.array([tokens.values[low:high, 1].max() for low, high in
                       zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)])  # fmt: skip
    y = (rng.random(360) < expit(states - np.quantile(states, 0.9))).astype(float)
    columns = columns_of(train, y, [0, 1, 2], [0, 0, 0])
    options = replace(SMALL, max_epochs=10, learning_rate=0.01)
    found = fit_token_probes(tokens, train, validation, columns, options)
    assert found.is_calibrated.all()
    for at in range(3):
        test = ~(train[at] | validation[at])
        before = log_loss(y[test], expit(found.decision[test, at]))
        assert log_loss(y[test], found.probability()[test, at]) < before - 0.05


def test_a_validation_side_of_one_class_leaves_the_logits_uncalibrated():
    tokens, train, validation, y = planted()
    y = np.where(validation[1], 0.0, y)
    columns = columns_of(train, y, [0, 1], [0, 0])
    found = fit_token_probes(tokens, train, validation, columns, SMALL)
    assert not found.is_calibrated[1]
    assert found.calibration[1].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(found.probability()[:, 1], expit(found.decision[:, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
def test_seeds_scatter_like_those_of_modules_trained_alone(pooling):
    """20 seeds beside 20 others of the modules, early stopping on, each on batches of its own.

    Kolmogorov-Smirnov and Mann-Whitney on PR-AUC, log loss and epochs: of the six p-values of a
    pooling the smallest, times six (Bonferroni, what Holm's first step is), is above .05.
    """
    options = replace(
        SMALL, pooling=pooling, max_epochs=15, patience=3, learning_rate=0.01, width=6
    )
    tokens, train, validation, y = planted(n=90, seed=6)
    flip = np.random.default_rng(1).random(90) < 0.15
    y = np.where(flip, 1 - y, y)
    columns = columns_of(train, y, [0] * 20, list(range(20)))
    found = fit_token_probes(tokens, train, validation, columns, options)
    watched = validation[0] * np.where(y > 0.5, columns.weight[:, 0].max(), 1.0)
    test, rows = ~(train[0] | validation[0]), np.flatnonzero(train[0])
    scores, epochs = [], []
    for seed in range(1000, 1020):
        generator = torch.Generator().manual_seed(seed)
        orders = [
            [rows[part.numpy()] for part in
             torch.randperm(len(rows), generator=generator).split(options.batch_size)]
            for _ in range(options.max_epochs)
        ]  # fmt: skip
        model = ReferenceProbe(6, options, seed)
        weight = columns.weight[:, 0]
        score, _, n_epochs = train_alone(model, tokens, train[0], watched, y, weight, orders)
        scores.append(score)
        epochs.append(n_epochs)
    assert len(set(epochs)) > 3
    pairs = [(found.n_iter, epochs)]
    for measure in (average_precision_score, lambda y, s: log_loss(y, expit(s))):
        ours = [measure(y[test], found.decision[test, at]) for at in range(20)]
        pairs.append((ours, [measure(y[test], score[test]) for score in scores]))
    p = [of(*pair).pvalue for pair in pairs for of in (ks_2samp, mannwhitneyu)]
    assert len(p) * min(p) > 0.05, p


def test_positive_weights_balance_the_classes_of_each_fold():
    train = np.array([[True, True, True, True, False], [False, True, True, True, True]])
    y = np.array([[1, 0], [0, 0], [0, 0], [0, 0], [1, 0]], dtype=float)
    found = positive_weights(y, np.array([0, 1]), train)
    assert found.T.tolist() == [[3, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def test_a_batch_that_a_model_learns_nothing_from_is_read_alone_or_together():
    tokens, train, validation, y = planted(n=24)
    options = replace(SMALL, batch_size=1, max_epochs=2)
    columns = columns_of(train, y, [0, 1, 2], [0, 0, 0])
    together = fit_token_probes(tokens, train, validation, columns, options)
    alone = fit_token_probes(tokens, train, validation, columns.take(np.array([1])), options)
    np.testing.assert_allclose(alone.decision[:, 0], together.decision[:, 1], atol=1e-5)


def test_settings_out_of_range_are_named_together():
    with pytest.raises(
        ConfigError, match=r"width 0, pooling 'mean', loss 'hinge', learning_rate nan"
    ):
        TokenProbeOptions("mean", loss="hinge", width=0, learning_rate=float("nan"))


def test_arguments_that_do_not_fit_are_refused():
    tokens, train, validation, y = planted(n=12)
    columns = columns_of(train, y, [0, 1], [0, 0])
    bad = FitRequest(columns.fold, columns.y * 2, columns.weight, None)
    with pytest.raises(DataError, match=r"no seed.*not 0 or 1"):
        fit_token_probes(tokens, train, validation, bad, SMALL)
    with pytest.raises(DataError, match="hold training sentences"):
        fit_token_probes(tokens, train, train, columns, SMALL)
    with pytest.raises(DataError, match="sentences of tokens"):
        fit_token_probes(tokens.take(np.arange(4)), train, validation, columns, SMALL)
    empty = validation & (np.arange(3) != 1)[:, None]
    with pytest.raises(NotEnoughDataError, match="fold 1"):
        fit_token_probes(tokens, train, empty, columns, SMALL)
    arrays = fit_token_probes(tokens, train, validation, columns, SMALL).column(0)
    with pytest.raises(DataError, match="width 2 for a probe of width 6"):
        score_token_probe(RaggedTokens.from_sentences([np.ones((2, 2))]), arrays, SMALL)
    with pytest.raises(NonFiniteError, match="sentence 0, token 0"):
        score_token_probe(RaggedTokens.from_sentences([np.full((2, 6), np.nan)]), arrays, SMALL)


def test_states_that_are_not_numbers_are_named():
    tokens, train, validation, y = planted(n=12)
    values = tokens.values.clone()
    values[int(tokens.offsets[5])] = torch.inf
    columns = columns_of(train, y, [0], [0])
    with pytest.raises(NonFiniteError, match="sentence 5"):
        fit_token_probes(RaggedTokens(values, tokens.offsets), train, validation, columns, SMALL)


def test_divergence_is_said():
    tokens, train, validation, y = planted()
    columns = columns_of(train, y * 1e25, [0], [0], is_binary=False)
    options = replace(SMALL, loss="squared", learning_rate=1e20)
    with pytest.raises(NonFiniteError, match="diverged"):
        fit_token_probes(tokens, train, validation, columns, options)


def test_steps_of_an_epoch_are_those_of_a_model_alone_or_a_quarter_more():
    learnt = np.arange(1, 20_000, 7)
    for batch_size in (1, 32):
        exact = -(-learnt // batch_size)
        found = np.array([ragged.n_batches(int(n), batch_size) for n in learnt])
        assert (found[exact <= 8] == exact[exact <= 8]).all()
        assert (found >= exact).all()
        assert (found <= exact * 5 / 4 + 1).all()
    # Folds of nearly equal size, as leaving one problem out makes them, share a stack.
    assert len({ragged.n_batches(n, 32) for n in range(2100, 2550)}) == 1


def test_folds_of_other_sizes_are_trained_as_they_are_alone():
    tokens, train, validation, y = planted()
    at = np.arange(72)
    train = train & np.stack([at >= 0, at % 3 > 0, at % 2 > 0])
    columns = columns_of(train, y, [0, 1, 2, 1], [0, 0, 0, 0])
    options = replace(SMALL, batch_size=8)
    together = fit_token_probes(tokens, train, validation, columns, options)
    for at in range(4):
        alone = fit_token_probes(tokens, train, validation, columns.take(np.array([at])), options)
        np.testing.assert_allclose(alone.decision[:, 0], together.decision[:, at], atol=1e-5)
