"""Run any stage over any of its cells, but for those that failed checks or failed cells stop.

What checks found stands in `verdicts`, what failed in `failures`. Invariant: a cell is stopped by
what the store holds now, in whichever run and process that was found: by a check until the input is
another one or the study waives the check of that cell by name, by a failed cell until that is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from taprobe_core.errors import FailedCellsError, FailedCheckError, TaprobeError, attempted
from taprobe_core.pipeline.failures import (
    Failure,
    failure_at,
    failure_of,
    forget_failure,
    keep_failure,
)
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Description, Made, Outcome
from taprobe_core.pipeline.verdicts import Verdict, verdicts_of
from taprobe_core.study import Study

_SHOWN = 10
"""Failed checks and cells that an error lists."""

Stop = Verdict | Failure
"""What stops the cells that read a cell: a failed check of it, or that it failed itself."""


class Gate:
    """Asks each cell once how it fared; made anew for every question about a store that changes.

    Args:
        plan: the plan.
        looks: run checks that have not seen what is stored; without, only kept verdicts count, and
            a cell that nobody looked at stops nothing yet.
    """

    def __init__(self, plan: Plan, *, looks: bool = True) -> None:
        self._plan = plan
        self._looks = looks
        self._of: dict[tuple[str, Cell], tuple[Stop, ...]] = {}

    def above(self, stage: str, cell: Cell) -> tuple[Stop, ...]:
        """The failed checks and cells that stop a cell, in data-path order."""
        parents = self._plan.stages.parent_cells(self._plan.study, stage, cell)
        return tuple(distinct_stops(each for parent in parents for each in self.through(*parent)))

    def through(self, stage: str, cell: Cell) -> tuple[Stop, ...]:
        """What stops the readers of a cell: what is above it, else its own failure or checks."""
        place = (stage, cell)
        if place not in self._of:
            self._of[place] = self.above(stage, cell) or self._own(stage, cell)
        return self._of[place]

    def _own(self, stage: str, cell: Cell) -> tuple[Stop, ...]:
        failure = failure_at(self._plan, stage, cell)
        if failure is not None:
            return (failure,)
        verdicts = verdicts_of(self._plan, stage, cell, looks=self._looks)
        return tuple(verdict for verdict in verdicts if verdict.stops)


def split_stopped(
    gate: Gate, stage: str, cells: Iterable[Cell]
) -> tuple[list[Cell], dict[Cell, tuple[Stop, ...]]]:
    """Divide cells of a stage into those that may run and those that are stopped, with by what."""
    free: list[Cell] = []
    stopped: dict[Cell, tuple[Stop, ...]] = {}
    for cell in cells:
        found = gate.above(stage, cell)
        if found:
            stopped[cell] = found
        else:
            free.append(cell)
    return free, stopped


def refusal(study: Study, stops: Sequence[Stop], stopped: str) -> TaprobeError:
    """Return the error that names failed checks and cells, what was found, and what to do.

    Where cells failed by errors of one class it is of that class, otherwise a `FailedCellsError`;
    a `FailedCheckError` where none failed.

    Args:
        study: the study.
        stops: what failed, at least one.
        stopped: what they stop, in words; may be empty.
    """
    checks = [each for each in stops if isinstance(each, Verdict)]
    failures = [each for each in stops if isinstance(each, Failure)]
    n = len(stops)
    so = f", so {stopped}" if stopped else ""
    if n == 1:
        why, where = stops[0].apart
        what = f"{stops[0].headline}{so}: {why}"
    else:
        counted = [
            f"{count} {noun}{'' if count == 1 else 's'}"
            for count, noun in ((len(failures), "cell"), (len(checks), "check"))
            if count
        ]
        told = [f"{each.headline}: {each.details}" for each in stops]
        rest = [f"and {n - _SHOWN} more"] if n > _SHOWN else []
        what = f"{' and '.join(counted)} failed{so}"
        where = f"study {study.name}:" + "".join(f"\n  - {each}" for each in told[:_SHOWN] + rest)
    fix = "; ".join(dict.fromkeys(each.fix for each in stops[:_SHOWN] if each.fix))
    if checks:
        first = checks[0]
        waiver = f"{{check: {first.check}, cell: {first.place}, reason: ...}}"
        each = "" if len(checks) == 1 else ", one for each check and cell"
        fix += f"; to go on all the same, add `waivers: [{waiver}]` to the study{each}"
    kinds = {type(fault.error) for each in failures for fault in each.faults}
    if not kinds:
        return FailedCheckError(what, where, fix)
    if len(kinds) > 1:
        return FailedCellsError(what, where, fix)
    return kinds.pop()(what, where, fix)


def all_stops(gate: Gate, cells: Mapping[str, Iterable[Cell]]) -> list[Stop]:
    """Return what failed in some cells and in all that these are made from.

    Args:
        gate: of the plan.
        cells: stage -> its cells.
    """
    return distinct_stops(
        each
        for stage, its_cells in cells.items()
        for cell in its_cells
        for each in gate.through(stage, cell)
    )


def distinct_stops(stops: Iterable[Stop]) -> list[Stop]:
    """Return each failed check and cell once, in order."""
    return list({each.headline: each for each in stops}.values())


def stage_verdicts(plan: Plan, stage: str, check: str, *, looks: bool = True) -> list[Verdict]:
    """Return what a check says of every cell of its stage that is stored, in grid order."""
    return [
        verdict
        for cell in plan.stages.cells(plan.study, stage)
        for verdict in verdicts_of(plan, stage, cell, looks=looks, only=check)
    ]


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
            others. Of the class of what they failed by, see `refusal`.
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
