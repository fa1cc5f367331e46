"""Load the base transformer of an inspected checkpoint onto one device, or onto all of a host.

No language-model head, no gradients, no code of the checkpoint's author, no network. Several GPUs
hold a copy each; a model larger than one of them is spread over all. Invariant: a loaded model has
every weight from its files; none is left at a random start.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from taprobe_core.checkpoints.folder import CheckpointFiles
from taprobe_core.checkpoints.quiet import quiet_transformers
from taprobe_core.errors import ConfigError, ModelError, ModelMismatchError
from taprobe_core.study import Model

if TYPE_CHECKING:
    import torch

ATTENTION = "sdpa"
"""The attention implementation that a loaded model has, or `eager` where its architecture lacks it;
extraction puts its own in its place where it understands the model's."""

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
    module = _read(files, dtype, "balanced" if is_spread else None).eval().requires_grad_(False)
    try:
        modules: tuple[Any, ...] = (module if is_spread else module.to(devices[0]),)
        if not is_spread:
            modules += tuple(replicate(module, device) for device in devices[1:])
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a model that does not fit on {devices[0]}",
            where,
            "use bfloat16, set device to cpu, or make more GPUs visible",
        ) from error
    config = module.config.get_text_config()
    return LoadedModel(
        modules=modules,
        devices=tuple(devices),
        dtype=dtype,
        d_model=int(config.hidden_size),
        n_layers=int(config.num_hidden_layers),
        n_positions=getattr(config, "max_position_embeddings", None),
    )


def _room(device: torch.device) -> float:
    """Bytes that weights may take on a device; no bound but its own where it cannot be asked."""
    import torch

    if device.type != "cuda":
        return float("inf")
    return _ROOM_FOR_STATES * torch.cuda.mem_get_info(device)[0]


def weight_bytes(files: CheckpointFiles, dtype: torch.dtype) -> int:
    """Return the bytes that a checkpoint's weights take in a dtype, from the files' headers alone.

    Args:
        files: from `resolve_checkpoint`.
        dtype: what they are loaded as.
    """
    from safetensors import safe_open

    n_values = 0
    for path in sorted(files.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                n_values += size
    return n_values * dtype.itemsize


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


def _read(files: CheckpointFiles, dtype: torch.dtype, device_map: str | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModel

    where = str(files.folder)
    try:
        load = partial(
            AutoModel.from_pretrained,
            files.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        with quiet_transformers():
            try:
                module, report = load(attn_implementation=ATTENTION)
            except ValueError as error:
                # Attention with sinks or capped scores, say, which PyTorch's function lacks.
                if "scaled_dot_product_attention" not in str(error):
                    raise
                module, report = load(attn_implementation="eager")
    except (
        *(OSError, ValueError, KeyError, RuntimeError, ImportError),
        StrictDataclassError,  # a configuration at odds with itself
    ) as error:
        said = error.__cause__ if isinstance(error, StrictDataclassError) else error
        reason = (str(said).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"a checkpoint that transformers cannot load ({reason})",
            where,
            "check that config.json and the weights belong together, and the transformers version",
        ) from error
    lacking = sorted({str(name) for name in report["missing_keys"]})
    if lacking:
        raise ModelMismatchError(
            f"{len(lacking)} weights of the architecture missing: {', '.join(lacking[:3])}",
            where,
            "check that config.json and the weights belong together",
        )
    return module
