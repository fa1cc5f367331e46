"""The JSON schema that editors read, and the studies that ship with the project."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from taprobe_core.errors import ConfigError
from taprobe_core.keys import Site
from taprobe_core.study import ESTIMATORS, Study, load_study, shipped_studies
from taprobe_core.study.parts import FOLDER_NAME
from taprobe_core.study.schema import REGENERATE, schema_text, study_schema

STUDIES = Path(__file__).resolve().parents[3] / "studies"
NAMES = ("demo", "demo_sweep", "full", "local_rollouts", "pilot", "scaling_matrix", "sweep")
ENVIRON = {"TAPROBE_ROLLOUTS": "/data/rollouts"}


def study_named(name: str) -> Study:
    return load_study(STUDIES / f"{name}.yaml", environ=ENVIRON)


def test_the_stored_schema_is_current() -> None:
    stored = (STUDIES / "schema.json").read_text(encoding="utf-8")

    assert stored == schema_text(), f"the models changed; run `{REGENERATE}`"


def test_the_command_prints_the_schema() -> None:
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-m", "taprobe_core.study.schema"],
        capture_output=True,
        check=True,
        text=True,
    )

    assert json.loads(printed.stdout) == study_schema()
    assert REGENERATE.startswith("python -m taprobe_core.study.schema")


def test_the_schema_refuses_unknown_keys_everywhere() -> None:
    parts: list[dict[str, Any]] = [study_schema(), *study_schema()["$defs"].values()]

    assert all(part["additionalProperties"] is False for part in parts if "properties" in part)
    assert {"rollouts", "models", "settings"} <= set(study_schema()["properties"])


def test_the_shipped_studies_are_these() -> None:
    assert tuple(shipped_studies()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_study_is_sound_and_says_what_it_is_for(name: str) -> None:
    study = study_named(name)
    lines = (STUDIES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()

    assert study.name == name
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert lines[2].startswith("# ")
    assert study.description
    assert all(re.fullmatch(FOLDER_NAME, model.rollouts_dir) for model in study.models.values())


def test_the_demo_needs_nothing_from_outside() -> None:
    study = load_study(environ={})

    assert study.rollouts.source.kind == "demo"
    assert {model.checkpoint.kind for model in study.models.values()} == {"demo"}
    assert len(study.sites) == 8
    assert study.settings == ("correct_base_solution", "incorrect_base_solution")
    assert study.seeds == (0, 1, 2, 3, 4)
    assert {recipe.estimator for recipe in study.recipes} == set(ESTIMATORS)


def test_the_scaling_matrix_reads_quartiles_of_two_depths() -> None:
    assert [(site.model[-3:], site.layer) for site in study_named("scaling_matrix").sites] == [
        ("-8b", 8),
        ("-8b", 16),
        ("-8b", 24),
        ("14b", 12),
        ("14b", 24),
        ("14b", 36),
    ]


def test_pilot_samples_five_of_what_full_takes_whole() -> None:
    pilot, full = study_named("pilot"), study_named("full")

    assert (pilot.rollouts.max_problems, pilot.rollouts.sample_seed) == (5, 0)
    assert full.rollouts.max_problems is None
    assert pilot.sites == full.sites == (Site("deepseek-r1-distill-llama-8b", 16),)


def test_local_rollouts_needs_its_folder_named() -> None:
    tokenizers = {model.tokenizer for model in study_named("local_rollouts").models.values()}

    assert tokenizers == {
        "/data/rollouts/../tokenizers/deepseek-r1-distill-llama-8b",
        "/data/rollouts/../tokenizers/deepseek-r1-distill-qwen-14b",
    }
    with pytest.raises(
        ConfigError, match=r"TAPROBE_ROLLOUTS is not set[\s\S]*Fix: export TAPROBE_R"
    ):
        load_study(STUDIES / "local_rollouts.yaml", environ={})


def test_the_schema_knows_every_key_that_the_shipped_studies_use() -> None:
    properties = study_schema()["properties"]

    for name in NAMES:
        content = yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
        assert set(content) <= set(properties)
