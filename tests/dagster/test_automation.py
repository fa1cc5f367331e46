"""The schedule and the sensor, tick by tick."""

from __future__ import annotations

import time
from collections.abc import Mapping

import dagster as dg
import pytest
import yaml

from taprobe_core.pipeline import Plan, cells_of, key_of, open_plan
from taprobe_core.study import Study, parse_study
from taprobe_dagster import automation
from taprobe_dagster.assets import ops_of
from taprobe_dagster.automation import (
    FIRST_WAIT_S,
    MAX_ATTEMPTS,
    op_jobs,
    schedules,
    wanted_cells_sensor,
)
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.partitions import partition_key
from taprobe_dagster.resources import Workbench


def _sensor_tick(instance: dg.DagsterInstance, plan: Plan) -> dg.SensorExecutionData:
    sensor = wanted_cells_sensor(op_jobs(plan.study))
    with dg.build_sensor_context(
        instance=instance, resources={"workbench": Workbench(plan.study, plan.data_root)}
    ) as context:
        return sensor.evaluate_tick(context)


def test_everything_is_off_by_default(study: Study) -> None:
    jobs = op_jobs(study)
    stopped = dg.DefaultScheduleStatus.STOPPED
    assert [schedule.default_status for schedule in schedules(jobs)] == [stopped, stopped]
    assert wanted_cells_sensor(jobs).default_status == dg.DefaultSensorStatus.STOPPED


def test_the_sensor_launches_the_first_op_that_lacks_cells(
    study: Study, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = open_plan(study, tmp_path_factory.mktemp("empty"))
    tick = _sensor_tick(fresh, plan)
    assert tick.run_requests is not None
    (request,) = tick.run_requests
    assert request.asset_selection == [
        dg.AssetKey("rollouts"),
        dg.AssetKey("labels"),
        dg.AssetKey("spans"),
    ]
    assert request.tags["dagster/asset_partition_range_start"] == "tiny|correct_base_solution"
    assert request.tags["dagster/asset_partition_range_end"] == "other|incorrect_base_solution"
    again = _sensor_tick(fresh, plan)
    assert again.run_requests is not None
    assert again.run_requests[0].run_key == request.run_key


def _end(
    instance: dg.DagsterInstance, request: dg.RunRequest, status: dg.DagsterRunStatus, n: int
) -> None:
    instance.add_run(
        dg.DagsterRun(job_name="j", run_id=f"run-{n}", status=status, tags=request.tags)
    )


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED])
def test_a_failed_launch_is_tried_again_under_another_key_later_and_later(
    study: Study,
    fresh: dg.DagsterInstance,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    status: dg.DagsterRunStatus,
) -> None:
    plan = open_plan(study, tmp_path_factory.mktemp("failing"))
    clock = [time.time()]
    monkeypatch.setattr(automation, "get_current_timestamp", lambda: clock[0])
    keys = []
    for n in range(1, MAX_ATTEMPTS + 1):
        tick = _sensor_tick(fresh, plan)
        assert tick.run_requests is not None
        (request,) = tick.run_requests
        keys.append(request.run_key)
        _end(fresh, request, status, n)
        (record,) = fresh.get_run_records(dg.RunsFilter(run_ids=[f"run-{n}"]))
        due = record.update_timestamp.timestamp() + FIRST_WAIT_S * 2 ** (n - 1)
        if n < MAX_ATTEMPTS:
            clock[0] = due - 1
            tick = _sensor_tick(fresh, plan)
            assert not tick.run_requests
            assert f"tried {n} times, last by run run-{n}; tried again in 1 s" in str(
                tick.skip_message
            )
        clock[0] = due + 1
    assert len(set(keys)) == MAX_ATTEMPTS
    clock[0] += 10 * 24 * 3600
    tick = _sensor_tick(fresh, plan)
    assert not tick.run_requests
    assert "given up until a cell or its inputs change" in str(tick.skip_message)

    # Another dataset has other fingerprints, and nothing has been tried at these.
    values = yaml.safe_load(study.model_dump_json())
    values["rollouts"]["source"]["n_rollouts"] += 1
    changed = open_plan(parse_study(yaml.safe_dump(values), "changed.yaml"), plan.data_root)
    tick = _sensor_tick(fresh, changed)
    assert tick.run_requests is not None
    assert tick.run_requests[0].run_key not in keys


def test_a_cell_that_was_made_and_then_discarded_is_launched_at_once_under_another_key(
    study: Study, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = open_plan(study, tmp_path_factory.mktemp("discarded"))
    keys = []
    for n in range(3):
        tick = _sensor_tick(fresh, plan)
        assert tick.run_requests is not None
        (request,) = tick.run_requests
        keys.append(request.run_key)
        _end(fresh, request, dg.DagsterRunStatus.SUCCESS, n)
        # The event log says that one cell of the rectangle is there; the store has lost it.
        cell = cells_of(study, "labels")[1]
        fresh.report_runless_asset_event(
            dg.AssetMaterialization(
                "labels",
                partition=partition_key("labels", cell),
                tags={"dagster/data_version": key_of(plan, "labels", cell).fingerprint},
            )
        )
    assert len(set(keys)) == 3


def test_a_success_that_makes_nothing_is_not_repeated_without_end(
    study: Study, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = open_plan(study, tmp_path_factory.mktemp("nothing"))
    tick = _sensor_tick(fresh, plan)
    assert tick.run_requests is not None
    for n in range(MAX_ATTEMPTS):
        _end(fresh, tick.run_requests[0], dg.DagsterRunStatus.SUCCESS, n)
    tick = _sensor_tick(fresh, plan)
    assert not tick.run_requests
    assert "given up" in str(tick.skip_message)


def test_the_sensor_skips_when_nothing_is_wanted(
    plan: Plan, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    tick = _sensor_tick(instance, plan)
    assert not tick.run_requests
    assert tick.skip_message == "every cell is present at its present fingerprint"


def test_the_sensor_waits_for_runs_under_way(
    study: Study, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fresh.add_run(dg.DagsterRun(job_name="j", run_id="r", status=dg.DagsterRunStatus.STARTED))
    tick = _sensor_tick(fresh, open_plan(study, tmp_path_factory.mktemp("busy")))
    assert not tick.run_requests
    assert "under way" in str(tick.skip_message)


def test_the_schedule_covers_the_whole_evaluation_grid(
    study: Study, plan: Plan, fresh: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    schedule = schedules(op_jobs(study))[0]
    with dg.build_schedule_context(
        instance=fresh, resources={"workbench": Workbench(plan.study, plan.data_root)}
    ) as context:
        tick = schedule.evaluate_tick(context)
    assert tick.run_requests is not None
    (request,) = tick.run_requests
    assert request.job_name == "evaluate_probes_job"
    assert request.asset_selection == [dg.AssetKey("evaluation")]
    first = request.tags["dagster/asset_partition_range_start"]
    last = request.tags["dagster/asset_partition_range_end"]
    assert (first, last) == (
        "correct_base_solution|tiny@L00",
        "incorrect_base_solution|other@L02",
    )


def test_the_definitions_load_whole(study: Study) -> None:
    dg.Definitions.validate_loadable(build_defs(study))


def test_each_op_has_a_job_over_its_own_grid(study: Study) -> None:
    repository = build_defs(study).get_repository_def()
    for op, stages in ops_of(study).items():
        assert repository.get_job(f"{op}_job").asset_layer.executable_asset_keys == {
            dg.AssetKey(stage) for stage in stages
        }
