"""Runs that nobody executes any more: they are failed, and what they held is given back.

Looked for by every `taprobe run` at its start, while it works and at its end, and by `taprobe ui`
all the time. Dagster's own run monitoring knows of no process behind a run that the UI launched; it
would leave such a run as started until its longest runtime has passed.

Concept: https://docs.dagster.io/deployment/execution/run-monitoring
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from dagster._core.events import DagsterEventType
from sqlalchemy.exc import SQLAlchemyError

from taprobe_dagster.liveness import Life, life_of, record_path

INTERVAL_S = 15
START_S = 90
"""How long a run may be on its way before a process says that it takes it up."""

_SLOW_S = 600
"""How long that process may then take to load everything."""

_SETTLING_S = 60
"""How long it may take from starting the run to recording itself."""

_ON_THE_WAY = (dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING)
_UNDER_WAY = (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail runs whose process is gone, and free the pool slots of every run that is over.

    A run that was being cancelled is marked as cancelled. Runs in a queue wait for nobody's
    process and are left.

    Args:
        instance: a persistent instance; on any other, no process is known and nothing is done.

    Returns:
        The ids of the runs that were marked.
    """
    if not instance.is_persistent:
        return []
    home = Path(instance.root_directory)
    records = instance.get_run_records(dg.RunsFilter(statuses=[*_ON_THE_WAY, *_UNDER_WAY]))
    marked = [
        record.dagster_run.run_id
        for record in records
        if (reason := _reason(instance, home, record)) and _mark(instance, record, reason)
    ]
    _free_slots(instance, home)
    _forget(instance, home)
    return marked


def _reason(instance: dg.DagsterInstance, home: Path, record: dg.RunRecord) -> str | None:
    """Why a run is dead; None for one that may live."""
    run = record.dagster_run
    life = life_of(home, run.run_id)
    if life is Life.DEAD:
        return "the process that executed it is gone"
    if life is Life.ALIVE:
        return None
    pids = _announced(instance, run.run_id)
    is_there = any(_exists(pid) for pid in pids)
    if run.status in _ON_THE_WAY:
        waited_s = time.time() - record.update_timestamp.timestamp()
        if waited_s < (_SLOW_S if is_there else 0 if pids else START_S):
            return None
        return "no process took it up" if not pids else "the process that took it up is gone"
    if is_there and record.start_time and time.time() - record.start_time < _SETTLING_S:
        return None
    return "no process executes it"


def _announced(instance: dg.DagsterInstance, run_id: str) -> set[int]:
    """The processes that have told the event log that they take up a run."""
    events = instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT)
    found = {
        str(event.dagster_event.engine_event_data.metadata["pid"].value)
        for event in events
        if event.dagster_event is not None
        and "pid" in event.dagster_event.engine_event_data.metadata
    }
    return {int(pid) for pid in found if pid.isdigit()}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _mark(instance: dg.DagsterInstance, record: dg.RunRecord, reason: str) -> bool:
    """Mark one run; False where it ended by itself in the meantime."""
    run = instance.get_run_by_id(record.dagster_run.run_id)
    if run is None or run.status != record.dagster_run.status:
        return False
    message = (
        f"{reason}; finished cells stay in the store. To go on, materialize the same cells again, "
        "or use `taprobe run`: only what is missing is computed"
    )
    if run.status == dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, message)
    else:
        instance.report_run_failed(run, message)
    return True


def _free_slots(instance: dg.DagsterInstance, home: Path) -> None:
    log = instance.event_log_storage
    if not log.supports_global_concurrency_limits:
        return
    for run_id in log.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        # A run that was ended by hand in the UI keeps its slot while its process goes on.
        if (run is None or run.is_finished) and life_of(home, run_id) is not Life.ALIVE:
            log.free_concurrency_slots_for_run(run_id)


def _forget(instance: dg.DagsterInstance, home: Path) -> None:
    """Delete the records of processes that ended with their runs."""
    for path in (home / "liveness").glob("[!.]*"):
        run = instance.get_run_by_id(path.name)
        if (run is None or run.is_finished) and life_of(home, path.name) is Life.DEAD:
            record_path(home, path.name).unlink(missing_ok=True)


@contextmanager
def watched(
    instance: dg.DagsterInstance, say: Callable[[str], None], interval_s: float = INTERVAL_S
) -> Iterator[None]:
    """Look for dead runs before, during and after the block.

    Args:
        instance: where the runs are.
        say: told in one sentence what was marked.
        interval_s: time between two looks.
    """

    def look() -> None:
        if marked := fail_dead_runs(instance):
            runs = ", ".join(run_id[:8] for run_id in marked)
            say(f"{len(marked)} run(s) whose process is gone are now marked as failed: {runs}")

    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            try:
                look()
            except (SQLAlchemyError, dg.DagsterError, OSError) as error:
                say(f"looking for runs whose process is gone failed, and is tried again: {error}")

    look()
    thread = threading.Thread(target=watch, name="dead runs", daemon=True)
    thread.start()
    try:
        yield
        look()
    finally:
        stop.set()
        thread.join(timeout=5)
