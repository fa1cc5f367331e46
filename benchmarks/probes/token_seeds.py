"""Whether seeds of our token probes scatter like those of modules trained one at a time.

    python -m benchmarks.probes.token_seeds [--seeds 20]

20 seeds of ours beside 20 others of the peer (`token_peer`), which draws its own initial weights
and its own batches of the fold's sentences; early stopping on both sides. Planted data of small
size with a tenth of the labels flipped, so that nobody is perfect. Two-sample Kolmogorov-Smirnov
and Mann-Whitney on the PR-AUC of the tested problems and on the epochs trained: four p-values a
pooling, twelve in all, of which the smallest is given beside twelve times itself (Bonferroni, which
is the first step of Holm's procedure: above .05 it keeps every hypothesis).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp, mannwhitneyu
from sklearn.metrics import average_precision_score

from benchmarks.probes.token_peer import PaddedSet, train_epoch, watched_loss
from benchmarks.probes.tokens import Data, Peer, Size, make
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens.pooling import POOLINGS, TokenProbeOptions
from taprobe_core.solvers.tokens.reference import ReferenceProbe
from taprobe_core.solvers.tokens.solve import fit_token_probes, positive_weights

PLANTED = Size("planted, 12 d", 12, 12, 30, 8.5, 0.3, 12)
TESTED = 3
"""Problems that the fold tests, watches each; the others are learnt from."""

Floats = NDArray[np.float64]


def planted() -> Data:
    """Draw sentences of 12 problems, one fold, a tenth of the labels flipped."""
    made = make(PLANTED, 1)
    problem = np.repeat(np.arange(PLANTED.n_problems), PLANTED.n_sentences)
    is_flipped = np.random.default_rng(1).random(len(made.y)) < 0.1
    y = np.where(is_flipped, 1 - made.y, made.y)
    train, validation = (problem >= 2 * TESTED)[None], (problem < TESTED)[None]
    return replace(made, y=y, train=train, validation=validation)


def ours(data: Data, options: TokenProbeOptions, n_seeds: int) -> tuple[Floats, Floats]:
    """Return PR-AUC and epochs of seeds 0, 1, ..., [seed] each."""
    fold = np.zeros(n_seeds, dtype=np.int64)
    y = np.tile(data.y[:, None], n_seeds)
    columns = FitRequest(fold, y, positive_weights(y, fold, data.train), np.arange(n_seeds))
    found = fit_token_probes(data.tokens, data.train, data.validation, columns, options)
    test = ~(data.train | data.validation)[0]
    measured = [average_precision_score(data.y[test], each) for each in found.decision[test].T]
    return np.array(measured), found.n_iter.astype(np.float64)


def theirs(data: Data, options: TokenProbeOptions, n_seeds: int) -> tuple[Floats, Floats]:
    """Return PR-AUC and epochs of as many other seeds of the peer, [seed] each."""
    peer = Peer(data, options, torch.device("cpu"))
    found = [_train(peer, data, seed) for seed in range(1000, 1000 + n_seeds)]
    measured, epochs = zip(*found, strict=True)
    return np.array(measured), np.array(epochs, dtype=np.float64)


def _train(peer: Peer, data: Data, seed: int) -> tuple[float, int]:
    options = peer.options
    model = ReferenceProbe(data.tokens.n_features, options, seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    rows, watched = (np.flatnonzero(side[0]) for side in (data.train, data.validation))
    test = np.flatnonzero(~(data.train | data.validation)[0])
    positive = float(peer.set.weight.max())
    weight = np.where(data.y > 0.5, positive, 1.0)
    weighed = PaddedSet(peer.set.sentences, data.y, weight, torch.device("cpu"))
    best, best_loss, best_epoch, epoch = 0.0, np.inf, 0, 0
    while epoch < options.max_epochs and epoch - best_epoch < options.patience:
        epoch += 1
        n_batches = -(-len(rows) // options.batch_size)
        train_epoch(model, optimizer, peer.set, np.array_split(rng.permutation(rows), n_batches))
        loss = watched_loss(model, weighed, watched)
        if loss < best_loss:
            with torch.no_grad():
                states, mask, _, _ = weighed.batch(test)
                score = model(states, mask).numpy()
            best, best_loss, best_epoch = average_precision_score(data.y[test], score), loss, epoch
    return float(best), epoch


def main() -> None:
    """Print the p-values of every pooling and the smallest of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    n = parser.parse_args().seeds
    torch.set_num_threads(1)
    data, p_values = planted(), []
    print(f"\n{n} seeds of ours beside {n} others of the padded module")
    print(f"{'':<20}{'PR-AUC ours':>16}{'alone':>16}{'KS p':>8}{'MW p':>8}"
          f"{'epochs ours':>14}{'alone':>8}{'KS p':>8}{'MW p':>8}")  # fmt: skip
    for pooling in POOLINGS:
        options = TokenProbeOptions(
            pooling, width=PLANTED.width, learning_rate=0.01, max_epochs=40, patience=5
        )
        pairs = list(zip(ours(data, options, n), theirs(data, options, n), strict=True))
        p = [float(test(*pair).pvalue) for pair in pairs for test in (ks_2samp, mannwhitneyu)]
        p_values += p
        (a, b), (own, other) = pairs
        shown = [f"{each.mean():.3f} ± {each.std():.3f}" for each in (a, b)]
        print(
            f"{pooling:<20}{shown[0]:>16}{shown[1]:>16}"
            f"{p[0]:>8.3f}{p[1]:>8.3f}{own.mean():>14.1f}{other.mean():>8.1f}{p[2]:>8.3f}{p[3]:>8.3f}",
            flush=True,
        )
    least = min(p_values)
    print(
        f"smallest of {len(p_values)} p-values: {least:.3f}; times {len(p_values)} (Holm's first "
        f"step): {min(1.0, least * len(p_values)):.2f}"
    )


if __name__ == "__main__":
    main()
