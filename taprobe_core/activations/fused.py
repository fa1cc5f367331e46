"""A pack through Llama-like blocks by few steps, each without needless passes over memory.

The blocks are those of transformers; only the order of operations is spelled out here, and each
step is what is best for the device. On CUDA in half precision it is one kernel, with the residual
sums within the matrix products. On a CPU it is the library's operations, in memory that a pass
keeps: a block of the library makes a dozen new tensors of all tokens, and each time the operating
system hands their memory out page by page, zeroed, a tenth of a pass of a small model.

What does not belong here: the kernels (`kernels`), attention (`packed_attention`), any other
architecture or device (`forward`).

The invariant: differences from the library's own blocks are rounding alone on CUDA and none on a
CPU, where every value is rounded where the library rounds it and each text's matrix products are
its own, since a BLAS library may give a row other bits among more rows; `trial` compares the two
before a job relies on this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import silu

from taprobe_core.activations.packed_attention import Watcher, packed_attention
from taprobe_core.activations.packing import Layout
from taprobe_core.activations.understood import understand
from taprobe_core.devices import has_triton


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


Sink = Callable[[int, torch.Tensor], None]
"""Gets a layer and its hidden states [token, d_model], which the next block overwrites."""

_BLOCKS = frozenset({"LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer"})
_MODELS = frozenset({"LlamaModel", "Qwen2Model", "MistralModel"})


class Steps(Protocol):
    """What a block consists of, beside attention; a result may be overwritten by the next block."""

    def rotary(
        self, model: Any, hidden: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions, in the form that `rotate_` takes."""
        ...

    def rms_norm(self, hidden: torch.Tensor, norm: Any) -> torch.Tensor:
        """Root-mean-square normalisation of each row, times a weight."""
        ...

    def project(self, slot: str, states: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """Apply a linear layer; results of different slots do not overwrite each other."""
        ...

    def add_product_(self, hidden: torch.Tensor, states: torch.Tensor, linear: nn.Linear) -> None:
        """Add a linear layer's result to the residual stream."""
        ...

    def rotate_(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """Apply the rotary embedding to [token, head, d_head] in place."""
        ...

    def silu_times_(self, gate: torch.Tensor, up: torch.Tensor) -> Any:
        """Put silu(gate) · up into `gate`."""
        ...


class CudaSteps:
    """Steps on CUDA in half precision; see `Steps`."""

    def __init__(self) -> None:
        from taprobe_core.activations import kernels

        self._kernels = kernels
        self.rotate_ = kernels.rotate_
        self.silu_times_ = kernels.silu_times_

    def rotary(
        self, model: Any, hidden: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [token, d_head / 2]; the library's halves are equal."""
        wide = torch.empty(0, dtype=torch.float32, device=layout.positions.device)
        cos, sin = model.rotary_emb(wide, layout.positions)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def rms_norm(self, hidden: torch.Tensor, norm: Any) -> torch.Tensor:
        """Root-mean-square normalisation by one kernel."""
        return self._kernels.rms_norm(hidden, norm.weight, norm.variance_epsilon)

    def project(self, slot: str, states: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """Apply a linear layer; memory comes from the allocator, which keeps it."""
        return functional.linear(states, linear.weight, linear.bias)

    def add_product_(self, hidden: torch.Tensor, states: torch.Tensor, linear: nn.Linear) -> None:
        """Add a linear layer's result to the residual stream, within the matrix product."""
        hidden.addmm_(states, linear.weight.t())


def can_fuse(base_model: nn.Module) -> bool:
    """Whether the blocks are of a kind known here, on a device and in a type with steps for them.

    Texts longer than the model's window, if it has one, are not for them all the same.

    Args:
        base_model: base transformer without LM head.
    """
    blocks: Any = getattr(base_model, "layers", None)
    if base_model.training or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    return (
        type(base_model).__name__ in _MODELS
        and understand(base_model).reason is None
        and all(type(block).__name__ in _BLOCKS and _is_plain(block) for block in blocks)
        and base_model.config.hidden_act == "silu"  # type: ignore[union-attr]
        and (_is_half_on_cuda(base_model) or _is_on_cpu(base_model))
        and not is_hooked(base_model)
    )


def _is_plain(block: Any) -> bool:
    """No bias where the residual sum is fused, no adapter in place of a linear layer."""
    attention, mlp = block.self_attn, block.mlp
    bare = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, *bare)
    return (
        all(type(each) is nn.Linear for each in projections)
        and all(each.bias is None for each in bare)
        and getattr(attention, "is_causal", True)
    )


def _window(model: Any, attention: Any) -> int | None:
    """Tokens that a query sees; Mistral's stands in the configuration alone."""
    if type(model).__name__ == "MistralModel":
        return model.config.sliding_window  # type: ignore[no-any-return]
    return getattr(attention, "sliding_window", None)


def _is_half_on_cuda(model: Any) -> bool:
    is_half = all(
        parameter.is_cuda and parameter.dtype in (torch.float16, torch.bfloat16)
        for parameter in model.parameters()
    )
    heads = (block.self_attn.head_dim for block in model.layers)
    return is_half and has_triton() and all(each in (32, 64, 128, 256) for each in heads)


def _is_on_cpu(model: Any) -> bool:
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    return kinds in ({("cpu", torch.float32)}, {("cpu", torch.bfloat16)})


def is_hooked(base_model: nn.Module) -> bool:
    """Whether someone hooked into the model, whose hooks only the library's blocks would call.

    Those that transformers itself leaves behind after `output_hidden_states` are idle.

    Args:
        base_model: base transformer without LM head.
    """
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for module in base_model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )


def run_fused(
    base_model: nn.Module,
    input_ids: torch.Tensor,
    layout: Layout,
    deepest: int,
    sink: Sink,
    watcher: Watcher | None = None,
) -> None:
    """Run a pack through the blocks up to the deepest, showing each one's output to the sink.

    Args:
        base_model: one that `can_fuse`; its blocks may stand on several devices.
        input_ids: int64 [token], on the device of the embedding.
        layout: where the texts lie.
        deepest: last block to run.
        sink: gets every block's output.
        watcher: gets every block's queries and keys.
    """
    model: Any = base_model
    hidden = model.embed_tokens(input_ids)
    steps: Steps = CudaSteps() if hidden.is_cuda else HostSteps(layout)
    cos, sin = steps.rotary(model, hidden, layout)
    for layer in range(deepest + 1):
        block = model.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        if (device := attention.q_proj.weight.device) != hidden.device:
            hidden, cos, sin = (each.to(device) for each in (hidden, cos, sin))
            layout = layout.to(device)
        normed = steps.rms_norm(hidden, block.input_layernorm)
        query, key, value = (
            steps.project(slot, normed, each).view(len(normed), -1, attention.head_dim)
            for slot, each in (
                ("query", attention.q_proj),
                ("key", attention.k_proj),
                ("value", attention.v_proj),
            )
        )
        steps.rotate_(query, cos, sin)
        steps.rotate_(key, cos, sin)
        mixed, _ = packed_attention(
            attention,
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            None,
            scaling=attention.scaling,
            sliding_window=_window(model, attention),
            packed_layout=layout,
            packed_watcher=watcher,
        )
        steps.add_product_(hidden, mixed[0].flatten(1), attention.o_proj)
        normed = steps.rms_norm(hidden, block.post_attention_layernorm)
        gate = steps.project("gate", normed, mlp.gate_proj)
        steps.silu_times_(gate, steps.project("up", normed, mlp.up_proj))
        steps.add_product_(hidden, gate, mlp.down_proj)
        sink(layer, hidden)
