"""The schedule and the sensor, tick by tick."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
import pytest

from taprobe_core.pipeline import Plan, open_plan
from taprobe_core.study import Study
from taprobe_dagster.automation import reevaluation_schedule, wanted_cells_sensor
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.resources import Workbench


def _sensor_tick(instance: dg.DagsterInstance, plan: Plan) -> dg.SensorExecutionData:
    sensor = wanted_cells_sensor()
    with dg.build_sensor_context(
        instance=instance, resources={"workbench": Workbench(plan.study, plan.data_root)}
    ) as context:
        return sensor.evaluate_tick(context)


def test_both_are_off_by_default() -> None:
    assert reevaluation_schedule().default_status == dg.DefaultScheduleStatus.STOPPED
    assert wanted_cells_sensor().default_status == dg.DefaultSensorStatus.STOPPED


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
    schedule = reevaluation_schedule()
    with dg.build_schedule_context(
        instance=fresh, resources={"workbench": Workbench(plan.study, plan.data_root)}
    ) as context:
        tick = schedule.evaluate_tick(context)
    assert tick.run_requests is not None
    (request,) = tick.run_requests
    assert request.asset_selection == [dg.AssetKey("evaluation")]
    first = request.tags["dagster/asset_partition_range_start"]
    last = request.tags["dagster/asset_partition_range_end"]
    assert (first, last) == (
        "correct_base_solution|tiny@L00",
        "incorrect_base_solution|other@L02",
    )


def test_requests_of_both_resolve_against_the_definitions(study: Study) -> None:
    repository = build_defs(study).get_repository_def()
    assert [schedule.name for schedule in repository.schedule_defs] == ["reevaluate"]
    assert [sensor.name for sensor in repository.sensor_defs] == ["launch_wanted_cells"]
