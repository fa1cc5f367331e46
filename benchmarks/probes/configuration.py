"""One configuration over all folds and seeds: the deterministic kinds by a loop, and solved once.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.probes.configuration

The loop is that of the earlier script system: for every fold and seed it standardises and fits
position, text, activations and activations with position by scikit-learn at its defaults. Two of
its folds are run for one seed, and multiplied. Ours solves every fold once, converged, for all
seeds. CPU seconds by `time.process_time`, one thread; the mean PR-AUC of both over the folds that
the loop ran stands beside the ratio (scikit-learn's defaults do not converge, so they may differ).
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.probes.features import make_probe_data
from taprobe_core.metrics import pr_auc
from taprobe_core.probes.dense import tolerance_of
from taprobe_core.probes.features import fold_words, text_pipeline
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock
from taprobe_core.solvers.linear.logistic import balanced_weights, solve_logistic

SOLVES = (("position",), ("text",), ("activations", "activations_plus_position"))
"""What is solved together: kinds that share all but a few features."""


def texts_of(n: int, rng: np.random.Generator) -> list[str]:
    """Return sentences of about 20 words whose frequencies fall as in language."""
    words = np.array([f"w{index:04d}" for index in range(4000)])
    share = 1 / np.arange(1, len(words) + 1)
    lengths = rng.integers(5, 36, n)
    return [" ".join(rng.choice(words, k, p=share / share.sum())) for k in lengths]


def main() -> None:
    """Run both and print CPU seconds, ratios and PR-AUC."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"rows": 3983, "features": 4096, "folds": 20, "seeds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kind", choices=("iid", "ill"), default="ill")
    options = parser.parse_args()
    data = make_probe_data(options.kind, options.rows, options.features)
    rng = np.random.default_rng(1)
    _, first, size = np.unique(data.problem, return_index=True, return_counts=True)
    index = np.arange(options.rows) - first[data.problem]
    count = size[data.problem]
    position = np.column_stack([index, count, index / (count - 1), rng.integers(6, 60, len(index))])
    position = position.astype(np.float32)
    texts, y = texts_of(options.rows, rng), data.anchors(90)
    train, test = data.lopo_train(options.folds), data.test_rows(options.folds)
    dense = {
        "position": position,
        "text": None,
        "activations": data.features,
        "activations_plus_position": np.concatenate([data.features, position], axis=1),
    }
    looped = [0, options.folds // 2]
    print(f"{'kind':34} {'loop':>10} {'ours':>8} {'ratio':>8}   PR-AUC of loop and ours")
    total = np.zeros(2)
    for kinds in SOLVES:
        loop, loop_auc = 0.0, []
        for kind in kinds:
            seconds, auc = run_loop(dense[kind], texts, y, train, test, looped)
            loop += seconds * options.folds * options.seeds / len(looped)
            loop_auc.append(auc)
        ours, our_auc = run_ours([dense[kind] for kind in kinds], texts, y, train, test, looped)
        total += (loop, ours)
        pairs = ", ".join(f"{a:.4f} {b:.4f}" for a, b in zip(loop_auc, our_auc, strict=True))
        print(f"{' and '.join(kinds):34} {loop:8.0f} s {ours:6.2f} s {loop / ours:7.0f}x   {pairs}")
    print(f"{'all':34} {total[0]:8.0f} s {total[1]:6.2f} s {total[0] / total[1]:7.0f}x")


def run_loop(
    dense: NDArray[np.float32] | None,
    texts: list[str],
    y: NDArray[np.float64],
    train: NDArray[np.bool_],
    test: list[NDArray[np.intp]],
    folds: list[int],
) -> tuple[float, float]:
    """Return CPU seconds of some folds for one seed, and their mean PR-AUC."""
    start, found = time.process_time(), []
    for fold in folds:
        inputs = StandardScaler() if dense is not None else text_pipeline()
        model = make_pipeline(inputs, LogisticRegression(max_iter=1000, class_weight="balanced"))
        rows = np.flatnonzero(train[fold])
        own = dense[rows] if dense is not None else [texts[row] for row in rows]
        other = dense[test[fold]] if dense is not None else [texts[row] for row in test[fold]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(own, y[rows])
        found.append(pr_auc(y[test[fold]], model.predict_proba(other)[:, 1]))
    return time.process_time() - start, float(np.mean(found))


def run_ours(
    blocks: list[NDArray[np.float32] | None],
    texts: list[str],
    y: NDArray[np.float64],
    train: NDArray[np.bool_],
    test: list[NDArray[np.intp]],
    folds: list[int],
) -> tuple[float, list[float]]:
    """Return CPU seconds of all folds of some kinds, and the mean PR-AUC of each on some folds.

    As in `probes.linear`, kinds that differ in a few features are one solve, in which a fold stands
    once for each and sees the features of its own.
    """
    start = time.process_time()
    text, visible = None, None
    widest = blocks[-1]
    if widest is None:
        words = fold_words(texts, train)
        text = TextBlock(csr_matrix(words.counts), words.idf)
    else:
        widths = [block.shape[1] for block in blocks if block is not None]
        seen = np.arange(widest.shape[1]) < np.array(widths)[:, None]
        visible = np.repeat(seen, len(train), axis=0)
    masks = np.tile(train, (len(blocks), 1))
    matrix = FoldMatrix(masks, widest, text, visible=visible)
    fold = np.arange(len(masks), dtype=np.int64)
    labels = np.repeat(y[:, None], len(masks), axis=1)
    columns = FitRequest(fold, labels, balanced_weights(labels, masks, fold))
    decision = solve_logistic(
        matrix, columns, np.ones(len(masks)), tol=tolerance_of(matrix)
    ).decision
    seconds = time.process_time() - start
    kinds = np.split(decision, len(blocks), axis=1)
    return seconds, [
        float(np.mean([pr_auc(y[test[f]], each[test[f], f]) for f in folds])) for each in kinds
    ]


if __name__ == "__main__":
    main()
