"""Failed checks through Dagster and the command: runs, checks of an asset, sensor, messages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import dagster as dg
import pytest

from taprobe_core.errors import FailedCheckError
from taprobe_core.pipeline import STAGES, CellFilter, cells_of, key_of, open_plan, stages_of
from taprobe_dagster.assets import ops_of
from taprobe_dagster.automation import op_jobs, wanted_cells_sensor
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.events import refresh_checks
from taprobe_dagster.launch import Launch, execute, launches_of
from taprobe_dagster.resources import Workbench

CORRECT, INCORRECT = "correct_base_solution", "incorrect_base_solution"
COPY = ("no_trace_on_two_sides", f"tiny/{CORRECT}")
TRIPWIRE = ("shuffled_labels_at_chance", f"tiny@L01/{CORRECT}")


class Site:
    """One study, its definitions and an event log."""

    def __init__(self, mirror: Any, instance: dg.DagsterInstance) -> None:
        self.plan, self.instance = open_plan(mirror.study, mirror.data), instance
        bench = Workbench(self.plan.study, self.plan.data_root)
        self.defs = build_defs(self.plan.study, {"workbench": bench})

    def run(self, op: str, setting: str | None = None) -> int:
        """Run an op over one setting, wanted or not."""
        stages = ops_of(self.plan.study)[op]
        trials = frozenset({f"{setting}@s00"}) if setting else None
        cells = cells_of(self.plan.study, stages[0], CellFilter(None, trials))
        return execute(self.defs, self.instance, Launch(op, stages, cells[0], cells[-1], ""))

    def evaluation(self, stage: str, name: str) -> Any:
        key = dg.AssetCheckKey(dg.AssetKey(stage), name)
        log = self.instance.event_log_storage
        record = log.get_latest_asset_check_execution_by_key([key])[key]
        assert record.event is not None
        assert record.event.dagster_event is not None
        return record.event.dagster_event.asset_check_evaluation_data

    def execute_check(self, stage: str, name: str) -> bool:
        """What "Execute" does: the check alone, of no partition."""
        key = dg.AssetCheckKey(dg.AssetKey(stage), name)
        job = self.defs.resolve_implicit_global_asset_job_def()
        result = job.get_subset(
            asset_selection=set(), asset_check_selection={key}
        ).execute_in_process(instance=self.instance)
        return result.success

    def tick(self) -> dg.SensorExecutionData:
        bench = Workbench(self.plan.study, self.plan.data_root)
        with dg.build_sensor_context(
            instance=self.instance, resources={"workbench": bench}
        ) as context:
            return wanted_cells_sensor(op_jobs(self.plan.study)).evaluate_tick(context)

    def cells(self, stage: str) -> list[tuple[str, ...]]:
        """Stored cells of a stage."""
        return [
            cell
            for cell in cells_of(self.plan.study, stage)
            if self.plan.store.find(key_of(self.plan, stage, cell))
        ]


def test_a_check_stays_red_while_any_stored_cell_fails(
    mirror: Any, fresh: dg.DagsterInstance
) -> None:
    one, two = mirror.copy_trace()
    site = Site(mirror, fresh)
    with pytest.raises(FailedCheckError, match=f"problems {one}, {two} have the same trace"):
        site.run("read_rollouts", CORRECT)
    assert site.cells("rollouts") == [("tiny", CORRECT)]
    found = site.evaluation("rollouts", COPY[0])
    assert (found.passed, found.severity, found.blocking) == (
        False,
        dg.AssetCheckSeverity.ERROR,
        True,
    )

    # A sound cell afterwards is a run that succeeds, and turns nothing green.
    assert site.run("read_rollouts", INCORRECT) == 3
    found = site.evaluation("rollouts", COPY[0])
    assert not found.passed
    assert found.metadata["failing_cells"].value == [COPY[1]]
    assert (found.metadata["n_cells"].value, found.metadata["n_passed"].value) == (2, 1)
    assert "rollouts.problem_ids" in found.metadata["fix"].value
    assert site.evaluation("rollouts", "rollouts_schema").passed
    runs = fresh.get_runs()
    assert [run.status.value for run in runs] == ["SUCCESS", "FAILURE"]

    # Mended, the other run makes it green; nobody has to wipe anything.
    mirror.mend()
    mirror.accept()
    site = Site(mirror, fresh)
    assert site.run("read_rollouts") == 3
    assert site.evaluation("rollouts", COPY[0]).passed


def test_execute_looks_at_what_is_stored(mirror: Any, fresh: dg.DagsterInstance) -> None:
    site = Site(mirror, fresh)
    site.run("read_rollouts")
    assert site.evaluation("rollouts", COPY[0]).passed
    mirror.copy_trace()
    mirror.accept()
    site = Site(mirror, fresh)
    with pytest.raises(FailedCheckError):
        site.run("read_rollouts")
    mirror.waive(COPY)
    site = Site(mirror, fresh)
    assert site.execute_check("rollouts", COPY[0])
    found = site.evaluation("rollouts", COPY[0])
    assert found.passed
    assert found.metadata["n_waived"].value == 1
    assert "both are <kept> on purpose" in found.metadata["waivers"].value
    mirror.waive()
    site = Site(mirror, fresh)
    assert site.execute_check("rollouts", COPY[0])
    assert not site.evaluation("rollouts", COPY[0]).passed


def test_the_sensor_does_not_launch_what_a_failed_check_stops(
    mirror: Any, fresh: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.copy_trace()
    site = Site(mirror, fresh)
    requests = []
    for _ in range(8):
        tick = site.tick()
        if not tick.run_requests:
            break
        for request in tick.run_requests:
            requests.append(request)
            op = request.job_name.removesuffix("_job")
            is_first = op == "read_rollouts"
            with pytest.raises(FailedCheckError) if is_first else nullcontext():
                site.run(op, None if is_first else INCORRECT)
    assert [request.job_name for request in requests] == [
        "read_rollouts_job", "extract_activations_job", "fit_probes_job", "evaluate_probes_job",
    ]  # fmt: skip
    for request in requests[1:]:
        assert INCORRECT in request.tags["dagster/asset_partition_range_start"]
        assert INCORRECT in request.tags["dagster/asset_partition_range_end"]
    tick = site.tick()
    assert not tick.run_requests
    assert "wait until failed checks are mended or waived" in str(tick.skip_message)
    assert f"no_trace_on_two_sides on rollouts tiny/{CORRECT}" in str(tick.skip_message)

    mirror.waive(COPY)
    site = Site(mirror, fresh)
    tick = site.tick()
    assert tick.run_requests
    assert tick.run_requests[0].job_name == "read_rollouts_job"
    refresh_checks(fresh, site.plan)
    assert site.evaluation("rollouts", COPY[0]).passed
    # What the event log says already is not said again.
    monkeypatch.setattr(fresh, "report_runless_asset_event", pytest.fail)
    refresh_checks(fresh, site.plan)


@pytest.mark.slow
def test_the_command_ends_with_what_where_and_fix_as_often_as_it_is_given(
    mirror: Any, taprobe: Callable[..., Any]
) -> None:
    one, two = mirror.copy_trace()
    plan = open_plan(mirror.study, mirror.data)
    n = sum(len(cells_of(plan.study, stage)) for stage in stages_of(plan.study))
    for turn in range(3):
        said = taprobe("run", mirror.study)
        assert (said.code, said.out) == (3, "")
        assert said.err.count("error: ") == said.err.count("Fix: ") == 1
        assert "Traceback" not in said.err
        text = " ".join(said.err.split())
        assert f"problems {one}, {two} have the same trace" in text
        assert f"check {COPY[0]} failed on rollouts {COPY[1]}" in text
        assert "artifacts are stopped" in text
        # All that does not read the copy was made at once, and is made once.
        assert ("0 computed" in text) is (turn > 0)
        for stage in stages_of(plan.study):
            cells = cells_of(plan.study, stage)
            made = [c for c in cells if plan.store.find(key_of(plan, stage, c))]
            assert made == (
                cells if stage == "rollouts" else [c for c in cells if c and INCORRECT in c[1]]
            )
    assert taprobe("report", mirror.study).code == 3

    mirror.waive(COPY)
    said = taprobe("run", mirror.study)
    assert said.code == 3
    assert f"check {TRIPWIRE[0]} failed on evaluation {TRIPWIRE[1]}" in " ".join(said.err.split())
    mirror.waive(COPY, TRIPWIRE)
    said = taprobe("run", mirror.study)
    assert said.code == 0, said.err
    assert f"{n} artifacts: 2 computed" in " ".join(said.err.split())
    assert "linear_probe" in said.out

    mirror.mend()
    said = taprobe("run", mirror.study)
    assert (said.code, "changed since" in said.err) == (2, True)
    assert taprobe("check", mirror.study, "--accept", "--no-measure").code == 0
    assert taprobe("run", mirror.study).code == 0


def test_every_check_of_an_asset_says_whether_it_stops(mirror: Any) -> None:
    defs = build_defs(open_plan(mirror.study, mirror.data).study)
    graph = defs.resolve_asset_graph()
    for stage in graph.materializable_asset_keys:
        for name, check in STAGES[stage.to_user_string()].checks.items():
            spec = graph.get_check_spec(dg.AssetCheckKey(stage, name))
            assert spec.blocking is check.is_blocking
            assert spec.description


def test_the_launches_of_an_op_leave_out_what_is_stopped(
    mirror: Any, fresh: dg.DagsterInstance
) -> None:
    mirror.copy_trace()
    site = Site(mirror, fresh)
    with pytest.raises(FailedCheckError):
        site.run("read_rollouts")
    launches = list(launches_of(fresh, site.plan, "extract_activations", ("activations",)))
    assert [(each.first, each.last) for each in launches] == [
        (("tiny@L00", INCORRECT), ("tiny@L01", INCORRECT))
    ]
    assert list(launches_of(fresh, site.plan, "publish_study", ("leaderboard",))) == []
