"""Which process executes a run, and whether it still lives.

Every run, whoever launched it, is recorded in `DAGSTER_HOME/liveness/<run id>` by the process that
executes it. That process locks the file for as long as it lives: the kernel frees the lock however
the process ends, so neither a number that another process has taken since nor a container with
another name can make a dead run look alive. A process on another machine is told by its heartbeat.

Concept: https://docs.dagster.io/deployment/execution/run-monitoring
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, cast

import dagster as dg
from dagster._core.definitions.executor_definition import IN_PROC_CONFIG
from dagster._core.events import DagsterEvent
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor

HEARTBEAT_S = 15
SILENT_S = 75
"""A process on another machine that has not given a sign for so long is gone."""


class Life(Enum):
    """What is known of the process of a run."""

    ALIVE = "alive"
    DEAD = "dead"
    UNRECORDED = "unrecorded"


class Record:
    """The record of one run, held by the process that executes it.

    Args:
        home: `DAGSTER_HOME`.
        run_id: the run.

    Raises:
        OSError: the record cannot be written.
    """

    def __init__(self, home: Path, run_id: str) -> None:
        self.path = record_path(home, run_id)
        self.path.parent.mkdir(exist_ok=True)
        # Locked before it has its name, so nobody ever sees it without its lock.
        part = self.path.with_name(f".{run_id}.{os.getpid()}")
        self._file = part.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.write(json.dumps({"pid": os.getpid(), **_machine()}))
        self._file.flush()
        part.replace(self.path)
        self._stop = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                os.utime(self._file.fileno())
            except (OSError, ValueError):
                return

    def release(self) -> None:
        """End the record; its run is over."""
        self._stop.set()
        self.path.unlink(missing_ok=True)
        self._file.close()


@contextmanager
def recorded(home: Path, run_id: str) -> Iterator[None]:
    """Record a run that this process executes in the block, from before its creation on."""
    record = Record(home, run_id)
    try:
        yield
    finally:
        record.release()


def record_path(home: Path, run_id: str) -> Path:
    """Where a run's record stands."""
    return home / "liveness" / run_id


def life_of(home: Path, run_id: str) -> Life:
    """Whether the process that recorded a run still lives.

    Args:
        home: `DAGSTER_HOME`.
        run_id: the run.
    """
    try:
        file = record_path(home, run_id).open()
    except FileNotFoundError:
        return Life.UNRECORDED
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Life.ALIVE
        silent_s = time.time() - os.fstat(file.fileno()).st_mtime
        try:
            found = json.load(file)
        except ValueError:
            found = None  # cut short by a power failure, so this machine's
    return Life.DEAD if _is_of_this_machine(found) or silent_s > SILENT_S else Life.ALIVE


def _machine() -> dict[str, str]:
    return {"host": os.uname().nodename, "boot": _boot_id()}


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _is_of_this_machine(found: Any) -> bool:
    """Whether the lock tells all: the same kernel, or this machine before it was started again."""
    here = _machine()
    return not isinstance(found, dict) or any(
        here[name] and found.get(name) == here[name] for name in ("boot", "host")
    )


class RecordedExecutor(InProcessExecutor):
    """Dagster's in-process executor in a run worker of its own, which records itself."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[DagsterEvent]:
        """Execute a run; the record is held until the process ends, which is after the run."""
        instance = plan_context.instance
        if instance.is_persistent:
            _HELD.append(Record(Path(instance.root_directory), plan_context.run_id))
        yield from super().execute(plan_context, execution_plan)


_HELD: list[Record] = []


@dg.executor(name="in_process", config_schema=IN_PROC_CONFIG)
def recorded_executor(context: dg.InitExecutorContext) -> RecordedExecutor:
    """All steps in the run's own process, with a record of that process."""
    retries = cast("dict[str, Any]", context.executor_config["retries"])
    return RecordedExecutor(retries=RetryMode.from_config(retries) or RetryMode.ENABLED)
