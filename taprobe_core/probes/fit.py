"""Fit many recipes on every fold in few batched solves, and score what each fold does not train on.

Recipes that read the same features with the same kind of estimator are one solve, whatever their
targets, penalties, residualisations and seeds. What does not belong here: folds and targets
(`design`), the solves (`registry`), keeping the result (`fitted`).

Invariant: given its seed a fit depends on nothing else, also not on what is solved with it; so one
that fails is found by solving fewer together, and costs itself.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.devices import products_in, threads_for
from taprobe_core.errors import NonFiniteError, TaprobeError, attempted, original
from taprobe_core.probes.design import TARGET_SETTINGS, Design, Fit
from taprobe_core.probes.features import ProbeData
from taprobe_core.probes.fitted import FittedProbe, SolverResult
from taprobe_core.probes.inputs import n_inputs, n_values
from taprobe_core.probes.registry import SOLVERS
from taprobe_core.study import Precision
from taprobe_core.tables import SCORES, check_table

_log = logging.getLogger(__name__)

MAX_COLUMNS = 4096
"""Models of one solve: bounds what a kill can cost."""

MAX_HOST_BYTES = 4 * 2**30
"""Of targets, weights and results of one solve, on the host."""

MAX_BOUND = 1e308
"""Stands for infinity, which JSON cannot hold."""


@dataclass(frozen=True, eq=False)
class RecipeFit:
    """What one recipe and seed came to.

    Attributes:
        scores: `tables.SCORES`.
        probes: one per tested fold in order; none where they were not to be kept.
        n_iter: [fold] int64, epochs or solver steps on every fold of the design.
        not_converged: fold of the design, in words -> the error bound of a linear probe there that
            is not within its tolerance; its scores count.
    """

    scores: pl.DataFrame
    probes: list[FittedProbe]
    n_iter: NDArray[np.int64]
    not_converged: dict[str, float] = field(default_factory=dict)


def fit_batches(
    design: Design,
    fits: Sequence[Fit],
    device: str = "cpu",
    *,
    keep_probes: bool = True,
    precision: Precision = "float32",
) -> Iterator[tuple[Fit, RecipeFit]]:
    """Fit every recipe on every fold; arguments and order are those of `fit_each`.

    Raises:
        DataError: a recipe reads what the data lacks.
        NotEnoughDataError: the training side of a fold has one class only, or no word.
        NumericsError: a network diverged.
        NonFiniteError: a score is NaN or infinite.
    """
    for fit, found in fit_each(design, fits, device, keep_probes=keep_probes, precision=precision):
        if isinstance(found, TaprobeError):
            raise original(found)
        yield fit, found


def fit_each(
    design: Design,
    fits: Sequence[Fit],
    device: str = "cpu",
    *,
    keep_probes: bool = True,
    precision: Precision = "float32",
) -> Iterator[tuple[Fit, RecipeFit | TaprobeError]]:
    """Fit every recipe on every fold; yield each as soon as the solve that it is part of is done.

    `regularization` is the inverse penalty C of a binary linear probe and the penalty alpha of a
    continuous one.

    Args:
        design: rows and folds.
        fits: recipes with their targets filled in (`Study.recipes`), and seeds.
        device: of the solvers, as PyTorch names it.
        keep_probes: False saves the memory of weights where the scores are enough.
        precision: of the products of networks and token probes on CUDA.

    Yields:
        Each fit with its scores and probes, or with the error that it failed by; solves run in the
        order in which their first fit stands in `fits`.
    """
    groups: dict[str, list[Fit]] = defaultdict(list)
    for fit in fits:
        groups[_shared(fit, design.data)].append(fit)
    for group in groups.values():
        recipe = group[0].recipe
        solver = SOLVERS[recipe.estimator]
        weights = solver.n_weights(recipe, n_inputs(recipe, design.data)) if keep_probes else 0
        n_columns = columns_at_once(len(design.data.texts), weights)
        size = max(1, n_columns // len(design.folds))
        for start in range(0, len(group), size):
            yield from _solved(design, group[start : start + size], device, keep_probes, precision)


def _solved(
    design: Design, fits: Sequence[Fit], device: str, keep_probes: bool, precision: Precision
) -> Iterator[tuple[Fit, RecipeFit | TaprobeError]]:
    """Solve fits together; where that fails, each half by itself, down to the fit that fails."""
    recipe = fits[0].recipe
    solve = SOLVERS[recipe.estimator].solve

    def together() -> SolverResult:
        with (
            threads_for(n_values(recipe, design.data)),
            products_in(precision if recipe.is_stochastic else "float32", device),
        ):
            return solve(design, fits, device, keep_probes)

    solved = attempted(together, _named(fits))
    if not isinstance(solved, TaprobeError):
        for index, fit in enumerate(fits):
            result = partial(_result, design, fit, solved, index, keep_probes)
            yield fit, attempted(result, _named([fit]))
    elif len(fits) == 1:
        yield fits[0], solved
    else:
        _log.warning("%d fits failed together, solved in halves: %s", len(fits), solved.what)
        half = len(fits) // 2
        yield from _solved(design, fits[:half], device, keep_probes, precision)
        yield from _solved(design, fits[half:], device, keep_probes, precision)


def _named(fits: Sequence[Fit]) -> str:
    return f"recipe {', '.join(dict.fromkeys(fit.recipe.name for fit in fits))}"


def columns_at_once(n_rows: int, n_weights: int) -> int:
    """Return how many models one solve takes: at most `MAX_COLUMNS`, within `MAX_HOST_BYTES`.

    Args:
        n_rows: sentences; a model has a target, a weight and a score of each, float64.
        n_weights: weights of a model that are kept, float32.
    """
    return max(1, min(MAX_COLUMNS, MAX_HOST_BYTES // (3 * 8 * n_rows + 4 * n_weights)))


def _shared(fit: Fit, data: ProbeData) -> str:
    """What fits of one solve have in common: all but targets, seeds and what models may differ in.

    Their targets are all classes or all values.
    """
    recipe, solver = fit.recipe, SOLVERS[fit.recipe.estimator]
    per_column = {*TARGET_SETTINGS, "control_seed", *solver.per_model}
    common = {name: value for name, value in recipe.content().items() if name not in per_column}
    common["features"] = solver.features(recipe, data)
    entry = recipe.target_entry
    rows = None
    if solver.stops_on_validation and entry is not None and entry.undefined_by is not None:
        # Where the target is undefined there is no validation loss either.
        rows = [entry.name, *(getattr(recipe, name) for name in entry.undefined_by)]
    return json.dumps([common, recipe.is_binary, rows], sort_keys=True)


def _result(
    design: Design, fit: Fit, solved: SolverResult, index: int, keep_probes: bool
) -> RecipeFit:
    n_folds, n_kept = len(design.folds), len(design.outer) * keep_probes
    first = index * n_folds
    scores = _scores(design, fit, solved.score[:, first : first + n_folds])
    if not index:
        # The tables of one solve are made alike: one look at the contract is enough.
        check_table(scores, SCORES, f"recipe {fit.recipe.name!r}, target {fit.recipe.target}")
    probes = [solved.probe(fit, first + fold) for fold in range(n_kept)]
    n_iter = solved.n_iter[first : first + n_folds]
    return RecipeFit(scores, probes, n_iter, _not_converged(design, fit, solved, first))


def _not_converged(design: Design, fit: Fit, solved: SolverResult, first: int) -> dict[str, float]:
    if solved.not_converged is None:
        return {}
    own = solved.not_converged[first : first + len(design.folds)]
    found = {
        str(design.folds[at]): min(float(own[at]), MAX_BOUND)
        for at in np.flatnonzero(~np.isnan(own))
    }
    for fold, bound in found.items():
        _log.warning(
            "recipe %s, %s: not converged, its relative error may be %.1g",
            *(fit.recipe.name, fold, bound),
        )
    return found


def _scores(design: Design, fit: Fit, score: NDArray[np.float32]) -> pl.DataFrame:
    """Test rows of every tested fold, and its validation rows or those of its inner folds."""
    target, places = design.target(fit.recipe), design.places
    own = places.number if len(target.value) > 1 else np.zeros_like(places.number)
    is_defined = target.weight[places.row] > 0
    value = np.where(is_defined, target.value[own, places.row], np.nan)
    found = score[places.row, places.number]
    _check_finite(design, fit, found)
    positive = pl.lit(None, pl.Boolean)
    if target.is_positive is not None:
        ranked = pl.Series(target.is_positive[own, places.row])
        positive = pl.when(pl.Series(is_defined)).then(ranked)
    return places.frame.select(
        "problem_id",
        "sentence_idx",
        pl.lit(fit.recipe.name).alias("recipe"),
        "protocol",
        "fold",
        "split",
        pl.Series("score", found, pl.Float32),
        pl.Series("target_value", value, pl.Float64, nan_to_null=True),
        positive.alias("is_positive"),
    )


def _check_finite(design: Design, fit: Fit, score: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(~np.isfinite(score))
    if bad.size:
        shown = [design.places.frame.row(int(row), named=True) for row in bad[:10]]
        raise NonFiniteError(
            f"{bad.size} scores of recipe {fit.recipe.name!r} are NaN or infinite",
            "; ".join(
                "{protocol} fold {fold}, problem {problem_id}, sentence {sentence_idx}".format(
                    **row
                )
                for row in shown
            ),
            "look for extreme values in the features of these sentences",
        )
