"""Linear probes beside scikit-learn's converged optimum, on labels and features of every kind.

    python -m benchmarks.probes.agreement [--rollouts DIR --tokenizers DIR] [--features 1024]

Labels: the demo's, and with a mirror of the published rollouts the real ones of each model and
setting. Features: standard normal (`iid`), ill-conditioned (`ill`: see `features`), and the demo's
own activations at a layer; beside real labels, rows of the demo's, again and again. Every problem
is tested once (LOPO). scikit-learn: `StandardScaler`, then `LogisticRegression(tol=1e-8)` with
balanced classes, or `Ridge`, in float64. Printed: the largest difference of a probability and of a
ridge score, on all rows of all folds, and on how many folds PR-AUC is equal to six digits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.probes.features import make_probe_data
from taprobe_core.metrics import pr_auc
from taprobe_core.pipeline import cells_of, open_plan, read_probe_data, run_stage
from taprobe_core.probes import Design, Fit, fit_batches
from taprobe_core.probes.features import ProbeData
from taprobe_core.splits import Fold, make_folds
from taprobe_core.study import Labels, ProbeRecipe, Splits

RECIPE = ProbeRecipe(name="linear_probe", features=("activations",))
SPLITS = Splits(protocols=("lopo",))
DEMO_STAGES = ("rollouts", "labels", "spans", "activations")


class Agreement(NamedTuple):
    """How near ours is to scikit-learn on one data set.

    Attributes:
        probability: largest difference of a probability.
        n_equal: folds whose PR-AUC is equal to six digits.
        n_folds: folds.
        ridge: largest difference of a ridge score.
    """

    probability: float
    n_equal: int
    n_folds: int
    ridge: float


def compare(data: ProbeData, labels: Labels) -> Agreement:
    """Fit both on every LOPO fold of some rows and compare all validation and test scores."""
    folds = make_folds(data.problems, SPLITS, present=data.problems)
    design = Design(data, tuple(folds), SPLITS, labels)
    anchors = Fit(RECIPE.resolved("anchor_binary", labels.percentile), 0)
    signed = Fit(RECIPE.resolved("importance_signed", labels.percentile), 0)
    found = dict(fit_batches(design, [anchors, signed]))
    X, y = data.activations["mean"].astype(np.float64), design.target(anchors.recipe).y[0]
    value = data.labels["importance_signed"].to_numpy()
    worst, worst_ridge, n_equal = 0.0, 0.0, 0
    for number, fold in enumerate(folds):
        rows, test = data.rows(fold.train), data.rows(fold.test)
        logistic = LogisticRegression(tol=1e-8, max_iter=100_000, class_weight="balanced")
        theirs = make_pipeline(StandardScaler(), logistic).fit(X[rows], y[rows])
        ridge = make_pipeline(StandardScaler(), Ridge(1.0)).fit(X[rows], value[rows])
        for split, at in (("val", data.rows(fold.val)), ("test", test)):
            ours = scores_of(found[anchors].scores, fold, split)
            expected = theirs.predict_proba(X[at])[:, 1]
            worst = max(worst, float(np.abs(ours - expected).max()))
            mine = scores_of(found[signed].scores, fold, split)
            worst_ridge = max(worst_ridge, float(np.abs(mine - ridge.predict(X[at])).max()))
        ours = found[anchors].probes[number].scores(data)[test]
        expected = theirs.predict_proba(X[test])[:, 1]
        n_equal += round(pr_auc(y[test], ours), 6) == round(pr_auc(y[test], expected), 6)
    return Agreement(worst, n_equal, len(folds), worst_ridge)


def scores_of(scores: object, fold: Fold, split: str) -> NDArray[np.float64]:
    """Return one fold's scores of one side, in the order of the rows."""
    own = scores.filter(fold=fold.index, split=split)  # type: ignore[attr-defined]
    found: NDArray[np.float64] = own["score"].to_numpy().astype(np.float64)
    return found


def with_features(data: ProbeData, X: NDArray[np.float32]) -> ProbeData:
    """Return the rows with other activations."""
    return replace(data, activations={"mean": X})


def variants(
    data: ProbeData, demo: NDArray[np.float32], n_features: int
) -> Mapping[str, ProbeData]:
    """Return the rows with features of every kind."""
    n = len(data.texts)
    made = {kind: make_probe_data(kind, n, n_features).features for kind in ("iid", "ill")}  # type: ignore[arg-type]
    made["demo"] = demo[np.arange(n) % len(demo)]
    return {kind: with_features(data, X) for kind, X in made.items()}


def demo_rows(folder: Path) -> Iterator[tuple[str, ProbeData, Labels]]:
    """Yield rows of the embedded demo with its own activations, setting by setting."""
    plan = open_plan(None, folder)
    last = {site.model: site for site in plan.study.sites}
    for model, site in last.items():
        for stage in DEMO_STAGES:
            cells = [each for each in cells_of(plan.study, stage) if each[0] in (model, str(site))]
            list(run_stage(plan, stage, cells))
        for setting in plan.study.settings:
            data = read_probe_data(plan, model, setting, site, [RECIPE])
            yield f"{site} {setting}", data, plan.study.labels


def real_rows(folder: Path) -> Iterator[tuple[str, ProbeData, Labels]]:
    """Yield rows of `studies/local_rollouts.yaml`, without activations."""
    plan = open_plan("studies/local_rollouts.yaml", folder)
    for stage in DEMO_STAGES[:3]:
        list(run_stage(plan, stage, cells_of(plan.study, stage)))
    for model in plan.study.models:
        for setting in plan.study.settings:
            data = read_probe_data(plan, model, setting, None)
            yield f"{model} {setting}", data, plan.study.labels


def main() -> None:
    """Print one line a data set."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probes.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--features", type=int, default=1024, help="of the random ones")
    parser.add_argument(
        "--real", action="store_true", help="with the rollouts that TAPROBE_ROLLOUTS names"
    )
    options = parser.parse_args()
    print(f"{'labels':58} {'features':8} {'sentences':>9} {'probability':>12} "
          f"{'PR-AUC equal':>13} {'ridge score':>12}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        demo = list(demo_rows(Path(folder) / "demo"))
        states = demo[0][1].activations["mean"]
        real = list(real_rows(Path(folder) / "real")) if options.real else []
        for name, data, labels in [*demo, *real]:
            own = data.activations.get("mean", states)
            for kind, each in variants(data, own, options.features).items():
                found = compare(each, labels)
                print(f"{name:58} {kind:8} {len(each.texts):9,} {found.probability:12.1e} "
                      f"{f'{found.n_equal} of {found.n_folds}':>13} {found.ridge:12.1e}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
