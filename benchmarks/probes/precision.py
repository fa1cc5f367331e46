"""Networks and token probes in TF32 beside float32: are their results of the same distribution?

    python -m benchmarks.probes.precision --device cuda

20 seeds in float32 and 20 other seeds in TF32, early stopping on, 1,500 sentences x 1,024 `ill`
features of which one problem is tested; Kolmogorov-Smirnov and Mann-Whitney on what a probe reaches
and on its epochs, p-values by Holm. Beside them the largest change of PR-AUC or R² of one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp, mannwhitneyu
from sklearn.metrics import average_precision_score, r2_score

from benchmarks.probes.features import SyntheticProbeData, make_probe_data
from benchmarks.probes.networks_accelerator import make_columns
from benchmarks.probes.tokens import DEMO, Data, make
from taprobe_core.devices import products_in
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks
from taprobe_core.solvers.tokens.pooling import POOLINGS, TokenProbeOptions
from taprobe_core.solvers.tokens.solve import fit_token_probes, positive_weights
from taprobe_core.study import Precision

N_SEEDS = 20
WIDER = replace(DEMO, d=512, n_sentences=30)
Floats = NDArray[np.float64]


class Reached(NamedTuple):
    """By seed: PR-AUC or R² on the tested problem, and epochs."""

    value: Floats
    n_iter: Floats


Fit = Callable[[list[int]], Reached]


def network(data: SyntheticProbeData, device: str, *, is_classifier: bool) -> Fit:
    """Return what fits networks of some seeds."""
    train, rows = data.lopo_train(1, n_val=0), data.test_rows(1)[0]
    y = data.anchors(85) if is_classifier else data.importance
    measure = average_precision_score if is_classifier else r2_score
    options = NetworkOptions((100,), is_classifier=is_classifier)

    def fit(seeds: list[int]) -> Reached:
        columns = make_columns(y, train, [0] * len(seeds), seeds)
        found = fit_networks(data.features, train, columns, options, None, device)
        values = [measure(y[rows], each[rows]) for each in found.decision.T]
        return Reached(np.array(values), found.n_iter.astype(float))

    return fit


def token_probe(data: Data, pooling: str, device: str) -> Fit:
    """Return what fits token probes of some seeds."""
    options = TokenProbeOptions(pooling, width=64, max_epochs=30)  # type: ignore[arg-type]
    test = ~(data.train[0] | data.validation[0])

    def fit(seeds: list[int]) -> Reached:
        fold = np.zeros(len(seeds), np.int64)
        y = np.tile(data.y[:, None], len(seeds))
        weight = positive_weights(y, fold, data.train)
        columns = FitRequest(fold, y, weight, np.array(seeds))
        found = fit_token_probes(data.tokens, data.train, data.validation, columns, options, device)
        values = [average_precision_score(data.y[test], each[test]) for each in found.decision.T]
        return Reached(np.array(values), found.n_iter.astype(float))

    return fit


def main() -> None:
    """Fit both and print the tests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device: str = parser.parse_args().device
    features = make_probe_data("ill", 1500, 1024, n_problems=12, seed=5)
    tokens = make(WIDER, 1)
    noisy = np.random.default_rng(4).random(len(tokens.y)) < 0.1
    tokens = Data(tokens.tokens, np.where(noisy, 1 - tokens.y, tokens.y), tokens.train,
                  tokens.validation)  # fmt: skip
    fits = {
        "network, anchors": network(features, device, is_classifier=True),
        "network, importance": network(features, device, is_classifier=False),
        **{each: token_probe(tokens, each, device) for each in POOLINGS},
    }
    print(f"{'20 seeds':22} {'float32':>15} {'TF32':>15} {'KS p':>7} {'MW p':>7} {'one seed':>9}")
    found: list[float] = []
    for name, fit in fits.items():
        exact = in_precision(fit, list(range(N_SEEDS)), "float32", device)
        rounded = in_precision(fit, list(range(100, 100 + N_SEEDS)), "tf32", device)
        again = in_precision(fit, list(range(N_SEEDS)), "tf32", device)
        moved = float(np.abs(again.value - exact.value).max())
        for field in Reached._fields:
            pair = getattr(exact, field), getattr(rounded, field)
            tests = [1.0, 1.0]
            if not np.array_equal(*map(np.unique, pair)):
                tests = [ks_2samp(*pair).pvalue, mannwhitneyu(*pair).pvalue]
            found += tests
            spread = [f"{each.mean():7.3f} ± {each.std():5.3f}" for each in pair]
            print(f"{name + ', ' + field:22.22} {spread[0]:>15} {spread[1]:>15} {tests[0]:7.3f} "
                  f"{tests[1]:7.3f} {moved:9.1e}", flush=True)  # fmt: skip
    print(f"{len(found)} tests, smallest p {min(found):.3f}, by Holm "
          f"{min(1.0, min(found) * len(found)):.3f}")  # fmt: skip


def in_precision(fit: Fit, seeds: list[int], precision: Precision, device: str) -> Reached:
    """Fit some seeds with products of a precision."""
    with products_in(precision, device):
        return fit(seeds)


if __name__ == "__main__":
    main()
