"""Failed cells through Dagster and the command: their events, partitions, sensor, exit status."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.storage.partition_status_cache import (
    get_and_update_asset_status_cache_value,
)

from taprobe_core.errors import DataError, NumericsError
from taprobe_core.pipeline import Cell, cells_of, is_complete, open_plan, stages_of
from taprobe_core.probes import Fit
from taprobe_core.probes import fit as probe_fit
from taprobe_dagster.assets import ops_of
from taprobe_dagster.automation import op_jobs, wanted_cells_sensor
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.launch import Launch, execute, launches_of
from taprobe_dagster.partitions import grid_of, partition_key
from taprobe_dagster.resources import Workbench

CORRECT, INCORRECT = "correct_base_solution", "incorrect_base_solution"


@pytest.fixture
def strict(mirror: Any) -> Any:
    """The mirror, of a study that fails on a bad problem."""
    values = yaml.safe_load(mirror.study.read_text())
    values["rollouts"]["on_bad_problem"] = "fail"
    mirror.study.write_text(yaml.safe_dump(values))
    return mirror


def cut(mirror: Any) -> tuple[Path, bytes]:
    """Cut a file of one problem of one setting; returns it and what it held."""
    folder = next(mirror.folder.glob(f"tiny/*/{CORRECT}"))
    path = sorted(folder.glob("problem_*"))[1] / "chunks_labeled.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path, whole


class Site:
    """One study, its definitions and an event log."""

    def __init__(self, mirror: Any, instance: dg.DagsterInstance) -> None:
        self.plan, self.instance = open_plan(mirror.study, mirror.data), instance
        bench = Workbench(self.plan.study, self.plan.data_root)
        self.defs = build_defs(self.plan.study, {"workbench": bench})

    def run(self, op: str) -> int:
        stages = ops_of(self.plan.study)[op]
        cells = cells_of(self.plan.study, stages[0])
        return execute(self.defs, self.instance, Launch(op, stages, cells[0], cells[-1], ""))

    def failures(self, stage: str) -> list[dg.AssetObservation]:
        records = self.instance.fetch_observations(dg.AssetKey(stage), limit=100).records
        found = [record.event_log_entry.asset_observation for record in records]
        return [each for each in found if each is not None]

    def partitions(self, stage: str) -> tuple[set[str], set[str]]:
        """What the UI shows of a stage: partitions that are there, partitions that failed."""
        grid = grid_of(self.plan.study, stage)
        assert grid is not None
        key = dg.AssetKey(stage)
        status = get_and_update_asset_status_cache_value(self.instance, key, grid)
        assert status is not None
        made = status.deserialize_materialized_partition_subsets(grid)
        failed = status.deserialize_failed_partition_subsets(grid)
        return set(made.get_partition_keys()), set(failed.get_partition_keys())

    def tick(self) -> dg.SensorExecutionData:
        bench = Workbench(self.plan.study, self.plan.data_root)
        with dg.build_sensor_context(
            instance=self.instance, resources={"workbench": bench}
        ) as context:
            return wanted_cells_sensor(op_jobs(self.plan.study)).evaluate_tick(context)


def keys(stage: str, cells: Sequence[Cell]) -> set[str]:
    return {str(partition_key(stage, cell)) for cell in cells}


def test_a_failed_cell_has_its_own_event_and_the_others_are_materialized(
    strict: Any, fresh: dg.DagsterInstance
) -> None:
    path, whole = cut(strict)
    site = Site(strict, fresh)
    with pytest.raises(DataError, match=f"rollouts tiny/{CORRECT} failed, so nothing"):
        site.run("read_rollouts")
    for stage in ("rollouts", "labels", "spans"):
        made, failed = site.partitions(stage)
        assert made == keys(stage, [("tiny", INCORRECT)]), stage
        assert failed == keys(stage, [("tiny", CORRECT)]), stage
    assert fresh.get_runs()[0].status is dg.DagsterRunStatus.FAILURE
    (event,) = site.failures("rollouts")
    assert event.partition == str(partition_key("rollouts", ("tiny", CORRECT)))
    assert (event.description or "").startswith(f"rollouts tiny/{CORRECT} failed: ")
    assert event.metadata["error"].value == "DataError"
    assert path.parent.name in str(event.metadata["where"].value)
    assert "rollouts.on_bad_problem: skip" in str(event.metadata["fix"].value)
    # Those that read it have no error of their own.
    assert site.failures("labels") == site.failures("spans") == []

    # Later ops do what does not read it, in the same state of affairs.
    for op, stages in ops_of(site.plan.study).items():
        for launch in launches_of(fresh, site.plan, op, stages):
            if op != "read_rollouts":
                assert INCORRECT in launch.first[1]
                execute(site.defs, fresh, launch)
    for stage in ("activations", "probe_fits", "evaluation"):
        cells = cells_of(site.plan.study, stage)
        assert [cell for cell in cells if is_complete(site.plan, stage, cell)] == [
            cell for cell in cells if INCORRECT in cell[1]
        ]

    path.write_bytes(whole)
    strict.accept()
    site = Site(strict, fresh)
    (launch,) = launches_of(fresh, site.plan, "read_rollouts", ("rollouts", "labels", "spans"))
    assert launch.first == launch.last == ("tiny", CORRECT)
    assert execute(site.defs, fresh, launch) == 3
    made, failed = site.partitions("rollouts")
    assert (len(made), failed) == (2, set())


def poison(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every solve fail that one recipe takes part in."""
    linear = probe_fit.SOLVERS["linear"]

    def solve(design: Any, fits: Sequence[Fit], *rest: Any) -> Any:
        if any(fit.recipe.name == name for fit in fits):
            raise NumericsError("a column did not converge", "a solve", "lower C")
        return linear.solve(design, fits, *rest)

    monkeypatch.setitem(probe_fit.SOLVERS, "linear", replace(linear, solve=solve))


def test_the_sensor_gives_up_what_fails_and_goes_on_with_the_rest(
    strict: Any, fresh: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(strict)
    site = Site(strict, fresh)
    now = [0.0]
    monkeypatch.setattr("taprobe_dagster.automation.get_current_timestamp", lambda: now[0])
    asked: list[str] = []
    for _ in range(30):
        tick = site.tick()
        if not tick.run_requests and "tried again" not in str(tick.skip_message):
            break
        for request in tick.run_requests or ():
            op = str(request.job_name).removesuffix("_job")
            asked.append(op)
            job = site.defs.resolve_job_def(str(request.job_name))
            job.execute_in_process(
                instance=fresh,
                tags=request.tags,
                asset_selection=list(request.asset_selection or ()),
                raise_on_error=False,
            )
        now[0] = 4e9
    # Once with the sound cell, and then alone, as often as anything is tried at one state.
    assert asked.count("read_rollouts") == 6
    assert {"extract_activations", "fit_probes", "evaluate_probes"} <= set(asked)
    assert "publish_study" not in asked
    assert "given up until a cell or its inputs change" in str(tick.skip_message)


@pytest.mark.slow
def test_the_command_names_what_failed_and_how_to_mend_it(
    strict: Any, taprobe: Callable[..., Any]
) -> None:
    path, whole = cut(strict)
    plan = open_plan(strict.study, strict.data)
    n = sum(len(cells_of(plan.study, stage)) for stage in stages_of(plan.study))
    for turn in range(2):
        said = taprobe("run", strict.study)
        text = " ".join(said.err.split())
        assert (said.code, said.out) == (2, "")
        assert "Traceback" not in said.err
        assert f"rollouts tiny/{CORRECT} failed" in text
        assert path.parent.name in text
        assert "rollouts.exclude_ids" in text
        assert "rollouts.on_bad_problem: skip" in text
        assert "1 failed" in text
        assert f"of {n} artifacts are stopped" in text
        assert (" 0 computed" in text) is (turn > 0)
    said = taprobe("check", strict.study, "--no-measure")
    assert said.code == 2
    assert f"failed: rollouts tiny/{CORRECT}: " in said.err
    assert "rollouts.on_bad_problem: skip" in said.err
    said = taprobe("check", strict.study, "--no-measure", "--json")
    assert said.code == 2
    (failure,) = json.loads(said.out)["failures"]
    assert (failure["stage"], failure["cell"]) == ("rollouts", ["tiny", CORRECT])
    assert failure["faults"][0]["error"] == "DataError"

    path.write_bytes(whole)
    assert taprobe("check", strict.study, "--accept", "--no-measure").code == 0
    said = taprobe("run", strict.study)
    assert said.code in (0, 3), said.err  # a check may fail on so few problems
    assert not list((strict.data / "failures").rglob("*.json"))


def test_the_command_fits_one_recipe_after_all_others(
    mirror: Any, taprobe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = open_plan(mirror.study, mirror.data)
    choice = ("--site", "tiny@L01", "--trial", f"{CORRECT}@s00")
    stages = ("rollouts", "labels", "spans", "activations", "probe_fits")
    select = [word for stage in stages for word in ("--select", stage)]
    with monkeypatch.context() as poisoned:
        poison(poisoned, "linear_probe")
        said = taprobe("run", mirror.study, *choice, *select)
    assert said.code == 2
    text = " ".join(said.err.split())
    assert f"probe_fits tiny@L01/{CORRECT}@s00 failed: recipe linear_probe: a column" in text
    fits = {key.partition[2] for key in plan.store.keys("fits")}
    assert fits == {"linear_probe_control", "position_baseline", "text_only_baseline"}
    said = taprobe("run", mirror.study, *choice, *select)
    assert said.code == 0, said.err
    assert "1 computed" in said.err
    assert len(list(plan.store.keys("fits"))) == 4
