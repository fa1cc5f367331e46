"""What is to be run: one task per text, made from the tables of the spans stage.

What does not belong here: running (extract). A task without layers is not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from taprobe_core.errors import SpanError


@dataclass(frozen=True)
class TextTask:
    """One text, and what is wanted of it.

    Attributes:
        problem_id: the problem.
        token_ids: BOS first where the model has one, [token].
        spans: half-open token range of each sentence, in sentence_idx order.
        layers: blocks whose pooled output is wanted, in any order.
        attention_layers: blocks whose vertical attention is wanted.
        input_sha256: `texts.input_sha256`; goes with the result.
    """

    problem_id: int
    token_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]
    layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()
    input_sha256: str = ""

    @property
    def deepest(self) -> int:
        """The last block that has to run."""
        return max((*self.layers, *self.attention_layers))


def tasks_of(
    texts: pl.DataFrame,
    spans: pl.DataFrame,
    layers: Mapping[int, Sequence[int]],
    attention_layers: Mapping[int, Sequence[int]] | None = None,
) -> list[TextTask]:
    """Return a task for every problem that wants a layer.

    Args:
        texts: `tables.TEXTS`.
        spans: `tables.SPANS`.
        layers: problem_id to the layers whose activations are missing.
        attention_layers: problem_id to the layers whose vertical attention is missing.

    Raises:
        SpanError: a problem has no text or no spans.
    """
    attention_layers = attention_layers or {}
    wanted = [
        problem_id
        for problem_id in sorted({*layers, *attention_layers})
        if layers.get(problem_id) or attention_layers.get(problem_id)
    ]
    ranges = spans.sort("sentence_idx").group_by("problem_id").agg("start_token", "end_token")
    joined = texts.filter(pl.col("problem_id").is_in(wanted)).join(ranges, on="problem_id")
    absent = sorted(set(wanted) - set(joined["problem_id"]))
    if absent:
        raise SpanError(
            f"problems {absent} have no text or no spans",
            "tables 'texts' and 'spans'",
            "build the spans again, or leave these problems out",
        )
    return [
        TextTask(
            row["problem_id"],
            row["token_ids"],
            list(zip(row["start_token"], row["end_token"], strict=True)),
            tuple(sorted(set(layers.get(row["problem_id"], ())))),
            tuple(sorted(set(attention_layers.get(row["problem_id"], ())))),
            row["input_sha256"],
        )
        for row in joined.sort("problem_id").iter_rows(named=True)
    ]
