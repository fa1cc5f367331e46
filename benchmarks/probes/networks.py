"""Batched networks beside looped scikit-learn, and beside one network at a time on an accelerator.

    python -m benchmarks.probes.networks                        speed and agreement on a CPU
    python -m benchmarks.probes.networks --sections demo        one section
    python -m benchmarks.probes.networks --device cuda          400 networks on an accelerator

On a CPU the clock is CPU seconds of the process, one thread; ours and scikit-learn's fits alternate
in one process, of the same folds and seeds, and the agreement of these very fits stands beside the
ratio. On an accelerator it is wall seconds between synchronisations.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp, mannwhitneyu
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score, r2_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.probes.features import Kind, SyntheticProbeData, make_probe_data
from benchmarks.probes.networks_accelerator import accelerator, make_columns, same_as_cpu
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks

ALPHA = 0.01


class Shape(NamedTuple):
    """One size to be timed: rounds of `n_ours` fits of ours and `n_theirs` of scikit-learn's."""

    name: str
    n_rows: int
    n_features: int
    n_folds: int
    seeds: tuple[int, ...]
    options: NetworkOptions
    n_ours: int
    n_theirs: int
    n_rounds: int


DEMO = NetworkOptions(hidden=(32,), max_iter=60, early_stopping="off")
SHAPES = {
    "demo": Shape("demo", 280, 128, 21, tuple(range(5)), DEMO, 105, 15, 3),
    "demo_stopping": Shape(
        "demo, stopping early",
        280,
        128,
        21,
        tuple(range(5)),
        NetworkOptions(hidden=(32,)),
        105,
        7,
        2,
    ),
    "real_100_100": Shape(
        "real (100, 100)", 3983, 4096, 20, (0,), NetworkOptions(hidden=(100, 100)), 4, 2, 3
    ),
    "real_100": Shape("real (100,)", 3983, 4096, 20, (0,), NetworkOptions(hidden=(100,)), 4, 2, 3),
}
SECTIONS = (*SHAPES, "agreement", "rounding")


def fit_one(
    X: NDArray[Any], train: NDArray[np.bool_], y: NDArray[Any], seed: int, o: NetworkOptions
) -> tuple[NDArray[np.float64], int]:
    """Return output (logit or value) on all rows and epochs of scikit-learn's network."""
    scaler = StandardScaler().fit(X[train])
    kind = MLPClassifier if o.is_classifier else MLPRegressor
    model = kind(
        hidden_layer_sizes=o.hidden,
        max_iter=o.max_iter,
        alpha=o.alpha,
        learning_rate_init=o.learning_rate,
        early_stopping=o.early_stopping == "rows",
        n_iter_no_change=o.patience,
        random_state=seed,
    )
    # float32 features and targets throughout: its faster path
    target = y[train].astype(np.int64 if o.is_classifier else np.float32)
    model.fit(scaler.transform(X[train]), target)
    state = scaler.transform(X)
    for layer, (weight, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        state = (np.maximum(state, 0) if layer else state) @ weight + bias
    return state[:, 0].astype(np.float64), model.n_iter_


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds of this process, and the result."""
    begin = time.process_time()
    found = run()
    return time.process_time() - begin, found


def speed(shape: Shape) -> None:
    """Time both in alternation and compare the fits that both made."""
    data = make_probe_data("ill", shape.n_rows, shape.n_features, n_problems=21)
    train, tests = data.lopo_train(shape.n_folds, n_val=0), data.test_rows(shape.n_folds)
    X, y = data.features, data.anchors(90)
    pairs = [(fold, seed) for seed in shape.seeds for fold in range(shape.n_folds)]
    ours, theirs, epochs, faults = [], [], [], []
    for turn in range(shape.n_rounds):
        chosen = [pairs[(turn * shape.n_ours + i) % len(pairs)] for i in range(shape.n_ours)]
        folds = sorted({fold for fold, _ in chosen})
        columns = make_columns(
            y, train[folds], [folds.index(fold) for fold, _ in chosen], [seed for _, seed in chosen]
        )
        seconds, found = cpu_seconds(partial(fit_networks, X, train[folds], columns, shape.options))
        ours.append(seconds / len(chosen))
        epochs.append(found.n_iter.mean())
        step = max(1, len(chosen) // shape.n_theirs)
        for place in range(0, step * shape.n_theirs, step):
            fold, seed = chosen[place]
            seconds, (decision, n_iter) = cpu_seconds(
                partial(fit_one, X, train[fold], y, seed, shape.options)
            )
            theirs.append((seconds, n_iter))
            mine, rows = found.decision[:, place], tests[fold]
            precision = [average_precision_score(y[rows], each[rows]) for each in (mine, decision)]
            faults.append(
                (
                    abs(mine - decision).max(),
                    abs(precision[0] - precision[1]),
                    n_iter != found.n_iter[place],
                )
            )
    theirs_s, theirs_epochs = np.array(theirs).mean(axis=0)
    ours_s, ours_epochs = np.mean(ours), np.mean(epochs)
    ours_ms, theirs_ms = 1e3 * ours_s / ours_epochs, 1e3 * theirs_s / theirs_epochs
    worst, gap, is_other = zip(*faults, strict=True)
    print(
        f"{shape.name:22} {ours_s:8.4f} {theirs_s:8.4f} {theirs_s / ours_s:6.2f}x "
        f"{ours_ms:9.3f} {theirs_ms:9.3f} {theirs_ms / ours_ms:6.2f}x {ours_epochs:6.1f} "
        f"{len(faults):5d} {sum(is_other):5d} {max(worst):9.1e} {max(gap):9.1e}",
        flush=True,
    )


SPEED_HEAD = (
    f"{'':22} {'CPU s per fit':^25} {'CPU ms per epoch':^27}\n"
    f"{'':22} {'ours':>8} {'sklearn':>8} {'ratio':>7} {'ours':>9} {'sklearn':>9} {'ratio':>7} "
    f"{'epochs':>6} {'pairs':>5} {'other':>5} {'max diff':>9} {'AP diff':>9}"
)


def agreement(n_seeds: int = 20) -> None:
    """Test whether our seeds and other seeds of scikit-learn's differ in distribution.

    Kolmogorov-Smirnov and Mann-Whitney on the test problem's PR-AUC (R^2 of regressors) and on the
    number of epochs; not distinguishable: no p-value below .01 after Holm over the table.
    """
    settings = (
        NetworkOptions(hidden=(32,), learning_rate=5e-3),
        NetworkOptions(hidden=(32, 16), learning_rate=5e-3),
        NetworkOptions(hidden=(32,), learning_rate=5e-3, is_classifier=False),
        NetworkOptions(hidden=(16,), max_iter=40, early_stopping="off"),
    )
    kinds: tuple[Kind, ...] = ("iid", "ill")
    cases = [(kind, options) for kind in kinds for options in settings]
    found = []
    print(f"\nDistribution over {n_seeds} seeds (seeds of ours: 1000 and on, of theirs: 0 and on)")
    print(f"{'':34} {'ours':>15} {'scikit-learn':>15} {'KS p':>7} {'MW p':>7}")
    for kind, options in cases:
        data = make_probe_data(kind, 700, 48, n_problems=10, seed=1)
        measures = _measures(data, options, n_seeds)
        name = f"{kind} {'class' if options.is_classifier else 'value'} {options.hidden} "
        for measure, (ours, theirs) in measures.items():
            if np.ptp([*ours, *theirs]) == 0:
                print(f"{name + measure:34} {ours[0]:15.3f} {theirs[0]:15.3f}   equal throughout")
                continue
            tests = ks_2samp(ours, theirs).pvalue, mannwhitneyu(ours, theirs).pvalue
            found += list(tests)
            spread = [f"{np.mean(each):7.3f} ± {np.std(each):5.3f}" for each in (ours, theirs)]
            print(f"{name + measure:34} {spread[0]:>15} {spread[1]:>15} {tests[0]:7.3f} "
                  f"{tests[1]:7.3f}", flush=True)  # fmt: skip
    smallest = min(1.0, min(found) * len(found))
    verdict = "not distinguishable" if smallest >= ALPHA else "DIFFERENT"
    print(f"{len(found)} tests, smallest p after Holm {smallest:.3f}: {verdict} at {ALPHA}")


def rounding() -> None:
    """Print how far float32 takes ours and scikit-learn's from scikit-learn's float64 network."""
    print("\nLargest difference of logits from scikit-learn in float64 (1500 x 1024, (100, 100))")
    print(f"{'':24} {'ours':>9} {'sklearn float32':>16}")
    kinds: tuple[Kind, ...] = ("iid", "ill")
    for kind in kinds:
        data = make_probe_data(kind, 1500, 1024, n_problems=21)
        X, y, train = data.features, data.anchors(90), data.lopo_train(3, n_val=0)
        for n_epochs in (5, 15, 30):
            options = NetworkOptions(max_iter=n_epochs, early_stopping="off")
            columns = make_columns(y, train, range(3), [0] * 3)
            ours = fit_networks(X, train, columns, options).decision.T
            far = []
            for fold, mine in enumerate(ours):
                exact, _ = fit_one(X.astype(np.float64), train[fold], y, 0, options)
                single, _ = fit_one(X, train[fold], y, 0, options)
                far.append([abs(each - exact).max() for each in (mine, single)])
            worst = np.max(far, axis=0)
            print(f"{kind}, {n_epochs:2d} epochs, 3 folds    {worst[0]:9.1e} {worst[1]:16.1e}",
                  flush=True)  # fmt: skip


def _measures(
    data: SyntheticProbeData, options: NetworkOptions, n_seeds: int
) -> dict[str, tuple[list[float], list[float]]]:
    train, rows = data.lopo_train(1, n_val=0), data.test_rows(1)[0]
    y = data.anchors(85) if options.is_classifier else data.importance
    measure = average_precision_score if options.is_classifier else r2_score
    columns = make_columns(y, train, [0] * n_seeds, range(1000, 1000 + n_seeds))
    ours = fit_networks(data.features, train, columns, options)
    theirs = [fit_one(data.features, train[0], y, seed, options) for seed in range(n_seeds)]
    return {
        "PR-AUC" if options.is_classifier else "R^2": (
            [measure(y[rows], each[rows]) for each in ours.decision.T],
            [measure(y[rows], each[rows]) for each, _ in theirs],
        ),
        "epochs": ([float(each) for each in ours.n_iter], [float(each) for _, each in theirs]),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probes.networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, or cuda for the accelerator's part alone")
    add(
        "--sections",
        default=",".join(SECTIONS),
        help=f"of {','.join(SECTIONS)} on a CPU; or accelerator, to try that part on any device",
    )
    add("--epochs", type=int, default=10, help="timed on the accelerator")
    add("--seeds", type=int, default=20, help="on the accelerator; 20 folds of each")  # fmt: skip
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type != "cpu" or given.sections == "accelerator":
        same_as_cpu(device)
        accelerator(device, given.epochs, given.seeds)
        return
    torch.set_num_threads(1)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        others = {"agreement": agreement, "rounding": rounding}
        print(SPEED_HEAD)
        for section in given.sections.split(","):
            others[section]() if section in others else speed(SHAPES[section])


if __name__ == "__main__":
    main()
