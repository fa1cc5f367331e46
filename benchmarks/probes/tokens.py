"""Token probes: one padded torch module at a time against ours, in one process.

    python -m benchmarks.probes.tokens                  # CPU seconds, one thread
    python -m benchmarks.probes.tokens --device cuda    # 100 probes, milliseconds

Seconds per model and epoch: the time of a long training less that of a short one, over the epochs
between them; validation after each epoch is included on both sides, patience is off. The peer
(`token_peer`) trains on batches of 32 of its own fold's sentences. Folds leave one problem out and
hold three for validation: the three that follow it (`rotating`), or the three of the smallest
numbers (`smallest`), which hardly any fold learns from.

Agreement: after two epochs from the same weights over the same batches, the largest difference of
logits over their standard deviation; beside it that of the peer from itself when the sentences of
every batch stand in reverse order, which is what rounding alone does: activations within rounding
of the ReLU's kink, and nearly equal maxima, fall to the other side. Last, the daily case: a sweep
cell of demo size, early stopping on. Scatter over seeds: `token_seeds`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.probes.token_peer import PaddedSet, scores, train_epoch
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens.forward import draw
from taprobe_core.solvers.tokens.pooling import POOLINGS, TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import RaggedTokens, n_batches
from taprobe_core.solvers.tokens.reference import ReferenceProbe
from taprobe_core.solvers.tokens.solve import TokenSolution, fit_token_probes, positive_weights
from taprobe_core.solvers.tokens.training import network_shape

SHORT, LONG = 1, 4


@dataclass(frozen=True)
class Size:
    """Shape of a problem set: features, problems, sentences of each, tokens of a sentence."""

    name: str
    d: int
    n_problems: int
    n_sentences: int
    median: float
    sigma: float
    width: int


REAL = Size("1024 d, 18 k tokens", 1024, 20, 40, 19.0, 0.66, 128)
DEMO = Size("demo, 128 d, 2.5 k tokens", 128, 20, 14, 8.5, 0.3, 32)


@dataclass(frozen=True, eq=False)
class Data:
    """Synthetic sentences with a planted hot token, and leave-one-problem-out folds."""

    tokens: RaggedTokens
    y: NDArray[np.float64]
    train: NDArray[np.bool_]
    validation: NDArray[np.bool_]

    def columns(self, n_folds: int, n_seeds: int) -> FitRequest:
        """One model per fold and seed."""
        fold = np.tile(np.arange(n_folds), n_seeds)
        y = np.tile(self.y[:, None], len(fold))
        seed = np.repeat(np.arange(n_seeds), n_folds)
        return FitRequest(fold, y, positive_weights(y, fold, self.train), seed)


def make(size: Size, n_folds: int, protocol: str = "rotating") -> Data:
    """Draw sentences.

    Lengths of the real size are log-normal with the percentiles of published traces (5, 50 and 95 %
    at about 6, 19 and 56 tokens); those of the demo size are near 9.
    """
    rng = np.random.default_rng(0)
    n = size.n_problems * size.n_sentences
    lengths = np.exp(rng.normal(np.log(size.median), size.sigma, n)).round().astype(int)
    lengths = np.maximum(lengths, 2)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = rng.standard_normal((offsets[-1], size.d), dtype=np.float32)
    y = (rng.random(n) < 0.15).astype(np.float64)
    at = offsets[:-1] + (rng.random(n) * lengths).astype(int)
    values[at, 0] += np.where(y > 0, 6.0, 0.0)
    problem = np.repeat(np.arange(size.n_problems), size.n_sentences)
    tests = np.arange(n_folds) % (size.n_problems + 1)  # the last fold of 21 tests nothing
    train, validation = [], []
    for test in tests:
        others = [each for each in range(size.n_problems) if each != test]
        if protocol == "rotating":
            others = [*(each for each in others if each > test), *others[:test]]
        validation.append(np.isin(problem, others[:3]))
        train.append(np.isin(problem, others[3:]))
    return Data(
        RaggedTokens(torch.from_numpy(values), offsets), y, np.stack(train), np.stack(validation)
    )


class Peer:
    """One padded module on one fold, its states standardised beforehand."""

    def __init__(self, data: Data, options: TokenProbeOptions, device: torch.device) -> None:
        self.data, self.options, self.device = data, options, device
        tokens, train = data.tokens, data.train[0]
        raw = tokens.values.double()
        known = raw[torch.from_numpy(np.repeat(train, tokens.lengths))]
        states = ((raw - known.mean(0)) / known.std(0, correction=0)).float()
        columns = data.columns(1, 1)
        parts = list(states.split(tokens.lengths.tolist()))
        self.set = PaddedSet(parts, data.y, columns.weight[:, 0], device)
        self.model = ReferenceProbe(tokens.n_features, options).to(device)

    def train(self, epochs: list[list[NDArray[np.int64]]]) -> None:
        """Train from the drawn weights, with validation after each epoch."""
        self.model.load(draw(network_shape(self.data.tokens.n_features, self.options), 0))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.0)
        watched = np.flatnonzero(self.data.validation[0])
        for batches in epochs:
            train_epoch(self.model, optimizer, self.set, batches)
            scores(self.model, self.set, watched).mean().item()

    def train_own(self, n_epochs: int) -> None:
        """Train on batches of 32 training sentences, as a user would draw them."""
        rng, rows = np.random.default_rng(0), np.flatnonzero(self.data.train[0])
        n_batches = -(-len(rows) // 32)
        self.train([np.array_split(rng.permutation(rows), n_batches) for _ in range(n_epochs)])

    def our_epochs(self, n_epochs: int) -> list[list[NDArray[np.int64]]]:
        """The training sentences of the batches that ours draws for seed 0."""
        rng, n = np.random.default_rng([0, 1]), len(self.data.tokens)
        train = self.data.train[0]
        cut = n_batches(int(train.sum()), 32)
        orders = [np.array_split(rng.permutation(n), cut) for _ in range(n_epochs)]
        return [[part[train[part]] for part in order] for order in orders]


def agreement(peer: Peer) -> tuple[float, float]:
    """Largest difference of logits after two epochs, over their standard deviation.

    Returns:
        That of ours from the peer, and of the peer from itself with every batch in reverse order.
    """
    data, options = peer.data, replace(peer.options, max_epochs=2, patience=100)
    columns, epochs = data.columns(1, 1), peer.our_epochs(2)
    ours = fit_token_probes(data.tokens, data.train, None, columns, options, peer.device)
    theirs = []
    for order in (slice(None), slice(None, None, -1)):
        peer.train([[batch[order].copy() for batch in batches] for batches in epochs])
        found = scores(peer.model, peer.set, np.arange(len(data.tokens)))
        theirs.append(found.double().cpu().numpy())
    pairs = ((ours.decision[:, 0], theirs[0]), (theirs[1], theirs[0]))
    first, second = (float(np.abs(a - b).max() / b.std()) for a, b in pairs)
    return first, second


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of the process, or wall seconds to the end of an accelerator's work."""
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def per_epoch(
    works: Sequence[Callable[[int], object]], device: torch.device, repetitions: int
) -> NDArray[np.float64]:
    """Seconds of an epoch of each work, [repetition, work]: a long training less a short one."""
    for work in works:
        work(SHORT)
    found = np.empty((repetitions, len(works)))
    for repetition in range(repetitions):
        for at, work in enumerate(works):
            short = seconds(partial(work, SHORT), device)
            long = seconds(partial(work, LONG), device)
            found[repetition, at] = (long - short) / (LONG - SHORT)
    return found


def compare(
    size: Size,
    shapes: list[tuple[int, int]],
    device: torch.device,
    runs: int,
    protocol: str = "rotating",
) -> None:
    """Print one table: milliseconds per model-epoch of the peer and of ours for several batches.

    A ratio is the median over repetitions of ratios within a repetition.
    """
    data = make(size, max(folds for folds, _ in shapes), protocol)
    tokens = RaggedTokens(data.tokens.values.to(device), data.tokens.offsets)
    print(
        f"\n{size.name}, {protocol}: {len(tokens)} sentences, {len(tokens.values)} tokens, "
        f"width {size.width}"
    )
    heads = "".join(f"{f'ours, M={folds * seeds}':>16}{'ratio':>8}" for folds, seeds in shapes)
    print(f"{'ms per model-epoch':<20}{'alone':>10}{heads}{'max|d|/sd':>12}{'reversed':>10}")
    for pooling in POOLINGS:
        options = TokenProbeOptions(pooling, width=size.width, patience=100)
        peer = Peer(data, options, device)
        differs, reversed_ = agreement(peer)
        batches = [data.columns(*shape) for shape in shapes]
        works: list[Callable[[int], object]] = [peer.train_own]
        works += [partial(fit, tokens, data, each, options) for each in batches]
        found = per_epoch(works, device, runs) * 1e3
        line = f"{pooling:<20}{np.median(found[:, 0]):>10.2f}"
        for at, columns in enumerate(batches, 1):
            each = found[:, at] / len(columns)
            line += f"{np.median(each):>16.3f}{np.median(found[:, 0] / each):>8.1f}"
        print(f"{line}{differs:>12.1e}{reversed_:>10.1e}", flush=True)


def fit(
    tokens: RaggedTokens,
    data: Data,
    columns: FitRequest,
    options: TokenProbeOptions,
    n_epochs: int | None = None,
) -> TokenSolution:
    """Fit on the device where the tokens are, for so many epochs or as the options say."""
    if n_epochs is not None:
        options = replace(options, max_epochs=n_epochs)
    device = tokens.values.device
    return fit_token_probes(tokens, data.train, data.validation, columns, options, device)


def daily(device: torch.device) -> None:
    """Print the seconds of a demo cell: 21 folds, 5 seeds, at most 15 epochs, patience 5."""
    data = make(DEMO, 21)
    tokens, columns = data.tokens.to(device), data.columns(21, 5)
    total = 0.0
    print()
    for pooling in POOLINGS:
        options = TokenProbeOptions(pooling, width=DEMO.width, max_epochs=15)
        n_epochs = fit(tokens, data, columns, options).n_iter.mean()
        took = seconds(partial(fit, tokens, data, columns, options), device)
        total += took
        print(f"demo cell, {pooling:<17} {took:6.2f} s for 105 models, {n_epochs:.1f} epochs each")
    print(f"16 cells of the three kinds: {16 * total:.0f} s")


def main() -> None:
    """Run the comparison that the device calls for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32 on CUDA")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
        print(torch.cuda.get_device_name(device), f"tf32={arguments.tf32}", torch.__version__)
        compare(REAL, [(1, 1), (20, 1), (20, 5)], device, arguments.repetitions)
    else:
        torch.set_num_threads(1)
        print(f"1 thread, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
        for protocol in ("rotating", "smallest"):
            compare(REAL, [(1, 1), (20, 1)], device, arguments.repetitions, protocol)
        compare(DEMO, [(1, 1), (21, 5)], device, arguments.repetitions)
    daily(device)


if __name__ == "__main__":
    main()
