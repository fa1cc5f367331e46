"""The grid of cells of each stage, and which of them a study still lacks.

A stage is one of the asset names; a cell is the pair of partition keys of that stage, in the order
of its dimensions, or the empty tuple for the stages that have one artifact per study. A study has
the stages of vertical attention and of a sweep only where it asks for them (`stages_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from taprobe_core.errors import ConfigError, TaprobeError, attempted
from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import ArtifactKey, Manifest
from taprobe_core.study import Study

Cell = tuple[str, ...]

DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "rollouts": ("model", "setting"),
    "labels": ("model", "setting"),
    "spans": ("model", "setting"),
    "activations": ("site", "setting"),
    "vertical_attention": ("site", "setting"),
    "receiver_heads": ("model", "setting"),
    "probe_fits": ("site", "trial"),
    "deferral_plans": ("site", "trial"),
    "evaluation": ("site", "setting"),
    "leaderboard": (),
    "study_report": (),
    "sweep_stage1": ("site", "setting"),
    "sweep_shortlist_stage2": (),
    "sweep_stage2": ("site", "setting"),
    "sweep_shortlist_stage3": (),
    "sweep_stage3": ("site", "setting"),
    "sweep_leaderboard": (),
    "sweep_paired_deltas": (),
    "sweep_stability": (),
}
"""Every stage there is, in data-path order, with the names of its two partition dimensions."""

STAGES = tuple(DIMENSIONS)

_ATTENTION: Mapping[str, frozenset[str]] = {
    "off": frozenset(),
    "light": frozenset({"vertical_attention"}),
    "full": frozenset({"vertical_attention", "receiver_heads"}),
}
"""Mode of the study's attention -> the stages of attention that it has."""

_OPTIONAL = frozenset(stage for stage in STAGES if stage.startswith("sweep_")) | _ATTENTION["full"]
"""Stages that only some studies have."""

PARENTS: Mapping[str, tuple[str, ...]] = {
    "rollouts": (),
    "labels": ("rollouts",),
    "spans": ("rollouts",),
    "activations": ("spans",),
    "vertical_attention": ("spans",),
    "receiver_heads": ("vertical_attention",),
    "probe_fits": ("labels", "spans", "activations", "vertical_attention"),
    "deferral_plans": ("probe_fits",),
    "evaluation": ("probe_fits", "deferral_plans"),
    "leaderboard": ("evaluation",),
    "study_report": ("leaderboard",),
    "sweep_stage1": ("labels", "spans", "activations"),
    "sweep_shortlist_stage2": ("sweep_stage1",),
    "sweep_stage2": (
        "sweep_shortlist_stage2",
        "labels",
        "spans",
        "activations",
        "vertical_attention",
    ),
    "sweep_shortlist_stage3": ("sweep_stage2",),
    "sweep_stage3": (
        "sweep_shortlist_stage3",
        "labels",
        "spans",
        "activations",
        "vertical_attention",
    ),
    "sweep_leaderboard": ("sweep_stage1", "sweep_stage2", "sweep_stage3"),
    "sweep_paired_deltas": ("sweep_stage1", "sweep_stage2", "sweep_stage3"),
    "sweep_stability": ("sweep_stage1", "sweep_stage2", "sweep_stage3"),
}
"""The stages each stage reads, as far as a study has them (`parents_of`). Where two stages have
different dimensions, a model stands for all its sites and a setting for all its trials."""

_PARTS = {
    "activations": "activation_shards",
    "vertical_attention": "attention_shards",
    "probe_fits": "fits",
    "sweep_stage1": "fits",
    "sweep_stage2": "fits",
    "sweep_stage3": "fits",
}
"""Stages whose artifact is an index, with the stage of the parts that it lists."""


def stages_of(study: Study) -> tuple[str, ...]:
    """The stages that a study has, in data-path order."""
    own = _ATTENTION[study.attention.mode]
    return tuple(
        stage
        for stage in STAGES
        if stage not in _OPTIONAL
        or stage in own
        or (stage.startswith("sweep_") and study.sweep is not None)
    )


def parents_of(study: Study, stage: str) -> tuple[str, ...]:
    """The stages that a stage of a study reads."""
    known = stages_of(study)
    return tuple(parent for parent in PARENTS[stage] if parent in known)


def parent_cells(study: Study, stage: str, cell: Cell) -> Iterator[tuple[str, Cell]]:
    """Yield stage and cell of everything that a cell reads directly, in data-path order."""
    own = dict(zip(DIMENSIONS[stage], cell, strict=True))
    for parent in parents_of(study, stage):
        grid: list[Cell] = [()]
        for dimension in DIMENSIONS[parent]:
            grid = [(*each, key) for each in grid for key in _related(study, dimension, own)]
        for each in grid:
            yield parent, each


def _related(study: Study, dimension: str, own: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a dimension that stand for a cell with these keys."""
    if dimension in own:
        return (own[dimension],)
    if dimension == "model" and "site" in own:
        return (parse_site(own["site"]).model,)
    if dimension == "setting" and "trial" in own:
        return (parse_trial(own["trial"]).setting,)
    keys = dimension_keys(study, dimension)
    if dimension == "site" and "model" in own:
        return tuple(key for key in keys if parse_site(key).model == own["model"])
    if dimension == "trial" and "setting" in own:
        return tuple(key for key in keys if parse_trial(key).setting == own["setting"])
    return keys


def part_keys(manifest: Manifest) -> list[ArtifactKey]:
    """Keys of the parts that an index lists; none for an artifact that is no index."""
    part = _PARTS.get(manifest.stage)
    return [key for key in manifest.upstream_keys if key.stage == part]


def check_stage(study: Study, stage: str) -> str:
    """Return `stage` if the study has it.

    Raises:
        ConfigError: there is no such stage, or the study asks for too little attention for it.
    """
    known = stages_of(study)
    if stage in known:
        return stage
    fix = f"use one of {', '.join(known)}"
    if stage.startswith("sweep_") and stage in STAGES:
        fix = f"give the study a `sweep`, or {fix}"
    elif stage in STAGES:
        enough = [mode for mode, stages in _ATTENTION.items() if stage in stages]
        fix = f"set attention.mode to {' or '.join(enough)}, or {fix}"
    raise ConfigError(f"no stage {stage!r}", f"study {study.name}", fix)


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
    """Every cell of a stage that the filter takes, in grid order; none where the study lacks it."""
    if stage not in stages_of(study):
        return []
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
        "vertical_attention": lambda: plan.vertical_attention(parse_site(first), second),
        "receiver_heads": lambda: plan.receiver_heads(first, second),
        "probe_fits": lambda: plan.probe_fits(parse_site(first), parse_trial(second)),
        "deferral_plans": lambda: plan.deferral_plans(parse_site(first), parse_trial(second)),
        "evaluation": lambda: plan.evaluation(parse_site(first), second),
        "leaderboard": plan.leaderboard,
        "study_report": plan.study_report,
        "sweep_stage1": lambda: plan.sweep_fits("stage1", parse_site(first), second),
        "sweep_shortlist_stage2": lambda: plan.sweep_shortlist("stage2"),
        "sweep_stage2": lambda: plan.sweep_fits("stage2", parse_site(first), second),
        "sweep_shortlist_stage3": lambda: plan.sweep_shortlist("stage3"),
        "sweep_stage3": lambda: plan.sweep_fits("stage3", parse_site(first), second),
        "sweep_leaderboard": lambda: plan.sweep_table("sweep_leaderboard"),
        "sweep_paired_deltas": lambda: plan.sweep_table("sweep_paired_deltas"),
        "sweep_stability": lambda: plan.sweep_table("sweep_stability"),
    }
    return keys[stage]()


def is_complete(plan: Plan, stage: str, cell: Cell) -> bool:
    """Whether the store holds a cell's artifact, at today's fingerprint, and all its parts.

    The artifacts of activations, attention and fits are indexes: a part that is gone (discarded as
    corrupt, say) leaves the index in place, but the cell has to run again.
    """
    artifact = plan.store.find(key_of(plan, stage, cell))
    if artifact is None:
        return False
    parts = part_keys(artifact.manifest)
    return all(plan.store.backend.sizes(key) is not None for key in parts)


def has_key(plan: Plan, stage: str, cell: Cell) -> bool:
    """Whether a cell can be named here; not for want of its checkpoint or its files, for example.

    Raises:
        ArtifactError: the data folder cannot be written, or another process holds it.
    """
    return not isinstance(attempted(lambda: key_of(plan, stage, cell), stage), TaprobeError)


def is_made(plan: Plan, stage: str, cell: Cell) -> bool:
    """`is_complete`; no for a cell that has no key here."""
    return has_key(plan, stage, cell) and is_complete(plan, stage, cell)


def missing_cells(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Cells whose artifact, at today's fingerprint, the store does not hold whole."""
    for cell in cells:
        if not is_complete(plan, stage, cell):
            yield cell
