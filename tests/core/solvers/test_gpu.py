"""What the solvers give on CUDA is what they give on a CPU, whatever runs beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from taprobe_core.devices import products_in
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.networks import batch as network_batch
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks
from taprobe_core.solvers.tokens.pooling import POOLINGS, TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import RaggedTokens
from taprobe_core.solvers.tokens.solve import fit_token_probes, positive_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

Mask = NDArray[np.bool_]


def folds_of(problem: NDArray[np.int64]) -> tuple[Mask, Mask]:
    tests = range(int(problem.max()) + 1)
    validation = np.stack([problem == (test + 1) % len(tests) for test in tests])
    train = np.stack([problem != test for test in tests]) & ~validation
    return train, validation


def columns_of(
    y: NDArray[np.float64], train: Mask, n_seeds: int, *, is_balanced: bool
) -> FitRequest:
    fold = np.tile(np.arange(len(train)), n_seeds)
    targets = np.repeat(y[:, None], len(fold), axis=1)
    weight = train[fold].T.astype(np.float64)
    if is_balanced:
        weight = positive_weights(targets, fold, train)
    return FitRequest(fold, targets, weight, np.repeat(np.arange(n_seeds), len(train)))


@pytest.mark.parametrize("hidden", [(16,), (16, 8)])
@pytest.mark.parametrize("stopping", ["off", "rows", "problems"])
def test_networks_equal_those_of_a_cpu(hidden: tuple[int, ...], stopping: str) -> None:
    rng = np.random.default_rng(0)
    problem = np.repeat(np.arange(6), 50)
    X = rng.standard_normal((300, 24)).astype(np.float32) * 3 + 1
    y = (X[:, 0] + rng.standard_normal(300) > 1).astype(np.float64)
    train, validation = folds_of(problem)
    columns = columns_of(y, train, 2, is_balanced=False)
    options = NetworkOptions(hidden, max_iter=12, early_stopping=stopping)  # type: ignore[arg-type]
    watched = validation if stopping == "problems" else None
    here, there = (
        fit_networks(X, train, columns, options, watched, device) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(there.decision, here.decision, atol=2e-4)
    assert there.n_iter.tolist() == here.n_iter.tolist()
    fewer = fit_networks(X, train, columns, options, watched, "cuda", max_bytes=300_000)
    np.testing.assert_allclose(fewer.decision, there.decision, atol=2e-4)


@pytest.mark.parametrize("hidden", [(100,), (130, 8)])
def test_networks_that_read_rows_in_place_equal_those_that_gather(
    hidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    problem = np.repeat(np.arange(6), 50)
    X = rng.standard_normal((300, 150)).astype(np.float32) * 3 + 1
    y = (X[:, 0] + rng.standard_normal(300) > 1).astype(np.float64)
    train, _ = folds_of(problem)
    columns = columns_of(y, train, 2, is_balanced=False)
    options = NetworkOptions(hidden, max_iter=8, batch_size=70, alpha=0.01, early_stopping="off")
    monkeypatch.setattr(network_batch, "has_triton", lambda: False)
    gathered = fit_networks(X, train, columns, options, None, "cuda").decision
    monkeypatch.undo()
    in_place = fit_networks(X, train, columns, options, None, "cuda").decision
    with products_in("tf32", "cuda"):
        rounded = fit_networks(X, train, columns, options, None, "cuda").decision
    assert not (in_place == gathered).all()
    np.testing.assert_allclose(in_place, gathered, atol=1e-3)
    # Factors of 10 bits, 40 steps: a thousandth of the outputs' spread, and no more.
    apart = np.median(np.abs(rounded - gathered)) / gathered.std()
    assert 1e-5 < apart < 5e-3


@pytest.mark.parametrize("pooling", POOLINGS)
def test_token_probes_of_many_seeds_equal_those_of_a_cpu(pooling: str) -> None:
    rng = np.random.default_rng(1)
    problem = np.repeat(np.arange(5), 30)
    lengths = rng.integers(1, 30, len(problem))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = rng.standard_normal((offsets[-1], 20)).astype(np.float16)
    y = (rng.random(len(problem)) < 0.4).astype(np.float64)
    values[offsets[:-1], 0] += (6 * y).astype(np.float16)
    tokens = RaggedTokens(torch.from_numpy(values), offsets)
    train, validation = folds_of(problem)
    columns = columns_of(y, train, 7, is_balanced=True)
    options = TokenProbeOptions(pooling, width=8, max_epochs=4)  # type: ignore[arg-type]
    here, there = (
        fit_token_probes(tokens, train, validation, columns, options, device)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(there.decision, here.decision, atol=5e-4)
    assert there.n_iter.tolist() == here.n_iter.tolist()
    alone = fit_token_probes(
        tokens, train, validation, columns.take(np.array([11])), options, "cuda"
    )
    np.testing.assert_allclose(alone.decision[:, 0], there.decision[:, 11], atol=5e-4)


def test_products_are_rounded_only_while_asked() -> None:
    a, b = torch.randn(2, 256, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    exact = a.double() @ b.double()

    def error() -> float:
        return float(((a @ b).double() - exact).abs().max())

    assert error() < 1e-4
    with products_in("tf32", "cuda"):
        assert error() > 1e-3
    assert error() < 1e-4
