"""How much attention a run measures: none, the last tokens of each text, or all sentence pairs.

What does not belong here: the layers (the study's choice) and the measuring (`mass`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from taprobe_core.errors import ConfigError

AttentionKind = Literal["off", "light", "full"]


@dataclass(frozen=True)
class AttentionMode:
    """What is measured at each attention layer.

    Attributes:
        kind: `off` nothing; `light` the mass of the last tokens on every sentence (`tail_mass`);
            `full` the sentence by sentence mass (`sentence_mass`).
        last_n: query tokens of `light`, at least 1; the other kinds do not read it.

    Raises:
        ConfigError: another kind, or `last_n` below 1.
    """

    kind: AttentionKind = "off"
    last_n: int = 4

    def __post_init__(self) -> None:
        kinds = get_args(AttentionKind)
        if self.kind not in kinds:
            raise ConfigError(
                f"attention mode {self.kind!r}", "attention.kind", f"use one of {', '.join(kinds)}"
            )
        if self.last_n < 1:
            raise ConfigError(
                f"last_n = {self.last_n}", "attention.last_n", "ask for one query token or more"
            )


OFF = AttentionMode()
"""Measure no attention."""
