"""A model whose tokenizer names no BOS token: its texts are read as they are, and it is said so."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import yaml

from taprobe_core.cli.check import render_check
from taprobe_core.pipeline import STAGES, Plan, cells_of, open_plan, run_stage
from taprobe_core.pipeline.forecast import Assumptions, Speed, forecast, plan_summary

MADE = ("rollouts", "labels", "spans", "activations", "vertical_attention", "probe_fits")
SETTING = "correct_base_solution"


@pytest.fixture(scope="module")
def plans(
    built: Any, small_text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Plan]:
    """The study on the demo's tokenizer, and on the same one without a BOS token, which has run."""
    folder = tmp_path_factory.mktemp("no_bos")
    world = open_plan(built.study, built.data).demo
    assert world is not None
    shutil.copytree(world.tokenizer_folder, folder / "tokenizer")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))

    values = yaml.safe_load(small_text)
    del values["models"]["other"]
    values["rollouts"]["source"] = {"kind": "mirror", "folder": str(world.rollouts_folder)}
    values |= {"settings": [SETTING], "seeds": [0], "attention": {"mode": "full"}}
    values["activations"] = {"poolings": ["mean", "boundary"]}
    values["probes"]["recipes"].append(
        {"name": "before", "features": ["activations"], "pooling": "boundary"}
    )
    opened = []
    for tokenizer in (world.tokenizer_folder, folder / "tokenizer"):
        values["models"]["tiny"]["tokenizer"] = str(tokenizer)
        study = folder / f"study{len(opened)}.yaml"
        study.write_text(yaml.safe_dump(values))
        opened.append(open_plan(study, folder / "data"))
    for stage in MADE:
        list(run_stage(opened[1], stage, cells_of(opened[1].study, stage)))
    return opened[0], opened[1]


def test_no_token_stands_before_the_text(plans: tuple[Plan, Plan]) -> None:
    spans = plans[1].open("spans", ("tiny", SETTING))
    texts = spans.read_table("texts.parquet")

    assert texts["bos_token_id"].is_null().all()
    assert spans.manifest.provenance["bos"] == "none"


def test_every_stage_and_its_checks_hold(plans: tuple[Plan, Plan]) -> None:
    plan = plans[1]
    for stage in ("spans", "activations", "vertical_attention", "probe_fits"):
        for name, check in STAGES[stage].checks.items():
            for cell in cells_of(plan.study, stage):
                assert check(plan, cell) == [], (stage, name)


def test_another_name_for_other_texts(plans: tuple[Plan, Plan]) -> None:
    with_bos, without = plans

    assert "bos" not in with_bos.checkpoint("tiny")
    assert without.checkpoint("tiny")["bos"] == "none"
    assert with_bos.key("rollouts", ("tiny", SETTING)) == without.key("rollouts", ("tiny", SETTING))
    assert with_bos.key("spans", ("tiny", SETTING)) != without.key("spans", ("tiny", SETTING))


def test_check_says_it(plans: tuple[Plan, Plan]) -> None:
    said = []
    for plan in plans:
        models = plan_summary(plan)["models"]
        rows = forecast(plan, Assumptions())
        parts = [str(part) for part in render_check(models, rows, Speed("cpu"), Assumptions())]
        said.append((models[0]["bos"], any(part.endswith(", no BOS") for part in parts)))

    assert said == [("<|begin_of_text|>", False), ("none", True)]
