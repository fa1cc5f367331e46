"""Tiny random checkpoints of any causal model type of transformers.

In: a model type. Out: its configuration, a few layers deep and some dozens of values wide, with
every kind of layer that its default configuration has, windows and chunks far shorter than the
texts, and weights large enough that a wrong mask shows. What does not belong here: running a model
(agreement), and what comes of it (sweep).

The invariant: whatever a type needs beside the general recipe stands in `overrides`, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tools.architectures.overrides import OVERRIDES, PARTS

N_LAYERS = 4

_VALUES = {
    96: "intermediate_size d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff "
    "ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "prefix_dense_intermediate_size shared_intermediate_size",
    64: "hidden_size d_model n_embd embedding_dim embedding_size emb_dim word_embed_proj_dim "
    "lru_width attention_hidden_size input_embedding_size output_embedding_size mamba_d_ssm "
    "backbone_hidden_size adapter_in_dim adapter_out_dim adapter_input_size "
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
    "original_max_position_embeddings",
    32: "attention_chunk_size image_size",
    24: "sliding_window attention_window_size sliding_window_size window_size local_attention",
    16: "q_lora_rank index_head_dim linear_value_head_dim index_topk keep_window_size block_size "
    "chunk_size mamba_chunk_size local_attn_chunk_length lsh_attn_chunk_length rel_extent "
    "router_hidden_size o_lora_rank local_attention_window_len ple_embed_dim "
    "moe_latent_size relative_max_distance "
    "head_dim dim_head d_head attention_head_size swa_head_dim v_head_dim qk_nope_head_dim "
    "kv_channels linear_head_dim mamba_d_head mamba_head_dim",
    8: "qk_rope_head_dim kv_lora_rank rotary_dim mamba_d_state state_size ssm_state_size "
    "mamba_dt_rank linear_key_head_dim laurel_rank gated_norm_rank "
    "hidden_size_per_layer_input d_rel adapter_rank hc_lowrank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
    "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads index_n_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "patch_size hc_count index_block_size num_hidden_layers n_layer n_layers num_layers "
    "decoder_layers encoder_layers num_encoder_layers num_decoder_layers num_blocks",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok moe_topk moe_k top_k_experts mamba_n_groups n_groups "
    "n_mamba_heads ngram_size heads_per_ngram index_topk_blocks max_window_layers",
    1: "first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts "
    "moe_num_shared_experts n_group topk_group",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "max_target_positions max_source_positions",
    128: "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size "
    "unpadded_vocab_size pronunciation_vocab_size shape_vocab_size",
}
SMALL = {name: value for value, names in _VALUES.items() for name in names.split()}
"""What a number of a configuration becomes, by its name; one that is None or 0 stays so."""

_FIXED = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_sliding_window": True,
    "is_decoder": True,
}
_PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")
"""Kinds of the layers: every kind of the default configuration, in turns."""


def tiny_config(model_type: str) -> Any:
    """Return a configuration of a model type, tiny in all its parts.

    Args:
        model_type: a key of `CONFIG_MAPPING`.
    """
    return CONFIG_MAPPING[model_type](**tiny_values(model_type))


def tiny_values(model_type: str) -> dict[str, Any]:
    """Return the arguments that make a model type's configuration tiny.

    Args:
        model_type: a key of `CONFIG_MAPPING`.
    """
    values = _values(CONFIG_MAPPING[model_type]) | OVERRIDES.get(model_type, {})
    if model_type in PARTS:
        part, language_model, differing = PARTS[model_type]
        values[part] = tiny_values(language_model) | differing | {"model_type": language_model}
    return values


def _values(kind: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    default = _default(kind)
    names = {field.name for field in fields(kind)}
    for field in fields(kind):
        name, before = field.name, default.get(field.name)
        if name in SMALL and (before or name == "sliding_window"):
            values[name] = SMALL[name]
        elif name in _FIXED:
            values[name] = _FIXED[name]
        elif name in _PER_LAYER and before:
            kinds = list(dict.fromkeys(before))
            if name == "layer_types" and "sliding_window" in names and len(kinds) == 1:
                kinds = ["sliding_attention", "full_attention"]
            # A kind of MLP beside each kind of attention: its order turns after a round.
            turned = kinds if name == "layer_types" else [*kinds, *reversed(kinds)]
            values[name] = list(islice(cycle(turned), N_LAYERS))
    if "kv_lora_rank" in names and "num_key_value_heads" in values:
        # Latent attention has no groups of heads.
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if part.__name__ != "AutoConfig":
            values[name] = _values(part)
    return values


def _default(kind: Any) -> Mapping[str, Any]:
    try:
        return dict(vars(kind()))
    except Exception:  # a class whose defaults are at odds: those of its fields
        return {field.name: field.default for field in fields(kind)}


def write_checkpoint(
    config: Any, folder: Path, *, is_causal: bool = True, dtype: str = "float32"
) -> None:
    """Write a random checkpoint of a configuration.

    Args:
        config: from `tiny_config`.
        folder: gets `config.json` and the weights.
        is_causal: whether the language-model head is written too, as checkpoints have it.
        dtype: of the weights.
    """
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if is_causal else AutoModel
    model = kind.from_config(config, dtype=torch.float32)
    _disturb(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def _disturb(model: nn.Module) -> None:
    """Make weights so large that attention is not flat, and no bias or norm is idle."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("A_log", "dt_bias", "time_", "lambda")):
                continue  # rates of decay, whose start is chosen so that states stay finite
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
            elif "sink" in name:
                weight.normal_(0, 2.0)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
