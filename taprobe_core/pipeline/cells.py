"""The grid of cells of each stage, and which of them a study still lacks.

A stage is one of the asset names; a cell is the pair of partition keys of that stage, in the order
of its dimensions, or the empty tuple for the two stages that have one artifact per study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import ArtifactKey
from taprobe_core.study import Study

Cell = tuple[str, ...]

DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "rollouts": ("model", "setting"),
    "labels": ("model", "setting"),
    "spans": ("model", "setting"),
    "activations": ("site", "setting"),
    "probe_fits": ("site", "trial"),
    "deferral_plans": ("site", "trial"),
    "evaluation": ("site", "setting"),
    "leaderboard": (),
    "study_report": (),
}
"""Stages in data-path order, each with the names of its two partition dimensions."""

STAGES = tuple(DIMENSIONS)

PARENTS: Mapping[str, tuple[str, ...]] = {
    "rollouts": (),
    "labels": ("rollouts",),
    "spans": ("rollouts",),
    "activations": ("spans",),
    "probe_fits": ("labels", "spans", "activations"),
    "deferral_plans": ("probe_fits",),
    "evaluation": ("probe_fits", "deferral_plans"),
    "leaderboard": ("evaluation",),
    "study_report": ("leaderboard",),
}
"""The stages each stage reads. Where two stages have different dimensions, a model stands for all
its sites and a setting for all its trials."""

_PARTS = {"activations": "activation_shards", "probe_fits": "fits"}
"""Stages whose artifact is an index, with the stage of the parts that it lists."""


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


def cells_of(study: Study, stage: str, chosen: CellFilter | None = None) -> list[Cell]:
    """Every cell of a stage that the filter takes, in grid order."""
    chosen = chosen or CellFilter()
    grid: list[Cell] = [()]
    for dimension in DIMENSIONS[stage]:
        keys = [key for key in dimension_keys(study, dimension) if chosen.takes(dimension, key)]
        grid = [(*cell, key) for cell in grid for key in keys]
    return grid


def key_of(plan: Plan, stage: str, cell: Sequence[str]) -> ArtifactKey:
    """Key of a cell's artifact."""
    first, second = (*cell, "", "")[:2]
    keys: Mapping[str, Callable[[], ArtifactKey]] = {
        "rollouts": lambda: plan.rollouts(first, second),
        "labels": lambda: plan.labels(first, second),
        "spans": lambda: plan.spans(first, second),
        "activations": lambda: plan.activations(parse_site(first), second),
        "probe_fits": lambda: plan.probe_fits(parse_site(first), parse_trial(second)),
        "deferral_plans": lambda: plan.deferral_plans(parse_site(first), parse_trial(second)),
        "evaluation": lambda: plan.evaluation(parse_site(first), second),
        "leaderboard": plan.leaderboard,
        "study_report": plan.study_report,
    }
    return keys[stage]()


def is_complete(plan: Plan, stage: str, cell: Cell) -> bool:
    """Whether the store holds a cell's artifact, at today's fingerprint, and all its parts.

    The artifacts of activations and fits are indexes: a part that is gone (discarded as corrupt,
    say) leaves the index in place, but the cell has to run again.
    """
    artifact = plan.store.find(key_of(plan, stage, cell))
    if artifact is None:
        return False
    if stage not in _PARTS:
        return True
    parts = [key for key in artifact.manifest.upstream_keys if key.stage == _PARTS[stage]]
    return all(plan.store.backend.sizes(key) is not None for key in parts)


def missing_cells(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Cells whose artifact, at today's fingerprint, the store does not hold whole."""
    for cell in cells:
        if not is_complete(plan, stage, cell):
            yield cell
