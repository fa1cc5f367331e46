"""The first layer of many networks on CUDA: rows are read where they lie, weights stepped at once.

A gathered minibatch and a gradient would be written only to be read again, and the step is bound by
memory: together that is a third of what it moves. Triton. What does not belong here: the same in
PyTorch (`batch`), to which this is equal but for rounding.

Invariant: float32 sums; factors have ten bits of mantissa where PyTorch's products may have them
(`torch.backends.cuda.matmul.allow_tf32`), else three products on the tensor cores make up for the
rounding (Ootomo and Yokota 2022), with errors like those of float32 factors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_READ = {"ROWS": 128, "UNITS": 128, "FEATURES": 64, "num_warps": 8, "num_stages": 3}
_STEP = {
    "tf32": {"ROWS": 64, "UNITS": 128, "FEATURES": 64, "num_warps": 8, "num_stages": 1},
    "tf32x3": {"ROWS": 32, "UNITS": 128, "FEATURES": 64, "num_warps": 4, "num_stages": 1},
}
"""Sizes of the tiles, chosen by measurement on an H100."""


class AdamStep(NamedTuple):
    """One step of Adam, for each weight w -= size * m / (sqrt(v) / root + eps).

    Attributes:
        size: learning rate over the correction of the first moment.
        root: square root of the correction of the second moment.
        eps: added to the corrected root.
        betas: of the running moments.
    """

    size: float
    root: float
    eps: float
    betas: tuple[float, float]


def read_first_layer(
    X: torch.Tensor, at: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return the first hidden layer of every model, after ReLU.

    Args:
        X: [row, feature] float32.
        at: [model, batch] int64, rows of `X`.
        weight: [model, unit, feature] float32.
        bias: [model, 1, unit] float32.

    Returns:
        [model, batch, unit] float32.
    """
    n_models, n_rows = at.shape
    n_units, n_features = weight.shape[1:]
    out = torch.empty(n_models, n_rows, n_units, device=X.device)
    # Blocks of one model's rows stand next to each other and find its weights in the cache.
    grid = (triton.cdiv(n_rows, _READ["ROWS"]), triton.cdiv(n_units, _READ["UNITS"]), n_models)
    _read_first_layer[grid](
        X, at.contiguous(), weight, bias, out, n_rows, n_units,
        D=n_features, PRECISION=_precision(), **_READ,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("n_rows", "n_units"))  # type: ignore[untyped-decorator]
def _read_first_layer(  # type: ignore[no-untyped-def]
    X, at, weight, bias, out, n_rows, n_units,
    D: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    feature = tl.arange(0, FEATURES)
    is_row, is_unit = row < n_rows, unit < n_units
    source = tl.load(at + model * n_rows + row, mask=is_row, other=0)
    x_at = X + source[:, None] * D + feature[None, :]
    w_at = weight + (model * n_units + unit)[None, :] * D + feature[:, None]
    total = tl.zeros([ROWS, UNITS], tl.float32)
    for start in range(0, D, FEATURES):
        is_feature = start + feature < D
        x = tl.load(x_at + start, mask=is_row[:, None] & is_feature[None, :], other=0.0)
        w = tl.load(w_at + start, mask=is_unit[None, :] & is_feature[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    total += tl.load(bias + model * n_units + unit, mask=is_unit, other=0.0)[None, :]
    place = (model * n_rows + row)[:, None] * n_units + unit[None, :]
    tl.store(out + place, tl.maximum(total, 0.0), mask=is_row[:, None] & is_unit[None, :])


def step_first_layer(
    X: torch.Tensor,
    at: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    decay: torch.Tensor,
    adam: AdamStep,
) -> None:
    """Step the weights of the first layer; their gradient is never written.

    Args:
        X: [row, feature] float32.
        at: [model, batch] int64, rows of `X`.
        delta: [model, batch, unit] float32, gradient for the layer before ReLU.
        weight: [model, unit, feature] float32, stepped.
        moments: running mean of the gradient and of its square, like `weight`, updated.
        decay: [model], times the weights, part of the gradient.
        adam: the step.
    """
    n_models, n_rows = at.shape
    n_units, n_features = weight.shape[1:]
    tiles = _STEP[_precision()]
    grid = (
        triton.cdiv(n_features, tiles["FEATURES"]),
        triton.cdiv(n_units, tiles["UNITS"]),
        n_models,
    )
    # The tensor cores read float32 along the axis that is summed over: the rows.
    rows_last = delta.transpose(1, 2).contiguous()
    _step_first_layer[grid](
        X, at.contiguous(), rows_last, weight, *moments, decay.contiguous(), n_rows, n_units,
        adam.size, adam.root, adam.eps, BETA_1=adam.betas[0], BETA_2=adam.betas[1],
        D=n_features, PRECISION=_precision(), **tiles,
    )  # fmt: skip


@triton.jit(do_not_specialize=("n_rows", "n_units"))  # type: ignore[untyped-decorator]
def _step_first_layer(  # type: ignore[no-untyped-def]
    X, at, delta, weight, mean, square, decay, n_rows, n_units, size, root, eps,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    model = tl.program_id(2).to(tl.int64)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    is_feature, is_unit = feature < D, unit < n_units
    total = tl.zeros([FEATURES, UNITS], tl.float32)
    for start in range(0, n_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < n_rows
        source = tl.load(at + model * n_rows + row, mask=is_row, other=0)
        x_at = X + source[:, None] * D + feature[None, :]
        x = tl.load(x_at, mask=is_row[:, None] & is_feature[None, :], other=0.0)
        d_at = delta + (model * n_units + unit)[None, :] * n_rows + row[:, None]
        d = tl.load(d_at, mask=is_unit[None, :] & is_row[:, None], other=0.0)
        # The other way round, both factors would have to be turned.
        total = tl.dot(tl.trans(x), d, total, input_precision=PRECISION)
    place = (model * n_units + unit)[:, None] * D + feature[None, :]
    is_own = is_unit[:, None] & is_feature[None, :]
    w = tl.load(weight + place, mask=is_own, other=0.0)
    g = tl.trans(total) + tl.load(decay + model) * w
    m = tl.load(mean + place, mask=is_own, other=0.0)
    m += (1 - BETA_1) * (g - m)
    tl.store(mean + place, m, mask=is_own)
    v = tl.load(square + place, mask=is_own, other=0.0)
    v = BETA_2 * v + (1 - BETA_2) * g * g
    tl.store(square + place, v, mask=is_own)
    tl.store(weight + place, w - size * m / (tl.sqrt(v) / root + eps), mask=is_own)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
