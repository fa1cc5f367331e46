"""The steps of a block on a CPU: those of the library, in its order, in memory that a pass keeps.

A block of the library makes a dozen new tensors of all tokens, and each time the kernel hands their
memory out page by page, zeroed: a tenth of a pass of a small model. Here a pass has one buffer for
each purpose, and works in place where that is possible. What does not belong here: the order of the
steps (fused), attention (packed_attention).

The invariant: every value is rounded where the library rounds it, so the bits are the library's;
each text's matrix products are its own, since a BLAS library may give a row other bits among more
rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from taprobe_core.activations.packing import Layout


class HostSteps:
    """Steps of one pass, with its buffers; see `fused.Steps`.

    Args:
        layout: where the texts of the pass lie.
    """

    def __init__(self, layout: Layout) -> None:
        self._bounds = layout.bounds
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def rotary(
        self, model: Any, hidden: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [token, 1, d_head] in the type of the states."""
        cos, sin = model.rotary_emb(hidden[None], layout.positions)
        return cos[0, :, None], sin[0, :, None]

    def rms_norm(self, hidden: torch.Tensor, norm: Any) -> torch.Tensor:
        """Root-mean-square normalisation of each row, times a weight, [token, d_model].

        Args:
            hidden: [token, d_model].
            norm: the library's module.

        Returns:
            In a buffer that the next call and `add_product_` overwrite.
        """
        out = self._buffer("normed", hidden.shape, hidden.dtype)
        if hidden.dtype == torch.float32:
            wide = scaled = out
            torch.mul(hidden, hidden, out=wide)
            source = hidden
        else:
            scaled = self._buffer("wide", hidden.shape, torch.float32).copy_(hidden)
            source, wide = scaled, self._buffer("scratch", hidden.shape, torch.float32)
            torch.mul(source, source, out=wide)
        scale = wide.mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
        torch.mul(source, scale, out=scaled)
        if scaled is not out:
            out.copy_(scaled)
        return out.mul_(norm.weight)

    def project(self, slot: str, states: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """Apply a linear layer, each text by itself.

        Args:
            slot: name of the buffer for the result, which the next call with it overwrites.
            states: [token, width in].
            linear: the layer.

        Returns:
            [token, width out].
        """
        weight = linear.weight.t()
        out = self._buffer(slot, (len(states), weight.shape[1]), states.dtype)
        for start, end in self._bounds:
            if linear.bias is None:
                torch.mm(states[start:end], weight, out=out[start:end])
            else:
                torch.addmm(linear.bias, states[start:end], weight, out=out[start:end])
        return out

    def add_product_(self, hidden: torch.Tensor, states: torch.Tensor, linear: nn.Linear) -> None:
        """Add a linear layer's result to the residual stream.

        A product summed into the stream by BLAS itself would save a hundredth of a pass, and round
        otherwise than the library.
        """
        hidden.add_(self.project("normed", states, linear))

    def rotate_(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Apply the rotary embedding in place, halves paired as in Llama.

        Args:
            states: queries or keys, [token, head, d_head].
            cos: from `rotary`.
            sin: from `rotary`; its halves are equal.
        """
        half = states.shape[-1] // 2
        crossed = self._buffer("scratch", states.shape, states.dtype)
        torch.mul(states, sin, out=crossed)
        states.mul_(cos)
        # Not by addcmul, which rounds once where the library rounds twice.
        states[..., :half].sub_(crossed[..., half:])
        states[..., half:].add_(crossed[..., :half])

    def silu_times_(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Put silu(gate) · up into `gate`."""
        silu(gate, inplace=True).mul_(up)

    def _buffer(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the memory of this slot, which grows to the largest that is asked for."""
        view = self._views.get((slot, shape, dtype))
        if view is None:
            n_bytes = math.prod(shape) * dtype.itemsize
            buffer = self._buffers.get(slot)
            if buffer is None or buffer.numel() < n_bytes:
                buffer = self._buffers[slot] = torch.empty(n_bytes, dtype=torch.uint8)
            view = self._views[slot, shape, dtype] = buffer[:n_bytes].view(dtype).view(shape)
        return view
