"""What a check is, and what it finds when it looks at one cell.

The checks themselves are in `checks` and `tripwire_checks`; what becomes of their findings is in
`verdicts` (records) and `gate` (what they stop).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import ArtifactKey


@dataclass(frozen=True)
class Found:
    """What a check found in one cell.

    Attributes:
        faults: what does not hold, in words; none if the check passes.
        not_run: why it could not look, for example too few problems; None if it looked.
        numbers: figures behind the verdict, by name.
        fix: what to do about these faults; None takes the check's own.
    """

    faults: tuple[str, ...] = ()
    not_run: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    fix: str | None = None


def _everywhere(plan: Plan, cell: Cell) -> bool:
    return True


def _nothing(plan: Plan) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Check:
    """One check of a stage.

    Attributes:
        look: reads a cell's artifact back, hash and all, and says what it found.
        reads: keys of the artifacts that it reads beside the cell's own. Their content, and its,
            decide what it finds.
        fix: what to do about a fault.
        is_blocking: whether a fault stops what comes after the cell; otherwise it warns.
        settings: what of the study decides what it finds, beside the artifacts.
        looks_at: whether it looks at a cell at all.
    """

    look: Callable[[Plan, Cell], Found]
    reads: Callable[[Plan, Cell], list[ArtifactKey]]
    fix: str
    is_blocking: bool = True
    settings: Callable[[Plan], Mapping[str, Any]] = _nothing
    looks_at: Callable[[Plan, Cell], bool] = _everywhere

    def __call__(self, plan: Plan, cell: Cell) -> list[str]:
        """Look at a cell and say its faults; none where the check does not look at it."""
        return list(self.look(plan, cell).faults) if self.looks_at(plan, cell) else []

    @property
    def description(self) -> str:
        """What must hold, in one sentence."""
        return self.look.__doc__ or ""
