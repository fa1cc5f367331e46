"""Run any stage over its cells, and describe what is there: what Dagster and notebooks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.pipeline.failures import Failure, failure_of, forget_failure, keep_failure
from taprobe_core.pipeline.gate import Gate, distinct_stops, refusal, split_stopped
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Description, Made, Outcome


def run_stage(
    plan: Plan,
    stage: str,
    cells: Sequence[Cell],
    tell: Callable[[Failure], object] = lambda _: None,
) -> Iterator[tuple[Cell, Outcome]]:
    """Compute what the cells of a stage lack; yield each cell with its outcome, when complete.

    A cell that fails is kept (`failures`) and costs itself: the others are made, and the error
    comes last of all.

    Args:
        plan: the plan.
        stage: a stage that the study has (`cells.stages_of`).
        cells: cells of that stage, in any order.
        tell: gets each failure as it happens.

    Yields:
        (cell, outcome). Activations, attention and fits come grouped by what they share, so the
        order may differ from that of `cells`.

    Raises:
        ConfigError: the study has no such stage.
        FailedCheckError: a blocking check of what a cell is made from failed, in this run or an
            earlier one; raised after all cells that this does not concern.
        TaprobeError: cells failed, or what they are made from had failed before; raised after all
            others. Of the class of what they failed by, see `gate.refusal`.
        ArtifactError: the store cannot be written; nothing is tried after that.
    """
    plan.stages.asked(plan.study, stage)
    free, stopped = split_stopped(Gate(plan), stage, cells)
    failed: list[Failure] = []
    for cell, made in _made(plan, stage, free):
        if isinstance(made, Outcome):
            forget_failure(plan, made.key)
            yield cell, made
        else:
            failure = failure_of(stage, cell, made)
            keep_failure(plan, failure)
            tell(failure)
            failed.append(failure)
    if failed or stopped:
        above = [each for reasons in stopped.values() for each in reasons]
        said = ", ".join("/".join(cell) for cell in stopped if cell)
        of_cells = f" of {said}" if said else ""
        so = f"{stage}{of_cells} cannot be made" if stopped else ""
        raise refusal(plan.study, distinct_stops([*failed, *above]), so)


def _made(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Made]]:
    """Make cells; an error that is no single cell's is that of all that were still to come."""
    left: dict[Cell, None] = {}
    for cell in cells:
        key = attempted(partial(plan.key, stage, cell), f"{stage} {'/'.join(cell)}")
        if isinstance(key, TaprobeError):
            yield cell, key
        else:
            left[cell] = None
    making = plan.stages[stage].make(plan, list(left))
    while left:
        found = attempted(lambda: next(making, None), stage)
        if isinstance(found, TaprobeError):
            yield from ((cell, found) for cell in left)
        if found is None or isinstance(found, TaprobeError):
            return
        left.pop(found[0])
        yield found


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
