"""The memory-bound steps of a pass as one kernel each: Triton, CUDA only.

Written out as tensor operations each of these reads and writes its states several times over, and a
pass spends as long on them as on a fifth of its matrix products. Arithmetic is float32 inside a
kernel and rounded once, at the end. What does not belong here: the order of the steps (fused).

The invariant: no result depends on what else is in the pack; a NaN comes out as NaN.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl


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
