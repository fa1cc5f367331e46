"""Load the base transformer of an inspected checkpoint onto one device, or onto all of a host.

No language-model head, no gradients, no code of the checkpoint's author, no network. Several GPUs
hold a copy each; a model larger than one of them is spread over all.

A base transformer has no head, and a decoder read from a checkpoint of several parts has no eyes:
what does not take part in its states may stay in the file. Everything else that is left out would
have changed the states, so the model is another one than the file's, and is refused by the names of
those weights. Transformers' own lists of names to be silent about are of the first kind: each
architecture names heads, buffers and layers for predicting further tokens there.

Invariant: a loaded model has every weight from its files, none is left at a random start, and no
weight of its files is left out that belongs to the decoder.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import safe_open

from taprobe_core.checkpoints.folder import (
    CheckpointFiles,
    files_to_load,
    read_config,
    stated_number,
)
from taprobe_core.checkpoints.quiet import is_out_of_memory, quiet_transformers, reason_of
from taprobe_core.errors import ConfigError, ModelError, ModelMismatchError
from taprobe_core.study import Model

if TYPE_CHECKING:
    import torch


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
    """Return what safetensors files hold, from their headers alone."""
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
    """Refuse a checkpoint of which loading left out what belongs to the decoder."""
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


_ROOM_FOR_STATES = 0.85
"""Share of a device that weights may take: the rest is for the states of a pass."""


@dataclass(frozen=True)
class LoadedModel:
    """A base transformer, ready for forward passes.

    Attributes:
        modules: in evaluation mode, no parameter requires a gradient; equal weights, one per
            device, or a single one that is spread over several.
        devices: all devices that hold weights.
        dtype: what it computes in.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_positions: longest text in tokens; None when the configuration does not say.
    """

    modules: tuple[torch.nn.Module, ...]
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    d_model: int
    n_layers: int
    n_positions: int | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The first of `modules`."""
        return self.modules[0]


def pick_devices(name: str) -> tuple[torch.device, ...]:
    """Return the devices that a study names: for `cuda` every visible GPU.

    Args:
        name: `cpu`, `cuda`, `mps`, or `auto` for the first of cuda, mps, cpu that is there.

    Raises:
        ConfigError: no such device on this machine.
    """
    import torch

    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_there in present.items() if is_there)
    if not present.get(name, False):
        there = [device for device, is_there in present.items() if is_there]
        raise ConfigError(
            f"device {name!r}, which this machine lacks (it has {', '.join(there)})",
            "activations.device",
            "set it to auto, or install a torch build for the device",
        )
    if name == "cuda":
        return tuple(torch.device("cuda", at) for at in range(torch.cuda.device_count()))
    return (torch.device(name),)


def load_base_model(
    files: CheckpointFiles, model: Model, devices: Sequence[torch.device]
) -> LoadedModel:
    """Load a checkpoint's base transformer, once from the disk, onto each device.

    Args:
        files: from `resolve_checkpoint`.
        model: the model of the study; its dtype is what is computed in, on every device.
        devices: from `pick_devices`. Where the weights fill the smallest of several GPUs, one model
            is spread over all of them (needs accelerate).

    Raises:
        ModelMismatchError: the files lack weights of the architecture, or hold others.
        ModelError: transformers cannot load the checkpoint, or it does not fit on the device.
    """
    import torch

    dtype = getattr(torch, model.dtype)
    where = str(files.folder)
    is_spread = len(devices) > 1 and weight_bytes(files, dtype) > min(map(_room, devices))
    module = _read(files, dtype, model.attn_implementation, "balanced" if is_spread else None)
    module = module.eval().requires_grad_(False)
    try:
        modules: tuple[Any, ...] = (module if is_spread else module.to(devices[0]),)
        if not is_spread:
            modules += tuple(replicate(module, device) for device in devices[1:])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(where, devices[0]) from error
    config = module.config.get_text_config()
    return LoadedModel(
        modules=modules,
        devices=tuple(devices),
        dtype=dtype,
        d_model=_size(config, "hidden_size", where),
        n_layers=_size(config, "num_hidden_layers", where),
        n_positions=getattr(config, "max_position_embeddings", None),
    )


def _size(config: Any, name: str, where: str) -> int:
    found = getattr(config, name, None)
    if not isinstance(found, int):
        raise ModelError(
            f"an architecture that does not state its {name} ({type(config).__name__})",
            where,
            "use a decoder-only checkpoint with one stack of blocks",
        )
    return found


def _room(device: torch.device) -> float:
    """Bytes that weights may take on a device; no bound but its own where it cannot be asked."""
    import torch

    if device.type != "cuda":
        return float("inf")
    return _ROOM_FOR_STATES * torch.cuda.mem_get_info(device)[0]


def weight_bytes(files: CheckpointFiles, dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint's weights in a dtype, from the files' headers alone."""
    sizes = (math.prod(tensor.shape) for tensor in _stored(files).values())
    return sum(sizes) * dtype.itemsize


def _stored(files: CheckpointFiles) -> dict[str, Stored]:
    names = files_to_load(files.folder, "fetch the checkpoint again")
    return stored_tensors([files.folder / name for name in names if name.endswith(".safetensors")])


def replicate(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return a copy of a model on another device; the weights go there directly.

    Args:
        module: any module.
        device: where the copy is wanted.
    """
    import torch

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.detach().to(device, copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(values, tensor.requires_grad) if is_parameter else values

    # Told that these are copied already, deepcopy makes no second set of weights beside the first.
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): moved(tensor) for tensor in tensors})


def _read(
    files: CheckpointFiles, dtype: torch.dtype, attention: str, device_map: str | None
) -> Any:
    from transformers import AutoModel

    where = str(files.folder)
    config = read_config(files.folder, "fetch the checkpoint again")
    try:
        with quiet_transformers():
            module, report = AutoModel.from_pretrained(
                files.folder,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except Exception as error:  # another's configuration makes the library raise anything
        if is_out_of_memory(error):
            raise _too_large(where, "this machine") from error
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            raise ModelError(
                "an architecture whose attention PyTorch's scaled_dot_product_attention does not "
                f"compute ({config.get('model_type')}: attention sinks or capped scores, say)",
                where,
                "set attn_implementation: eager for this model in the study; memory then grows "
                "with the square of a text's length",
            ) from error
        raise ModelError(
            f"a checkpoint that transformers cannot load ({reason_of(error)})",
            where,
            "check that config.json and the weights belong together, and the transformers version",
        ) from error
    stored = _stored(files)
    refuse_unread(report["unexpected_keys"], stored, config, module.base_model_prefix, where)
    lacking = sorted({str(name) for name in report["missing_keys"]})
    if lacking:
        raise ModelMismatchError(
            f"{len(lacking)} weights of the architecture missing: {', '.join(lacking[:3])}",
            where,
            "check that config.json and the weights belong together",
        )
    others = sorted(report["mismatched_keys"])
    if others:
        name, found, expected = others[0]
        raise ModelMismatchError(
            f"a checkpoint that transformers cannot load: {len(others)} weights have another shape "
            f"than config.json says ({name} is {list(found)}, not {list(expected)})",
            where,
            "check that config.json and the weights belong together",
        )
    return module


def _too_large(where: str, device: object) -> ModelError:
    return ModelError(
        f"a model that does not fit on {device}",
        where,
        "use bfloat16, set device to cpu, make more GPUs visible, or use a machine with more "
        "memory",
    )
