from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from taprobe_core.errors import ConfigError, DataError, SourceUnavailableError
from taprobe_core.keys import Site
from taprobe_core.pipeline import (
    STAGES,
    CellFilter,
    Plan,
    cells_of,
    data_root,
    dimension_keys,
    key_of,
    open_plan,
    run_stage,
    stages_of,
)
from taprobe_core.pipeline.input_faults import input_faults
from taprobe_core.store import ArtifactKey, Store
from taprobe_core.study import ProbeRecipe, Study, parse_study

FROM_LABELS = {"labels", "probe_fits", "deferral_plans", "evaluation", "leaderboard", "report"}
FROM_FITS = FROM_LABELS - {"labels"}
FROM_PLANS = FROM_FITS - {"probe_fits"}
FROM_EVALUATION = FROM_PLANS - {"deferral_plans"}
FROM_SPANS = FROM_FITS | {"spans", "activations"}
FROM_ACTIVATIONS = FROM_FITS | {"activations"}

CHANGES: dict[str, tuple[tuple[str | int, ...], Any, set[str]]] = {
    "percentile": (("labels", "percentile"), 80, FROM_LABELS),
    "text view": (("spans", "text_view"), "flattened", FROM_SPANS),
    "storage": (("activations", "storage"), "float32", FROM_ACTIVATIONS),
    "dtype": (("models", "tiny", "dtype"), "bfloat16", FROM_ACTIVATIONS),
    "weights": (("models", "tiny", "checkpoint", "seed"), 1, FROM_ACTIVATIONS),
    "device": (("activations", "device"), "cpu", set()),
    "token budget": (("activations", "token_budget"), 4096, set()),
    "poolings": (("activations", "poolings"), ["mean", "last"], FROM_ACTIVATIONS),
    "regularization": (("probes", "recipes", 2, "regularization"), 2, FROM_FITS),
    "target": (("probes", "target"), "importance_abs", FROM_FITS),
    "split": (("splits", "val_fraction"), 0.2, FROM_FITS),
    "budgets": (("deferral", "budgets"), [0.1], FROM_PLANS),
    "seed of controls": (("evaluation", "selectivity"), {"seed": 1}, FROM_FITS),
    "no control": (("evaluation", "selectivity"), {"recipes": []}, FROM_FITS),
    "bootstrap": (("evaluation", "n_bootstrap"), 51, FROM_EVALUATION),
    "description": (("description",), "another", {"report"}),
    "bad problems": (
        ("rollouts", "on_bad_problem"), "fail", FROM_SPANS | FROM_LABELS | {"rollouts"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def values(built: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(built.study.read_text())
    return loaded


@pytest.fixture(scope="module")
def plan(built: Any) -> Plan:
    return open_plan(built.study, built.data)


def with_value(values: dict[str, Any], path: tuple[str | int, ...], value: Any) -> Study:
    changed = yaml.safe_load(yaml.safe_dump(values))
    place = changed
    for part in path[:-1]:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[path[-1]] = value
    return parse_study(yaml.safe_dump(changed), "changed.yaml")


def all_keys(plan: Plan) -> dict[tuple[str, ...], ArtifactKey]:
    return {
        (stage, *cell): key_of(plan, stage, cell)
        for stage in stages_of(plan.study)
        for cell in cells_of(plan.study, stage)
    }


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_study_moves_the_keys_below_it_and_no_other(
    values: dict[str, Any], plan: Plan, path: tuple[str, ...], value: Any, expected: set[str]
) -> None:
    changed = open_plan(with_value(values, path, value), plan.data_root)
    before, after = all_keys(plan), all_keys(changed)
    moved = {place for place in before if before[place] != after[place]}
    stages = {stage.replace("report", "study_report") for stage in expected}
    assert moved == {place for place in before if place[0] in stages}


def test_a_longer_list_of_layers_and_seeds_keeps_every_cell_above_the_leaderboard(
    values: dict[str, Any], plan: Plan
) -> None:
    fewer = with_value(values, ("models", "tiny", "layers"), [1])
    before = all_keys(open_plan(fewer, plan.data_root))
    after = all_keys(plan)
    assert before.items() - after.items() == {
        (place, key) for place, key in before.items() if not STAGES[place[0]].grid
    }
    fewer = with_value(values, ("seeds",), [1])
    kept = {
        place[0] for place, _ in all_keys(open_plan(fewer, plan.data_root)).items() & after.items()
    }
    assert kept == {"rollouts", "labels", "spans", "activations", "probe_fits", "deferral_plans"}


def mirror_study(plan: Plan, folder: Path) -> Study:
    assert plan.demo is not None
    changed = plan.study.model_dump(mode="json")
    changed["rollouts"]["source"] = {"kind": "mirror", "folder": str(folder)}
    changed["models"]["tiny"]["tokenizer"] = str(plan.demo.tokenizer_folder)
    return parse_study(yaml.safe_dump(changed), "mirror.yaml")


def test_a_moved_mirror_keeps_every_key_and_an_edited_file_moves_its_own_cell_only(
    plan: Plan, tmp_path: Path
) -> None:
    assert plan.demo is not None
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(plan.demo.rollouts_folder, first)
    store = Store(tmp_path / "store")
    before = all_keys(Plan(mirror_study(plan, first), store, tmp_path, STAGES))
    first.rename(second)
    moved = mirror_study(plan, second)
    report = ("study_report",)
    after = all_keys(Plan(moved, store, tmp_path, STAGES))
    assert {place for place in before if before[place] != after[place]} == {report}
    # The very same rollouts as the demo's, but only the demo says so of itself.
    assert after["labels", "tiny", "correct_base_solution"] == plan.key(
        "labels", ("tiny", "correct_base_solution")
    )

    edited = next(second.glob("tiny/*/correct_base_solution/problem_*/problem.json"))
    edited.write_text(edited.read_text().replace('"problem"', ' "problem"'))
    with pytest.raises(DataError, match=f"1 file .*{edited.relative_to(second)}"):
        all_keys(Plan(moved, store, tmp_path, STAGES))
    accepting = Plan(moved, store, tmp_path, STAGES)
    accepting.pins.is_accepting = True
    assert input_faults(accepting) == []
    again = all_keys(Plan(moved, store, tmp_path, STAGES))
    changed = {place for place in after if after[place] != again[place]}
    assert changed == {
        place for place in after if len(place) == 1 or place[2].startswith("correct_base_solution")
    }


def test_a_fit_is_shared_by_all_that_it_does_not_depend_on(plan: Plan) -> None:
    setting = "correct_base_solution"
    first, second = Site("tiny", 0), Site("tiny", 1)
    position, text, linear = plan.study.probes.recipes
    network = ProbeRecipe(name="network", features=("activations",), estimator="mlp")
    for baseline in (position, text):
        keys = {
            plan.fit(site, setting, baseline, seed) for site in (first, second) for seed in (0, 1)
        }
        assert len(keys) == 1
    assert plan.fit(first, setting, linear, 0) == plan.fit(first, setting, linear, 1)
    assert plan.fit(first, setting, linear, 0) != plan.fit(second, setting, linear, 0)
    assert plan.fit(first, setting, network, 0) != plan.fit(first, setting, network, 1)
    # Two settings, each with two baselines, and one linear probe and its control at two sites.
    assert len(list(plan.store.keys("fits"))) == 2 * (2 + 2 * 2)


def test_an_unknown_model_is_named_with_the_known_ones(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"no model 'timy' in study small\nFix: .*tiny"):
        plan.key("rollouts", ("timy", "correct_base_solution"))


def test_what_cannot_be_reached_is_asked_for_once(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def unreachable(*arguments: object) -> str:
        asked.append(arguments)
        raise SourceUnavailableError("no network")

    monkeypatch.setattr("taprobe_core.pipeline.sources.content_digest", unreachable)
    fresh = Plan(plan.study, plan.store, plan.data_root, STAGES)
    for stage in stages_of(fresh.study):
        with pytest.raises(SourceUnavailableError, match="no network"):
            key_of(fresh, stage, cells_of(fresh.study, stage)[0])
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (CellFilter(), {"spans": 2, "activations": 4, "probe_fits": 8, "leaderboard": 1}),
        (
            CellFilter(sites=frozenset({"tiny@L01"})),
            {"spans": 2, "activations": 2, "probe_fits": 4, "leaderboard": 1},
        ),
        (
            CellFilter(trials=frozenset({"correct_base_solution@s01"})),
            {"spans": 1, "activations": 2, "probe_fits": 2, "leaderboard": 1},
        ),
        (
            CellFilter(frozenset({"other@L00"}), frozenset({"correct_base_solution@s01"})),
            {"spans": 0, "activations": 0, "probe_fits": 0, "leaderboard": 1},
        ),
    ],
)
def test_a_filter_takes_whole_models_and_settings_from_sites_and_trials(
    plan: Plan, chosen: CellFilter, expected: dict[str, int]
) -> None:
    assert {stage: len(cells_of(plan.study, stage, chosen)) for stage in expected} == expected


def test_cells_come_in_the_order_of_the_study(plan: Plan) -> None:
    assert dimension_keys(plan.study, "site") == ("tiny@L00", "tiny@L01")
    assert cells_of(plan.study, "activations") == [
        (site, setting)
        for site in ("tiny@L00", "tiny@L01")
        for setting in ("correct_base_solution", "incorrect_base_solution")
    ]


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        ("given", "named", lambda cwd: cwd / "given"),
        (None, "named", lambda cwd: cwd / "named"),
        (None, "", lambda cwd: cwd / ".taprobe"),
        (None, "~/there", lambda cwd: cwd / "home" / "there"),
    ],
)
def test_the_data_folder(
    argument: str | None,
    variable: str,
    expected: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAPROBE_DATA", variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_root(argument) == expected(tmp_path)


def test_a_manifest_names_code_version_and_the_slice_of_the_study(plan: Plan) -> None:
    site, setting = plan.study.sites[0], plan.study.settings[0]
    (done,) = run_stage(plan, "rollouts", [(site.model, setting)])
    (labelled,) = run_stage(plan, "labels", [(site.model, setting)])
    for _, outcome in (done, labelled):
        manifest = outcome.artifact.manifest
        assert manifest.code_version == STAGES.code_version(outcome.key.stage)
    assert labelled[1].artifact.manifest.config == plan.study.labels.model_dump(mode="json")
