"""Launch cells: which ones a study lacks, in as few runs as the grid allows.

A cell is wanted when the store has no artifact of its present fingerprint, or when Dagster's event
log does not say so (a fresh `DAGSTER_HOME` over an old store: artifacts are then adopted, not
computed again). The store decides what is computed; the event log only what is shown.

Concept: https://docs.dagster.io/guides/build/partitions-and-backfills/backfilling-data
"""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.events import DagsterEventType
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)
from dagster._core.utils import make_new_run_id

from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline import (
    Cell,
    CellFilter,
    Gate,
    Plan,
    cells_of,
    is_complete,
    key_of,
    split_stopped,
)
from taprobe_core.study import Study
from taprobe_dagster.assets import ops_of, pool_of
from taprobe_dagster.liveness import recorded
from taprobe_dagster.partitions import box_cells, boxes, partition_key

_AGAIN_S = 0.05


@dataclass(frozen=True)
class Launch:
    """One run to start: an op's stages over one rectangle of their grid."""

    op: str
    stages: tuple[str, ...]
    first: Cell
    last: Cell
    state: str
    """Digest of all its cells: fingerprints, which are wanted, what the event log has of these.

    It is another one as soon as a wanted cell has been made, by whichever run, so that a cell
    that is discarded afterwards is not taken for the attempt before.
    """

    @property
    def tags(self) -> dict[str, str]:
        """Run tags that name the rectangle."""
        start = partition_key(self.stages[0], self.first)
        end = partition_key(self.stages[0], self.last)
        if start is None or end is None:
            return {}
        return {ASSET_PARTITION_RANGE_START_TAG: start, ASSET_PARTITION_RANGE_END_TAG: end}


def wanted_cells(
    instance: dg.DagsterInstance, plan: Plan, stage: str, cells: Sequence[Cell]
) -> list[Cell]:
    """Cells that are not whole in the store, or that the event log does not show as present."""
    logged = _logged_versions(instance, stage)
    wanted = []
    for cell in cells:
        key = key_of(plan, stage, cell)
        is_logged = logged.get(partition_key(stage, cell)) == key.fingerprint
        if not (is_logged and is_complete(plan, stage, cell)):
            wanted.append(cell)
    return wanted


def _logged_versions(instance: dg.DagsterInstance, stage: str) -> Mapping[str | None, str]:
    asset = dg.AssetKey(stage)
    tags = instance.event_log_storage.get_latest_tags_by_partition(
        asset, DagsterEventType.ASSET_MATERIALIZATION, tag_keys=[DATA_VERSION_TAG]
    )
    versions: dict[str | None, str] = {key: each[DATA_VERSION_TAG] for key, each in tags.items()}
    if not versions and (event := instance.get_latest_materialization_event(asset)) is not None:
        materialization = event.asset_materialization
        if materialization and materialization.tags:
            versions[None] = materialization.tags[DATA_VERSION_TAG]
    return versions


def launches_of(
    instance: dg.DagsterInstance,
    plan: Plan,
    op: str,
    stages: Sequence[str],
    chosen: CellFilter | None = None,
) -> Iterator[Launch]:
    """The runs that one op needs to give its stages every cell they lack and may have.

    A cell that a failed check is known to stop is not launched: its run would be refused.
    """
    if not stages:
        return
    gate = Gate(plan, looks=False)
    wanted: dict[str, list[Cell]] = {}
    for stage in stages:
        lacked = wanted_cells(instance, plan, stage, cells_of(plan.study, stage, chosen))
        wanted[stage], _ = split_stopped(gate, stage, lacked)
    cells = dict.fromkeys(cell for found in wanted.values() for cell in found)
    if not cells:
        return
    events = {stage: _last_events(instance, stage, set(found)) for stage, found in wanted.items()}
    for first, last in boxes(plan.study, stages[0], list(cells)):
        state = [
            (stage, cell, key_of(plan, stage, cell).fingerprint, events[stage].get(cell, "present"))
            for stage in stages
            for cell in box_cells(plan.study, stage, first, last)
        ]
        digest = hashlib.sha256(repr(state).encode()).hexdigest()[:20]
        yield Launch(op, tuple(stages), first, last, digest)


def _last_events(
    instance: dg.DagsterInstance, stage: str, cells: AbstractSet[Cell]
) -> Mapping[Cell, int | None]:
    """Each cell -> the number of its latest event; None where there is none."""
    asset = dg.AssetKey(stage)
    if cells == {()}:
        records = instance.get_asset_records([asset])
        return {(): records[0].asset_entry.last_materialization_storage_id if records else None}
    found = instance.event_log_storage.get_latest_storage_id_by_partition(
        asset, DagsterEventType.ASSET_MATERIALIZATION
    )
    return {cell: found.get(str(partition_key(stage, cell))) for cell in cells}


def execute(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    launch: Launch,
    run_id: str | None = None,
) -> int:
    """Execute one launch in this process; returns how many artifacts were computed, not reused.

    Extraction must not outlive its run: in one process there is no orphan to go on writing.

    Args:
        defs: definitions of the study.
        instance: where the run is recorded.
        launch: what to run.
        run_id: of the run; None makes a new one.

    Raises:
        FailedCheckError: a blocking check failed, or had failed before; what it does not stop is
            committed (`n_computed_in`).
        TaprobeError: what a stage raised.
        KeyboardInterrupt: Ctrl-C, which Dagster turns into an error of its own while a step runs.
    """
    job = defs.resolve_implicit_global_asset_job_def()
    run_id = run_id or make_new_run_id()
    try:
        with recorded(Path(instance.root_directory), run_id), interrupts_kept():
            job.execute_in_process(
                asset_selection=[dg.AssetKey(stage) for stage in launch.stages],
                instance=instance,
                run_id=run_id,
                tags=launch.tags,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
    except dg.Failure as failure:
        if isinstance(failure.__cause__, TaprobeError):
            raise failure.__cause__ from None
        raise
    except DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None
    finally:
        # An interrupted step keeps its slot, as Dagster has it.
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return n_computed_in(instance, run_id)


def n_computed_in(instance: dg.DagsterInstance, run_id: str) -> int:
    """How many artifacts a run has computed, not reused, however it ended."""
    events = [
        entry.asset_materialization
        for entry in instance.all_logs(run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
    ]
    return sum(not event.metadata["is_reused"].value for event in events if event is not None)


def who_holds_pool(instance: dg.DagsterInstance, launch: Launch) -> list[str]:
    """The runs for which a launch has to wait, because they hold every slot of its pool.

    The slot itself is claimed by Dagster, as the step begins; this is for telling why it takes
    long.
    """
    pool = pool_of(launch.stages)
    if pool is None:
        return []
    info = instance.event_log_storage.get_concurrency_info(pool)
    return sorted(info.active_run_ids) if info.active_slot_count >= info.slot_count > 0 else []


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Send Ctrl-C again where it was lost.

    Python prints what a finalizer or a weak reference's callback raises and goes on; the event log
    runs many of these, and an interrupt that comes meanwhile would be one such exception.
    """
    before = sys.unraisablehook

    def keep(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt | DagsterExecutionInterruptedError):
            # From another thread, a moment later: raised here, it would be lost again.
            threading.Timer(_AGAIN_S, signal.raise_signal, (signal.SIGINT,)).start()
        else:
            before(lost)

    sys.unraisablehook = keep
    try:
        yield
    finally:
        sys.unraisablehook = before


def stages_in(study: Study, op: str, select: frozenset[str] | None) -> tuple[str, ...]:
    """The stages of a study's op that a selection keeps."""
    return tuple(stage for stage in ops_of(study)[op] if select is None or stage in select)
