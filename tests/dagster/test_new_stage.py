"""A stage added in one place is keyed, run, checked, shown and an asset, with nothing else told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from taprobe_core.pipeline import (
    STAGES,
    Cell,
    Check,
    Description,
    Found,
    Outcome,
    Plan,
    Stage,
    cells_of,
    describe,
    is_complete,
    key_of,
    open_plan,
    parents_of,
    run_stage,
    stages_of,
    verdicts_of,
)
from taprobe_core.pipeline.commit import commit_cell
from taprobe_core.pipeline.stage import cell_by_cell
from taprobe_core.study import Study
from taprobe_dagster.assets import ops_of
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.launch import execute, launches_of
from taprobe_dagster.partitions import cell_of
from taprobe_dagster.resources import Workbench


def make(plan: Plan, cell: Cell) -> Outcome:
    def compute() -> dict[str, pl.DataFrame]:
        sentences = plan.read("rollouts", cell, "sentences")
        ids = sentences["problem_id"].unique().sort()
        return {"notes": pl.DataFrame({"problem_id": ids}).with_columns(note=pl.lit("counted"))}

    return commit_cell(plan, "counts", cell, compute, {"why": "a test"})


def has_notes(plan: Plan, cell: Cell) -> Found:
    """There is a note of some problem."""
    return Found(() if plan.read("counts", cell, "notes").height else ("no note",))


COUNTS = Stage(
    name="counts",
    title="One note per problem.",
    grid=("model", "setting"),
    reads=("rollouts", "labels"),
    code_version="7",
    config=lambda plan, cell: {"percentile": plan.study.labels.percentile},
    make=cell_by_cell(make),
    describe=lambda plan, cell: Description({}, plan.read("counts", cell, "notes").height),
    tables={"notes": "NOTES"},
    checks={"has_notes": Check(has_notes)},
    op="count",
    kinds=frozenset({"polars"}),
    is_provenance=True,
)


@pytest.fixture
def plan(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setitem(STAGES, COUNTS.name, COUNTS)
    return open_plan(study, tmp_path / "data")


def test_a_new_stage_is_keyed_run_checked_and_shown(plan: Plan) -> None:
    cells = cells_of(plan.study, "counts")
    assert stages_of(plan.study)[-1] == "counts"
    assert cells == cells_of(plan.study, "labels")
    assert parents_of(plan.study, "counts") == ("rollouts", "labels")
    for stage in ("rollouts", "labels", "counts"):
        done = dict(run_stage(plan, stage, cells))
    assert list(done) == cells
    manifest = done[cells[0]].artifact.manifest
    assert (manifest.code_version, manifest.config) == (
        "7", {"percentile": plan.study.labels.percentile},
    )  # fmt: skip
    assert list(manifest.upstream_keys) == [
        key_of(plan, "rollouts", cells[0]),
        key_of(plan, "labels", cells[0]),
    ]
    assert all(is_complete(plan, "counts", cell) for cell in cells)
    assert describe(plan, "counts", cells[0]).n_rows == 6
    (verdict,) = verdicts_of(plan, "counts", cells[0])
    assert (verdict.check, verdict.status) == ("has_notes", "passed")


def test_a_new_stage_is_an_asset_with_its_op_partitions_dependencies_and_check(
    plan: Plan, fresh: dg.DagsterInstance
) -> None:
    defs = build_defs(plan.study, {"workbench": Workbench(plan.study, plan.data_root)})
    dg.Definitions.validate_loadable(defs)
    node: Any = defs.resolve_asset_graph().get(dg.AssetKey("counts"))
    assert {key.to_user_string() for key in node.parent_keys} == {"rollouts", "labels"}
    assert (node.group_name, node.code_version, set(node.kinds)) == ("counts", "7", {"polars"})
    assert node.description == COUNTS.title
    cells = cells_of(plan.study, "counts")
    found = {cell_of("counts", key) for key in node.partitions_def.get_partition_keys()}
    assert found == set(cells)
    assert [key.name for key in node.check_keys] == ["has_notes"]
    assert ops_of(plan.study)["count"] == ("counts",)
    assert "count_job" in {job.name for job in defs.jobs or ()}
    n_computed = 0
    for op in ("read_rollouts", "count"):
        for launch in launches_of(fresh, plan, op, ops_of(plan.study)[op]):
            n_computed += execute(defs, fresh, launch)
    assert n_computed == 4 * len(cells)
    assert list(launches_of(fresh, plan, "count", ("counts",))) == []
