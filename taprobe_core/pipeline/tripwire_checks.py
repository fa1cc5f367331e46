"""Tripwires as checks of stored data: is the pipeline of probes sound?

They look at the rows and folds that the probes of one site and setting are fitted on. The pipeline
is the same for all layers, so each model and setting is looked at once, at its middle layer: a
false alarm is rare (`tripwires`), and with every layer of a deep model it would not stay so.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.features import ProbeData
from taprobe_core.keys import Site, parse_site
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.inputs import read_probe_data
from taprobe_core.pipeline.plan import Plan
from taprobe_core.probes.threads import threads_for
from taprobe_core.splits import make_folds
from taprobe_core.study import ProbeRecipe
from taprobe_core.tripwires import (
    memorises_one_problem,
    network,
    ridge_probe,
    row_identity,
    shuffled_labels,
)

_log = logging.getLogger(__name__)


def shuffled_labels_at_chance(plan: Plan, cell: Cell) -> list[str]:
    """A probe of shuffled labels ranks held-out problems no better than chance."""
    found = _rows(plan, cell)
    if found is None:
        return []
    data, X = found
    folds = make_folds(plan.problem_ids(), plan.study.splits, present=data.problems)
    try:
        with threads_for(X.size):
            verdict = shuffled_labels(
                ridge_probe(X),
                data.problem_id,
                data.labels["is_anchor"].to_numpy(),
                folds,
                identity=row_identity(X),
                seed=plan.study.seeds[0],
            )
    except NotEnoughDataError as error:
        return _not_run("shuffled labels", cell, error)
    return [] if verdict.passes else [verdict.text]


def one_problem_is_memorised(plan: Plan, cell: Cell) -> list[str]:
    """A network learns the labels of the largest problem by heart, without early stopping."""
    found = _rows(plan, cell)
    if found is None:
        return []
    data, X = found
    try:
        with threads_for(X.size):
            verdict = memorises_one_problem(
                network(),
                X,
                data.problem_id,
                data.labels["is_anchor"].to_numpy(),
                seed=plan.study.seeds[0],
            )
    except NotEnoughDataError as error:
        return _not_run("memorisation", cell, error)
    return [] if verdict.passes else [verdict.text]


def _rows(plan: Plan, cell: Cell) -> tuple[ProbeData, NDArray[np.float32]] | None:
    """The rows of a cell that is looked at, and the states that the first recipe of them reads."""
    site, setting = parse_site(cell[0]), cell[1]
    readers = [recipe for recipe in plan.study.recipes if "activations" in recipe.features]
    if not readers or site != _middle(plan, site.model):
        return None
    recipe = ProbeRecipe(name="tripwire", features=("activations",), pooling=readers[0].pooling)
    data = read_probe_data(plan, site.model, setting, site, [recipe])
    return data, data.activations[recipe.pooling]


def _middle(plan: Plan, model: str) -> Site:
    sites = sorted(plan.sites(model), key=lambda site: site.layer)
    return sites[len(sites) // 2]


def _not_run(name: str, cell: Cell, error: NotEnoughDataError) -> list[str]:
    _log.warning("tripwire %s not run for %s: %s", name, "/".join(cell), error)
    return []
