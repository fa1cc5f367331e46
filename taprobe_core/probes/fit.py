"""Fit one recipe on every fold and score its validation and test sentences.

What is learned (scaling, terms, weights) is learned on the training problems of the fold. Text is
counted and activations are converted once for all folds. What does not belong here: which folds
(`splits`), which recipes and seeds (the study), keeping the result (`files`). Invariant: given the
seed, the result depends on nothing else; no global state is set, folds run one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.fitted import FittedProbe, Training
from taprobe_core.probes.inputs import (
    Arrays,
    Matrix,
    RawInputs,
    apply_inputs,
    learn_inputs,
    read_inputs,
)
from taprobe_core.probes.linear import fit_logistic, fit_ridge
from taprobe_core.probes.network import train_network
from taprobe_core.splits import Fold, check_no_leakage
from taprobe_core.study.config import ProbeRecipe, Target
from taprobe_core.tables import PROTOCOLS, SCORES, SPLITS, check_table


@dataclass(frozen=True, eq=False)
class RecipeFit:
    """Scores of one recipe (`tables.SCORES`), and its probes, one per fold in their order."""

    scores: pl.DataFrame
    probes: list[FittedProbe]


def fit_recipe(
    recipe: ProbeRecipe, target: Target, data: ProbeData, folds: Sequence[Fold], seed: int
) -> RecipeFit:
    """Fit `recipe` on each fold and score the fold's validation and test sentences.

    `regularization` is the inverse penalty C of a binary linear probe and the penalty alpha of a
    continuous one; a network ignores it.

    Args:
        recipe: features, estimator and settings.
        target: what to predict; binary targets get classifiers.
        data: rows of all problems that the folds name.
        folds: from `splits.make_folds`, made from `data.problems`.
        seed: of a network; a linear probe ignores it.

    Raises:
        LeakageError: a problem stands on two sides of a fold.
        DataError: a fold names a problem without rows, or the recipe reads activations that
            `data` lacks.
        NotEnoughDataError: the training side of a fold has one class only, or no word.
        NumericsError: a fit has no optimum in float64, or a network diverged.
        NonFiniteError: a score is NaN or infinite.
    """
    for fold in folds:
        _check_fold(fold, data)
    raw = read_inputs(recipe, data)
    y = data.target(target)
    probes, tables = [], []
    for fold in folds:
        probe = _fit_fold(recipe, target, data, raw, y, fold, seed)
        probes.append(probe)
        tables += [
            _score(probe, data, raw, split, data.rows(side))
            for split, side in (("val", fold.val), ("test", fold.test))
        ]
    where = f"recipe {recipe.name!r}, target {target}"
    return RecipeFit(check_table(pl.concat(tables), SCORES, where), probes)


def _check_fold(fold: Fold, data: ProbeData) -> None:
    check_no_leakage(fold)
    unknown = sorted({*fold.train, *fold.val, *fold.test} - set(data.problems))
    if unknown:
        raise DataError(
            f"problems {unknown} have no rows",
            str(fold),
            "make the folds from ProbeData.problems: problems without spans are not in it",
        )


def _fit_fold(
    recipe: ProbeRecipe,
    target: Target,
    data: ProbeData,
    raw: RawInputs,
    y: NDArray[np.float64],
    fold: Fold,
    seed: int,
) -> FittedProbe:
    rows = data.rows(fold.train)
    is_binary = target == "anchor_binary"
    if is_binary and len(np.unique(y[rows])) < 2:
        found = "anchors" if y[rows].all() else "no anchor"
        raise NotEnoughDataError(
            f"training needs two classes, found {found} among {len(rows)} sentences of problems "
            f"{list(fold.train)}",
            f"recipe {recipe.name!r}, {fold}",
            "use more problems, or lower labels.percentile",
        )
    learned, terms = learn_inputs(raw, rows)
    if terms is not None and not terms:
        raise NotEnoughDataError(
            f"no word of two letters among {len(rows)} sentences of problems {list(fold.train)}",
            f"recipe {recipe.name!r}, {fold}",
            "take text out of the recipe's features",
        )
    X = apply_inputs(raw, learned, terms, rows)
    solved, training = _solve(recipe, is_binary, X, y[rows], data.problem_id[rows], seed)
    return FittedProbe(recipe, target, fold, seed, {**learned, **solved}, terms, training)


def _solve(
    recipe: ProbeRecipe,
    is_binary: bool,
    X: Matrix,
    y: NDArray[np.float64],
    problem_id: NDArray[np.int64],
    seed: int,
) -> tuple[Arrays, Training]:
    if recipe.estimator == "mlp":
        network = train_network(X, y, problem_id, recipe, is_binary, seed)
        arrays: Arrays = {}
        for depth, (weight, bias) in enumerate(network.layers):
            arrays[f"weight_{depth}"], arrays[f"bias_{depth}"] = weight, bias
        return arrays, Training(network.n_iter, network.is_converged, network.early_stopping)
    fit = fit_logistic if is_binary else fit_ridge
    line = fit(X, y, recipe.regularization)
    return {"coef": line.coef, "intercept": np.array([line.intercept])}, Training(line.n_iter, True)


def _score(
    probe: FittedProbe, data: ProbeData, raw: RawInputs, split: str, rows: NDArray[np.intp]
) -> pl.DataFrame:
    score = probe.score(apply_inputs(raw, probe.arrays, probe.terms, rows))
    bad = np.flatnonzero(~np.isfinite(score))
    if bad.size:
        shown = [data.keys.row(int(row)) for row in rows[bad[:10]]]
        raise NonFiniteError(
            f"{bad.size} scores of recipe {probe.recipe.name!r} are NaN or infinite",
            f"{probe.fold}, (problem_id, sentence_idx) {shown}",
            "look for extreme values in the features of these sentences",
        )
    return data.keys[rows].select(
        "problem_id",
        "sentence_idx",
        pl.lit(probe.recipe.name).alias("recipe"),
        pl.lit(probe.fold.protocol, pl.Enum(PROTOCOLS)).alias("protocol"),
        pl.lit(probe.fold.index, pl.Int32).alias("fold"),
        pl.lit(split, pl.Enum(SPLITS)).alias("split"),
        pl.Series("score", score, pl.Float32),
    )
