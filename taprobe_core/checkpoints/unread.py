"""Weights of a checkpoint that the loaded model has no place for: which may be left out, which not.

A base transformer has no head, and a decoder read from a checkpoint of several parts has no eyes:
what does not take part in its states may stay in the file. Everything else that is left out would
have changed the states, so the model is another one than the file's. Transformers' own lists of
names to be silent about are of the first kind: each architecture names heads, buffers and layers
for predicting further tokens there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from taprobe_core.checkpoints.folder import stated_number
from taprobe_core.errors import ModelMismatchError


class Stored(NamedTuple):
    """A tensor as its file's header states it."""

    dtype: str
    shape: tuple[int, ...]


_PREFIX = r"^(?:(?:model|transformer|language_model|text_model|gpt_neox|thinker|llm)\.)*"
_HEADS = (
    r"lm_head|text_lm_head|embed_out|output_layer|output_projection|final_logits_bias|cls|"
    r"score|scorer|v_head|value_head|reward_head|classifier|classification_head|qa_outputs"
)
_OTHER_PARTS = (
    r"visual|vision_\w+|image_newline|audio_\w+|mm_projector|multi_modal_\w+|embed_vision|"
    r"embed_audio|vit|vision|audio|talker|token2wav|code2wav|speech_\w+|patch_merger|"
    r"pre_mm_projector_norm"
)
_LEFT_OUT = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_PREFIX}(?:{_HEADS})(?:\.|$)",
        rf"{_PREFIX}(?:{_OTHER_PARTS})\.",
        rf"{_PREFIX}image_newline$",
        rf"{_PREFIX}mtp(?:_\w+)?\.",  # layers that predict tokens after the next
        r"(?:^|\.)(?:rotary_emb|rotary_pos_emb|rope)\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)$",
        r"(?:^|\.)(?:position_ids|attn\.embed_positions|_extra_state)$",
    )
)
_CAUSAL_MASK = re.compile(r"attn|attention")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

_REASONS = (
    (
        re.compile(r"lora_|(?:^|\.)base_model\.model\.|modules_to_save|base_layer|adapter|ia3_"),
        "of an adapter that was not merged",
        "merge the adapter into its base model (peft: merge_and_unload), save that, and name it",
    ),
    (
        re.compile(
            r"scale(?:s|_inv)?$|zero_point|zeros$|qweight|g_idx|absmax|quant_(?:map|state)|\.SCB$|"
            r"_blocks$|weight_(?:packed|shape|format)|amax$"
        ),
        "of quantised weights, which no quantization_config covers",
        "restore quantization_config in config.json, or use the checkpoint that is not quantised",
    ),
    (
        re.compile(r"norm|\.ln_\w+\."),
        "of normalisations that the configuration does not ask for",
        "set model_type, and the keys for norms, in config.json to those of the weights",
    ),
    (
        re.compile(r"bias$"),
        "biases that the configuration does not ask for",
        "set model_type, and keys like attention_bias, in config.json to those of the weights",
    ),
)


def stored_tensors(paths: Sequence[Path]) -> dict[str, Stored]:
    """Return what safetensors files hold, from their headers alone.

    Args:
        paths: files that are whole.
    """
    found = {}
    for path in paths:
        with safe_open(path, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                tensor = weights.get_slice(name)
                found[name] = Stored(tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def refuse_unread(
    unexpected: Collection[str],
    stored: Mapping[str, Stored],
    config: Mapping[str, Any],
    prefix: str,
    where: str,
) -> None:
    """Refuse a checkpoint of which loading left out what belongs to the decoder.

    Args:
        unexpected: names of the tensors that found no place.
        stored: all tensors of the checkpoint.
        config: its `config.json`.
        prefix: the name that the architecture puts before the names of its base model.
        where: the checkpoint, for messages.

    Raises:
        ModelMismatchError: a tensor is no head, no other part and no known buffer; two tensors are
            for the same place; or integers stand where the configuration tells of no quantisation.
    """
    unread = sorted(name for name in unexpected if not _may_be_left_out(name, stored, config))
    if unread:
        reason, fix = _why(unread[0], config)
        raise ModelMismatchError(
            f"{len(unread)} tensors that the model has no place for, the first {reason}: "
            f"{', '.join(unread[:3])}",
            where,
            fix,
        )
    twice = sorted(_twice(stored, prefix))
    if twice:
        raise ModelMismatchError(
            f"{len(twice)} weights under two names, one with {prefix!r} before it: {twice[0]}",
            where,
            "keep one of the two",
        )
    integers = sorted(
        name
        for name, tensor in stored.items()
        if tensor.dtype in _INTEGERS and name.endswith(".weight") and name not in unexpected
    )
    if integers and not _is_quantised(config):
        name = integers[0]
        raise ModelMismatchError(
            f"{len(integers)} weights that are integers ({stored[name].dtype}): {name}",
            where,
            "restore quantization_config in config.json, or use the checkpoint that is not "
            "quantised",
        )


def _may_be_left_out(name: str, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> bool:
    if any(pattern.search(name) for pattern in _LEFT_OUT):
        return True
    parent, _, last = name.rpartition(".")
    if last in ("bias", "masked_bias", "causal_mask") and _CAUSAL_MASK.search(parent):
        # A causal mask that old versions stored: a square of the longest text, or its one value.
        tensor = stored.get(name)
        return tensor is not None and (
            tensor.shape == () or (len(tensor.shape) == 4 and tensor.shape[-1] == tensor.shape[-2])
        )
    block, n_blocks = _block(name), _n_blocks(config)
    n_next = stated_number(config, "num_nextn_predict_layers") or 0
    return block is not None and n_blocks <= block < n_blocks + n_next


def _is_quantised(config: Mapping[str, Any]) -> bool:
    parts = (config, config.get("text_config"))
    return any(isinstance(part, Mapping) and part.get("quantization_config") for part in parts)


def _block(name: str) -> int | None:
    match = _BLOCK.search(name)
    return None if match is None else int(match[1])


def _n_blocks(config: Mapping[str, Any]) -> int:
    return stated_number(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0


def _why(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    for pattern, reason, fix in _REASONS[:2]:
        if pattern.search(name):
            return reason, fix
    block, n_blocks = _block(name), _n_blocks(config)
    if block is not None and n_blocks and block >= n_blocks:
        return (
            f"of block {block}, where the configuration has {n_blocks}",
            f"set num_hidden_layers in config.json to the {block + 1} or more of the weights",
        )
    for pattern, reason, fix in _REASONS[2:]:
        if pattern.search(name):
            return reason, fix
    return (
        "of another architecture",
        "set model_type in config.json to that of the weights, or fetch the checkpoint again",
    )


def _twice(stored: Mapping[str, Stored], prefix: str) -> Iterator[str]:
    return (name for name in stored if prefix and f"{prefix}.{name}" in stored)
