"""Linear probes: scikit-learn one fit at a time beside ours in one batch, in one process.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.probes.linear

CPU seconds by `time.process_time`, one thread. Folds hold out one problem to test and three to
validate; six targets are anchors at six percentiles. scikit-learn fits the folds and targets named
in the output, ours fits them all; agreement is taken where both did. Standardisation is inside both
times: scikit-learn pays it per fit, ours once per feature matrix. Ours stops at the tolerance of
recipes.

    python -m benchmarks.probes.linear --before CHECKOUT [--device cuda]

fits the same logistic columns by this version and by another checkout's, each in a process of its
own, in turn, and prints the ratio of seconds (CPU seconds, or wall on a GPU) and on how many folds
PR-AUC is equal to six digits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import auc, precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.probes.features import Kind, SyntheticProbeData, make_probe_data
from taprobe_core.probes.dense import tolerance_of
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import balanced_weights, solve_logistic
from taprobe_core.solvers.linear.ridge import solve_ridge

PERCENTILES = (90, 85, 87, 92, 93, 95)


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of features with its folds."""

    data: SyntheticProbeData
    features: NDArray[np.float64]
    train: NDArray[np.bool_]
    test: list[NDArray[np.intp]]

    @property
    def n_folds(self) -> int:
        """Folds."""
        return len(self.train)


def _path_of(checkout: Path) -> str:
    """The checkout's packages before all that are found already."""
    return os.pathsep.join([str(checkout.resolve()), os.environ.get("PYTHONPATH", "")])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probes.linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=3983)
    add("--features", type=int, default=4096)
    add("--folds", type=int, default=20)
    add("--targets", type=int, default=6, help="of the logistic batch, at most 6")
    add("--peer-folds", type=int, default=4, help="folds that scikit-learn fits, spread evenly")
    add("--kinds", default="iid,ill")
    add("--seed", type=int, default=0)
    add("--before", type=Path, help="another checkout, to run beside this one")
    add("--rounds", type=int, default=2, help="of both versions, with --before")
    add("--device", default="cpu", help="with --before")
    return parser.parse_args(arguments)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the CPU seconds that it took."""
    begin = time.process_time()
    result = function()
    return result, time.process_time() - begin


def pr_auc(y: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """Area under the precision-recall curve by trapezoids."""
    precision, recall, _ = precision_recall_curve(y, score)
    return float(auc(recall, precision))


def probability(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logistic function."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))


def logistic_columns(case: Case, n_targets: int) -> FitRequest:
    """Return anchors at `n_targets` percentiles on every fold, weighed by class."""
    chosen = PERCENTILES[:n_targets]
    fold = np.repeat(np.arange(case.n_folds), n_targets)
    labels = np.stack([case.data.anchors(each) for each in chosen], axis=1)
    y = np.ascontiguousarray(labels[:, np.tile(np.arange(n_targets), case.n_folds)])
    return FitRequest(fold, y, balanced_weights(y, case.train, fold))


_OTHER = """
import json, sys, time
import numpy as np, torch
from taprobe_core.probes.dense import tolerance_of
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix
from taprobe_core.solvers.linear.logistic import solve_logistic
device, folder = sys.argv[1:]
torch.set_num_threads(1)
given = np.load(folder + "/given.npz")
columns = FitRequest(given["fold"], given["y"], given["weight"])
clock = time.process_time if device == "cpu" else time.perf_counter
for is_warm in (False, True) if device != "cpu" else (True,):
    begin = clock()
    matrix = FoldMatrix(given["train"], given["features"], device=device)
    C = np.ones(len(columns))
    found = solve_logistic(matrix, columns, C, tol=tolerance_of(matrix))
    seconds = clock() - begin
np.save(folder + "/decision.npy", found.decision)
print(json.dumps([seconds, float(found.n_iter.mean())]))
"""
"""What both versions run, in a process of its own: what it imports is the same in both."""


def beside(case: Case, n_targets: int, before: Path, device: str, n_rounds: int) -> None:
    """Print seconds of the version before over ours, and where their PR-AUC is equal."""
    columns = logistic_columns(case, n_targets)
    seconds: dict[str, list[float]] = {"before": [], "ours": []}
    decision: dict[str, NDArray[np.float64]] = {}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(
            Path(folder) / "given.npz",
            features=case.features,
            train=case.train,
            **{name: getattr(columns, name) for name in ("fold", "y", "weight")},
        )
        roots = {"before": before.resolve(), "ours": Path(__file__).resolve().parents[2]}
        for _ in range(n_rounds):
            for name, root in roots.items():
                done = subprocess.run(  # noqa: S603
                    [sys.executable, "-c", _OTHER, device, folder],
                    cwd=root,
                    env={**os.environ, "PYTHONPATH": _path_of(root)},
                    stdout=subprocess.PIPE,
                    check=True,
                )
                used, n_iter = json.loads(done.stdout)
                seconds[name].append(used)
                decision[name] = np.load(Path(folder) / "decision.npy")
                print(f"  {name:6} {used:7.2f} s, iterations {n_iter:.1f}", flush=True)
    n_equal = 0
    for column, fold in enumerate(columns.fold):
        rows = case.test[fold]
        y = columns.y[rows, column]
        areas = {round(pr_auc(y, each[rows, column]), 6) for each in decision.values()}
        n_equal += len(areas) == 1
    gap = np.abs(probability(decision["ours"]) - probability(decision["before"])).max()
    ratio = min(seconds["before"]) / min(seconds["ours"])
    print(f"  => {ratio:.2f} x as fast as before; PR-AUC equal on {n_equal} of {len(columns)} "
          f"columns, largest difference of a probability {gap:.1e}")  # fmt: skip


def logistic(case: Case, n_targets: int, peer_folds: NDArray[np.intp]) -> None:
    """Print the logistic table of one case."""
    columns = logistic_columns(case, n_targets)
    fold, y = columns.fold, columns.y

    def ours() -> Any:
        matrix = FoldMatrix(case.train, case.data.features)
        return solve_logistic(matrix, columns, np.ones(len(fold)), tol=tolerance_of(matrix))

    solution, seconds = timed(ours)
    own = seconds / len(fold)
    print(f"  ours: {len(fold)} columns {seconds:.2f} s, {own:.4f} s a fit, "
          f"iterations {solution.n_iter.mean():.1f} (max {solution.n_iter.max()})")  # fmt: skip
    rows = []
    for index in peer_folds:
        column = int(index) * n_targets
        train, test = case.train[index], case.test[index]
        logits = {"ours": solution.decision[:, column]}
        cost, steps = {}, {}
        for name, options in (("default", {"max_iter": 1000}), ("tol 1e-8", TIGHT)):
            pipeline = make_pipeline(
                StandardScaler(), LogisticRegression(class_weight="balanced", **options)
            )
            target = y[train, column]
            _, cost[name] = timed(lambda p=pipeline, t=target, r=train: p.fit(case.features[r], t))
            logits[name] = pipeline.decision_function(case.features)
            steps[name] = int(pipeline[-1].n_iter_[0])
        area = {name: pr_auc(y[test, column], each[test]) for name, each in logits.items()}
        gap = {
            name: float(np.abs(probability(each) - probability(logits["tol 1e-8"])).max())
            for name, each in logits.items()
        }
        rows.append((cost["default"], cost["tol 1e-8"], gap["ours"], gap["default"]))
        equal = "equal" if round(area["ours"], 6) == round(area["tol 1e-8"], 6) else "DIFFERENT"
        print(f"  fold {index:2d}: default {cost['default']:.2f} s ({steps['default']} it), "
              f"tol 1e-8 {cost['tol 1e-8']:.2f} s ({steps['tol 1e-8']} it); max |p - p(1e-8)| "
              f"ours {gap['ours']:.1e}, default {gap['default']:.1e}; PR-AUC ours "
              f"{area['ours']:.6f}, 1e-8 {area['tol 1e-8']:.6f} {equal}, "
              f"default {area['default']:.6f}")  # fmt: skip
    default, tight = (float(np.mean([row[each] for row in rows])) for each in range(2))
    print(f"  => scikit-learn default {default:.3f} s ({default / own:.1f} x ours), "
          f"tol 1e-8 {tight:.3f} s ({tight / own:.1f} x ours)")  # fmt: skip


TIGHT = {"tol": 1e-8, "max_iter": 100_000}


def ridge(case: Case, peer_folds: NDArray[np.intp]) -> None:
    """Print the ridge table of one case."""
    n_folds = case.n_folds
    rng = np.random.default_rng(1)

    def columns(n_targets: int) -> FitRequest:
        fold = np.repeat(np.arange(n_folds), n_targets)
        noise = rng.standard_normal((case.train.shape[1], len(fold)))
        noise[:, ::n_targets] = 0
        y = case.data.importance[:, None] + noise
        return FitRequest(fold, y, case.train[fold].T.astype(np.float64))

    def ours(asked: FitRequest) -> Any:
        matrix = FoldMatrix(case.train, case.data.features)
        return solve_ridge(matrix, asked, np.ones(len(asked)))

    n_more = 6
    one, more = columns(1), columns(n_more)
    solution, seconds = timed(lambda: ours(one))
    _, seconds_more = timed(lambda: ours(more))
    own = seconds / n_folds
    extra = (seconds_more - seconds) / (n_folds * (n_more - 1))
    print(f"  ours: {n_folds} fits {seconds:.2f} s, {own:.4f} s a fit; each further target "
          f"{extra:.4f} s; iterations {solution.n_iter.max()}")  # fmt: skip
    cost, gap = [], []
    for index in peer_folds:
        train = case.train[index]
        pipeline = make_pipeline(StandardScaler(), Ridge(1.0))
        target = one.y[train, index]
        _, used = timed(lambda p=pipeline, t=target, r=train: p.fit(case.features[r], t))
        cost.append(used)
        difference = pipeline.predict(case.features) - solution.decision[:, index]
        gap.append(float(np.abs(difference).max()))
    peer = float(np.mean(cost))
    print(f"  => scikit-learn {peer:.3f} s ({peer / own:.1f} x a fit, {peer / extra:.1f} x a "
          f"further target), max score difference {max(gap):.1e}")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run every case."""
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    kinds: list[Kind] = options.kinds.split(",")
    peer_folds = np.unique(
        np.linspace(0, options.folds - 1, min(options.peer_folds, options.folds)).round()
    ).astype(np.intp)
    for kind in kinds:
        data = make_probe_data(kind, options.rows, options.features, seed=options.seed)
        case = Case(
            data,
            data.features.astype(np.float64),
            data.lopo_train(options.folds),
            data.test_rows(options.folds),
        )
        shape = f"{kind}: {options.rows} rows x {options.features} features, {options.folds} folds"
        if options.before is not None:
            print(shape)
            beside(case, options.targets, options.before, options.device, options.rounds)
            continue
        print(f"{shape}; scikit-learn on folds {peer_folds.tolist()}")
        print(" logistic regression, C = 1, class_weight balanced")
        logistic(case, options.targets, peer_folds)
        print(" ridge, alpha = 1")
        ridge(case, peer_folds)


if __name__ == "__main__":
    main()
