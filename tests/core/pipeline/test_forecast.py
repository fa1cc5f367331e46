from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from taprobe_core.activations.cost import EFFICIENCY, pass_flop
from taprobe_core.activations.gemm_rate import BlockShape
from taprobe_core.pipeline import STAGES, Plan, cells_of, open_plan, stages_of
from taprobe_core.pipeline.forecast import (
    Assumptions,
    ModelShape,
    Speed,
    forecast,
    measure_speed,
    model_shapes,
    plan_summary,
)
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
def plan(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """On a copy: other models of the study have a world of their own, which a plan writes."""
    data = shutil.copytree(built.data, tmp_path_factory.mktemp("forecast") / "data")
    return open_plan(built.study, Path(data))


def changed(study: Study, **rollouts: Any) -> Study:
    values = study.model_dump(mode="json")
    values["rollouts"] |= rollouts
    return parse_study(yaml.safe_dump(values), "changed.yaml")


def with_parts(plan: Plan, folder: Path | None = None, **parts: Any) -> Plan:
    """The plan of the same study with other parts, on the same store or on an empty one."""
    study = parse_study(yaml.safe_dump(plan.study.model_dump(mode="json") | parts), "changed.yaml")
    return Plan(study, Store(folder) if folder else plan.store, plan.data_root, STAGES)


def test_what_has_run_is_measured(plan: Plan) -> None:
    rows = forecast(plan, Assumptions())
    assert rows["basis"].to_list() == ["measured", "measured"]
    row = rows.row(0, named=True)
    spans = plan.open("spans", ("tiny", row["setting"]))
    texts, sentences = (spans.read_table(f"{name}.parquet") for name in ("texts", "spans"))
    n_tokens = texts["n_tokens"].sum()
    assert (row["n_problems"], row["n_sentences"], row["n_tokens"]) == (
        6,
        sentences.height,
        n_tokens,
    )
    # Two layers of width 16 in float16; offsets of eight bytes, one more than sentences.
    assert row["mean_mib"] == row["kept_mib"] == sentences.height * 2 * 16 * 2 / 2**20
    of_tokens = sentences["n_tokens"].sum() * 2 * 16 * 2 + (sentences.height + 6) * 2 * 8
    assert row["tokens_mib"] == of_tokens / 2**20
    assert row["attention_mib"] == row["attention_tera_flop"] == 0
    # The stand-in's own dimensions, and each text's own length.
    shape = BlockShape(d_model=16, d_mlp=48, n_heads=4, n_kv_heads=2, d_head=4, gated=True)
    assert row["flop_basis"] == "exact"
    assert row["tera_flop"] == pass_flop(shape, texts["n_tokens"].to_list(), 2) / 1e12
    assert row["expected_compute_s"] is None


def test_what_is_stored_is_about_what_was_forecast(plan: Plan) -> None:
    kept = forecast(plan, Assumptions())["kept_mib"].sum() * 2**20
    tensors = sum(
        artifact.manifest.files["activations.safetensors"].size_bytes
        for key in plan.store.keys("activation_shards")
        if (artifact := plan.store.find(key)) is not None
    )
    n_shards = len(list(plan.store.keys("activation_shards")))
    assert kept < tensors < kept + 300 * n_shards


def test_what_has_not_run_is_assumed_and_says_so(plan: Plan, tmp_path: Path) -> None:
    fresh = with_parts(plan, tmp_path)
    row = forecast(fresh, Assumptions(100, 10)).row(0, named=True)
    assert row["basis"] == "assumed"
    assert (row["n_problems"], row["n_sentences"], row["n_tokens"]) == (6, 600, 6000)
    two = Plan(changed(plan.study, max_problems=2), Store(tmp_path), plan.data_root, STAGES)
    assert forecast(two, Assumptions())["n_problems"].to_list() == [2, 2]


def test_every_pooling_is_forecast_in_its_storage(plan: Plan, tmp_path: Path) -> None:
    poolings = ["mean", "last", "tokens"]
    parts = {"activations": {"poolings": poolings, "storage": "float32"}}
    off, full, light = (
        forecast(
            with_parts(plan, tmp_path, **parts, attention={"mode": mode, "last_n": 2}),
            Assumptions(100, 10),
        ).row(0, named=True)
        for mode in ("off", "full", "light")
    )
    assert off["last_mib"] == off["mean_mib"] == 2 * 600 * 16 * 4 / 2**20
    assert off["tokens_mib"] == 2 * (6000 * 16 * 4 + 8 * 6 * 101) / 2**20
    assert off["kept_mib"] == off["mean_mib"] + off["last_mib"] + off["tokens_mib"]
    assert "max_mib" not in off
    # Four heads; mass between sentences and from BOS, in float32, and the lengths.
    assert full["attention_mib"] == 2 * 6 * 4 * (4 * 100 * 101 + 100) / 2**20
    assert light["attention_mib"] == 2 * 6 * 4 * (4 * 2 * 101 + 100) / 2**20
    assert full["kept_mib"] == off["kept_mib"] + full["attention_mib"]
    assert full["attention_tera_flop"] > light["attention_tera_flop"] > 0
    assert full["tera_flop"] == off["tera_flop"]


def test_seconds_are_work_over_a_share_of_the_measured_rate(plan: Plan) -> None:
    speed = Speed("cpu", 2, {"tiny": 1e9})
    row = forecast(plan, Assumptions(), speed=speed).row(0, named=True)
    expected = row["tera_flop"] * 1e12 / (2 * 1e9 * EFFICIENCY["cpu"])
    assert row["expected_compute_s"] == pytest.approx(expected)
    other = forecast(plan, Assumptions(), speed=Speed("cpu", 1, {}))
    assert other["expected_compute_s"].to_list() == [None, None]


def test_a_speed_is_measured_once_for_equal_shapes(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def measured(*arguments: object) -> float:
        asked.append(arguments)
        return 5e9

    monkeypatch.setattr("taprobe_core.activations.gemm_rate.sustained_gemm_rate", measured)
    values = plan.study.model_dump(mode="json")["models"]["tiny"]
    models = dict.fromkeys(("first", "second"), values)
    models["third"] = values | {"dtype": "bfloat16"}
    here = with_parts(plan, models=models, activations={"device": "cpu"})
    shape = BlockShape.assumed(8)
    speed = measure_speed(here, dict.fromkeys(models, shape))
    assert (speed.device, speed.n_devices, speed.note) == ("cpu", 1, None)
    assert speed.gemm_rates == dict.fromkeys(models, 5e9)
    cpu = torch.device("cpu")
    assert asked == [(cpu, torch.float32, shape), (cpu, torch.bfloat16, shape)]
    assert not measure_speed(here, {"first": shape}, is_measured=False).gemm_rates
    assert len(asked) == 2


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_here_is_said_and_nothing_measured(plan: Plan) -> None:
    elsewhere = with_parts(plan, activations={"device": "mps"})
    speed = measure_speed(elsewhere, {"tiny": BlockShape.assumed(8)})
    assert (speed.device, speed.gemm_rates) == ("mps", {})
    assert "this machine lacks" in str(speed.note)


def test_sizes_of_published_models_without_any_file_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    plan = open_plan(parse_study(HUB, "hub.yaml"), tmp_path)
    stated, unstated = forecast(plan, Assumptions()).iter_rows(named=True)
    assert stated["n_sentences"] == 4 * 150
    assert stated["n_tokens"] == 4 * 150 * 22
    assert stated["flop_basis"] == "12 d_model^2"
    # Sixteen blocks of 8B weights at 24 d^2 operations a token: about 0.4 T d^2 a text.
    blocks = 16 * 24 * 4096**2 * stated["n_tokens"] / 1e12
    assert blocks < stated["tera_flop"] < 1.2 * blocks
    assert stated["mean_mib"] == pytest.approx(600 * 4096 * 2 / 2**20)
    sizes = [name for name in unstated if name.endswith("_mib")]
    assert sizes == ["mean_mib", "tokens_mib", "attention_mib", "kept_mib"]
    unknown = ["d_model", "flop_basis", "tera_flop", "attention_tera_flop", *sizes]
    assert {unstated[name] for name in unknown} == {None}
    assert not (tmp_path / "artifacts").exists()


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
LLAMA_SHAPE = BlockShape(d_model=64, d_mlp=100, n_heads=4, n_kv_heads=1, d_head=16, gated=True)


def test_a_configuration_in_the_hub_cache_or_a_folder_is_exact(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--a" / "snapshots" / ("b" * 40)
    for folder in (snapshot, tmp_path / "folder"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        (folder / "tokenizer.json").write_text("{}")
    values = yaml.safe_load(HUB)["models"]["unstated"]
    paths = {"cached": "org/a", "local": str(tmp_path / "folder"), "absent": "org/c"}
    models = {
        name: values | {"checkpoint": {"kind": "pretrained", "path": path, "revision": revision}}
        for (name, path), revision in zip(paths.items(), ["b" * 40, None, "b" * 40], strict=True)
    }
    shapes = model_shapes(with_parts(plan, models=models))
    assert shapes["cached"] == shapes["local"] == ModelShape(LLAMA_SHAPE, is_exact=True)
    assert shapes["absent"] == ModelShape(None, is_exact=False)


@pytest.mark.parametrize(
    ("config", "is_exact", "d_model"),
    [
        (LLAMA, True, 64),
        (LLAMA | {"model_type": "gemma"}, False, 64),
        (LLAMA | {"model_type": "of_tomorrow"}, False, 48),
        (LLAMA | {"auto_map": {"AutoModel": "code.py"}}, False, 48),
        (None, False, 48),
    ],
)
def test_a_configuration_that_says_too_little_leaves_the_width(
    plan: Plan, tmp_path: Path, config: dict[str, Any] | None, is_exact: bool, d_model: int
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    values = yaml.safe_load(HUB)["models"]["unstated"] | {"d_model": 48}
    values["checkpoint"] = {"kind": "pretrained", "path": str(tmp_path)}
    shape = model_shapes(with_parts(plan, models={"tiny": values}))["tiny"]
    assert shape.is_exact == is_exact
    assert shape.block is not None
    assert shape.block.d_model == d_model


def test_a_summary_of_a_finished_study(plan: Plan) -> None:
    summary = plan_summary(plan)
    assert summary["data_root"] == str(plan.data_root)
    assert [row["stage"] for row in summary["stages"]] == list(stages_of(plan.study))
    for row in summary["stages"]:
        assert row["n_cells"] == row["n_present"] == len(cells_of(plan.study, row["stage"]))
        assert row["note"] is None
    (model,) = summary["models"]
    assert model["is_present"]
    assert model["checkpoint"] == "stand-in of random weights"
    assert model["note"] is None
    assert model["tokenizer"] == plan.checkpoint("tiny")["tokenizer_sha256"][:12]
    assert (model["layers_read"], model["deepest_layer"]) == (2, 1)


def test_a_summary_of_a_study_that_has_not_run(plan: Plan, tmp_path: Path) -> None:
    fresh = Plan(plan.study, Store(tmp_path), plan.data_root, STAGES)
    assert {row["n_present"] for row in plan_summary(fresh)["stages"]} == {0}


def test_a_summary_says_what_is_not_on_this_machine(plan: Plan, tmp_path: Path) -> None:
    values = plan.study.model_dump(mode="json")
    values["rollouts"]["source"] = {"kind": "mirror", "folder": str(tmp_path / "gone")}
    values["models"]["tiny"]["tokenizer"] = None
    values["models"]["tiny"]["checkpoint"] = {"kind": "pretrained", "path": str(tmp_path / "no")}
    absent = Plan(parse_study(yaml.safe_dump(values), "absent.yaml"), plan.store, tmp_path, STAGES)
    summary = plan_summary(absent)
    assert {row["n_present"] for row in summary["stages"]} == {None}
    assert all(row["note"].startswith("no such folder") for row in summary["stages"])
    (model,) = summary["models"]
    assert not model["is_present"]
    assert "no such folder" in model["note"]
    assert forecast(absent, Assumptions())["basis"].to_list() == ["assumed", "assumed"]
