"""The cells of a study's stages, by name: which there are, what they read, which are missing.

For whoever has a study or a plan and the name of a stage: commands, notebooks, Dagster. What the
stages are is said in `stages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from taprobe_core.pipeline.grid import Cell, CellFilter
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stages import STAGES
from taprobe_core.store import ArtifactKey
from taprobe_core.study import Study


def stages_of(study: Study) -> tuple[str, ...]:
    """The stages that a study has, in data-path order."""
    return STAGES.of(study)


def check_stage(study: Study, stage: str) -> str:
    """Return `stage` if the study has it.

    Raises:
        ConfigError: there is no such stage, or the study does not ask for it.
    """
    return STAGES.asked(study, stage)


def parents_of(study: Study, stage: str) -> tuple[str, ...]:
    """The stages that a stage of a study reads."""
    return STAGES.parents(study, stage)


def cells_of(study: Study, stage: str, chosen: CellFilter | None = None) -> list[Cell]:
    """Every cell of a stage that the filter takes, in grid order; none where the study lacks it."""
    return STAGES.cells(study, stage, chosen)


def key_of(plan: Plan, stage: str, cell: Sequence[str]) -> ArtifactKey:
    """Key of a cell's artifact."""
    return plan.key(stage, tuple(cell))


def is_complete(plan: Plan, stage: str, cell: Cell) -> bool:
    """Whether the store holds a cell's artifact, at today's fingerprint, and all its parts."""
    return plan.is_complete(stage, cell)


def missing_cells(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Cells whose artifact, at today's fingerprint, the store does not hold whole."""
    return (cell for cell in cells if not plan.is_complete(stage, cell))
