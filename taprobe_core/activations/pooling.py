"""Token states to sentence means, and means to the number type they are kept in.

What does not belong here: where the states come from (forward). Spans may overlap, may leave gaps,
and may stand in any order.

The invariant: a mean depends on the tokens of its own span alone, so a bad token cannot spoil
another sentence; sums are float32 whatever the model computes in; a kept value is finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import embedding_bag

from taprobe_core.errors import NonFiniteError, SpanError

Storage = Literal["float16", "float32"]

FLOAT16_MAX = 65504.0
"""Largest finite float16."""


class SpanIndex(NamedTuple):
    """Spans as a flat list of tokens: span i is tokens[starts[i]:starts[i + 1]].

    Attributes:
        tokens: int64, [number of tokens in all spans].
        starts: int64, [span].
    """

    tokens: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device) -> SpanIndex:
        """Return the index on `device`."""
        return SpanIndex(self.tokens.to(device), self.starts.to(device))


def span_index(spans: torch.Tensor | Sequence[tuple[int, int]], n_tokens: int) -> SpanIndex:
    """Check spans against a text and return their index, on the CPU.

    Args:
        spans: half-open token ranges, [span, 2], integers.
        n_tokens: tokens of the text.

    Raises:
        SpanError: there is no span, or a span is empty or outside the text; names the first.
    """
    ranges = torch.as_tensor(spans, dtype=torch.int64, device="cpu").reshape(-1, 2)
    start, end = ranges.unbind(1)
    bad = (start < 0) | (end > n_tokens) | (start >= end)
    if not len(ranges) or bad.any():
        first = int(bad.to(torch.int8).argmax()) if len(ranges) else 0
        found = f"token range {ranges[first].tolist()}" if len(ranges) else "no token range"
        raise SpanError(
            f"{found} in a text of {n_tokens} tokens: empty or outside",
            f"sentence {first}",
            "build the spans again with the model's own tokenizer",
        )
    lengths = end - start
    starts = lengths.cumsum(0) - lengths
    tokens = torch.arange(int(lengths.sum())) + (start - starts).repeat_interleave(lengths)
    return SpanIndex(tokens, starts)


def span_means(
    hidden: torch.Tensor, spans: torch.Tensor | Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Average the hidden state over each span.

    Args:
        hidden: states of one text, [token, d_model], any float type.
        spans: half-open token ranges, [span, 2]; may overlap.

    Returns:
        [span, d_model], float32, on the device of `hidden`, in the order of `spans`.

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.

    Example:
        >>> span_means(torch.tensor([[1.0], [3.0], [8.0]]), [(0, 2), (1, 3)]).tolist()
        [[2.0], [5.5]]
    """
    return bag_means(hidden, span_index(spans, len(hidden)))


def bag_means(hidden: torch.Tensor, index: SpanIndex) -> torch.Tensor:
    """Average the hidden state over each span of a checked index; see `span_means`."""
    # A bag of tokens is summed in a fixed order: equal runs give equal bits, which an atomic
    # index_add does not promise, and a matrix product would spread one NaN over every sentence.
    tokens, starts = index.to(hidden.device)
    return embedding_bag(tokens, hidden.float(), starts, mode="mean")


def to_storage(
    means: torch.Tensor, storage: Storage, *, where: str | None = None
) -> tuple[torch.Tensor, Storage]:
    """Cast sentence means to the type they are kept in.

    Means that float16 cannot hold stay float32: a clipped or infinite value would be a wrong one.

    Args:
        means: [sentence, d_model], float32.
        storage: the type asked for.
        where: problem and layer, for the message.

    Returns:
        The means, and the type that they have: `storage`, or `float32` where a magnitude is above
        `FLOAT16_MAX`.

    Raises:
        NonFiniteError: a mean is NaN or infinite; names the first sentence and dimension.
    """
    largest = max_abs(means)
    # The maximum carries NaN along, so it is finite only when every value is.
    if not largest < float("inf"):
        raise _non_finite(means, where)
    if storage == "float16" and largest <= FLOAT16_MAX:
        return means.to(torch.float16), "float16"
    return means.to(torch.float32), "float32"


def max_abs(means: torch.Tensor) -> float:
    """Return the largest magnitude, NaN if any value is; 0 for an empty tensor."""
    return float(means.abs().amax()) if means.numel() else 0.0


def _non_finite(means: torch.Tensor, where: str | None) -> NonFiniteError:
    bad = ~torch.isfinite(means)
    sentence, dimension = (int(at) for at in bad.nonzero()[0])
    return NonFiniteError(
        f"{int(bad.any(dim=1).sum())} of {len(means)} sentence means are not finite, first "
        f"{float(means[sentence, dimension])} at sentence {sentence}, dimension {dimension}",
        f"{where}, sentence {sentence}" if where else f"sentence {sentence}",
        "set the model's dtype to bfloat16 or float32; float16 overflows above 65504",
    )
