"""How often do the tripwires trip: on sound data, and on each planted fault?

    python benchmarks/tripwires.py [--repetitions 200] [--large]

Every repetition draws a study of its own: 20 traces of 9 to 25 sentences (about 340), 128 features
with a falling spectrum, two massive ones, a level per problem and a drift along the trace, and
anchors (the top tenth of each trace) that some features partly predict. A fault is then planted, or
none. Prints the share of repetitions that trip, with its exact 95 % interval (Clopper and Pearson),
and CPU seconds a check. Probes are ridge regressions (`ridge_probe`) unless said; logistic ones,
with 4 shuffles, run on an eighth of the repetitions. Then ten times as many sound studies with 2
shuffles, for the false-alarm rate; 26 seeds over one sound study, and
the same networks with early stopping on. `--large` adds timings at 3,772 sentences x 4,096
features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from threadpoolctl import threadpool_limits

from taprobe_core.evaluation.tripwires import (
    Fit,
    linear_probe,
    memorises_one_problem,
    network,
    ridge_probe,
    row_identity,
    shuffled_labels,
)
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.networks.solve import NetworkOptions, fit_networks
from taprobe_core.splits import Fold

N_PROBLEMS, N_FEATURES = 20, 128
FLOATS = NDArray[np.float64]


@dataclass(frozen=True)
class Study:
    """Rows of all problems, and the folds."""

    X: NDArray[np.float32]
    problem_id: NDArray[np.int64]
    is_anchor: NDArray[np.bool_]
    folds: list[Fold]

    def take(self, rows: NDArray[np.intp]) -> Study:
        """Return some rows, in the order given."""
        return replace(
            self, X=self.X[rows], problem_id=self.problem_id[rows], is_anchor=self.is_anchor[rows]
        )


def draw(seed: int, sizes: tuple[int, int] = (9, 26), d: int = N_FEATURES) -> Study:
    """Draw a sound study."""
    rng = np.random.default_rng([seed, 11])
    n_rows = rng.integers(*sizes, size=N_PROBLEMS)
    problem_id = np.repeat(np.arange(N_PROBLEMS), n_rows)
    X = rng.normal(size=(len(problem_id), d)) + rng.normal(size=(N_PROBLEMS, d))[problem_id]
    relative = np.concatenate([np.linspace(-1, 1, n) for n in n_rows])
    X += relative[:, None] * rng.normal(size=d)
    signal = X[:, :8].mean(axis=1) + 0.3 * rng.normal(size=len(X))
    X *= np.arange(1, d + 1) ** -0.5
    X[:, :2] *= 300
    is_anchor = np.zeros(len(X), dtype=np.bool_)
    for problem in range(N_PROBLEMS):
        rows = np.flatnonzero(problem_id == problem)
        is_anchor[rows[np.argsort(-signal[rows])[: -(-len(rows) // 10)]]] = True
    return Study(X.astype(np.float32), problem_id, is_anchor, lopo(range(N_PROBLEMS)))


def lopo(problems: range) -> list[Fold]:
    """Return one fold per problem, three of the others for validation."""
    folds = []
    for index, tested in enumerate(problems):
        rest = tuple(each for each in problems if each != tested)
        folds.append(Fold("lopo", index, rest[3:], rest[:3], (tested,)))
    return folds


HOLDOUT = Fold("holdout", 0, tuple(range(14)), (14, 15, 16), (17, 18, 19))


def ridge(X: NDArray[np.float32]) -> Fit:
    """Return a linear probe in a few lines, for pipelines that choose features column by column."""

    def fit(train: NDArray[np.bool_], columns: FitRequest) -> FLOATS:
        score = np.empty(columns.y.shape)
        for fold, rows in enumerate(train):
            mine = columns.fold == fold
            Z = (X - X[rows].mean(axis=0)) / X[rows].std(axis=0)
            y = columns.y[rows][:, mine]
            gram = Z[rows].T @ Z[rows] + 4 * np.eye(X.shape[1])
            score[:, mine] = Z @ np.linalg.solve(gram, Z[rows].T @ (y - y.mean(axis=0)))
        return score

    return fit


def column_by_column(features: Callable[[FLOATS], NDArray[np.float32]]) -> Fit:
    """Return a pipeline whose features depend on the labels of all rows: it leaks."""

    def fit(train: NDArray[np.bool_], columns: FitRequest) -> FLOATS:
        score = np.empty(columns.y.shape)
        for column in range(len(columns)):
            one = columns.take(np.array([column]))
            alone = replace(one, fold=np.zeros(1, dtype=np.int64))
            X = features(one.y[:, 0])
            score[:, [column]] = ridge(X)(train[one.fold], alone)
        return score

    return fit


def select(study: Study, n_kept: int) -> Fit:
    """Keep the features that correlate most with the labels of all rows."""
    Z = (study.X - study.X.mean(axis=0)) / study.X.std(axis=0)
    return column_by_column(
        lambda y: study.X[:, np.argsort(-np.abs(Z.T @ (y - y.mean())))[:n_kept]]
    )


def encode(study: Study, noise: float, seed: int) -> Fit:
    """Add a feature that is the label with noise."""
    rng = np.random.default_rng([seed, 12])
    return column_by_column(
        lambda y: np.column_stack([study.X, y + noise * rng.normal(size=len(y))]).astype(np.float32)
    )


def split_rows(study: Study, share: float, seed: int) -> Fit:
    """Train on a share of the held-out rows too, as a split by rows and not by problems does."""
    inner, rng = ridge_probe(study.X), np.random.default_rng([seed, 13])
    tested = np.stack([np.isin(study.problem_id, fold.test) for fold in study.folds])
    leaked = tested & (rng.random(tested.shape) < share)

    def fit(train: NDArray[np.bool_], columns: FitRequest) -> FLOATS:
        weight = columns.weight.copy()
        # Balanced over what is trained on now.
        sees = (train | leaked)[columns.fold].T
        for label in (0, 1):
            mine = sees & (columns.y == label)
            weight[mine] = (sees.sum(axis=0) / (2 * mine.sum(axis=0)))[np.nonzero(mine)[1]]
        return inner(train | leaked, replace(columns, weight=weight))

    return fit


def both_sides(fold: Fold) -> Fold:
    """Train on the held-out problems too."""
    return replace(fold, train=tuple(sorted({*fold.train, *fold.test})))


def trips_shuffled(fault: str, seed: int) -> tuple[bool, float]:
    """Plant a fault, run `shuffled_labels`; return whether it trips, and p."""
    study = draw(seed)
    fit, folds, identity = ridge_probe(study.X), study.folds, None
    n_shuffles = None
    if fault == "sound, holdout of 3":
        folds = [HOLDOUT]
    elif fault == "every problem on both sides":
        folds = [both_sides(fold) for fold in folds]
    elif fault == "one problem on both sides of its fold":
        folds = [*folds[:4], both_sides(folds[4]), *folds[5:]]
    elif fault.endswith("% of held-out rows train"):
        fit = split_rows(study, float(fault.split()[0]) / 100, seed)
    elif fault.startswith("features chosen"):
        fit = select(study, int(fault.rsplit(" ", 3)[1]))
    elif fault.startswith("a feature made"):
        fit = encode(study, float(fault.rsplit(" ", 1)[1]), seed)
    elif fault.endswith("logistic"):
        fit, n_shuffles = linear_probe(study.X), 4
        folds = [*folds[:4], both_sides(folds[4]), *folds[5:]] if "one problem" in fault else folds
    elif fault == "one trace stored twice":
        copy = np.flatnonzero(study.problem_id == 4)
        study = study.take(np.append(np.arange(len(study.X)), copy))
        study.problem_id[-len(copy) :] = N_PROBLEMS
        fit, folds = ridge_probe(study.X), lopo(range(N_PROBLEMS + 1))
        identity = row_identity(study.X)
    found = shuffled_labels(
        fit, study.problem_id, study.is_anchor, folds,
        identity=identity, seed=seed, n_shuffles=n_shuffles,
    )  # fmt: skip
    return not found.passes, found.p


SHUFFLED = (
    "sound",
    "sound, holdout of 3",
    "every problem on both sides",
    "one problem on both sides of its fold",
    "one trace stored twice",
    "25 % of held-out rows train",
    "10 % of held-out rows train",
    "features chosen by all labels, 10 of 128",
    "features chosen by all labels, 40 of 128",
    "a feature made of the label, noise sd 1",
    "sound, logistic",
    "one problem on both sides of its fold, logistic",
)


def trips_memorisation(fault: str, seed: int) -> tuple[bool, float]:
    """Plant a fault, run `memorises_one_problem`; return whether it trips, and the PR-AUC."""
    study = draw(seed)
    X, problem_id, is_anchor = study.X, study.problem_id, study.is_anchor
    rng = np.random.default_rng([seed, 14])
    if fault == "sound, random features":
        X = rng.normal(size=X.shape).astype(np.float32)
    elif fault == "constant features":
        X = np.full_like(X, 0.25)
    elif fault == "one row for a whole problem":
        X = X[np.searchsorted(problem_id, problem_id)]
    elif fault == "every second row is its neighbour's":
        X = X[np.arange(len(X)) // 2 * 2]
    elif fault == "labels shuffled (cannot be seen)":
        is_anchor = is_anchor[np.lexsort((rng.random(len(X)), problem_id))]
    elif fault.startswith("every row joined twice"):
        again = is_anchor[np.lexsort((rng.random(len(X)), problem_id))]
        X, problem_id = np.repeat(X, 2, axis=0), np.repeat(problem_id, 2)
        is_anchor = np.column_stack([is_anchor, again]).ravel()
    elif "joined twice" in fault:
        again = np.flatnonzero(rng.random(len(X)) < float(fault.split()[0]) / 100)
        is_anchor = np.append(is_anchor, ~is_anchor[again])
        X, problem_id = np.append(X, X[again], axis=0), np.append(problem_id, problem_id[again])
    found = memorises_one_problem(network(), X, problem_id, is_anchor, seed=seed)
    return not found.passes, found.value


MEMORISATION = (
    "sound",
    "sound, random features",
    "constant features",
    "one row for a whole problem",
    "every second row is its neighbour's",
    "every row joined twice, second label drawn anew",
    "50 % of rows joined twice, second label the other",
    "25 % of rows joined twice, second label the other",
    "10 % of rows joined twice, second label the other",
    "labels shuffled (cannot be seen)",
)


def table(
    name: str,
    faults: tuple[str, ...],
    trips: Callable[[str, int], tuple[bool, float]],
    repetitions: int,
) -> None:
    """Print one row per fault."""
    print(f"\n{name}\n| planted | trips | share | 95 % interval | median {MEDIAN[name]} | CPU s |")
    print("|---|---|---|---|---|---|")
    for fault in faults:
        start = time.process_time()
        n = repetitions // 8 if fault.endswith("logistic") else repetitions
        found = [trips(fault, seed) for seed in range(n)]
        seconds = (time.process_time() - start) / n
        tripped = sum(trip for trip, _ in found)
        low, high = binomtest(tripped, n).proportion_ci(method="exact")
        values = np.array([value for _, value in found])
        print(
            f"| {fault} | {tripped} of {n} | {tripped / n:.3f} | {low:.3f} to {high:.3f} "
            f"| {np.median(values):.2g} | {seconds:.2f} |",
            flush=True,
        )
        if fault.startswith("sound") and name == "shuffled_labels":
            print(
                f"<!-- {fault}: p <= 0.05 in {(values <= 0.05).sum()} of {n} -->",
                flush=True,
            )


def false_alarms(n: int) -> None:
    """Print how often the p is small on sound studies, with 2 shuffles."""
    found = np.empty(n)
    for seed in range(n):
        study = draw(10_000 + seed)
        fit = ridge_probe(study.X)
        found[seed] = shuffled_labels(
            fit, study.problem_id, study.is_anchor, study.folds, seed=seed, n_shuffles=2
        ).p
    small = {level: int((found <= level).sum()) for level in (0.01, 0.05)}
    print(f"\n{n} sound studies, 2 shuffles: " + ", ".join(
        f"p <= {level:g} in {count}" for level, count in small.items()
    ), flush=True)  # fmt: skip


MEDIAN = {"shuffled_labels": "p", "memorises_one_problem": "PR-AUC"}


def stopped_early(study: Study, seeds: Iterator[int]) -> int:
    """Count the networks that learn the largest problem although they may stop early."""
    largest = np.bincount(study.problem_id).argmax()
    rows = study.problem_id == largest
    X, y = study.X[rows], study.is_anchor[rows]
    options = NetworkOptions(hidden=(50, 50), max_iter=500, early_stopping="rows", patience=10)

    def learn(
        features: NDArray[np.float32], labels: NDArray[np.bool_], drawn: NDArray[np.int64]
    ) -> FLOATS:
        shape = (len(features), len(drawn))
        columns = FitRequest(
            np.zeros(len(drawn), dtype=np.int64),
            np.broadcast_to(labels[:, None], shape).astype(np.float64),
            np.ones(shape),
            drawn,
        )
        return fit_networks(features, np.ones((1, len(features)), bool), columns, options).decision

    problem = np.zeros(len(X), dtype=np.int64)
    return sum(
        memorises_one_problem(learn, X, problem, y, seed=seed, n_networks=1).passes
        for seed in seeds
    )


def many_sentences(seed: int) -> Study:
    """Draw a sound study with a trace long enough to hold rows out of it."""
    return draw(seed, sizes=(60, 120))


def seed_runs() -> None:
    """Print how many of 26 seeds pass on one sound study."""
    study = draw(1_000)
    shuffled = sum(
        shuffled_labels(
            ridge_probe(study.X), study.problem_id, study.is_anchor, study.folds, seed=seed
        ).passes
        for seed in range(26)
    )
    args = (study.X, study.problem_id, study.is_anchor)
    learned = sum(memorises_one_problem(network(), *args, seed=seed).passes for seed in range(26))
    print(f"\n26 seeds on one sound study: shuffled_labels {shuffled}, memorisation {learned} pass")
    longer = many_sentences(1_000)
    args = (longer.X, longer.problem_id, longer.is_anchor)
    learned = sum(memorises_one_problem(network(), *args, seed=seed).passes for seed in range(26))
    early = stopped_early(longer, iter(range(26)))
    print(f"longer traces: memorisation {learned} pass; with early stopping on, {early} pass")


def few_features(n: int) -> None:
    """Print how often a sound problem of 400 sentences is learned, by number of features.

    Features are random walks along the trace: neighbours are alike, anchors are drawn at random.
    """
    print("\n400 sentences, random walks, learned by heart:")
    for d in (4, 16, 32, 64, 128):
        passed = 0
        for seed in range(n):
            rng = np.random.default_rng([seed, 16])
            X = np.cumsum(rng.normal(size=(400, d)), axis=0).astype(np.float32)
            is_anchor = rng.permutation(400) < 40
            one = np.zeros(400, dtype=np.int64)
            passed += memorises_one_problem(network(), X, one, is_anchor, seed=seed).passes
        print(f"  {d} features: {passed} of {n}", flush=True)


def cost(study: Study) -> None:
    """Print CPU seconds of each check."""
    print(f"\nCPU s at {len(study.X)} sentences x {study.X.shape[1]} features, 20 LOPO folds:")
    start = time.process_time()
    found = shuffled_labels(ridge_probe(study.X), study.problem_id, study.is_anchor, study.folds)
    print(
        f"  shuffled_labels, {found.n_shuffles} shuffles, ridge: {time.process_time() - start:.2f}"
    )
    start = time.process_time()
    shuffled_labels(
        linear_probe(study.X), study.problem_id, study.is_anchor, study.folds,
        n_shuffles=found.n_shuffles,
    )  # fmt: skip
    print(f"  the same, logistic: {time.process_time() - start:.2f}")
    start = time.process_time()
    memorises_one_problem(network(), study.X, study.problem_id, study.is_anchor)
    print(f"  memorises_one_problem: {time.process_time() - start:.2f}")
    start = time.process_time()
    row_identity(study.X)
    print(f"  row_identity: {time.process_time() - start:.3f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--large", action="store_true", help="time 3,983 x 4,096 too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        table("shuffled_labels", SHUFFLED, trips_shuffled, options.repetitions)
        table("memorises_one_problem", MEMORISATION, trips_memorisation, options.repetitions)
        false_alarms(10 * options.repetitions)
        seed_runs()
        few_features(min(8, options.repetitions))
        cost(draw(0))
        if options.large:
            cost(draw(0, sizes=(120, 280), d=4_096))


if __name__ == "__main__":
    main()
