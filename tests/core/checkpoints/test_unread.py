"""Weights that loading would leave out: heads and other parts may be, a decoder's own may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from taprobe_core.checkpoints import CheckpointFiles, LoadedModel, load_base_model
from taprobe_core.checkpoints.loading import Stored, refuse_unread
from taprobe_core.checkpoints.quiet import quiet_transformers
from taprobe_core.errors import ModelError, ModelMismatchError
from taprobe_core.study import Model, PretrainedCheckpoint

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "qwen3": Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        attention_bias=True,
    ),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8),
}
FIRST = "model.layers.0.self_attn."

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with its head of each architecture."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    with quiet_transformers():
        for name, config in CONFIGS.items():
            AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def load(
    saved: Path,
    folder: Path,
    change: Callable[[Weights], Weights] = lambda weights: weights,
    **config: Any,
) -> LoadedModel:
    """Load a checkpoint after changing a copy of its weights and configuration."""
    folder.mkdir()
    stated = json.loads((saved / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(stated))
    weights = change(load_file(saved / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = PretrainedCheckpoint(kind="pretrained", path=str(folder))
    model = Model(rollouts_dir="m", checkpoint=checkpoint, n_layers=2, dtype="float32")
    return load_base_model(CheckpointFiles(folder, {}), model, [torch.device("cpu")])


def adding(**more: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | more


@pytest.mark.parametrize(
    ("architecture", "change", "config", "found", "fix"),
    [
        (
            "qwen3",
            adding(),
            {"attention_bias": False},
            "biases that the configuration does not ask for",
            "attention_bias",
        ),
        (
            "qwen3",
            adding(),
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "of normalisations",
            "model_type",
        ),
        (
            "qwen2",
            adding(**{f"{FIRST}v_proj.lora_B.default.weight": torch.zeros(8, 2)}),
            {},
            "of an adapter",
            "merge_and_unload",
        ),
        (
            "qwen2",
            lambda weights: {f"base_model.model.{name}": each for name, each in weights.items()},
            {},
            "of an adapter",
            "merge_and_unload",
        ),
        (
            "qwen2",
            adding(**{f"{FIRST}o_proj.weight_scale": torch.ones(1)}),
            {},
            "of quantised weights",
            "quantization_config",
        ),
        (
            "qwen2",
            adding(**{"model.layers.1.mlp.up_proj.weight.absmax": torch.ones(4)}),
            {},
            "of quantised weights",
            "quantization_config",
        ),
        (
            "qwen2",
            adding(**{"model.layers.2.mlp.gate_proj.weight": torch.zeros(24, 16)}),
            {},
            "of block 2, where the configuration has 2",
            "num_hidden_layers",
        ),
        (
            "qwen2",
            adding(**{"model.embed_positions.weight": torch.zeros(8, 16)}),
            {},
            "of another architecture",
            "model_type",
        ),
        (
            "gpt2",
            adding(**{"transformer.h.0.ln_3.weight": torch.ones(16)}),
            {},
            "of normalisations",
            "model_type",
        ),
    ],
)
def test_weights_without_a_place_are_refused_by_name(
    saved: dict[str, Path],
    tmp_path: Path,
    architecture: str,
    change: Callable[[Weights], Weights],
    config: dict[str, Any],
    found: str,
    fix: str,
) -> None:
    folder = tmp_path / "changed"
    with pytest.raises(ModelMismatchError) as caught:
        load(saved[architecture], folder, change, **config)
    assert f"no place for, the first {found}" in caught.value.what
    assert fix in str(caught.value.fix)
    assert caught.value.where == str(folder)


def test_heads_masks_and_other_parts_may_stay_in_the_file(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    mask = torch.ones(1, 1, 8, 8)
    several = {
        "score.weight": torch.zeros(2, 16),
        "v_head.summary.bias": torch.zeros(1),
        "mtp.layers.0.mlp.up_proj.weight": torch.zeros(24, 16),
        "model.visual.blocks.0.attn.qkv.weight": torch.zeros(3, 3),
        "audio_tower.conv.bias": torch.zeros(3),
        "multi_modal_projector.linear_1.weight": torch.zeros(3),
        f"{FIRST}rotary_emb.inv_freq": torch.ones(2),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16),
    }
    qwen2 = load(saved["qwen2"], tmp_path / "1", adding(**several), num_nextn_predict_layers=1)
    gpt2 = {
        f"transformer.h.1.attn.{name}": each
        for name, each in {"bias": mask, "masked_bias": torch.tensor(-1e4)}.items()
    }
    stored = load_file(saved["qwen2"] / "model.safetensors")
    for name, value in qwen2.module.state_dict().items():
        assert torch.equal(value, stored[f"model.{name}"])
    load(saved["gpt2"], tmp_path / "2", lambda weights: weights | gpt2)


@pytest.mark.parametrize("shape", [(), (1, 1, 8, 8)])
def test_a_causal_mask_is_known_by_its_shape(shape: tuple[int, ...]) -> None:
    name = "transformer.h.0.attn.attention.bias"
    refuse_unread({name}, {name: Stored("BOOL", shape)}, {}, "transformer", "here")

    with pytest.raises(ModelMismatchError, match="first biases that the configuration"):
        refuse_unread({name}, {name: Stored("F32", (16,))}, {}, "transformer", "here")


def test_tied_weights_need_no_head(saved: dict[str, Path], tmp_path: Path) -> None:
    def headless(weights: Weights) -> Weights:
        return {name: each for name, each in weights.items() if name != "lm_head.weight"}

    load(saved["qwen2"], tmp_path / "tied", headless, tie_word_embeddings=True)


def test_a_weight_under_two_names_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    twice = adding(**{"layers.1.self_attn.q_proj.bias": torch.ones(16)})

    with pytest.raises(ModelMismatchError, match=r"under two names.*layers\.1\.self_attn\.q_proj"):
        load(saved["qwen2"], tmp_path / "twice", twice)


def test_integers_need_a_quantisation(saved: dict[str, Path], tmp_path: Path) -> None:
    name = f"{FIRST}o_proj.weight"

    with pytest.raises(ModelMismatchError, match=rf"1 weights that are integers \(I8\): {name}"):
        load(
            saved["qwen2"],
            tmp_path / "integers",
            lambda weights: weights | {name: (weights[name] * 999).to(torch.int8)},
        )
    stored = {name: Stored("I8", (16, 16))}
    refuse_unread((), stored, {"quantization_config": {"quant_method": "x"}}, "model", "here")


def test_another_shape_is_refused_by_name(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelMismatchError) as caught:
        load(saved["qwen2"], tmp_path / "shape", intermediate_size=20)
    assert "layers.0.mlp.down_proj.weight is [16, 24], not [16, 20]" in caught.value.what


@pytest.mark.parametrize(
    "config", [{"hidden_act": "unheard_of"}, {"rope_parameters": {"rope_type": "unheard_of"}}]
)
def test_whatever_a_library_raises_is_a_model_error(
    saved: dict[str, Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"cannot load[\s\S]*unheard_of[\s\S]*Fix: "):
        load(saved["qwen2"], tmp_path / "odd", **config)
