"""Which rows a fit sees and how its attention is scored, where a sweep varies them.

What does not belong here: the scores of an attention variant (`attention.tables`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.study.sweep import AttentionVariant

if TYPE_CHECKING:
    from taprobe_core.probes.features import ProbeData, TokenSets


class View(NamedTuple):
    """One way to look at the rows of a site and setting.

    Attributes:
        drop_last_sentence: leave the last labelled sentence of every problem out, also from the
            ranking that makes anchors. Position features stay those of the whole trace.
        attention: the variant that scores vertical attention; None for the study's own scores.
    """

    drop_last_sentence: bool = False
    attention: AttentionVariant | None = None

    def content(self, attention_mode: str) -> dict[str, Any]:
        """What of it decides scores; nothing for the study's own view."""
        found: dict[str, Any] = {}
        if self.drop_last_sentence:
            found["drop_last_sentence"] = True
        if self.attention is not None:
            found["attention"] = self.attention.content(attention_mode)
        return found


WHOLE = View()
"""The study's own."""


def kept_rows(data: ProbeData, view: View) -> NDArray[np.intp]:
    """Return the rows that a view shows, ascending."""
    if not view.drop_last_sentence:
        return np.arange(len(data.texts))
    return np.flatnonzero(np.diff(data.problem_id, append=-1) == 0)


def with_attention(data: ProbeData, scores: pl.DataFrame) -> ProbeData:
    """Return the features with other attention scores, in the one column that there then is.

    Args:
        data: the features.
        scores: `tables.ATTENTION_SCORES` of every row.
    """
    on = ["problem_id", "sentence_idx"]
    column = data.keys.join(scores, on=on, how="left", maintain_order="left")["attention_score"]
    block = column.to_numpy().astype(np.float32)[:, None]
    return replace(data, vertical_attention=block, attention_columns=(column.name,))


def take_rows(data: ProbeData, rows: NDArray[np.intp]) -> ProbeData:
    """Return some rows of joined features.

    Args:
        data: the features.
        rows: ascending.
    """
    if len(rows) == len(data.texts):
        return data
    attention, tokens = data.vertical_attention, data.tokens
    return replace(
        data,
        labels=data.labels[rows],
        texts=[data.texts[row] for row in rows],
        position=data.position[rows],
        causal_position=data.causal_position[rows],
        activations={name: block[rows] for name, block in data.activations.items()},
        tokens=None if tokens is None else _take_tokens(tokens, rows),
        vertical_attention=None if attention is None else attention[rows],
    )


def _take_tokens(tokens: TokenSets, rows: NDArray[np.intp]) -> TokenSets:
    from taprobe_core.probes.features import TokenSets

    lengths = np.diff(tokens.offsets)
    is_kept = np.zeros(len(lengths), dtype=bool)
    is_kept[rows] = True
    offsets = np.concatenate(([0], np.cumsum(lengths[rows])))
    return TokenSets(tokens.values[np.repeat(is_kept, lengths)], offsets)
