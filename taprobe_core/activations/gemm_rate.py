"""The dimensions of a transformer block, and how fast a device multiplies its matrices.

In: a configuration. Out: widths and heads, from which every count of operations and bytes follows.
In: a device, a number type and those dimensions. Out: FLOP/s over products with random values, the
yardstick of every pass. What does not belong here: how much there is to multiply (`cost`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_PLAIN = frozenset({"gpt2"})


@dataclass(frozen=True)
class BlockShape:
    """Dimensions of one transformer block.

    Attributes:
        d_model: width of the residual stream.
        d_mlp: width inside the MLP.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        d_head: width of a head.
        gated: whether the MLP has a gate beside its two matrices.
    """

    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    gated: bool

    @classmethod
    def of(cls, config: Any) -> BlockShape:
        """Return the shape that a transformers configuration states.

        Of an architecture that `is_known` does not know it is a guess: a gated MLP, the same in
        every block.

        Args:
            config: of a decoder-only model, or of one with such a part (`get_text_config`).
        """
        text = config.get_text_config()
        d_model, n_heads = int(text.hidden_size), count_of(text, "num_attention_heads") or 1
        d_mlp = count_of(text, "intermediate_size") or count_of(text, "n_inner")
        return cls(
            d_model=d_model,
            d_mlp=d_mlp or 4 * d_model,
            n_heads=n_heads,
            n_kv_heads=count_of(text, "num_key_value_heads") or n_heads,
            d_head=count_of(text, "head_dim") or d_model // n_heads,
            gated=text.model_type not in _PLAIN,
        )

    @classmethod
    def assumed(cls, d_model: int) -> BlockShape:
        """Return a block of 12 · d_model² weights, for a model of which only the width is known.

        Its heads are 128 wide where that divides the width, as in most models; else it has one.
        """
        d_head = 128 if d_model % 128 == 0 else d_model
        n_heads = d_model // d_head
        return cls(d_model, 4 * d_model, n_heads, n_heads, d_head, gated=False)

    @property
    def d_attn(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.d_head

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each matrix: q, k, v, o, gate if there is one, up, down."""
        d_kv = self.n_kv_heads * self.d_head
        n_into_mlp = 2 if self.gated else 1
        return (
            (self.d_model, self.d_attn),
            (self.d_model, d_kv),
            (self.d_model, d_kv),
            (self.d_attn, self.d_model),
            *((self.d_model, self.d_mlp),) * n_into_mlp,
            (self.d_mlp, self.d_model),
        )


def count_of(config: Any, name: str) -> int | None:
    """Return a count of a configuration; the largest where it says one for each block.

    Args:
        config: of transformers.
        name: of the count; None is returned where it is not said.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # A configuration of unlike blocks says it of each block alone.
        value = [getattr(each, name, None) for each in config.per_layer_config]
    if isinstance(value, (list, tuple)):
        value = max((each for each in value if each), default=None)
    return int(value) if isinstance(value, (int, float)) else None


def is_known(config: Any) -> bool:
    """Whether `BlockShape.of` is exact for a configuration's architecture."""
    return config.get_text_config().model_type in _GATED | _PLAIN


def block_weights(shape: BlockShape) -> int:
    """Return the weights of a block's matrices; biases and norms are left out."""
    return sum(n_in * n_out for n_in, n_out in shape.products)


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
    import torch

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
    import torch
    from torch.nn.functional import linear

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
        import torch

        torch.accelerator.synchronize(device)
