"""Runs whose process is gone, whoever launched them, told from those that live."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, DagsterEventType, EngineEventData

from taprobe_dagster import liveness, recovery
from taprobe_dagster.liveness import Life, Record, life_of, record_path, recorded
from taprobe_dagster.recovery import START_S, fail_dead_runs, watched

FORK = multiprocessing.get_context("fork")
STATUS = dg.DagsterRunStatus


def _home(instance: dg.DagsterInstance) -> Path:
    return Path(instance.root_directory)


def _add(instance: dg.DagsterInstance, run_id: str, status: dg.DagsterRunStatus) -> str:
    instance.add_run(dg.DagsterRun(job_name="j", run_id=run_id, status=status))
    return run_id


def _status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def _hold(home: Path, run_id: str, held: Any) -> None:
    Record(home, run_id)
    held.set()
    time.sleep(60)


@contextmanager
def _worker(home: Path, run_id: str) -> Iterator[int]:
    """A process that has recorded itself as the one that executes a run."""
    held = FORK.Event()
    process = FORK.Process(target=_hold, args=(home, run_id, held))
    process.start()
    try:
        assert held.wait(30)
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_a_killed_worker_is_told_from_a_living_one(fresh: dg.DagsterInstance) -> None:
    home = _home(fresh)
    here, gone = _add(fresh, "here", STATUS.STARTED), _add(fresh, "gone", STATUS.STARTED)
    with _worker(home, here), _worker(home, gone) as pid:
        assert fail_dead_runs(fresh) == []
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while life_of(home, gone) is Life.ALIVE:
            assert time.monotonic() < deadline
        assert fail_dead_runs(fresh) == [gone]
        assert (_status(fresh, gone), _status(fresh, here)) == (STATUS.FAILURE, STATUS.STARTED)
    (event,) = fresh.all_logs(gone, of_type=DagsterEventType.RUN_FAILURE)
    assert "the process that executed it is gone" in event.message
    assert "taprobe run" in event.message
    assert not record_path(home, gone).exists()


def test_a_number_that_another_process_has_taken_since_saves_nobody(
    fresh: dg.DagsterInstance,
) -> None:
    run_id = _add(fresh, "reused", STATUS.STARTED)
    with recorded(_home(fresh), run_id):
        content = record_path(_home(fresh), run_id).read_text()
    assert json.loads(content)["pid"] == os.getpid()
    record_path(_home(fresh), run_id).write_text(content)
    assert fail_dead_runs(fresh) == [run_id]


@pytest.mark.parametrize(
    ("about", "silent_s", "is_dead"),
    [
        ({"host": "another-name"}, 0, True),  # a container that was started again
        ({"boot": "another-boot"}, 0, True),  # this machine, before it was started again
        ({"host": "elsewhere", "boot": "another-boot"}, 10, False),
        ({"host": "elsewhere", "boot": "another-boot"}, 100, True),
    ],
)
def test_another_machine_is_told_by_its_heartbeat_and_this_one_by_its_lock(
    fresh: dg.DagsterInstance, about: dict[str, str], silent_s: float, is_dead: bool
) -> None:
    run_id = _add(fresh, "away", STATUS.STARTED)
    path = record_path(_home(fresh), run_id)
    path.parent.mkdir()
    path.write_text(json.dumps({"pid": 1, **liveness._machine(), **about}))
    os.utime(path, (time.time() - silent_s,) * 2)
    assert fail_dead_runs(fresh) == ([run_id] if is_dead else [])


def test_a_damaged_record_is_of_a_dead_process(fresh: dg.DagsterInstance) -> None:
    run_id = _add(fresh, "cut", STATUS.STARTED)
    record_path(_home(fresh), run_id).parent.mkdir()
    record_path(_home(fresh), run_id).write_text('{"pid": 12')
    assert fail_dead_runs(fresh) == [run_id]


def test_a_run_on_its_way_has_its_time(
    fresh: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_way = [_add(fresh, "new", STATUS.NOT_STARTED), _add(fresh, "soon", STATUS.STARTING)]
    assert fail_dead_runs(fresh) == []
    later = time.time() + START_S + 5
    monkeypatch.setattr(recovery.time, "time", lambda: later)
    assert sorted(fail_dead_runs(fresh)) == on_the_way


def test_a_run_that_nobody_executes_is_failed_at_once(fresh: dg.DagsterInstance) -> None:
    run_id = _add(fresh, "nobody", STATUS.STARTED)
    assert fail_dead_runs(fresh) == [run_id]
    assert _status(fresh, run_id) == STATUS.FAILURE


def test_a_worker_that_loads_slowly_is_waited_for_and_one_that_dies_meanwhile_is_not(
    fresh: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run_id, pid in (("slow", os.getpid()), ("gone", 2**22 + 7)):
        run = fresh.get_run_by_id(_add(fresh, run_id, STATUS.STARTING))
        assert run is not None
        fresh.report_engine_event("worker", run, EngineEventData.in_process(pid))
    assert fail_dead_runs(fresh) == ["gone"]
    later = time.time() + START_S + 5
    monkeypatch.setattr(recovery.time, "time", lambda: later)
    assert fail_dead_runs(fresh) == []
    later += 600
    assert fail_dead_runs(fresh) == ["slow"]


def test_a_worker_that_starts_a_run_has_a_moment_to_record_itself(
    fresh: dg.DagsterInstance,
) -> None:
    run_id = _add(fresh, "starting", STATUS.STARTING)
    run = fresh.get_run_by_id(run_id)
    assert run is not None
    fresh.report_engine_event("worker", run, EngineEventData.in_process(os.getpid()))
    event = DagsterEvent(event_type_value=DagsterEventType.RUN_START.value, job_name="j")
    fresh.report_dagster_event(event, run_id=run_id)
    assert _status(fresh, run_id) == STATUS.STARTED
    assert fail_dead_runs(fresh) == []


def test_a_run_that_was_being_cancelled_is_cancelled(fresh: dg.DagsterInstance) -> None:
    run_id = _add(fresh, "cancelling", STATUS.CANCELING)
    assert fail_dead_runs(fresh) == [run_id]
    assert _status(fresh, run_id) == STATUS.CANCELED


def test_slots_of_the_dead_are_free_and_those_of_the_living_are_kept(
    fresh: dg.DagsterInstance,
) -> None:
    log = fresh.event_log_storage
    log.set_concurrency_slots("gpu", 3)
    _add(fresh, "dead", STATUS.STARTED)
    _add(fresh, "ended by hand", STATUS.FAILURE)
    for run_id in ("dead", "ended by hand", "deleted"):
        assert log.claim_concurrency_slot("gpu", run_id, "step").is_claimed
    with recorded(_home(fresh), "ended by hand"):
        fail_dead_runs(fresh)
        assert log.get_concurrency_info("gpu").active_run_ids == {"ended by hand"}
    fail_dead_runs(fresh)
    assert log.get_concurrency_info("gpu").active_run_ids == set()


def test_a_watch_frees_what_dies_while_somebody_waits(fresh: dg.DagsterInstance) -> None:
    said: list[str] = []
    log = fresh.event_log_storage
    log.set_concurrency_slots("gpu", 1)
    run_id = _add(fresh, "holder-of-the-slot", STATUS.STARTED)
    assert log.claim_concurrency_slot("gpu", run_id, "step").is_claimed
    with _worker(_home(fresh), run_id) as pid, watched(fresh, said.append, interval_s=0.1):
        assert not log.claim_concurrency_slot("gpu", "me", "step").is_claimed
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not log.claim_concurrency_slot("gpu", "me", "step").is_claimed:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert said == ["1 run(s) whose process is gone are now marked as failed: holder-o"]


def test_a_watch_survives_a_look_that_fails(
    fresh: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def fail(_: object) -> list[str]:
        raise OSError("a full disk")

    with watched(fresh, said.append, interval_s=0.05), monkeypatch.context() as patch:
        patch.setattr(recovery, "fail_dead_runs", fail)
        deadline = time.monotonic() + 10
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert "is tried again: a full disk" in said[0]
