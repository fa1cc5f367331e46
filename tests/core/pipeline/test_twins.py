"""A setting that repeats the rows of another takes over its fits; with one other label not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline import Plan, cells_of, fit, open_plan, read_scores, run_stage

PLAIN, FORCED = "correct_base_solution", "correct_base_solution_forced_answer"
RECIPES = [
    {"name": "position_baseline", "features": ["position"]},
    {"name": "text_only_baseline", "features": ["text"]},
    {"name": "linear_probe", "features": ["activations"], "residualize": "position"},
    {"name": "mlp", "features": ["activations"], "estimator": "mlp", "hidden": [4], "max_iter": 3},
    {
        "name": "multimax",
        "features": ["tokens"],
        "estimator": "multimax",
        "token_probe": {"width": 4, "max_epochs": 2},
    },
]
SITES = (Site("tiny", 0), Site("tiny", 1))


def study_on(mirror: Path, tokenizer: Path, small: str) -> dict[str, Any]:
    values = yaml.safe_load(small)
    del values["models"]["other"]
    values["rollouts"]["source"] = {"kind": "mirror", "folder": str(mirror)}
    values["models"]["tiny"]["tokenizer"] = str(tokenizer)
    values["settings"] = [PLAIN, FORCED]
    values["activations"] = {"poolings": ["mean", "tokens"]}
    values["probes"] = {"recipes": RECIPES}
    return values  # type: ignore[no-any-return]


@pytest.fixture
def mirror(built: Any, tmp_path: Path) -> Path:
    """The rollouts of the small study's first setting, twice."""
    source = open_plan(built.study, built.data).demo
    assert source is not None
    (folder,) = source.rollouts_folder.glob(f"tiny/*/{PLAIN}")
    to = tmp_path / "mirror" / "tiny" / folder.parent.name
    for setting in (PLAIN, FORCED):
        shutil.copytree(folder, to / setting)
    return tmp_path / "mirror"


@pytest.fixture
def study(mirror: Path, built: Any, small_text: str, tmp_path: Path) -> Path:
    world = open_plan(built.study, built.data).demo
    assert world is not None
    file = tmp_path / "twins.yaml"
    file.write_text(yaml.safe_dump(study_on(mirror, world.tokenizer_folder, small_text)))
    return file


def fitted(study: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, list[str]]:
    """Run the study; return which fits were solved, by setting and recipe, in order."""
    plan, solved = open_plan(study, data), []
    solve = fit.fit_each

    def counted(design: Any, fits: Any, *rest: Any, **more: Any) -> Any:
        solved.extend(each.recipe.name for each in fits)
        return solve(design, fits, *rest, **more)

    monkeypatch.setattr(fit, "fit_each", counted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for stage in ("rollouts", "labels", "spans", "activations"):
        list(run_stage(plan, stage, cells_of(plan.study, stage)))
    for setting in plan.study.settings:
        cells = [
            cell for cell in cells_of(plan.study, "probe_fits") if cell[1].startswith(f"{setting}@")
        ]
        list(run_stage(plan, "probe_fits", cells))
    return plan, solved


def provenance(plan: Plan, site: Site, setting: str, seed: int) -> list[dict[str, Any]]:
    keys = [plan.fit(site, setting, recipe, seed) for recipe in plan.study.recipes]
    return [dict(plan.store.inspect(key).manifest.provenance) for key in keys]


def test_equal_rows_under_another_setting_are_fitted_once(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, solved = fitted(study, tmp_path / "data", monkeypatch)
    # position and text once, linear at two sites, mlp and multimax at two sites and two seeds
    assert sorted(solved) == sorted(
        ["position_baseline", "text_only_baseline", *["linear_probe"] * 2]
        + ["mlp"] * 4
        + ["multimax"] * 4
    )
    for site in SITES:
        for seed in (0, 1):
            own = read_scores(plan, site, Trial(PLAIN, seed))
            assert read_scores(plan, site, Trial(FORCED, seed)).equals(own)
            plain, forced = (provenance(plan, site, each, seed) for each in (PLAIN, FORCED))
            assert not any("twin" in each for each in plain)
            for mine, theirs in zip(plain, forced, strict=True):
                assert theirs["content_sha256"] == mine["content_sha256"]
                assert PLAIN in theirs["twin"]
                assert theirs["setting"] == FORCED
    names = [each["content_sha256"] for each in provenance(plan, SITES[0], PLAIN, 0)]
    assert len(set(names)) == len(RECIPES)


def test_one_other_label_is_another_fit(
    study: Path, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (labelled,) = list(mirror.glob(f"tiny/*/{FORCED}/problem_*/chunks_labeled.json"))[:1]
    chunks = json.loads(labelled.read_text())
    field = "counterfactual_importance_accuracy"
    chunks[0][field] = 0.5 if chunks[0][field] < 0.25 else 0.0
    labelled.write_text(json.dumps(chunks))
    plan, solved = fitted(study, tmp_path / "data", monkeypatch)
    assert len(solved) == 2 * 12
    for mine, theirs in zip(
        *(provenance(plan, SITES[0], each, 0) for each in (PLAIN, FORCED)), strict=True
    ):
        assert theirs["content_sha256"] != mine["content_sha256"]
        assert "twin" not in theirs
