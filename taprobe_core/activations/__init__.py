"""Run each text through the model once and keep what is wanted of every sentence.

In: the base transformer, texts and spans. Out: one shard per text and layer, pooled states
[sentence, d_model] and, where asked for, vertical attention. What does not belong here: loading the
model (checkpoints), placing sentences (spans), keeping shards (the store). Layer n is the output of
block n, before the final norm.

The invariant: one forward pass per text whatever the number of layers; no block after the deepest
requested layer runs; texts of one pack do not read each other; nothing that is not finite leaves
this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taprobe_core.activations.extraction import Extracted, extract
    from taprobe_core.activations.tasks import (
        ActivationShard,
        AttentionShard,
        ExtractOptions,
        TextTask,
        tasks_of,
    )

__all__ = [
    "ActivationShard",
    "AttentionShard",
    "ExtractOptions",
    "Extracted",
    "TextTask",
    "extract",
    "tasks_of",
]


def __getattr__(name: str) -> object:
    """Import what a notebook asks for when it asks: torch costs seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "extraction" if name in ("extract", "Extracted") else "tasks"
    return getattr(import_module(f"{__name__}.{module}"), name)
