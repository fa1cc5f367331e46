"""Fit many recipes on every fold in few batched solves, and score what each fold does not train on.

Recipes that read the same features with the same kind of estimator are one solve, whatever their
targets, penalties, residualisations and seeds. What does not belong here: folds and targets
(`design`), the solves (`linear`, `network`, `token_sets`), keeping the result (`files`).

Invariant: given its seed a fit depends on nothing else, also not on what is solved with it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import NonFiniteError
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.fitted import FittedProbe
from taprobe_core.probes.linear import fit_linear
from taprobe_core.probes.network import fit_mlp
from taprobe_core.probes.solved import Solved
from taprobe_core.probes.token_sets import fit_token_sets
from taprobe_core.tables import PROTOCOLS, SCORES, SPLITS, check_table

MAX_COLUMNS = 4096
"""Models of one solve: bounds memory, and what a kill can cost."""

_SOLVE = {"linear": fit_linear, "mlp": fit_mlp}


@dataclass(frozen=True, eq=False)
class RecipeFit:
    """Scores of one recipe (`tables.SCORES`), and its probes, one per tested fold in order."""

    scores: pl.DataFrame
    probes: list[FittedProbe]


def fit_batches(
    design: Design, fits: Sequence[Fit], device: str = "cpu"
) -> Iterator[tuple[Fit, RecipeFit]]:
    """Fit every recipe on every fold; yield each as soon as the solve that it is part of is done.

    `regularization` is the inverse penalty C of a binary linear probe and the penalty alpha of a
    continuous one.

    Args:
        design: rows and folds.
        fits: recipes with their targets filled in (`Study.recipes`), and seeds.
        device: of the solvers, as PyTorch names it.

    Yields:
        Each fit with its scores and probes. Solves run in the order in which their first fit
        stands in `fits`.

    Raises:
        DataError: a recipe reads what the data lacks.
        NotEnoughDataError: the training side of a fold has one class only, or no word.
        NumericsError: a fit did not converge, or a network diverged.
        NonFiniteError: a score is NaN or infinite.
    """
    groups: dict[str, list[Fit]] = defaultdict(list)
    for fit in fits:
        groups[_shared(fit)].append(fit)
    for group in groups.values():
        size = max(1, MAX_COLUMNS // len(design.folds))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            solve = _SOLVE.get(part[0].recipe.estimator, fit_token_sets)
            solved = solve(design, part, device)
            for index, fit in enumerate(part):
                yield fit, _result(design, fit, solved, index)


def _shared(fit: Fit) -> str:
    """What fits of one solve have in common: everything but target, penalty and seed."""
    recipe = fit.recipe
    per_column = {
        "target", "percentile", "threshold", "window", "weights", "residualize", "regularization",
    }  # fmt: skip
    common = {name: value for name, value in recipe.content().items() if name not in per_column}
    kind: object = recipe.target == "anchor_binary"
    if recipe.reads_tokens and recipe.target in ("exceeds_threshold", "windowed_change"):
        # Where the target is undefined there is no validation loss either.
        kind = [recipe.target, recipe.window]
    return json.dumps([common, kind], sort_keys=True)


def _result(design: Design, fit: Fit, solved: Solved, index: int) -> RecipeFit:
    n_folds, n_outer = len(design.folds), len(design.outer)
    first = index * n_folds
    score = solved.score[:, first : first + n_folds]
    return RecipeFit(
        _scores(design, fit, score), [solved.probe(fit, first + fold) for fold in range(n_outer)]
    )


def _scores(design: Design, fit: Fit, score: NDArray[np.float32]) -> pl.DataFrame:
    """Test rows of every tested fold, and its validation rows or those of its inner folds."""
    target = design.target(fit.recipe)
    parts = []
    for number, fold in enumerate(design.folds):
        for split, problem_ids in (("val", fold.val), ("test", fold.test)):
            rows = design.data.rows(problem_ids)
            if not rows.size:
                continue
            own = number if len(target.value) > 1 else 0
            positive = None if target.is_positive is None else target.is_positive[own, rows]
            is_defined = target.weight[rows] > 0
            _check_finite(design, fit, str(fold), rows, score[rows, number])
            part = design.data.keys[rows].select(
                "problem_id",
                "sentence_idx",
                pl.lit(fit.recipe.name).alias("recipe"),
                pl.lit(fold.protocol, pl.Enum(PROTOCOLS)).alias("protocol"),
                pl.lit(fold.index, pl.Int32).alias("fold"),
                pl.lit(split, pl.Enum(SPLITS)).alias("split"),
                pl.Series("score", score[rows, number], pl.Float32),
                pl.Series("target_value", target.value[own, rows], pl.Float64),
                pl.Series("is_positive", positive, pl.Boolean)
                if positive is not None
                else pl.lit(None, pl.Boolean).alias("is_positive"),
            )
            defined = pl.Series("is_defined", is_defined)
            parts.append(
                part.with_columns(
                    pl.when(defined).then(pl.col(name)).alias(name)
                    for name in ("target_value", "is_positive")
                )
            )
    where = f"recipe {fit.recipe.name!r}, target {fit.recipe.target}"
    return check_table(pl.concat(parts), SCORES, where)


def _check_finite(
    design: Design, fit: Fit, fold: str, rows: NDArray[np.intp], score: NDArray[np.float32]
) -> None:
    bad = np.flatnonzero(~np.isfinite(score))
    if bad.size:
        shown = [design.data.keys.row(int(row)) for row in rows[bad[:10]]]
        raise NonFiniteError(
            f"{bad.size} scores of recipe {fit.recipe.name!r} are NaN or infinite",
            f"{fold}, (problem_id, sentence_idx) {shown}",
            "look for extreme values in the features of these sentences",
        )
