"""What holds of every stage, and that no table is stored that breaks the contract of its stage."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from taprobe_core import tables
from taprobe_core.errors import SchemaError
from taprobe_core.pipeline import STAGES, Outcome, Plan, cells_of, open_plan, run_stage
from taprobe_core.pipeline.commit import commit_cell
from taprobe_core.tables import Contract


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_stands_after_what_it_reads_and_its_tables_have_contracts(stage: Any) -> None:
    order = list(STAGES)
    assert all(order.index(parent) < order.index(stage.name) for parent in stage.reads)
    contracts = {name: getattr(tables, contract) for name, contract in stage.tables.items()}
    assert all(isinstance(each, Contract) for each in contracts.values())
    assert STAGES[stage.name] is stage
    assert set(stage.grid) <= {"model", "setting", "site", "trial"}
    assert stage.title.endswith(".")


def test_stages_of_one_op_share_a_grid_and_parts_have_one_code_version() -> None:
    grids: dict[str, set[tuple[str, ...]]] = {}
    parts: dict[str, set[str]] = {}
    for stage in STAGES.values():
        grids.setdefault(stage.op, set()).add(stage.grid)
        if stage.part is not None:
            parts.setdefault(stage.part.name, set()).add(stage.part.code_version)
    assert {len(each) for each in grids.values()} == {1}
    assert {len(each) for each in parts.values()} == {1}
    assert not set(parts) & set(STAGES)


def test_every_table_that_a_stage_stores_is_one_it_names(built: Any) -> None:
    plan = open_plan(built.study, built.data)
    for name, outcomes in built.outcomes.items():
        for _, outcome in outcomes:
            files = {Path(each).stem for each in outcome.artifact.manifest.files}
            assert files - {"report"} <= set(plan.stages[name].tables)


def test_what_reads_more_than_its_own_cell_is_known_and_all_that_comes_after() -> None:
    swept = {name for name in STAGES if name.startswith("sweep_")} - {"sweep_stage1"}
    assert STAGES.of_the_whole() == swept | {
        "receiver_heads", "evaluation", "leaderboard", "study_report",
    }  # fmt: skip


def test_the_manifest_names_what_the_fingerprint_was_made_of(built: Any) -> None:
    plan = open_plan(built.study, built.data)
    for stage, outcomes in built.outcomes.items():
        for cell, outcome in outcomes:
            upstream = outcome.artifact.manifest.upstream_keys
            assert list(upstream)[: len(plan.upstream(stage, cell))] == plan.upstream(stage, cell)


def break_table(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.lit(-7, pl.Int64).alias("problem_id"))


@pytest.mark.parametrize(
    ("stage", "table", "change"),
    [
        ("labels", "labels", break_table),
        ("evaluation", "problem_metrics", break_table),
        ("evaluation", "metrics", lambda t: t.with_columns(pr_auc=pl.lit(float("nan")))),
        ("evaluation", "plans", lambda t: t.drop("seed")),
        ("deferral_plans", "decisions", break_table),
        ("leaderboard", "leaderboard", lambda t: t.with_columns(surprise=pl.lit(1))),
        ("leaderboard", "leaderboard", lambda t: pl.concat([t, t[:1]])),
        ("activations", "shards", break_table),
        ("probe_fits", "fits", lambda t: t.with_columns(recipe=pl.lit("twice"))),
    ],
)
def test_a_table_that_breaks_its_contract_is_not_stored(
    built: Any, copied: Path, stage: str, table: str, change: Any
) -> None:
    plan = open_plan(built.study, copied)
    cell = cells_of(plan.study, stage)[0]
    sound = {name: plan.read(stage, cell, name) for name in plan.stages[stage].tables}
    plan.store.discard(plan.key(stage, cell))
    with pytest.raises(SchemaError, match=stage) as refused:
        commit_cell(plan, stage, cell, lambda: {**sound, table: change(sound[table])}, {})
    assert "/".join(cell) in str(refused.value) or not cell
    assert plan.store.find(plan.key(stage, cell)) is None
    assert not commit_cell(plan, stage, cell, lambda: sound, {}).is_reused


def test_stages_are_run_by_their_own_make_and_no_other(
    built: Any, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = STAGES["labels"].make

    def make(plan: Plan, cells: Any) -> Any:
        made.extend(cells)
        return real(plan, cells)

    monkeypatch.setitem(STAGES, "labels", replace(STAGES["labels"], make=make))
    plan = open_plan(built.study, copied)
    cells = cells_of(plan.study, "labels")
    outcomes = dict(run_stage(plan, "labels", cells))
    assert list(outcomes) == made == cells
    assert all(isinstance(each, Outcome) and each.is_reused for each in outcomes.values())


def test_the_pipeline_is_there_before_what_computes_is_imported() -> None:
    heavy = {"torch", "transformers", "sklearn", "scipy", "matplotlib"}
    code = f"import sys, taprobe_core.pipeline; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stderr.strip() == "set()"
