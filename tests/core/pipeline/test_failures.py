"""A failure costs itself: one cell, fit, text or problem that fails, beside others that do not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from polars.testing import assert_frame_equal

from taprobe_core.activations import passes
from taprobe_core.activations.tasks import ACTIVATIONS_FILE as FILE
from taprobe_core.deferral import plans as deferral
from taprobe_core.errors import (
    CorruptArtifactError,
    DataError,
    DiskFullError,
    FailedCellsError,
    ModelError,
    NonFiniteError,
    NumericsError,
    TaprobeError,
    UnexpectedError,
    attempted,
)
from taprobe_core.pipeline import (
    Cell,
    Failure,
    Plan,
    cells_of,
    extract,
    failure_at,
    kept_failures,
    key_of,
    missing_cells,
    open_plan,
    run_stage,
    stages_of,
    verdicts_of,
)
from taprobe_core.pipeline.stages import study_report
from taprobe_core.probes import Fit
from taprobe_core.probes import fit as probe_fit
from taprobe_core.probes.fitted import Solver
from taprobe_core.store import parse_key

CORRECT, INCORRECT = "correct_base_solution", "incorrect_base_solution"
POISONED = ("tiny@L01", f"{CORRECT}@s01")


@pytest.fixture
def own(built: Any, copied: Path) -> Plan:
    return open_plan(built.study, copied)


class Run:
    """What came of a stage."""

    def __init__(self, plan: Plan, stage: str, cells: Sequence[Cell] | None = None) -> None:
        self.told: list[Failure] = []
        self.made: dict[Cell, bool] = {}
        self.error: TaprobeError | None = None
        wanted = cells_of(plan.study, stage) if cells is None else cells
        try:
            for cell, outcome in run_stage(plan, stage, wanted, self.told.append):
                self.made[cell] = outcome.is_reused
        except TaprobeError as error:
            self.error = error

    @property
    def n_computed(self) -> int:
        return sum(not is_reused for is_reused in self.made.values())


def again(plan: Plan) -> Plan:
    return open_plan(plan.study, plan.data_root)


def without(plan: Plan, *stages: str) -> Plan:
    """The plan whose store lacks some stages and everything that is made from them."""
    for stage in stages:
        shutil.rmtree(plan.data_root / "artifacts" / stage)
    return again(plan)


def written(plan: Plan, stage: str) -> dict[str, Any]:
    return {str(k): plan.store.open(k).manifest.created_at for k in plan.store.keys(stage)}


def records(plan: Plan) -> list[dict[str, Any]]:
    paths = (plan.data_root / "failures").rglob("*.json")
    return [json.loads(path.read_text()) for path in sorted(paths)]


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_one_poisoned_cell_of_eight_leaves_seven_and_the_next_run_makes_one(
    own: Plan,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_foreseen: bool,
) -> None:
    plan = without(own, "deferral_plans", "evaluation", "leaderboard", "study_report")
    cells = cells_of(plan.study, "deferral_plans")
    assert len(cells) == 8
    poison = cells.index(POISONED)
    calls: list[object] = []
    real = deferral.plan_deferrals

    def plan_deferrals(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == poison + 1:
            raise (
                DataError("no sentence to tune on", "fold 3", "add problems")
                if is_foreseen
                else ValueError("array is too big\nsecond line")
            )
        return real(*arguments)

    with monkeypatch.context() as poisoned, caplog.at_level(logging.ERROR, "taprobe_core"):
        poisoned.setattr(deferral, "plan_deferrals", plan_deferrals)
        run = Run(plan, "deferral_plans")

    assert set(run.made) == set(cells) - {POISONED}
    assert run.n_computed == 7
    (told,) = run.told
    assert (told.stage, told.cell) == ("deferral_plans", POISONED)
    kind, what = (
        (DataError, "no sentence to tune on in fold 3")
        if is_foreseen
        else (UnexpectedError, f"ValueError: array is too big in {'/'.join(POISONED)}")
    )
    assert type(run.error) is kind
    assert f"deferral_plans {'/'.join(POISONED)} failed: {what}" in str(run.error)
    assert run.error is not None
    assert run.error.fix
    # A defect is told with its traceback, in the log and in the record; a known fault without.
    has_trace = any(record.exc_info for record in caplog.records)
    assert has_trace is not is_foreseen
    (record,) = records(plan)
    assert ("in plan_deferrals" in record["faults"][0]["trace"]) is not is_foreseen

    # What reads it waits and says for what; what does not goes on.
    below = Run(again(plan), "evaluation")
    assert set(below.made) == {
        cell for cell in cells_of(plan.study, "evaluation") if cell != ("tiny@L01", CORRECT)
    }
    assert below.told == []
    assert f"evaluation of tiny@L01/{CORRECT} cannot be made" in str(below.error)
    assert what in str(below.error)
    board = Run(again(plan), "leaderboard")
    assert (board.made, type(board.error)) == ({}, kind)
    assert [each.cell for each in kept_failures(again(plan))] == [POISONED]

    before = written(plan, "deferral_plans")
    mended = Run(again(plan), "deferral_plans")
    assert mended.error is None
    assert mended.n_computed == 1
    assert before.items() < written(plan, "deferral_plans").items()
    assert records(plan) == kept_failures(again(plan)) == []
    for stage in ("evaluation", "leaderboard", "study_report"):
        assert Run(again(plan), stage).error is None


def poison_recipes(*names: str) -> Solver:
    """A solver whose batches fail where one of some recipes is in them."""
    linear = probe_fit.SOLVERS["linear"]

    def solve(design: Any, fits: Sequence[Fit], *rest: Any) -> Any:
        found = [fit.recipe.name for fit in fits if fit.recipe.name in names]
        if found and design.data.activations:
            raise NumericsError("1 column did not converge", f"column of {found[0]}", "lower C")
        return linear.solve(design, fits, *rest)

    return replace(linear, solve=solve)


def test_one_poisoned_recipe_leaves_the_others_of_its_solve_and_the_next_run_fits_it(
    own: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {
        str(key): own.store.open(key).read_table("scores.parquet") for key in own.store.keys("fits")
    }
    plan = without(own, "fits", "probe_fits", "deferral_plans")
    cell = ("tiny@L01", f"{CORRECT}@s00")
    with monkeypatch.context() as poisoned, caplog.at_level(logging.WARNING, "taprobe_core"):
        poisoned.setitem(probe_fit.SOLVERS, "linear", poison_recipes("linear_probe"))
        run = Run(plan, "probe_fits", [cell])

    assert (run.made, type(run.error)) == ({}, NumericsError)
    (told,) = run.told
    assert [fault.part for fault in told.faults] == ["recipe linear_probe"]
    assert "recipe linear_probe: 1 column did not converge in column of linear_probe" in str(
        run.error
    )
    assert "lower C" in str(run.error)
    assert "solved in halves" in caplog.text
    # Its control was in the same solve, and the baselines in the same cell.
    fitted = sorted(key.partition[2] for key in plan.store.keys("fits"))
    assert fitted == ["linear_probe_control", "position_baseline", "text_only_baseline"]
    assert list(plan.store.keys("probe_fits")) == []
    assert failure_at(again(plan), "probe_fits", cell) == told or records(plan)

    before = written(plan, "fits")
    mended = Run(again(plan), "probe_fits", [cell])
    assert (mended.error, mended.made) == (None, {cell: False})
    after = written(plan, "fits")
    (new,) = after.keys() - before.keys()
    assert "/linear_probe/" in f"{new}/"
    assert before.items() < after.items()
    assert records(plan) == []
    # What was solved without it, and then alone, is what is solved together, within the tolerance.
    for key in plan.store.keys("fits"):
        found = plan.store.open(key).read_table("scores.parquet")
        assert_frame_equal(found, expected[str(key)], rel_tol=0, abs_tol=1e-5)


def test_a_model_that_does_not_converge_is_named_and_its_scores_count(
    own: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linear = probe_fit.SOLVERS["linear"]

    def solve(design: Any, fits: Sequence[Fit], *rest: Any) -> Any:
        found = linear.solve(design, fits, *rest)
        bound = np.full(len(found.n_iter), np.nan)
        for index, fit in enumerate(fits):
            if fit.recipe.name == "linear_probe":
                bound[index * len(design.folds)] = np.inf
        return replace(found, not_converged=bound)

    plan = without(own, "fits", "probe_fits")
    cell = ("tiny@L01", f"{CORRECT}@s00")
    monkeypatch.setitem(probe_fit.SOLVERS, "linear", replace(linear, solve=solve))
    with caplog.at_level(logging.WARNING, "taprobe_core"):
        run = Run(plan, "probe_fits", [cell])
    assert (run.error, run.made) == (None, {cell: False})
    assert "recipe linear_probe, lopo fold 0: not converged" in caplog.text
    shown = plan.stages["probe_fits"].describe(plan, cell)
    assert shown.metrics["n_not_converged"] == 1
    assert shown.tables["not_converged"].rows() == [("linear_probe", "lopo fold 0", 1e308)]
    faults = study_report._checks(plan).faults.filter(check="convergence")
    assert faults.select("state", "asset", "cell").rows() == [
        ("warning", "probe_fits", "/".join(cell))
    ]
    assert "linear_probe, lopo fold 0: relative error up to" in faults["what"][0]


def test_a_recipe_that_fails_everywhere_fails_every_cell_and_nothing_else(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = without(own, "fits", "probe_fits", "deferral_plans", "evaluation")
    with monkeypatch.context() as poisoned:
        poisoned.setitem(
            probe_fit.SOLVERS, "linear", poison_recipes("linear_probe", "linear_probe_control")
        )
        run = Run(plan, "probe_fits")
    assert {each.cell for each in run.told} == set(cells_of(plan.study, "probe_fits"))
    names = {key.partition[2] for key in plan.store.keys("fits")}
    assert names == {"position_baseline", "text_only_baseline"}
    assert "8 cells failed" in str(run.error)
    mended = Run(again(plan), "probe_fits")
    assert (mended.error, len(mended.made)) == (None, 8)


def poison_text(monkeypatch: pytest.MonkeyPatch, problem_id: int, layer: int) -> pytest.MonkeyPatch:
    """Let one text's states at one layer be no numbers."""
    real = passes.check_finite

    def check(ranges: Any, rows: Any, where: str, *rest: Any) -> None:
        is_it = where.startswith(f"problem {problem_id}, layer {layer},")
        real(ranges * float("nan") if is_it else ranges, rows, where, *rest)

    monkeypatch.setattr(passes, "check_finite", check)
    return monkeypatch


def test_one_text_that_fails_at_one_layer_costs_that_layer_of_it(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = without(own, "activation_shards", "activations")
    texts = plan.read("spans", ("tiny", CORRECT), "texts")
    problem_id = texts["problem_id"][2]
    cells = [("tiny@L00", CORRECT), ("tiny@L01", CORRECT)]
    with monkeypatch.context() as poisoned:
        poison_text(poisoned, problem_id, 1)
        run = Run(plan, "activations", cells)

    assert run.made == {cells[0]: False}
    assert type(run.error) is NonFiniteError
    assert f"activations tiny@L01/{CORRECT} failed: problem {problem_id}:" in str(run.error)
    assert f"problem {problem_id}, layer 1, mean, sentence 0" in str(run.error)
    held = {
        int(key.partition[-1].removeprefix("problem_")): set(plan.store.open(key).tensors(FILE))
        for key in plan.store.keys("activation_shards")
    }
    assert held == {
        each: {"L00.mean"} if each == problem_id else {"L00.mean", "L01.mean"}
        for each in texts["problem_id"]
    }
    assert list(missing_cells(plan, "activations", cells)) == [cells[1]]

    before = written(plan, "activation_shards")
    mended = Run(again(plan), "activations", cells)
    assert (mended.error, mended.made) == (None, {cells[0]: True, cells[1]: False})
    after = written(plan, "activation_shards")
    (new,) = after.keys() - before.keys()
    assert f"tiny/{CORRECT}/problem_{problem_id}/" in new
    assert set(plan.store.open(parse_key(new)).tensors(FILE)) == {"L01.mean"}
    assert before.items() < after.items()


@pytest.mark.parametrize("n_threads", [0, 2])
def test_a_text_that_cannot_be_committed_costs_itself(
    own: Plan, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    plan = without(own, "activation_shards", "activations")
    problem_id = plan.read("spans", ("tiny", CORRECT), "texts")["problem_id"][2]
    cells = [("tiny@L00", CORRECT), ("tiny@L01", CORRECT)]
    write, each_ahead = extract.write_text, extract.each_ahead

    def refusing(folder: Path, *arguments: Any, **named: Any) -> None:
        if folder.parent.name == f"problem_{problem_id}":
            raise DataError("this one", folder.parent.name, "mend it")
        write(folder, *arguments, **named)

    with monkeypatch.context() as poisoned:
        poisoned.setattr(extract, "write_text", refusing)
        poisoned.setattr(
            extract, "each_ahead", lambda work, items, _: each_ahead(work, items, n_threads)
        )
        run = Run(plan, "activations", cells)
    assert run.made == {}
    assert [fault.part for each in run.told for fault in each.faults] == [
        f"problem {problem_id}"
    ] * 2
    assert len(list(plan.store.keys("activation_shards"))) == 5
    mended = Run(again(plan), "activations", cells)
    assert (mended.error, mended.made) == (None, dict.fromkeys(cells, False))
    assert len(list(plan.store.keys("activation_shards"))) == 6


def test_a_model_whose_texts_all_fail_is_given_up(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = without(own, "activation_shards", "activations")
    real = extract.load_base_model
    runs: list[object] = []

    def load(*arguments: Any) -> Any:
        loaded = real(*arguments)
        loaded.module.embed_tokens.weight.data *= float("nan")
        return loaded

    def check(ranges: Any, *rest: Any) -> None:
        runs.append(rest)
        real_check(ranges, *rest)

    real_check = passes.check_finite
    monkeypatch.setattr(passes, "check_finite", check)
    monkeypatch.setattr(extract, "load_base_model", load)
    monkeypatch.setattr(extract, "MAX_VAIN_TEXTS", 2)
    run = Run(plan, "activations", [("tiny@L00", CORRECT)])
    assert len(runs) == 2
    (told,) = run.told
    assert [fault.part.split()[0] for fault in told.faults] == ["problem", "problem", "the"]
    assert "the first 2 texts all failed, so 4 others were not run" in str(run.error)
    assert list(plan.store.keys("activation_shards")) == []


def test_a_check_that_crashes_is_a_fault_of_its_cell_and_no_crash(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(own.data_root / "checks")
    plan = again(own)
    (name, check), *_ = plan.stages["labels"].checks.items()

    def look(plan: Plan, cell: Cell) -> Any:
        if cell == ("tiny", CORRECT):
            raise ZeroDivisionError("division by zero")
        return check.look(plan, cell)

    monkeypatch.setitem(plan.stages["labels"].checks, name, replace(check, look=look))  # type: ignore[arg-type]
    cells = {
        cell: list(verdicts_of(plan, "labels", cell)) for cell in cells_of(plan.study, "labels")
    }
    (crashed,) = [each for each in cells["tiny", CORRECT] if each.status == "failed"]
    assert crashed.faults[0].startswith("it could not look: ZeroDivisionError: division by zero")
    assert {each.status for each in cells["tiny", INCORRECT]} == {"passed"}


def test_a_model_that_cannot_be_loaded_fails_its_cells_and_no_other_models(
    small_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(small_text)
    plan = open_plan(study, tmp_path / "data")
    for stage in ("rollouts", "labels", "spans"):
        assert Run(plan, stage).error is None
    real = extract.load_base_model

    def load(files: Any, spec: Any, *rest: Any) -> Any:
        if spec.n_layers == 2:
            raise ModelError("weights are cut", "model.safetensors", "fetch them again")
        return real(files, spec, *rest)

    with monkeypatch.context() as poisoned:
        poisoned.setattr(extract, "load_base_model", load)
        run = Run(plan, "activations")
    cells = cells_of(plan.study, "activations")
    assert set(run.made) == {cell for cell in cells if cell[0].startswith("other@")}
    assert {each.cell for each in run.told} == {c for c in cells if c[0].startswith("tiny@")}
    assert "weights are cut" in str(run.error)


def cut(mirror: Any, setting: str = CORRECT) -> tuple[Path, bytes]:
    """Cut a file of one problem of one setting; returns it and what it held."""
    folder = next(mirror.folder.glob(f"tiny/*/{setting}"))
    path = sorted(folder.glob("problem_*"))[1] / "chunks_labeled.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path, whole


def choose(mirror: Any, on_bad_problem: str) -> None:
    values = yaml.safe_load(mirror.study.read_text())
    values["rollouts"]["on_bad_problem"] = on_bad_problem
    mirror.study.write_text(yaml.safe_dump(values))


def test_one_unreadable_problem_fails_its_own_cell_and_names_both_cures(mirror: Any) -> None:
    choose(mirror, "fail")
    path, whole = cut(mirror)
    plan = open_plan(mirror.study, mirror.data)
    runs = {stage: Run(again(plan), stage) for stage in ("rollouts", "labels", "spans")}
    for stage, run in runs.items():
        assert set(run.made) == {("tiny", INCORRECT)}, stage
        said = str(run.error)
        assert path.parent.name in said or path.parent.name.replace("_", " ") in said
        assert "rollouts.exclude_ids" in said
        assert "rollouts.on_bad_problem: skip" in said
    assert [len(run.told) for run in runs.values()] == [1, 0, 0]
    for stage in stages_of(plan.study)[3:]:
        run = Run(again(plan), stage)
        assert all(INCORRECT in cell[1] for cell in run.made), stage
        assert bool(run.made) is bool(cells_of(plan.study, stage)[0]), stage

    path.write_bytes(whole)
    mirror.accept()
    mended = Run(open_plan(mirror.study, mirror.data), "rollouts")
    assert mended.error is None
    assert mended.made == {("tiny", CORRECT): False, ("tiny", INCORRECT): True}


def test_a_skipped_problem_fails_nothing(mirror: Any) -> None:
    choose(mirror, "skip")
    cut(mirror)
    plan = open_plan(mirror.study, mirror.data)
    run = Run(plan, "rollouts")
    assert (run.error, len(run.made), records(plan)) == (None, 2, [])


def test_errors_of_several_kinds_are_one_that_names_every_cell(own: Plan) -> None:
    plan = without(own, "deferral_plans")
    indexes = [
        plan.store.find(key_of(plan, "probe_fits", cell))
        for cell in (POISONED, ("tiny@L00", f"{INCORRECT}@s00"))
    ]
    assert indexes[0]
    assert indexes[1]
    (indexes[0].path / "manifest.json").write_text("{")
    shutil.rmtree(indexes[1].path)
    run = Run(plan, "deferral_plans")
    assert len(run.made) == 6
    assert type(run.error) is FailedCellsError
    assert "2 cells failed" in str(run.error)
    for cell in (POISONED, ("tiny@L00", f"{INCORRECT}@s00")):
        assert f"deferral_plans {'/'.join(cell)} failed: " in str(run.error)
    # A cell whose input is not made has nothing to mend, so nothing is kept of it.
    assert [tuple(record["cell"]) for record in records(plan)] == [POISONED]
    assert records(plan)[0]["faults"][0]["error"] == CorruptArtifactError.__name__


def test_a_record_of_other_inputs_counts_no_more(own: Plan) -> None:
    plan = without(own, "deferral_plans")
    index = plan.store.find(key_of(plan, "probe_fits", POISONED))
    assert index is not None
    (index.path / "manifest.json").write_text("{")
    assert len(Run(plan, "deferral_plans").told) == 1
    budgets = plan.study.deferral.model_copy(update={"budgets": (0.3,)})
    other = open_plan(plan.study.model_copy(update={"deferral": budgets}), plan.data_root)
    assert kept_failures(other) == []
    assert len(kept_failures(again(plan))) == 1
    # A record that is damaged is as none: the cell is tried again.
    (path,) = (plan.data_root / "failures").rglob("*.json")
    path.write_text("{")
    assert kept_failures(again(plan)) == []


def test_a_full_disk_ends_the_stage_at_once(own: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = without(own, "deferral_plans")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    tried: list[object] = []
    real = deferral.plan_deferrals
    monkeypatch.setattr(
        deferral, "plan_deferrals", lambda *args: (tried.append(args), real(*args))[1]
    )

    def full(*_: object) -> None:
        tried.append(1)
        raise DiskFullError("5 bytes needed", str(plan.data_root), "make room")

    monkeypatch.setattr(deferral, "plan_deferrals", full)
    run = Run(plan, "deferral_plans")
    assert type(run.error) is DiskFullError
    assert (len(tried), run.told, records(plan)) == (1, [], [])


@pytest.mark.parametrize("kind", [OSError, MemoryError, KeyboardInterrupt])
def test_what_is_of_the_machine_is_nobodys_own(kind: type[BaseException]) -> None:
    def work() -> None:
        raise kind("all of it")

    with pytest.raises(kind):
        attempted(work, "a cell")
