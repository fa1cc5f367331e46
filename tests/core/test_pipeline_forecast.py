from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from taprobe_core.pipeline import STAGES, Plan, cells_of, open_plan
from taprobe_core.pipeline.forecast import Assumptions, forecast, plan_summary
from taprobe_core.store import Store
from taprobe_core.study import Study, parse_study

HUB = f"""
name: large
rollouts:
  source: {{kind: hub, repo: org/rollouts, revision: {"a" * 40}}}
  problem_ids: [1, 2, 3, 4]
models:
  stated:
    rollouts_dir: a
    checkpoint: {{kind: pretrained, path: org/a, revision: {"b" * 40}}}
    n_layers: 32
    d_model: 4096
    layers: [15]
  unstated: {{rollouts_dir: b, checkpoint: {{kind: pretrained, path: org/b}}, n_layers: 48}}
settings: [one]
"""


@pytest.fixture(scope="module")
def plan(built: Any) -> Plan:
    return open_plan(built.study, built.data)


def changed(study: Study, **rollouts: Any) -> Study:
    values = study.model_dump(mode="json")
    values["rollouts"] |= rollouts
    return parse_study(yaml.safe_dump(values), "changed.yaml")


def test_what_has_run_is_measured(plan: Plan) -> None:
    rows = forecast(plan, Assumptions())
    assert rows["basis"].to_list() == ["measured", "measured"]
    row = rows.row(0, named=True)
    spans = plan.store.open(plan.spans("tiny", row["setting"]))
    n_sentences = spans.read_table("spans.parquet").height
    n_tokens = spans.read_table("texts.parquet")["n_tokens"].sum()
    assert (row["n_problems"], row["n_sentences"], row["n_tokens"]) == (6, n_sentences, n_tokens)
    # Two layers of width 16 in float16.
    assert row["pooled_mib"] == pytest.approx(n_sentences * 2 * 16 * 2 / 2**20)
    assert row["ragged_mib"] == pytest.approx(n_tokens * 2 * 16 * 2 / 2**20)


def test_what_is_stored_is_about_what_was_forecast(plan: Plan) -> None:
    pooled = forecast(plan, Assumptions())["pooled_mib"].sum() * 2**20
    tensors = sum(
        artifact.manifest.files["activations.safetensors"].size_bytes
        for key in plan.store.keys("activation_shards")
        if (artifact := plan.store.find(key)) is not None
    )
    n_shards = len(list(plan.store.keys("activation_shards")))
    assert pooled < tensors < pooled + 300 * n_shards


def test_what_has_not_run_is_assumed_and_says_so(plan: Plan, tmp_path: Path) -> None:
    fresh = Plan(plan.study, Store(tmp_path), plan.data_root)
    row = forecast(fresh, Assumptions(100, 10)).row(0, named=True)
    assert row["basis"] == "assumed"
    assert (row["n_problems"], row["n_sentences"], row["n_tokens"]) == (6, 600, 6000)
    two = Plan(changed(plan.study, max_problems=2), Store(tmp_path), plan.data_root)
    assert forecast(two, Assumptions())["n_problems"].to_list() == [2, 2]


def test_sizes_of_published_models_without_any_file_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    plan = open_plan(parse_study(HUB, "hub.yaml"), tmp_path)
    stated, unstated = forecast(plan, Assumptions()).iter_rows(named=True)
    assert stated["n_sentences"] == 4 * 150
    assert stated["n_tokens"] == 4 * 150 * 22
    # Sixteen blocks of 8B weights at 24 d^2 operations a token: about 0.4 T d^2 a text.
    blocks = 16 * 24 * 4096**2 * stated["n_tokens"] / 1e12
    assert blocks < stated["tera_flop"] < 1.2 * blocks
    assert stated["pooled_mib"] == pytest.approx(600 * 4096 * 2 / 2**20)
    assert [unstated[name] for name in ("d_model", "pooled_mib", "ragged_mib", "tera_flop")] == [
        None
    ] * 4
    assert not (tmp_path / "artifacts").exists()


def test_a_summary_of_a_finished_study(plan: Plan) -> None:
    summary = plan_summary(plan)
    assert summary["data_root"] == str(plan.data_root)
    assert [row["stage"] for row in summary["stages"]] == list(STAGES)
    for row in summary["stages"]:
        assert row["n_cells"] == row["n_present"] == len(cells_of(plan.study, row["stage"]))
        assert row["note"] is None
    (model,) = summary["models"]
    assert model["is_present"]
    assert model["checkpoint"] == "stand-in of random weights"
    assert model["note"] is None
    assert model["tokenizer"] == plan.checkpoint("tiny")["tokenizer_sha256"][:12]
    assert model["layers_read"] == 2


def test_a_summary_of_a_study_that_has_not_run(plan: Plan, tmp_path: Path) -> None:
    fresh = Plan(plan.study, Store(tmp_path), plan.data_root)
    assert {row["n_present"] for row in plan_summary(fresh)["stages"]} == {0}


def test_a_summary_says_what_is_not_on_this_machine(plan: Plan, tmp_path: Path) -> None:
    values = plan.study.model_dump(mode="json")
    values["rollouts"]["source"] = {"kind": "mirror", "folder": str(tmp_path / "gone")}
    values["models"]["tiny"]["tokenizer"] = None
    values["models"]["tiny"]["checkpoint"] = {"kind": "pretrained", "path": str(tmp_path / "no")}
    absent = Plan(parse_study(yaml.safe_dump(values), "absent.yaml"), plan.store, tmp_path)
    summary = plan_summary(absent)
    assert {row["n_present"] for row in summary["stages"]} == {None}
    assert all(row["note"].startswith("no such folder") for row in summary["stages"])
    (model,) = summary["models"]
    assert not model["is_present"]
    assert "no such folder" in model["note"]
    assert forecast(absent, Assumptions())["basis"].to_list() == ["assumed", "assumed"]
