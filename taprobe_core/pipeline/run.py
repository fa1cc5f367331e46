"""Run any stage over its cells, and describe what is there: what Dagster and notebooks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from taprobe_core.pipeline.gate import Gate, failed_checks, refusal, split_stopped
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Description, Outcome


def run_stage(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """Compute what the cells of a stage lack; yield each cell with its outcome, when complete.

    Args:
        plan: the plan.
        stage: a stage that the study has (`cells.stages_of`).
        cells: cells of that stage, in any order.

    Yields:
        (cell, outcome). Activations, attention and fits come grouped by what they share, so the
        order may differ from that of `cells`.

    Raises:
        ConfigError: the study has no such stage.
        MissingArtifactError: an upstream stage has not run.
        FailedCheckError: a blocking check of what a cell is made from failed, in this run or an
            earlier one; raised after all cells that this does not concern.
    """
    found = plan.stages[plan.stages.asked(plan.study, stage)]
    free, stopped = split_stopped(Gate(plan), stage, cells)
    yield from found.make(plan, free)
    if stopped:
        failed = failed_checks(Gate(plan), {stage: stopped})
        cells_said = ", ".join("/".join(cell) for cell in stopped if cell)
        of_cells = f" of {cells_said}" if cells_said else ""
        raise refusal(plan.study, failed, f"{stage}{of_cells} cannot be made")


def describe(plan: Plan, stage: str, cell: Cell) -> Description:
    """Describe a cell's artifact: numbers that plot over cells, and one picture.

    Read from the store, not from the computation, so an artifact that was reused is shown like one
    that was made.

    Args:
        plan: the plan.
        stage: a stage that the study has (`cells.stages_of`).
        cell: a cell whose artifact is in the store.

    Raises:
        ConfigError: the study has no such stage.
        MissingArtifactError: it is not there.
        CorruptArtifactError: its bytes differ from its manifest.
    """
    return plan.stages[plan.stages.asked(plan.study, stage)].describe(plan, cell)
