"""Spans to tiles: which sentences a range of tokens touches, and which token belongs to which.

What does not belong here: attention. A tile's bounds are plain integers, so that a loop over tiles
never asks the device for a number; its membership matrix lies on the device before the loop starts.

The invariant: whatever the tiles, each token of each span is a member once in exactly one of the
tiles that divide the text. Spans may leave gaps, may overlap, and may stand in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from taprobe_core.errors import SpanError

Spans = torch.Tensor | Sequence[tuple[int, int]]
Bounds = npt.NDArray[np.int64]


class Tile(NamedTuple):
    """A range of tokens and the sentences that have a token in it.

    Attributes:
        start: first token.
        stop: token after the last.
        first: first sentence of the smallest range that holds every sentence touched.
        end: sentence after the last; equal to `first` where no sentence is touched.
        member: float32 [end - first, stop - start], 1 where the token is in the sentence, else 0.
    """

    start: int
    stop: int
    first: int
    end: int
    member: torch.Tensor

    def until(self, token: int) -> Tile:
        """Return the part of the tile before `token`; itself when it stops there or before."""
        if token >= self.stop:
            return self
        return self._replace(stop=token, member=self.member[:, : token - self.start])


def span_bounds(spans: Spans, n_tokens: int) -> Bounds:
    """Check spans against a text.

    Args:
        spans: half-open token ranges, [sentence, 2], on the CPU; gaps and overlaps are allowed.
        n_tokens: tokens of the text.

    Returns:
        The ranges, int64 [sentence, 2].

    Raises:
        SpanError: there is no span, or a span is empty or outside the text; names the first.
    """
    bounds = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    is_bad = (bounds[:, 0] < 0) | (bounds[:, 0] >= bounds[:, 1]) | (bounds[:, 1] > n_tokens)
    if len(bounds) and not is_bad.any():
        return bounds
    first = int(is_bad.argmax()) if len(bounds) else 0
    found = f"token range {bounds[first].tolist()}" if len(bounds) else "no token range"
    raise SpanError(
        f"{found} in a text of {n_tokens} tokens: empty or outside",
        f"sentence {first}",
        "build the spans again with the model's own tokenizer",
    )


def touched_ranges(bounds: Bounds, n_tokens: int, size: int) -> list[tuple[int, int]]:
    """Divide the text every `size` tokens and shrink each part to the tokens that spans cover.

    Args:
        bounds: half-open token ranges, [sentence, 2].
        n_tokens: tokens of the text.
        size: most tokens of a part.

    Returns:
        Half-open token ranges in text order; parts without a span are left out.
    """
    ranges = []
    for start in range(0, n_tokens, size):
        stop = min(start + size, n_tokens)
        inside = bounds[(bounds[:, 0] < stop) & (bounds[:, 1] > start)]
        if len(inside):
            ranges.append((max(start, int(inside[:, 0].min())), min(stop, int(inside[:, 1].max()))))
    return ranges


def cut(bounds: Bounds, ranges: Sequence[tuple[int, int]], device: torch.device) -> list[Tile]:
    """Make the tile of each token range.

    Args:
        bounds: half-open token ranges of the sentences, [sentence, 2], at least one.
        ranges: half-open token ranges, at least one.
        device: where the membership matrices go.

    Returns:
        One tile per range, in order. The matrices are views of one tensor of
        tiles x most sentences x most tokens, float32.
    """
    tokens = np.asarray(ranges, dtype=np.int64)
    starts, stops = tokens[:, :1], tokens[:, 1:]
    touches = (bounds[:, 0] < stops) & (bounds[:, 1] > starts)
    first = touches.argmax(axis=1)
    end = np.where(touches.any(axis=1), len(bounds) - touches[:, ::-1].argmax(axis=1), first)
    sentence = first[:, None] + np.arange((end - first).max())
    known = bounds[np.minimum(sentence, len(bounds) - 1)] - starts[..., None]
    edges = _to_device(np.where((sentence < end[:, None])[..., None], known, 0), device)
    position = torch.arange(int((stops - starts).max()), device=device)
    member = ((position >= edges[..., :1]) & (position < edges[..., 1:])).float()
    return [
        Tile(start, stop, a, b, member[index, : b - a, : stop - start])
        for index, ((start, stop), a, b) in enumerate(
            zip(tokens.tolist(), first.tolist(), end.tolist(), strict=True)
        )
    ]


def _to_device(values: Bounds, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory would wait for all work that the device still has to do.
    return tensor.pin_memory().to(device, non_blocking=True)
