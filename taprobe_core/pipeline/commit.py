"""Computing an artifact once and committing it: the step that every stage ends with.

One place checks each table of a cell against the contract that its stage names for it, takes the
manifest's upstream from what the fingerprint was made of, and leaves alone what the store has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Outcome
from taprobe_core.store import ArtifactKey, write_table

_log = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes an artifact's files into the empty folder it is given."""

Files = Mapping[str, pl.DataFrame | str]
"""What a cell's artifact holds: tables by name, without suffix, and texts by the name of a file."""


def commit_cell(
    plan: Plan,
    stage: str,
    cell: Cell,
    compute: Callable[[], Files],
    provenance: Mapping[str, Any],
    parts: Sequence[ArtifactKey] = (),
) -> Outcome:
    """Return the artifact of a cell, computing it only if the store lacks it.

    Args:
        plan: the plan.
        stage: its stage, which names the contract of each table.
        cell: the cell.
        compute: makes what the artifact holds; see `commit_once` for when it is called.
        provenance: what the manifest should say beside the key.
        parts: keys of the parts that it lists, beside what its key was made of.

    Raises:
        SchemaError: a table breaks its contract; nothing is stored.
        Whatever `compute` raises.
    """
    found = plan.stages[stage]

    def write(folder: Path) -> None:
        for name, content in compute().items():
            if isinstance(content, str):
                (folder / name).write_text(content, encoding="utf-8")
            else:
                _check(content, found.tables[name], f"{stage} {'/'.join(cell)}".strip())
                write_table(folder / f"{name}.parquet", content)

    upstream = list(dict.fromkeys([*plan.upstream(stage, cell), *parts]))
    key = plan.key(stage, cell)
    index = plan.store.find(key)
    if index is not None and {*plan.part_keys(index.manifest)} - {*upstream}:
        # A text that was lost, or found damaged, was made again by an artifact of other layers.
        plan.store.discard(key)
    return commit_once(plan, key, write, provenance, upstream)


def _check(table: pl.DataFrame, contract: str, where: str) -> None:
    from taprobe_core import tables

    tables.check_table(
        table,
        getattr(tables, contract),
        where,
        "the stage, or what it takes its inputs for, is defective: report it, with this message",
    )


def contract_faults(plan: Plan, stage: str, cell: Cell, *names: str) -> Iterator[str]:
    """Yield what stored tables of a cell break; tables that it does not have break nothing."""
    from taprobe_core import tables

    artifact = plan.open(stage, cell)
    for name in names or plan.stages[stage].tables:
        if f"{name}.parquet" not in artifact.manifest.files:
            continue
        contract = getattr(tables, plan.stages[stage].tables[name])
        try:
            tables.check_table(artifact.read_table(f"{name}.parquet"), contract, name)
        except TaprobeError as error:
            yield str(error)


def commit_once(
    plan: Plan,
    key: ArtifactKey,
    write: Writer,
    provenance: Mapping[str, Any],
    upstream: Sequence[ArtifactKey] = (),
) -> Outcome:
    """Return the artifact of `key`, computing it only if the store lacks it.

    Args:
        plan: the plan that the key is of.
        key: the artifact's key.
        write: computes the result and writes it into the empty folder it is given. Called only
            when needed, and under the lock of its partition: a second process that wants the same
            artifact waits for the first and reuses it. Errors leave the store as it was.
        provenance: what the manifest should say beside the key.
        upstream: keys the result was computed from.
    """
    start = time.monotonic()
    written: list[Path] = []

    def compute(folder: Path) -> None:
        write(folder)
        written.append(folder)

    artifact = plan.commit(key, compute, provenance, upstream)
    seconds = time.monotonic() - start
    if written:
        _log.info("%s %s: computed in %.1f s", key.stage, "/".join(key.partition), seconds)
    return Outcome(artifact, not written, seconds)


def dataset_provenance(plan: Plan, model: str, setting: str) -> dict[str, Any]:
    """Which dataset, at which revision or content digest, a result descends from."""
    return {
        **{f"dataset_{name}": value for name, value in plan.source.identity().items()},
        "rollouts_dir": plan.model(model).rollouts_dir,
        "sampling": plan.study.rollouts.sampling,
        "setting": setting,
    }


def checkpoint_provenance(plan: Plan, model: str, setting: str) -> dict[str, Any]:
    """Which dataset and which checkpoint a result descends from."""
    return {
        **dataset_provenance(plan, model, setting),
        **{f"checkpoint_{name}": value for name, value in plan.checkpoint(model).items()},
    }


def warn_of_skipped(skipped: pl.DataFrame, cell: Cell) -> pl.DataFrame:
    """Say which problems a stage leaves out, and return their table (`tables.SKIPPED`)."""
    for row in skipped.iter_rows(named=True):
        place = f"{row['stage']} {'/'.join(cell)}"
        _log.warning("%s: problem %d left out: %s", place, row["problem_id"], row["what"])
    return skipped
