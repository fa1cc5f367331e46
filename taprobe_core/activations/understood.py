"""Which models' attention is understood well enough to be computed by this library, in packs.

In: a loaded model and its configuration. Out: None where every token attends by plain causal
softmax to the tokens of its own text and nothing else passes between tokens, else the reason; and
the window beyond which even that no longer holds. What does not belong here: running either way
(`forward`, `library_way`), and the trial that compares them (`trial`).

The invariant: an allow-list. What is not known by name here, in the classes of the loaded model, in
its configuration or in the kind of its rotary factors, is not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from taprobe_core.errors import ModelError

_PLAIN = frozenset(
    {
        *("apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "flex_olmo"),
        *("gemma", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "granite"),
        *("granitemoe", "helium", "hunyuan_v1_dense", "llama", "minimax_m2", "ministral"),
        *("mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
    }
)
"""Architectures whose code was read for transformers 5: causal softmax attention through the
library's attention interface, windows at most, no other state between tokens."""

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary factors that do not depend on the length of the call."""

_STRANGE = re.compile(
    r"chunk|sink|alibi|attn_logit_soft|mamba|ssm|conv|recurrent|linear_attn|index_topk|bidirectional"
    r"|temperature_tuning|position_bias|relative|encoder_decoder|cross_attention|prefix_lm"
)
"""Names in a configuration that say of more than plain attention, where their value is not off."""

_WINDOWS = ("sliding_window", "attention_window", "window_size")

_REACHES = re.compile(r"window$|window_size$|chunk_size$|original_max_position_embeddings$")
"""Names of token counts beyond which a model may attend, or turn its keys, in another way."""


@dataclass(frozen=True)
class Understanding:
    """What is known of a model's attention.

    Attributes:
        reason: why packs do not take it, as the end of a sentence; None where they do.
        window: longest text that packs take; None for any.
        reaches: token counts that the configuration names, beyond which something may change.
    """

    reason: str | None
    window: int | None
    reaches: tuple[int, ...]


def find_blocks(base_model: nn.Module) -> nn.ModuleList:
    """Return the list of blocks of a base transformer: its `layers` or `h`.

    Raises:
        ModelError: there is no such list, the model has an encoder, or it would drop out states.
    """
    name = type(base_model).__name__
    if base_model.training:
        raise ModelError("the model is in training mode", name, "call eval() after loading it")
    if getattr(getattr(base_model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            "a model with an encoder, which would read the text as well",
            name,
            "use a decoder-only model",
        )
    for attribute in ("layers", "h"):
        blocks = getattr(base_model, attribute, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    raise ModelError(
        "no list of blocks named layers or h",
        name,
        "load the base transformer, without LM head, of a decoder-only model",
    )


def understand(base_model: nn.Module) -> Understanding:
    """Return what is known of a model's attention; nothing is run.

    Args:
        base_model: base transformer without LM head, in evaluation mode.

    Raises:
        ModelError: the blocks are not found, or the model is in training mode.
    """
    blocks = find_blocks(base_model)
    config = getattr(base_model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return Understanding("the model has no configuration of transformers", None, ())
    text = config.get_text_config()
    settings = dict(_settings(text.to_dict()))
    reaches = {value for name, value in settings.items() if _REACHES.search(name) and value}
    reason = _reason(base_model, blocks, text, settings)
    windows = _windows(text, blocks) if reason is None else set()
    return Understanding(
        reason,
        min(windows, default=None),
        tuple(sorted({*windows, *(each for each in reaches if _is_count(each))})),
    )


def _reason(
    base_model: nn.Module, blocks: nn.ModuleList, config: Any, settings: Mapping[str, Any]
) -> str | None:
    source = type(base_model).__module__
    if config.model_type not in _PLAIN or not source.startswith("transformers.models."):
        return f"attention of {config.model_type} ({type(base_model).__name__}) is not known here"
    for module in (*blocks, *_attentions(blocks)):
        if type(module).__module__ != source:
            return f"{type(module).__name__} is not a part of {source.rpartition('.')[2]}"
        if getattr(module, "is_causal", True) is False:
            return f"{type(module).__name__} is not causal"
    rotary = sorted(_rotary_kinds(base_model, settings) - _ROTARY)
    if rotary:
        return f"rotary factors of kind {', '.join(rotary)} depend on the length of the call"
    return _strange(config, settings)


def _strange(config: Any, settings: Mapping[str, Any]) -> str | None:
    """What a configuration says beyond plain attention."""
    if getattr(config, "is_heterogeneous", False):
        return "config says settings of single blocks"
    if settings.get("is_causal") is False:
        return "config.is_causal is false"
    kinds = {*(getattr(config, "layer_types", None) or ())} - _LAYER_TYPES
    if kinds:
        return f"config.layer_types names {', '.join(sorted(map(str, kinds)))}"
    for name, value in settings.items():
        if _STRANGE.search(name) and value not in (None, False, 0):
            return f"config.{name} is {value}"
    return None


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a configuration, those of its parts under `part.name`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif not isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", value


def _attentions(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    for module in blocks.modules():
        if type(module).__name__.endswith("Attention"):
            yield module


def _windows(config: Any, blocks: nn.ModuleList) -> set[int]:
    """Windows that some block may have, wherever they are said."""
    kinds = getattr(config, "layer_types", None)
    found = [getattr(module, name, None) for module in _attentions(blocks) for name in _WINDOWS]
    if not kinds or "sliding_attention" in kinds:
        found += [getattr(config, name, None) for name in _WINDOWS]
    return {each for each in found if _is_count(each)}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _rotary_kinds(base_model: nn.Module, settings: Mapping[str, Any]) -> set[str]:
    kinds = {str(value) for name, value in settings.items() if name.endswith(".rope_type")}
    for module in base_model.modules():
        kind = getattr(module, "rope_type", None)
        kinds |= (
            set(map(str, kind.values())) if isinstance(kind, Mapping) else {str(kind or "default")}
        )
    return kinds
