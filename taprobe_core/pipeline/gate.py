"""What failed checks stop: every cell that reads, directly or not, one whose check failed.

The verdicts are in `verdicts`; running what is not stopped is in `run`. Invariant: a cell is
stopped by what the store holds now, in whichever run and process that was found, until the input is
another one or the study waives the check of that cell by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from taprobe_core.errors import FailedCheckError
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.verdicts import Verdict, verdicts_of
from taprobe_core.study import Study

_SHOWN = 10
"""Failed checks that an error lists."""


class Gate:
    """Asks each cell's checks once; made anew for every question about a store that changes.

    Args:
        plan: the plan.
        looks: run checks that have not seen what is stored; without, only kept verdicts count, and
            a cell that nobody looked at stops nothing yet.
    """

    def __init__(self, plan: Plan, *, looks: bool = True) -> None:
        self._plan = plan
        self._looks = looks
        self._of: dict[tuple[str, Cell], tuple[Verdict, ...]] = {}

    def above(self, stage: str, cell: Cell) -> tuple[Verdict, ...]:
        """The failed checks that stop a cell, in data-path order."""
        parents = self._plan.stages.parent_cells(self._plan.study, stage, cell)
        return tuple(_distinct(each for parent in parents for each in self.through(*parent)))

    def through(self, stage: str, cell: Cell) -> tuple[Verdict, ...]:
        """The failed checks that stop what reads a cell: those above it, else its own."""
        place = (stage, cell)
        if place not in self._of:
            self._of[place] = self.above(stage, cell) or tuple(
                verdict
                for verdict in verdicts_of(self._plan, stage, cell, looks=self._looks)
                if verdict.stops
            )
        return self._of[place]


def split_stopped(
    gate: Gate, stage: str, cells: Iterable[Cell]
) -> tuple[list[Cell], dict[Cell, tuple[Verdict, ...]]]:
    """Divide cells of a stage into those that may run and those that failed checks stop."""
    free: list[Cell] = []
    stopped: dict[Cell, tuple[Verdict, ...]] = {}
    for cell in cells:
        found = gate.above(stage, cell)
        if found:
            stopped[cell] = found
        else:
            free.append(cell)
    return free, stopped


def refusal(study: Study, failed: Sequence[Verdict], stopped: str) -> FailedCheckError:
    """Return the error that names failed checks, what they found, and what to do.

    Args:
        study: the study.
        failed: the checks that failed, at least one.
        stopped: what they stop, in words; may be empty.
    """
    first, n = failed[0], len(failed)
    so = f", so {stopped}" if stopped else ""
    if n == 1:
        what = f"check {first.check} failed on {first.where}{so}: {'; '.join(first.faults)}"
        where = first.path
    else:
        told = [f"{each.check} on {each.where}: {'; '.join(each.faults)}" for each in failed]
        rest = [f"and {n - _SHOWN} more"] if n > _SHOWN else []
        what = f"{n} checks failed{so}"
        where = f"study {study.name}:" + "".join(f"\n  - {each}" for each in told[:_SHOWN] + rest)
    fixes = "; or ".join(dict.fromkeys(each.fix for each in failed[:_SHOWN]))
    waiver = f"{{check: {first.check}, cell: {first.place}, reason: ...}}"
    each = "" if n == 1 else ", one for each check and cell"
    return FailedCheckError(
        what, where, f"{fixes}; to go on all the same, add `waivers: [{waiver}]` to the study{each}"
    )


def failed_checks(gate: Gate, cells: Mapping[str, Iterable[Cell]]) -> list[Verdict]:
    """Return the failed blocking checks of some cells and of all that these are made from.

    Args:
        gate: of the plan.
        cells: stage -> its cells.
    """
    return _distinct(
        each
        for stage, its_cells in cells.items()
        for cell in its_cells
        for each in gate.through(stage, cell)
    )


def _distinct(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return list({(each.stage, each.cell, each.check): each for each in verdicts}.values())


def stage_verdicts(plan: Plan, stage: str, check: str, *, looks: bool = True) -> list[Verdict]:
    """Return what a check says of every cell of its stage that is stored, in grid order."""
    return [
        verdict
        for cell in plan.stages.cells(plan.study, stage)
        for verdict in verdicts_of(plan, stage, cell, looks=looks, only=check)
    ]
