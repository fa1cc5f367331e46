"""What follows from a study's values: layers, sites, trials, and which recipes depend on what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from taprobe_core.study import (
    ANY_ANCHOR_PROBE,
    DEFAULT_RECIPES,
    Activations,
    ControlRecipe,
    Model,
    PretrainedCheckpoint,
    ProbeRecipe,
    Study,
    load_study,
    parse_study,
    resolve_folder,
)


def model(n_layers: int, layers: Any) -> Model:
    checkpoint = PretrainedCheckpoint(kind="pretrained", path="org/name")
    return Model(rollouts_dir="a", checkpoint=checkpoint, n_layers=n_layers, layers=layers)


@pytest.mark.parametrize(
    ("n_layers", "layers", "indices"),
    [
        (3, "all", (0, 1, 2)),
        (32, "mid", (16,)),
        (48, "mid", (24,)),
        (32, "quartiles", (8, 16, 24)),
        (48, "quartiles", (12, 24, 36)),
        (1, "quartiles", (0,)),
        (4, (3, 0), (0, 3)),
    ],
)
def test_layers_are_block_indices(n_layers: int, layers: Any, indices: tuple[int, ...]) -> None:
    assert model(n_layers, layers).layer_indices == indices


@given(st.integers(1, 200), st.sampled_from(["all", "mid", "quartiles"]))
def test_named_layers_exist_and_ascend(n_layers: int, layers: str) -> None:
    indices = model(n_layers, layers).layer_indices

    assert list(indices) == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < n_layers


def test_trials_of_a_setting_and_sites_of_a_model_stand_together() -> None:
    study = load_study("scaling_matrix", environ={})

    assert [trial.setting for trial in study.trials] == (
        ["correct_base_solution"] * 5 + ["incorrect_base_solution"] * 5
    )
    assert len({site.model for site in study.sites[:3]}) == 1


def test_the_default_recipes_say_what_they_depend_on() -> None:
    assert {
        recipe.name: (recipe.reads_activations, recipe.is_stochastic) for recipe in DEFAULT_RECIPES
    } == {
        "position_baseline": (False, False),
        "text_only_baseline": (False, False),
        "linear_probe": (True, False),
        "mlp_probe": (True, True),
        "activations_plus_position": (True, False),
    }


def demo_with_controls(*recipes: str, seed: int = 0) -> Study:
    values = load_study("demo", environ={}).model_dump(mode="json")
    values["evaluation"]["selectivity"] = {"recipes": recipes, "seed": seed}
    return parse_study(json.dumps(values), "s.yaml")


def test_linear_probes_of_anchors_have_a_control_unless_others_are_named() -> None:
    study = load_study("demo", environ={})
    assert list(study.controls) == [
        "linear_probe",
        "activations_plus_position",
        "vertical_attention_baseline",
        "vertical_attention_plus_position",
    ]
    assert study.fitted == (*study.recipes, *study.controls.values())
    assert demo_with_controls().controls == {}
    assert list(demo_with_controls("mlp_probe", "text_only_baseline").controls) == [
        "text_only_baseline",
        "mlp_probe",
    ]
    every = demo_with_controls(ANY_ANCHOR_PROBE)
    assert {recipe.name for recipe in every.recipes} - set(every.controls) == {
        "residual_linear_probe"
    }


def test_a_control_is_its_recipe_with_other_labels() -> None:
    study = demo_with_controls("linear_probe", seed=3)
    recipe = next(each for each in study.recipes if each.name == "linear_probe")
    control = study.controls["linear_probe"]
    assert control.content() == {**recipe.content(), "control_seed": 3}
    same = set(ProbeRecipe.model_fields) - {"name"}
    assert control.model_dump(include=same) == recipe.model_dump(include=same)
    assert isinstance(control, ControlRecipe)
    assert "control_seed" not in ProbeRecipe.model_fields


def test_a_control_of_the_longest_name_can_be_named() -> None:
    values = load_study("demo", environ={}).model_dump(mode="json")
    values["probes"]["recipes"][2]["name"] = name = "a" * 64
    assert len(parse_study(json.dumps(values), "s.yaml").controls[name].name) == 64


def test_the_order_of_poolings_is_not_the_authors() -> None:
    written: Any = ("tokens", "boundary", "mean")
    assert Activations(poolings=written).poolings == ("mean", "boundary", "tokens")
    assert Activations().poolings == ("mean",)


def test_a_study_whose_recipes_read_no_activations_may_keep_any_pooling() -> None:
    values = load_study("demo", environ={}).model_dump(mode="json")
    values["activations"]["poolings"] = ["last"]
    values["probes"]["recipes"] = values["probes"]["recipes"][:2]

    assert parse_study(json.dumps(values), "s.yaml").activations.poolings == ("last",)


def test_a_study_cannot_be_changed() -> None:
    study = load_study("demo", environ={})

    with pytest.raises(ValidationError, match="frozen"):
        study.seeds = (1,)  # type: ignore[misc]


def test_folders_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    assert resolve_folder("data/x") == tmp_path / "data" / "x"
    assert resolve_folder("~/x") == tmp_path / "home" / "x"
