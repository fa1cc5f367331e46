"""Random configurations of the architectures that most models have, by seed.

In: a seed. Out: a configuration, a number type and texts, with windows, chunks, rotary kinds and
lengths, heads, biases, norms and tied weights drawn at random. What does not belong here: the
comparison (agreement) and its verdict (sweep).

The invariant: a seed gives the same case on every machine and in every order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

from transformers import CONFIG_MAPPING

from tools.architectures.tiny import tiny_values

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gemma"),
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("olmo2", "olmo3", "olmoe", "cohere2", "smollm3", "granite", "glm4", "exaone4"),
    *("starcoder2", "stablelm", "phi", "gpt_neox", "llama4_text", "gpt_oss", "ministral"),
    *("phimoe", "seed_oss", "arcee", "helium", "ernie4_5", "deepseek_v3", "minimax_m2"),
)
"""Those of which most checkpoints are stand twice."""

_SPARSE = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama4_text", "gpt_oss", "phimoe"}
    | {"deepseek_v3", "minimax_m2"}
)
"""Experts: in half precision a router turns over by rounding alone, so these compute in float32."""

_SWITCHES = (
    *("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "use_bias", "attention_out_bias"),
    *("use_qk_norm", "qk_layernorm", "use_parallel_residual", "tie_word_embeddings"),
)
_CHOICES: dict[str, list[Any]] = {
    "num_key_value_heads": [1, 2, 4],
    "head_dim": [8, 12, 16, 24],
    "sliding_window": [None, 7, 16, 33, 64, 150],
    "use_sliding_window": [True, True, False],
    "attention_chunk_size": [8, 16, 33, 64],
    "attn_logit_softcapping": [None, 2.0, 50.0],
    "query_pre_attn_scalar": [8, 16, 64],
    **{name: [True, False] for name in _SWITCHES},
}
"""Values of a configuration that are drawn by themselves, where a type has them."""

_GROUPED = ("num_key_value_heads", "head_dim")
"""Not of latent attention, whose heads have widths of their own."""


@dataclass(frozen=True)
class Case:
    """One configuration, and what runs through it."""

    seed: int
    model_type: str
    config: Any
    dtype: str
    lengths: tuple[int, ...]
    told: str


def draw(seed: int) -> Case:
    """Return the case of a seed; a draw that the configuration's own checks refuse is drawn again.

    Args:
        seed: any whole number.
    """
    dice = random.Random(f"architectures {seed}")
    while True:
        model_type = dice.choice(FAMILIES)
        drawn = _draw_values(dice, model_type)
        try:
            config = CONFIG_MAPPING[model_type](**tiny_values(model_type) | drawn)
        except Exception:  # noqa: S112  (at odds with itself: what no model can have)
            continue
        dtype = "float32" if model_type in _SPARSE else dice.choice(["float32"] * 2 + ["bfloat16"])
        lengths = tuple(dice.randint(2, 200) for _ in range(dice.randint(2, 5)))
        told = ", ".join(f"{name}={value}" for name, value in sorted(drawn.items()))
        return Case(seed, model_type, config, dtype, lengths, f"{dtype}, {told}, texts {lengths}")


def _draw_values(dice: random.Random, model_type: str) -> dict[str, Any]:
    kind = CONFIG_MAPPING[model_type]
    names = {field.name for field in fields(kind)}
    base = tiny_values(model_type)
    n_layers = dice.randint(2, 4)
    values: dict[str, Any] = {"num_hidden_layers": n_layers}
    for name, choices in _CHOICES.items():
        if name in names and not ("kv_lora_rank" in names and name in _GROUPED):
            values[name] = dice.choice(choices)
    if "max_window_layers" in names:
        values["max_window_layers"] = dice.randint(0, n_layers)
    values |= _draw_layer_types(dice, names, base, values, n_layers)
    default = getattr(kind(), "rope_parameters", None) or {}
    is_partial = "partial_rotary_factor" in default
    rotary = _draw_rotary(dice, int(values.get("head_dim", 16)), is_partial=is_partial)
    if "rope_parameters" in names and rotary is not None:
        values["rope_parameters"] = _by_layer_type(default, rotary)
        if rotary["rope_type"] == "longrope" and "original_max_position_embeddings" in names:
            values["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]
        if rotary["rope_type"] == "dynamic":
            values["max_position_embeddings"] = dice.choice([64, 512])
    return values


def _draw_layer_types(
    dice: random.Random, names: set[str], base: dict[str, Any], values: dict[str, Any], n: int
) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    if "mlp_layer_types" in names and base.get("mlp_layer_types"):
        drawn["mlp_layer_types"] = base["mlp_layer_types"][:n]
    if "layer_types" not in names:
        return drawn
    if "layer_types" not in base or dice.random() < 0.3:
        return drawn | {"layer_types": None}
    kinds = sorted({"full_attention", *base["layer_types"]})
    if values.get("sliding_window", 1) is None:
        kinds = [kind for kind in kinds if kind != "sliding_attention"]
    return drawn | {"layer_types": [dice.choice(kinds) for _ in range(n)]}


def _draw_rotary(dice: random.Random, d_head: int, *, is_partial: bool) -> dict[str, Any] | None:
    kind = dice.choice(
        [None, "default", "linear", "dynamic", "yarn", "longrope", "llama3", "yarn", "longrope"]
    )
    if kind is None:
        return None
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": dice.choice([1e3, 1e4, 1e6])}
    if is_partial:
        found["partial_rotary_factor"] = dice.choice([0.5, 1.0])
    d_rotary = int(d_head * found.get("partial_rotary_factor", 1.0))
    original = dice.choice([16, 32, 64, 128])
    if kind != "default":
        found["factor"] = dice.choice([2.0, 4.0, 8.0])
    if kind in ("yarn", "longrope", "llama3"):
        found["original_max_position_embeddings"] = original
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        found["short_factor"] = [1.0 + 0.1 * at for at in range(d_rotary // 2)]
        found["long_factor"] = [1.0 + 3.0 * at for at in range(d_rotary // 2)]
    return found


def _by_layer_type(default: dict[str, Any], rotary: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters; by kind of layer where the type's default has them so."""
    kinds = [name for name in default if name.endswith("_attention")]
    if not kinds:
        return rotary
    plain = {"rope_type": "default", "rope_theta": 1e4}
    return {name: rotary if name == "full_attention" else plain for name in kinds}
