"""How fast a device multiplies the matrices of a transformer block: the yardstick of every pass.

In: a device, a number type, the dimensions of a block. Out: FLOP/s over products of those
dimensions with random values. What does not belong here: how much there is to multiply (cost).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import linear

from taprobe_core.activations.block_shape import BlockShape, block_weights

ACCELERATOR_ROWS = 16_384
CPU_ROWS = 512
"""Rows (tokens) of the products that `sustained_gemm_rate` measures."""

_ACCELERATOR_SECONDS, _CPU_SECONDS = 2.0, 0.3
_WARM_UP_SECONDS = 1.0
_FEWEST_ROWS = 256
_CPU_WIDTH = 1024
_CPU_PARTS = 5


def sustained_gemm_rate(
    device: torch.device,
    dtype: torch.dtype,
    shape: BlockShape,
    *,
    seconds: float | None = None,
    n_rows: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure how fast a device multiplies a block's matrices, one after the other.

    Random values, because an accelerator draws less power, and so runs faster, on zeros; long
    enough for its clock to settle. On a CPU the fastest fifth of the time counts, because other
    work on the machine only ever slows it down; and a wide block is measured narrowed to a d_model
    of 1,024: the rate of its products hardly depends on their width there.

    Args:
        device: where.
        dtype: type that the model computes in.
        shape: of a block.
        seconds: to measure, after warming up; None for 2 on an accelerator and 0.3 on a CPU.
        n_rows: tokens in a product; None for `ACCELERATOR_ROWS` or `CPU_ROWS`, halved where the
            memory does not take them.
        clock: seconds; on a CPU that is shared, `time.process_time` of one thread.

    Returns:
        FLOP/s, two operations for each weight and row.

    Raises:
        torch.OutOfMemoryError: not even 256 rows fit.
    """
    on_cpu = device.type == "cpu"
    wanted_s = seconds or (_CPU_SECONDS if on_cpu else _ACCELERATOR_SECONDS)
    rows = n_rows or (CPU_ROWS if on_cpu else ACCELERATOR_ROWS)
    measured = _narrowed(shape) if on_cpu else shape
    while True:
        try:
            round_s = _round_seconds(device, dtype, measured, rows, wanted_s, clock)
        except torch.OutOfMemoryError:
            if rows <= _FEWEST_ROWS:
                raise
            rows = max(_FEWEST_ROWS, rows // 2)
        else:
            return 2 * block_weights(measured) * rows / round_s


def _round_seconds(
    device: torch.device,
    dtype: torch.dtype,
    shape: BlockShape,
    n_rows: int,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    """Seconds of one round over a block's products, from about `seconds` of them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows = {n_in: normal(n_rows, n_in) for n_in, _ in shape.products}
    weights = [normal(n_out, n_in) * n_in**-0.5 for n_in, n_out in shape.products]

    def run(n_rounds: int) -> float:
        _synchronize(device)
        start = clock()
        for _ in range(n_rounds):
            for weight in weights:
                linear(rows[weight.shape[1]], weight)
        _synchronize(device)
        return clock() - start

    with torch.inference_mode():
        first_s = run(1)
        if first_s >= seconds and device.type == "cpu":
            return first_s  # a type that this CPU is slow at: what is measured is clear already
        round_s = max(run(1), 1e-6)  # the first calls chose kernels and took memory
        if device.type == "cpu":
            n_rounds = math.ceil(seconds / round_s / _CPU_PARTS)
            return max(min(run(n_rounds) for _ in range(_CPU_PARTS)), 1e-9) / n_rounds
        n_warm = math.ceil(_WARM_UP_SECONDS / round_s)
        round_s = max(run(n_warm) / n_warm, 1e-6)
        n_rounds = math.ceil(seconds / round_s)
        return max(run(n_rounds), 1e-9) / n_rounds


def _narrowed(shape: BlockShape) -> BlockShape:
    """The block at a d_model of `_CPU_WIDTH`, in its proportions; widths stay multiples of 64."""
    part = _CPU_WIDTH / shape.d_model
    if part >= 1:
        return shape
    return replace(
        shape,
        d_model=_CPU_WIDTH,
        d_mlp=max(64, 64 * round(shape.d_mlp * part / 64)),
        n_heads=max(1, round(shape.n_heads * part)),
        n_kv_heads=max(1, round(shape.n_kv_heads * part)),
    )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
