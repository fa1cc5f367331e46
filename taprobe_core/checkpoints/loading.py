"""Load the base transformer of an inspected checkpoint onto a device.

No language-model head, no gradients, no code of the checkpoint's author, no network. Invariant: a
loaded model has every weight from its files; none is left at a random start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from taprobe_core.checkpoints.folder import CheckpointFiles
from taprobe_core.checkpoints.quiet import quiet_transformers
from taprobe_core.errors import ConfigError, ModelError, ModelMismatchError
from taprobe_core.study import Model

if TYPE_CHECKING:
    import torch

ATTENTION = "sdpa"
"""The attention implementation of every forward pass."""


@dataclass(frozen=True)
class LoadedModel:
    """A base transformer, ready for forward passes.

    Attributes:
        module: in evaluation mode, no parameter requires a gradient.
        device: where it is.
        dtype: what it computes in; float32 on a CPU, whatever the study says.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_positions: longest text in tokens; None when the configuration does not say.
    """

    module: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    d_model: int
    n_layers: int
    n_positions: int | None = None


def pick_device(name: str) -> torch.device:
    """Return the device that a study names.

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
    return torch.device(name)


def load_base_model(files: CheckpointFiles, model: Model, device: torch.device) -> LoadedModel:
    """Load a checkpoint's base transformer.

    On a CPU half precision is several times slower than float32, so float32 is used there.

    Args:
        files: from `resolve_checkpoint`.
        model: the model of the study.
        device: from `pick_device`.

    Raises:
        ModelMismatchError: the files lack weights of the architecture, or hold others.
        ModelError: transformers cannot load the checkpoint, or it does not fit on the device.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModel

    dtype = torch.float32 if device.type == "cpu" else getattr(torch, model.dtype)
    where = str(files.folder)
    try:
        with quiet_transformers():
            module, report = AutoModel.from_pretrained(
                files.folder,
                dtype=dtype,
                attn_implementation=ATTENTION,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
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
    try:
        module = module.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a model that does not fit on {device}", where, "use bfloat16, or set device to cpu"
        ) from error
    config = module.config.get_text_config()
    return LoadedModel(
        module=module,
        device=device,
        dtype=dtype,
        d_model=int(config.hidden_size),
        n_layers=int(config.num_hidden_layers),
        n_positions=getattr(config, "max_position_embeddings", None),
    )
