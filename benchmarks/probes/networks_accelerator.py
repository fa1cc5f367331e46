"""Networks on an accelerator: all at once, one at a time, and beside the CPU's results.

Run by `python -m benchmarks.probes.networks --device cuda`. The clock is wall seconds between
synchronisations; scikit-learn's network, which stands beside them, is timed in CPU seconds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.probes.features import make_probe_data
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks


def make_columns(
    y: NDArray[np.float64], train: NDArray[np.bool_], fold: Sequence[int], seed: Sequence[int]
) -> FitRequest:
    """Return columns of one target, of weight 1 on their training rows."""
    folds = np.asarray(fold, np.int64)
    return FitRequest(
        folds,
        np.repeat(y[:, None], len(folds), axis=1),
        train[folds].T.astype(np.float64),
        np.asarray(seed, np.int64),
    )


def accelerator(device: torch.device, n_epochs: int, n_seeds: int) -> None:
    """Time 20 folds x seeds of one hidden layer of 100 together, and one network alone."""
    data = make_probe_data("iid", 3983, 4096, n_problems=20)
    train, y, X = data.lopo_train(20), data.anchors(90), data.features
    pairs = [(fold, seed) for fold in range(20) for seed in range(n_seeds)]
    columns = make_columns(y, train, *zip(*pairs, strict=True))
    kept = train[0]
    rows = torch.from_numpy(StandardScaler().fit_transform(X[kept])).to(device)
    target = torch.from_numpy(y[kept].astype(np.float32)).to(device)

    def ours(columns: FitRequest) -> float:
        """Seconds of an epoch, from two runs: what is done once falls out of the difference."""
        seconds = []
        for n in (1, 2, 2 + n_epochs):  # the first is to warm up
            options = NetworkOptions(hidden=(100,), max_iter=n, early_stopping="off")
            fit = partial(fit_networks, X, train, columns, options, None, device)
            seconds.append(wall(device, partial(fit, keep_weights=False)))
        fixed = seconds[1] - 2 * (seconds[2] - seconds[1]) / n_epochs
        print(f"  {len(columns)} of ours: {fixed:.2f} s once (moments, weights, scores), then "
              f"{seconds[2] - seconds[1]:.2f} s for {n_epochs} epochs")  # fmt: skip
        return (seconds[2] - seconds[1]) / n_epochs

    print(f"\n{describe(device)}: 3983 x 4096, hidden (100,)")
    for precision, name in (("highest", "fp32"), ("high", "TF32")):
        torch.set_float32_matmul_precision(precision)
        together, alone = ours(columns) / len(columns), ours(columns.take(np.arange(1)))
        torch_alone(rows, target, 1)
        eager = wall(device, partial(torch_alone, rows, target, n_epochs)) / n_epochs
        print(f"{name}, ms per network and epoch: {1e3 * together:.3f} together, {1e3 * alone:.3f} "
              f"ours alone, {1e3 * eager:.3f} torch.nn alone; gain {alone / together:.0f} x and "
              f"{eager / together:.0f} x (bar: 50)", flush=True)  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    theirs = looped_alone(X[kept], y[kept], n_epochs) / n_epochs
    print(f"scikit-learn on one core of this machine: {1e3 * theirs:.1f} CPU ms per epoch of one "
          f"network")  # fmt: skip
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


def describe(device: torch.device) -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def torch_alone(X: torch.Tensor, y: torch.Tensor, n_epochs: int) -> None:
    """Train one network as one writes it in PyTorch: modules, autograd, torch.optim.Adam."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(X.shape[1], 100), torch.nn.ReLU(), torch.nn.Linear(100, 1)
    ).to(X.device)
    optimiser = torch.optim.Adam(model.parameters())
    loss_of = torch.nn.BCEWithLogitsLoss()
    for _ in range(n_epochs):
        total = 0.0
        for batch in torch.randperm(len(X), device=X.device).split(200):
            optimiser.zero_grad()
            loss = loss_of(model(X[batch])[:, 0], y[batch])
            loss.backward()
            optimiser.step()
            total += loss.item()  # as loops that log their loss do


def looped_alone(X: NDArray[np.float32], y: NDArray[np.float64], n_epochs: int) -> float:
    """Return CPU seconds of scikit-learn's network for some epochs, on one thread."""
    rows = StandardScaler().fit_transform(X)
    model = MLPClassifier((100,), max_iter=n_epochs, n_iter_no_change=n_epochs, random_state=0)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        begin = time.process_time()
        model.fit(rows, y.astype(np.int64))
        seconds = time.process_time() - begin
    if model.n_iter_ != n_epochs:
        raise RuntimeError(f"scikit-learn stopped after {model.n_iter_} of {n_epochs} epochs")
    return seconds


def same_as_cpu(device: torch.device) -> None:
    """Print how far results on the device are from those on the CPU."""
    data = make_probe_data("ill", 700, 48, n_problems=10, seed=1)
    train, y = data.lopo_train(10), data.anchors(85)
    columns = make_columns(y, train, list(range(10)) * 4, np.repeat(range(4), 10).tolist())
    validation = ~train
    for early_stopping in ("off", "rows", "problems"):
        options = NetworkOptions(
            hidden=(32, 16), max_iter=30, patience=5, early_stopping=early_stopping
        )
        here, there = (
            fit_networks(data.features, train, columns, options, validation, each)
            for each in ("cpu", device)
        )
        worst = abs(here.decision - there.decision).max(axis=0)
        print(f"CPU and {device.type}, stopping {early_stopping:9}: median of largest differences "
              f"{np.median(worst):.1e}, largest {worst.max():.1e}, "
              f"{(here.n_iter != there.n_iter).sum()} of 40 stop elsewhere")  # fmt: skip


def wall(device: torch.device, run: Callable[[], Any]) -> float:
    """Return wall seconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
