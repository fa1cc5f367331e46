"""The schedule and the sensor, tick by tick."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
import pytest

from taprobe_core.pipeline import Plan, open_plan
from taprobe_core.study import Study
from taprobe_dagster.assets import ops_of
from taprobe_dagster.automation import op_jobs, schedules, wanted_cells_sensor
from taprobe_dagster.definitions import build_defs
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
