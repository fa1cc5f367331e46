"""What a stage is: everything that is known of one asset, and the page that all stages stand on.

A stage says what its artifacts are keyed by and made of, how they are made, checked and shown. The
stages themselves stand in `stages`, one file each; plan, runs, report and Dagster's definitions
read them here, and none of them lists stages by name.

    grid ◄─ stage ◄─ plan ◄─ commit ◄─ stages/* ◄─ cells, data_folder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import polars as pl

from taprobe_core.errors import ConfigError, TaprobeError, attempted
from taprobe_core.pipeline.grid import COARSER, Cell, CellFilter, grid_cells, related_cells
from taprobe_core.store import Artifact, ArtifactKey
from taprobe_core.study import Study

P = TypeVar("P")
"""The plan that a stage is asked with (`plan.Plan`, which is made of stages)."""


@dataclass(frozen=True)
class Outcome:
    """One committed artifact.

    Attributes:
        artifact: the artifact, committed now or found.
        is_reused: whether it stood in the store before.
        duration_s: seconds this step took.
    """

    artifact: Artifact
    is_reused: bool
    duration_s: float

    @property
    def key(self) -> ArtifactKey:
        """Stage, cell and fingerprint."""
        return self.artifact.key


Made = Outcome | TaprobeError | Mapping[str, TaprobeError]
"""What became of a cell: its artifact, its error, or the errors of its parts by their name."""


@dataclass(frozen=True)
class Description:
    """What to show of one artifact.

    Attributes:
        metrics: numbers, named as in the tables they come from.
        n_rows: rows of its main table; None where there is none.
        picture: a PNG as a data URI; None where there is none.
        tables: short tables by name, to be shown whole.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    n_rows: int | None = None
    picture: str | None = None
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)


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


def _everywhere(plan: Any, cell: Cell) -> bool:
    return True


def _no_keys(plan: Any, cell: Cell) -> list[ArtifactKey]:
    return []


def _no_settings(plan: Any) -> Mapping[str, Any]:
    return {}


def _no_config(plan: Any, cell: Cell) -> Mapping[str, Any]:
    return {}


STORE_CHANGED = (
    "the stage refuses to store this, so something else changed the store: remove the folder and "
    "run again; if it comes back, the stage is defective"
)
"""What to do where a stored artifact lacks what its stage sees to."""


@dataclass(frozen=True)
class Check(Generic[P]):
    """One check of a stage.

    Attributes:
        look: reads a cell's artifact back, hash and all, and says what it found.
        reads: keys of the artifacts that it reads beside the cell's own. Their content, and its,
            decide what it finds.
        fix: what to do about a fault.
        is_blocking: whether a fault stops what comes after the cell; otherwise it warns.
        settings: what of the study decides what it finds, beside the artifacts.
        looks_at: whether it looks at a cell at all.
        version: raised by hand when it finds other things: what is stored is then looked at again.
    """

    look: Callable[[P, Cell], Found]
    reads: Callable[[P, Cell], list[ArtifactKey]] = _no_keys
    fix: str = STORE_CHANGED
    is_blocking: bool = True
    settings: Callable[[P], Mapping[str, Any]] = _no_settings
    looks_at: Callable[[P, Cell], bool] = _everywhere
    version: str = "1"

    def __call__(self, plan: P, cell: Cell) -> list[str]:
        """Look at a cell and say its faults; none where the check does not look at it."""
        return list(self.look(plan, cell).faults) if self.looks_at(plan, cell) else []

    @property
    def description(self) -> str:
        """What must hold, in one sentence."""
        return self.look.__doc__ or ""


class Part(NamedTuple):
    """What an index lists: artifacts of their own, each committed as soon as it exists.

    Attributes:
        name: how their keys name them, where a stage's name stands otherwise.
        code_version: raised by hand when their content changes.
    """

    name: str
    code_version: str


class Condition(NamedTuple):
    """What makes a study have a stage.

    Attributes:
        holds: whether a study asks for it.
        fix: how to ask for it.
    """

    holds: Callable[[Study], bool]
    fix: str


@dataclass(frozen=True)
class Stage(Generic[P]):
    """One asset: a grid of artifacts, each under a key that says what it was made from.

    A key is a hash of the code version, the slice of the study and the keys of what is read, so it
    is known before anything is computed.

    Attributes:
        name: of the stage and of its asset.
        title: what it holds, in one sentence.
        grid: names of its two dimensions; none where a study has one artifact of it.
        reads: the stages that it is made from. Their keys, in this order, are the upstream of its
            fingerprint and of its manifest; its asset's dependencies, and what a failed check
            stops, follow from the same list. One that a study lacks is left out.
        code_version: raised by hand when its results change; every key below it then changes too.
        make: computes what cells lack; yields each cell with its outcome, when complete, or with
            what it failed by. An error that it raises is that of all cells that were to come.
        describe: what to show of a stored cell, read from the store.
        tables: each table that it writes -> the name of its contract in `taprobe_core.tables`.
        op: the Dagster op that makes it; stages that share a grid may share one.
        config: the slice of the study that a cell depends on, beside what it reads.
        keyed_by: keys that are its upstream in place of those that it reads: of parts, each of
            which says what it is made from.
        part: what its artifacts list, if they are indexes.
        checks: by name.
        asked_by: what makes a study have it; None where all do.
        group: group of assets; the name, if empty.
        kinds: of its asset.
        is_on_accelerator: whether it takes the accelerator while it works.
        is_provenance: whether a report lists its fingerprints.
    """

    name: str
    title: str
    grid: tuple[str, ...]
    reads: tuple[str, ...]
    code_version: str
    make: Callable[[P, Sequence[Cell]], Iterator[tuple[Cell, Made]]]
    describe: Callable[[P, Cell], Description]
    tables: Mapping[str, str]
    op: str
    config: Callable[[P, Cell], Mapping[str, Any]] = _no_config
    keyed_by: Callable[[P, Cell], Sequence[ArtifactKey]] | None = None
    part: Part | None = None
    checks: Mapping[str, Check[P]] = field(default_factory=dict)
    asked_by: Condition | None = None
    group: str = ""
    kinds: frozenset[str] = frozenset({"polars", "parquet"})
    is_on_accelerator: bool = False
    is_provenance: bool = False

    def is_of(self, study: Study) -> bool:
        """Whether a study has it."""
        return self.asked_by is None or self.asked_by.holds(study)


class Stages(dict[str, Stage[P]]):
    """Stages by name, in data-path order: each stands after what it reads.

    Args:
        stages: in that order.
    """

    def __init__(self, stages: Iterable[Stage[P]]) -> None:
        super().__init__({stage.name: stage for stage in stages})

    def of(self, study: Study) -> tuple[str, ...]:
        """The stages that a study has, in data-path order."""
        return tuple(name for name, stage in self.items() if stage.is_of(study))

    def asked(self, study: Study, stage: str) -> str:
        """Return `stage` if the study has it.

        Raises:
            ConfigError: there is no such stage, or the study does not ask for it.
        """
        known = self.of(study)
        if stage in known:
            return stage
        fix = f"use one of {', '.join(known)}"
        condition = self[stage].asked_by if stage in self else None
        if condition is not None:
            fix = f"{condition.fix}, or {fix}"
        raise ConfigError(f"no stage {stage!r}", f"study {study.name}", fix)

    def parents(self, study: Study, stage: str) -> tuple[str, ...]:
        """The stages that a stage of a study reads."""
        return tuple(parent for parent in self[stage].reads if self[parent].is_of(study))

    def cells(self, study: Study, stage: str, chosen: CellFilter | None = None) -> list[Cell]:
        """Every cell of a stage that the filter takes, in grid order; none if it is absent."""
        if not self[stage].is_of(study):
            return []
        return grid_cells(study, self[stage].grid, chosen)

    def parent_cells(self, study: Study, stage: str, cell: Cell) -> Iterator[tuple[str, Cell]]:
        """Yield stage and cell of all that a cell reads directly, in the order of `reads`."""
        own = dict(zip(self[stage].grid, cell, strict=True))
        for parent in self.parents(study, stage):
            for each in related_cells(study, self[parent].grid, own):
                yield parent, each

    def of_the_whole(self) -> frozenset[str]:
        """Stages that read more of the grid than stands at their own cell, and all below these."""
        found: set[str] = set()
        for name, stage in self.items():
            here = {*stage.grid, *(one for one, finer in COARSER.items() if finer in stage.grid)}
            parents = [self[parent] for parent in stage.reads]
            if any(each.name in found or not here.issuperset(each.grid) for each in parents):
                found.add(name)
        return frozenset(found)

    def code_version(self, name: str) -> str:
        """The code version of a stage, or of the parts that an index lists."""
        if name in self:
            return self[name].code_version
        parts = dict(stage.part for stage in self.values() if stage.part is not None)
        return parts[name]

    def check_versions(self) -> dict[str, str]:
        """Check -> its version, of all stages."""
        return {
            name: check.version for stage in self.values() for name, check in stage.checks.items()
        }

    def that_skip(self) -> tuple[str, ...]:
        """The stages that leave problems out and say which: those with a table `skipped`."""
        return tuple(name for name, stage in self.items() if "skipped" in stage.tables)


def cell_by_cell(
    make: Callable[[P, Cell], Outcome],
) -> Callable[[P, Sequence[Cell]], Iterator[tuple[Cell, Made]]]:
    """Return what makes cells of which none shares work with another, one after the other."""

    def make_all(plan: P, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Made]]:
        for cell in cells:
            yield cell, attempted(partial(make, plan, cell), "/".join(cell))

    return make_all


def present(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Leave out what is not defined: a missing point is honest, a plotted zero is not."""
    return {name: float(value) for name, value in metrics.items() if value is not None}


def mean(values: pl.Series) -> float | None:
    """Mean of the values that are there."""
    return values.cast(pl.Float64).mean()  # type: ignore[return-value]


def median(values: pl.Series) -> float | None:
    """Median of the values that are there."""
    return values.cast(pl.Float64).median()  # type: ignore[return-value]


def largest(values: pl.Series) -> float | None:
    """Largest of the values that are there."""
    return values.cast(pl.Float64).max()  # type: ignore[return-value]
