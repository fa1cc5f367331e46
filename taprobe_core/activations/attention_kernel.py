"""Causal attention inside each text of a pack as one Triton kernel, CUDA in half precision.

Blocks of queries are given out by hand, the ones with most keys first, each with the ends of its
text: so no key of another text is ever loaded, and short texts fill the gaps that long ones leave.
On an H100 it takes 0.54 to 0.60 of the time of PyTorch's varlen kernel (docs/performance.md). What
does not belong here: which attention a model calls (packed_attention).

The invariant: a query's result depends on its own text alone, in an order that only its place in
the text decides; the scores never exist as a matrix.

Source: Dao (2023), FlashAttention-2, algorithm 1, forward only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from taprobe_core.activations.packing import QUERY_BLOCK, Layout

_KEYS = 64
_HOPPER = (9, 0)
"""First generation whose memory accelerator copies tiles by descriptor."""


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally within each text, all texts in one launch.

    Args:
        query: [token, head, d_head], half precision, CUDA; d_head a multiple of 8, at most 256.
        key: [token, kv_head, d_head]; query heads share key heads in groups, in order.
        value: like `key`.
        layout: where the texts lie, on the same device.
        scale: factor of the scores.

    Returns:
        [token, head, d_head] in the type of `query`, and the natural log-sum-exp of the scores,
        float32 [head, token].
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    n_tokens, n_heads, d_head = query.shape
    n_kv_heads = key.shape[1]
    width = max(16, triton.next_power_of_2(d_head))
    out = torch.empty_like(query)
    lse = torch.empty(n_heads, n_tokens, dtype=torch.float32, device=query.device)
    by_tile = torch.cuda.get_device_capability(query.device) >= _HOPPER
    sources: list[Any] = [key, value]
    if by_tile:
        flat = (states.view(n_tokens, n_kv_heads * d_head) for states in sources)
        sources = [TensorDescriptor.from_tensor(each, [_KEYS, width]) for each in flat]
    with torch.cuda.device(query.device):
        # Heads run fastest: those that share keys run together and find them in the cache.
        _attend[n_heads, len(layout.blocks)](
            query,
            key,
            value,
            *sources,
            out,
            lse,
            layout.blocks,
            n_tokens,
            scale * math.log2(math.e),
            HEADS=n_heads,
            GROUP=n_heads // n_kv_heads,
            D=d_head,
            WIDTH=width,
            QUERIES=QUERY_BLOCK,
            KEYS=_KEYS,
            BY_TILE=by_tile,
            num_warps=4,
            num_stages=3,
        )
    return out, lse


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    key_tiles,
    value_tiles,
    out,
    lse,
    blocks,
    n_tokens,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BY_TILE: tl.constexpr,
):
    head = tl.program_id(0)
    block = blocks + tl.program_id(1) * 3
    text_start, first, text_end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    kv_head = head // GROUP
    kv_row: tl.constexpr = HEADS // GROUP * D
    dims = tl.arange(0, WIDTH)[None, :]
    rows = first + tl.arange(0, QUERIES)
    own = rows[:, None].to(tl.int64) * (HEADS * D) + head * D + dims
    is_own = (rows[:, None] < text_end) & (dims < D)
    q = tl.load(query + own, mask=is_own, other=0.0)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in tl.range(text_start, first, KEYS):
        if BY_TILE:
            k = key_tiles.load([start, kv_head * D])
            v = value_tiles.load([start, kv_head * D])
        else:
            seen = start + tl.arange(0, KEYS)
            at = seen[:, None].to(tl.int64) * kv_row + kv_head * D + dims
            k = tl.load(key + at, mask=dims < D, other=0.0)
            v = tl.load(value + at, mask=dims < D, other=0.0)
        scores = tl.dot(q, k.T) * scale
        mixed, largest, total = _fold(scores, v, mixed, largest, total)
    # The queries' own keys: causal, and no further than the text, whose neighbour may hold a NaN.
    for start in tl.range(first, tl.minimum(first + QUERIES, text_end), KEYS, num_stages=1):
        seen = start + tl.arange(0, KEYS)
        at = seen[:, None].to(tl.int64) * kv_row + kv_head * D + dims
        is_text = (seen[:, None] < text_end) & (dims < D)
        k = tl.load(key + at, mask=is_text, other=0.0)
        v = tl.load(value + at, mask=is_text, other=0.0)
        scores = tl.dot(q, k.T) * scale
        scores = tl.where(rows[:, None] >= seen[None, :], scores, float("-inf"))
        mixed, largest, total = _fold(scores, v, mixed, largest, total)
    tl.store(out + own, (mixed / total[:, None]).to(q.dtype), mask=is_own)
    natural = (largest + tl.math.log2(total)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * n_tokens + rows, natural, mask=rows < text_end)


@triton.jit
def _fold(scores, v, mixed, largest, total):  # type: ignore[no-untyped-def]
    """Take a tile of scores (base 2) into the running softmax."""
    top = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.math.exp2(scores - top[:, None])
    shrink = tl.math.exp2(largest - top)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None])
    return mixed, top, total
