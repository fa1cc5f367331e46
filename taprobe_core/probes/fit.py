"""Fit one recipe on every fold and score its validation and test sentences.

What is learned (scaling, terms, weights) is learned on the training problems of the fold. What does
not belong here: which folds (`splits`), which recipes and seeds (the study), keeping the result
(`files`). Invariant: given the seed, the result depends on nothing else; folds run one after
another, and the number of BLAS threads, lowered meanwhile on small data, is given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.fitted import FittedProbe
from taprobe_core.probes.inputs import input_frame, n_dense, transform_inputs
from taprobe_core.probes.pipeline import extract_arrays, fit_pipeline
from taprobe_core.probes.words import has_words
from taprobe_core.splits import Fold, check_no_leakage
from taprobe_core.study.config import ProbeRecipe, Target
from taprobe_core.tables import PROTOCOLS, SCORES, SPLITS, check_table

MAX_VALUES_ON_ONE_THREAD = 5_000_000


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
        NumericsError: a linear fit did not converge, or a network diverged.
        NonFiniteError: a score is NaN or infinite.
    """
    for fold in folds:
        _check_fold(fold, data)
    frame = input_frame(recipe, data)
    y = data.target(target)
    probes, tables = [], []
    with _threads(len(frame) * n_dense(frame)):
        for fold in folds:
            probe = _fit_fold(recipe, target, data, frame, y, fold, seed)
            probes.append(probe)
            tables += [
                _score(probe, data, frame, split, data.rows(side))
                for split, side in (("val", fold.val), ("test", fold.test))
            ]
    where = f"recipe {recipe.name!r}, target {target}"
    return RecipeFit(check_table(pl.concat(tables), SCORES, where), probes)


def _threads(n_values: int) -> AbstractContextManager[object]:
    """Keep small products on one thread: handing them out takes longer than computing them."""
    return nullcontext() if n_values > MAX_VALUES_ON_ONE_THREAD else threadpool_limits(1)


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
    frame: pl.DataFrame,
    y: NDArray[np.float64],
    fold: Fold,
    seed: int,
) -> FittedProbe:
    rows = data.rows(fold.train)
    where = f"recipe {recipe.name!r}, {fold}"
    if target == "anchor_binary" and len(np.unique(y[rows])) < 2:
        found = "anchors" if y[rows].all() else "no anchor"
        raise NotEnoughDataError(
            f"training needs two classes, found {found} among {len(rows)} sentences of problems "
            f"{list(fold.train)}",
            where,
            "use more problems, or lower labels.percentile",
        )
    training_frame = frame[rows]
    if "text" in recipe.features and not has_words(training_frame["text"].to_list()):
        raise NotEnoughDataError(
            f"no word of two letters among {len(rows)} sentences of problems {list(fold.train)}",
            where,
            "take text out of the recipe's features",
        )
    pipeline, training = fit_pipeline(recipe, target, training_frame, y[rows], seed, where)
    arrays, terms = extract_arrays(pipeline)
    return FittedProbe(recipe, target, fold, seed, arrays, terms, training)


def _score(
    probe: FittedProbe, data: ProbeData, frame: pl.DataFrame, split: str, rows: NDArray[np.intp]
) -> pl.DataFrame:
    score = probe.score(transform_inputs(frame[rows], probe.arrays, probe.terms))
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
