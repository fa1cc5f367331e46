"""Cells: the partition keys that a stage has an artifact for, and which stand for which.

A cell is the pair of keys of a stage's two dimensions, in their order, or the empty tuple for a
stage that has one artifact per study. Which dimensions a stage has is said by the stage (`stages`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.study import Study

Cell = tuple[str, ...]

COARSER = {"model": "site", "setting": "trial"}
"""Dimension -> the finer one, each of whose keys has one key of this: a site has one model."""


def dimension_keys(study: Study, dimension: str) -> tuple[str, ...]:
    """Partition keys of one dimension, in the order of the study."""
    return {
        "model": tuple(study.models),
        "setting": study.settings,
        "site": tuple(str(site) for site in study.sites),
        "trial": tuple(str(trial) for trial in study.trials),
    }[dimension]


@dataclass(frozen=True)
class CellFilter:
    """Which cells to take: those of these sites and trials; None takes all."""

    sites: frozenset[str] | None = None
    trials: frozenset[str] | None = None

    def takes(self, dimension: str, key: str) -> bool:
        """Whether cells of this partition key are wanted."""
        if dimension == "model":
            return self.sites is None or any(parse_site(s).model == key for s in self.sites)
        if dimension == "setting":
            return self.trials is None or any(parse_trial(t).setting == key for t in self.trials)
        wanted = self.sites if dimension == "site" else self.trials
        return wanted is None or key in wanted


def grid_cells(study: Study, grid: Sequence[str], chosen: CellFilter | None = None) -> list[Cell]:
    """Every cell of a grid that the filter takes, in grid order."""
    chosen = chosen or CellFilter()
    return _product(
        [
            [key for key in dimension_keys(study, dimension) if chosen.takes(dimension, key)]
            for dimension in grid
        ]
    )


def related_cells(study: Study, grid: Sequence[str], own: Mapping[str, str]) -> list[Cell]:
    """The cells of a grid that stand for a cell of another, in grid order.

    A model stands for all its sites and a setting for all its trials.

    Args:
        study: whose grids they are.
        grid: dimensions of the cells that are asked for.
        own: dimension -> key of the other cell.
    """
    return _product([_related(study, dimension, own) for dimension in grid])


def _related(study: Study, dimension: str, own: Mapping[str, str]) -> Sequence[str]:
    if dimension in own:
        return (own[dimension],)
    if dimension == "model" and "site" in own:
        return (parse_site(own["site"]).model,)
    if dimension == "setting" and "trial" in own:
        return (parse_trial(own["trial"]).setting,)
    keys = dimension_keys(study, dimension)
    if dimension == "site" and "model" in own:
        return [key for key in keys if parse_site(key).model == own["model"]]
    if dimension == "trial" and "setting" in own:
        return [key for key in keys if parse_trial(key).setting == own["setting"]]
    return keys


def _product(dimensions: Sequence[Sequence[str]]) -> list[Cell]:
    return list(itertools.product(*dimensions))
