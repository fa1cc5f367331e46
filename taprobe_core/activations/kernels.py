"""The steps of a pass as one Triton kernel each, CUDA only: memory-bound ones, and attention.

Written out as tensor operations each memory-bound step reads and writes its states several times
over, and a pass spends as long on them as on a fifth of its matrix products. Arithmetic is float32
inside a kernel and rounded once, at the end.

Attention is causal inside each text of a pack, in half precision. Blocks of queries are given out
by hand, the ones with most keys first, each with the ends of its text: so no key of another text is
ever loaded, and short texts fill the gaps that long ones leave; docs/performance.md has its time
beside PyTorch's varlen kernel.

What does not belong here: the order of the steps (`fused`), which attention a model calls
(`packed_attention`). The invariant: no result depends on what else is in the pack; a query's result
is summed in an order that only its place in the text decides, and scores never exist as a matrix; a
NaN comes out as NaN.

Source: Dao (2023), FlashAttention-2, algorithm 1, forward only.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from taprobe_core.activations.packing import QUERY_BLOCK, Layout


def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square normalisation of each row, times a weight (Zhang and Sennrich 2019).

    Args:
        states: [token, d_model], contiguous, any float type.
        weight: [d_model].
        epsilon: added to the mean square.

    Returns:
        Like `states`, new.
    """
    out = torch.empty_like(states)
    n_tokens, d_model = states.shape
    block = triton.next_power_of_2(d_model)
    with torch.cuda.device(states.device):
        _rms_norm[n_tokens,](states, weight, out, d_model, epsilon, BLOCK=block, num_warps=8)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(states, weight, out, d_model, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * d_model
    columns = tl.arange(0, BLOCK)
    inside = columns < d_model
    values = tl.load(states + start + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / d_model + epsilon)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, values * scale * factors, mask=inside)


def silu_times_(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Put silu(gate) · up into `gate` (the SwiGLU of Shazeer 2020) and return it.

    Args:
        gate: [token, d_mlp], contiguous.
        up: like `gate`.
    """
    n_values = gate.numel()
    block = 2048
    grid = (triton.cdiv(n_values, block),)
    with torch.cuda.device(gate.device):
        _silu_times[grid](gate, up, n_values, BLOCK=block, num_warps=8)
    return gate


@triton.jit  # type: ignore[untyped-decorator]
def _silu_times(gate, up, n_values, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_values
    values = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gate + at, values * tl.sigmoid(values) * factors, mask=inside)


def rotate_(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding (Su et al. 2021, halves paired as in Llama) in place.

    Args:
        states: queries or keys, [token, head, d_head], contiguous.
        cos: float32 [token, d_head / 2].
        sin: like `cos`.
    """
    n_tokens, n_heads, d_head = states.shape
    heads = triton.next_power_of_2(n_heads)
    half = d_head // 2
    with torch.cuda.device(states.device):
        _rotate[n_tokens,](states, cos, sin, n_heads, HALF=half, HEADS=heads, num_warps=4)
    return states


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(states, cos, sin, n_heads, HALF: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)
    at = states + token * n_heads * 2 * HALF + heads * 2 * HALF + pairs[None, :]
    inside = (heads < n_heads) & (pairs[None, :] < HALF)
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + pairs)[None, :]
    s = tl.load(sin + token * HALF + pairs)[None, :]
    tl.store(at, first * c - second * s, mask=inside)
    tl.store(at + HALF, second * c + first * s, mask=inside)


def reduce_spans(
    hidden: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, pooling: Literal["mean", "max"]
) -> torch.Tensor:
    """Mean or maximum over each span of tokens, summed in float32 in the order of the tokens.

    Args:
        hidden: [token, d_model], contiguous.
        starts: int64 [span], first token.
        ends: int64 [span], token after the last; above `starts`.
        pooling: which.

    Returns:
        [span, d_model]: mean float32, maximum in the type of `hidden`.
    """
    is_mean = pooling == "mean"
    d_model = hidden.shape[1]
    out: Any = torch.empty(
        (len(starts), d_model),
        dtype=torch.float32 if is_mean else hidden.dtype,
        device=hidden.device,
    )
    grid = (len(starts), triton.cdiv(d_model, 512))
    with torch.cuda.device(hidden.device):
        _reduce[grid](hidden, starts, ends, out, d_model, ROWS=4, COLUMNS=512, IS_MEAN=is_mean)
    return torch.as_tensor(out)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    hidden,
    starts,
    ends,
    out,
    d_model,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_MEAN: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(starts + span)
    end = tl.load(ends + span)
    empty = 0.0 if IS_MEAN else float("-inf")
    # One partial result for every row of a tile, joined once at the end: a sum across rows inside
    # the loop would make the warps wait for each other at every step.
    partial = tl.full([ROWS, COLUMNS], empty, tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = hidden + rows[:, None] * d_model + columns[None, :]
        inside = (rows[:, None] < end) & (columns[None, :] < d_model)
        tile = tl.load(at, mask=inside, other=empty).to(tl.float32)
        if IS_MEAN:
            partial += tile
        else:
            partial = tl.maximum(partial, tile, propagate_nan=tl.PropagateNan.ALL)
    if IS_MEAN:
        result = tl.sum(partial, axis=0) / (end - start).to(tl.float32)
    else:
        # A reduction drops NaN; it must come out, so that it is refused.
        bad = tl.max((partial != partial).to(tl.int32), axis=0) > 0
        result = tl.where(bad, float("nan"), tl.max(partial, axis=0))
    tl.store(out + span * d_model + columns, result, mask=columns < d_model)


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
