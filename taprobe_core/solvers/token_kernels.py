"""The memory-bound steps of token probes as one kernel each: Triton, CUDA only.

What does not belong here: the same steps in PyTorch (`token_states`, `token_optimiser`), of which
these are equal but for rounding, and where they are chosen.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def read_states(
    values: torch.Tensor, rows: torch.Tensor, centre: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """Gather states and scale them, (x - centre) * inverse.

    Args:
        values: [state, d], float16, bfloat16 or float32.
        rows: [token] int64, of `values`.
        centre: [d] float32.
        inverse: [d] float32.

    Returns:
        [token, d] float32.
    """
    n_features = values.shape[1]
    out = torch.empty(len(rows), n_features, device=values.device)
    grid = (len(rows), triton.cdiv(n_features, _BLOCK))
    _read[grid](values, rows, centre, inverse, out, D=n_features, BLOCK=_BLOCK)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _read(values, rows, centre, inverse, out, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < D
    state = tl.load(values + tl.load(rows + token) * D + at, mask=is_in).to(tl.float32)
    scaled = (state - tl.load(centre + at, mask=is_in)) * tl.load(inverse + at, mask=is_in)
    tl.store(out + token * D + at, scaled, mask=is_in)


def step_first_layer(
    weight: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    scaling: tuple[torch.Tensor, torch.Tensor],
    scaled: tuple[torch.Tensor, torch.Tensor],
    n_steps: torch.Tensor,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take the gradient through the fold's scaling, step AdamW, and scale the new weights.

    In PyTorch that is five passes over the weights and their state more.

    Args:
        weight: [model, width, d] float32, stepped.
        moments: running mean of the gradient and of its square, like `weight`, updated.
        gradient: like `weight`, for the weights as scaled.
        bias_gradient: [model, width], of the layer's bias.
        scaling: mean [model, d] and inverse [model, 1, d] of each model's fold.
        scaled: weights times inverse, like `weight`, and their product with the mean,
            [model, width]; overwritten.
        n_steps: one float32, steps taken with this one.
        learning_rate: of AdamW.
        weight_decay: of AdamW, decoupled.
        betas: of AdamW.
        eps: of AdamW.
    """
    n_models, width, n_features = weight.shape
    _step[(n_models * width,)](
        weight,
        *moments,
        gradient,
        bias_gradient,
        *scaling,
        *scaled,
        n_steps,
        learning_rate,
        1 - learning_rate * weight_decay,
        eps,
        WIDTH=width,
        D=n_features,
        BETA_1=betas[0],
        BETA_2=betas[1],
        LOG_BETA_1=math.log(betas[0]),
        LOG_BETA_2=math.log(betas[1]),
        BLOCK=min(_BLOCK, triton.next_power_of_2(n_features)),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    weight,
    mean,
    square,
    gradient,
    bias_gradient,
    fold_mean,
    fold_inverse,
    scaled,
    shift,
    n_steps,
    learning_rate,
    shrink,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    LOG_BETA_1: tl.constexpr,
    LOG_BETA_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    own = row.to(tl.int64) * D
    fold = (row // WIDTH).to(tl.int64) * D
    # In float32, 1 - 0.999 ** t would lose a thousandth part of its digits at the start.
    t = tl.load(n_steps).to(tl.float64)
    step = (learning_rate / (1 - tl.exp(t * LOG_BETA_1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(t * LOG_BETA_2)).to(tl.float32)
    to_bias = tl.load(bias_gradient + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_in = at < D
        centre = tl.load(fold_mean + fold + at, mask=is_in, other=0.0)
        inverse = tl.load(fold_inverse + fold + at, mask=is_in, other=0.0)
        g = tl.load(gradient + own + at, mask=is_in, other=0.0)
        g = (g - to_bias * centre) * inverse
        m = tl.load(mean + own + at, mask=is_in, other=0.0)
        v = tl.load(square + own + at, mask=is_in, other=0.0)
        m += (1 - BETA_1) * (g - m)
        v = BETA_2 * v + (1 - BETA_2) * g * g
        w = tl.load(weight + own + at, mask=is_in, other=0.0) * shrink
        w -= step * m / (tl.sqrt(v) / root + eps)
        tl.store(mean + own + at, m, mask=is_in)
        tl.store(square + own + at, v, mask=is_in)
        tl.store(weight + own + at, w, mask=is_in)
        folded = w * inverse
        tl.store(scaled + own + at, folded, mask=is_in)
        total += folded * centre
    tl.store(shift + row, tl.sum(total, 0))
