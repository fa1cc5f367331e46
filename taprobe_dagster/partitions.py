"""Partition grids and the mappings between them, derived from the study.

What belongs here: everything that knows Dagster's partition classes.

Concept: https://docs.dagster.io/guides/build/partitions-and-backfills/partitioning-assets
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import dagster as dg

from taprobe_core.pipeline import STAGES, Cell, dimension_keys
from taprobe_core.study import Study
from taprobe_dagster.beta import accepted_beta


def grid_of(study: Study, stage: str) -> dg.MultiPartitionsDefinition | None:
    """The two-dimensional grid of a stage; None for a stage with one artifact per study."""
    dimensions = STAGES[stage].grid
    if not dimensions:
        return None
    return dg.MultiPartitionsDefinition(
        {name: dg.StaticPartitionsDefinition(dimension_keys(study, name)) for name in dimensions}
    )


def partition_key(stage: str, cell: Cell) -> dg.MultiPartitionKey | None:
    """The Dagster key of a cell; None for the empty cell."""
    return dg.MultiPartitionKey(dict(zip(STAGES[stage].grid, cell, strict=True))) if cell else None


def cell_of(stage: str, key: str) -> Cell:
    """The cell of a Dagster key; Dagster orders the dimensions of a key by name."""
    names = sorted(STAGES[stage].grid)
    parts = dict(zip(names, key.split("|"), strict=True))
    return tuple(parts[name] for name in STAGES[stage].grid)


def mapping_between(study: Study, parent: str, child: str) -> dg.PartitionMapping | None:
    """How a child's cells map to a parent's; None leaves Dagster's identity default."""
    upstream, downstream = STAGES[parent].grid, STAGES[child].grid
    if upstream == downstream or not upstream:
        return None
    if not downstream:
        return dg.AllPartitionMapping()
    with accepted_beta():
        return dg.MultiPartitionMapping(
            {
                up: dg.DimensionPartitionMapping(down, _dimension_mapping(study, up, down))
                for up, down in zip(upstream, downstream, strict=True)
            }
        )


def _dimension_mapping(study: Study, up: str, down: str) -> dg.PartitionMapping:
    if up == down:
        return dg.IdentityPartitionMapping()
    if (up, down) == ("model", "site"):
        return dg.StaticPartitionMapping(_sites_by_model(study))
    if (up, down) == ("site", "model"):
        return dg.StaticPartitionMapping({str(site): site.model for site in study.sites})
    if (up, down) == ("setting", "trial"):
        return dg.StaticPartitionMapping(_trials_by_setting(study))
    return dg.StaticPartitionMapping({str(trial): trial.setting for trial in study.trials})


def _sites_by_model(study: Study) -> Mapping[str, list[str]]:
    return {
        model: [str(site) for site in study.sites if site.model == model] for model in study.models
    }


def _trials_by_setting(study: Study) -> Mapping[str, list[str]]:
    return {
        setting: [str(trial) for trial in study.trials if trial.setting == setting]
        for setting in study.settings
    }


def boxes(study: Study, stage: str, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Cover cells by few rectangles of the grid: first and last cell of each, exact, no overlap.

    One run materializes one rectangle, because Dagster names the partitions of a run by a range.
    """
    if not STAGES[stage].grid:
        yield from (((), ()) for _ in cells)
        return
    rows_, columns_ = (dimension_keys(study, name) for name in STAGES[stage].grid)
    wanted = set(cells)
    columns_by_row = [
        tuple(i for i, column in enumerate(columns_) if (row, column) in wanted) for row in rows_
    ]
    row = 0
    for columns, same in groupby(columns_by_row):
        height = len(list(same))
        for first, last in _stretches(columns):
            yield (rows_[row], columns_[first]), (rows_[row + height - 1], columns_[last])
        row += height


def box_cells(study: Study, stage: str, first: Cell, last: Cell) -> list[Cell]:
    """Every cell of the rectangle between two corners, both included, in grid order."""
    if not first:
        return [()]
    rows, columns = (
        keys[keys.index(one) : keys.index(other) + 1]
        for keys, one, other in zip(
            (dimension_keys(study, name) for name in STAGES[stage].grid), first, last, strict=True
        )
    )
    return [(row, column) for row in rows for column in columns]


def _stretches(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    for _, stretch in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in stretch]
        yield members[0], members[-1]
