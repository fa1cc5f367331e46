"""Checkpoints: from what a study names to a model in memory, safely and offline where possible.

    origin ─► folder ─► resolve ─► loading      where ─► inspected ─► files ─► module
      │                    └─ stand_in
      └─► tokenizer_files ─► tokenizer

torch and transformers are imported by the functions that need them: naming a checkpoint, for a
fingerprint or a check of a study, must not cost seconds.
"""

from taprobe_core.checkpoints.folder import CheckpointFiles
from taprobe_core.checkpoints.loading import LoadedModel, load_base_model, pick_devices, replicate
from taprobe_core.checkpoints.resolve import (
    check_present,
    checkpoint_identity,
    context_length,
    resolve_checkpoint,
)
from taprobe_core.checkpoints.tokenizer import (
    bos_token,
    load_tokenizer,
    special_tokens,
    tokenizer_sha256,
)

__all__ = [
    "CheckpointFiles",
    "LoadedModel",
    "bos_token",
    "check_present",
    "checkpoint_identity",
    "context_length",
    "load_base_model",
    "load_tokenizer",
    "pick_devices",
    "replicate",
    "resolve_checkpoint",
    "special_tokens",
    "tokenizer_sha256",
]
