"""What an extraction keeps of each text, and how much it runs at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from taprobe_core.attention.mode import OFF, AttentionMode
from taprobe_core.study.activations import Pooling, Storage

if TYPE_CHECKING:
    import torch

ACCELERATOR_TOKEN_BUDGET = 8_192
"""Tokens of a pass on an accelerator. Matrix products of 14B shape gain nothing from more on an
H200, and results come earlier from smaller passes (docs/performance.md)."""


@dataclass(frozen=True)
class ExtractOptions:
    """What to keep of each text, and how.

    Attributes:
        poolings: what to keep of a sentence.
        storage: number type of the states that are kept.
        attention: vertical attention, for the layers that a task names.
        token_budget: most tokens of a pass; None: one text a pass on a CPU, where a text fills the
            cores by itself, and `ACCELERATOR_TOKEN_BUDGET` elsewhere.
    """

    poolings: tuple[Pooling, ...] = ("mean",)
    storage: Storage = "float16"
    attention: AttentionMode = OFF
    token_budget: int | None = None

    def budget_on(self, device: torch.device) -> int:
        """Most tokens of a pass on a device; 1 lets every text stand alone."""
        if self.token_budget is not None:
            return self.token_budget
        return 1 if device.type == "cpu" else ACCELERATOR_TOKEN_BUDGET
