"""A pack through Llama-like blocks by few kernels, the residual sums within the matrix products.

The blocks are those of transformers; only the order of operations is spelled out here, so that each
memory-bound step is one kernel and each residual sum rides on a matrix product. For CUDA in half
precision. What does not belong here: any other architecture or device (forward).

The invariant: differences from the library's own blocks are rounding alone; `extract` compares the
two on a text before it relies on this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from taprobe_core.activations.packed_attention import Watcher, has_triton
from taprobe_core.activations.packing import Layout

Sink = Callable[[int, torch.Tensor], None]
"""Gets a layer and its hidden states [token, d_model], which the next block overwrites."""

_BLOCKS = frozenset({"LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer"})


def can_fuse(base_model: nn.Module) -> bool:
    """Whether the blocks are of a kind known here, on CUDA in half precision.

    Args:
        base_model: base transformer without LM head.
    """
    blocks: Any = getattr(base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    return (
        has_triton()
        and all(type(block).__name__ in _BLOCKS and _is_plain(block) for block in blocks)
        and base_model.config.hidden_act == "silu"  # type: ignore[union-attr]
        and all(
            parameter.is_cuda and parameter.dtype in (torch.float16, torch.bfloat16)
            for parameter in base_model.parameters()
        )
    )


def _is_plain(block: Any) -> bool:
    """No bias where the residual sum is fused, no window, no adapter in place of a linear layer."""
    attention, mlp = block.self_attn, block.mlp
    bare = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, *bare)
    return (
        all(type(each) is nn.Linear for each in projections)
        and all(each.bias is None for each in bare)
        and getattr(attention, "sliding_window", None) is None
        and attention.head_dim in (32, 64, 128, 256)
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
    from taprobe_core.activations.attention_kernel import causal_attention
    from taprobe_core.activations.kernels import rms_norm, rotate_, silu_times_

    model: Any = base_model
    hidden = model.embed_tokens(input_ids)
    cos, sin = _rotary(model, layout)
    for layer in range(deepest + 1):
        block = model.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        if (device := attention.q_proj.weight.device) != hidden.device:
            hidden, cos, sin = (each.to(device) for each in (hidden, cos, sin))
            layout = layout.to(device)
        norm = block.input_layernorm
        normed = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        query, key, value = (
            linear(normed, each.weight, each.bias).view(len(normed), -1, attention.head_dim)
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        rotate_(query, cos, sin)
        rotate_(key, cos, sin)
        mixed, lse = causal_attention(query, key, value, layout, attention.scaling)
        layout.attended.append(layer)
        if watcher is not None:
            watcher(layer, query, key, lse, attention.scaling)
        hidden.addmm_(mixed.flatten(1), attention.o_proj.weight.t())
        norm = block.post_attention_layernorm
        normed = rms_norm(hidden, norm.weight, norm.variance_epsilon)
        gate = linear(normed, mlp.gate_proj.weight)
        silu_times_(gate, linear(normed, mlp.up_proj.weight))
        hidden.addmm_(gate, mlp.down_proj.weight.t())
        sink(layer, hidden)


def _rotary(model: Any, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 [token, d_head / 2]; both halves of the library's are equal."""
    wide = torch.empty(0, dtype=torch.float32, device=layout.positions.device)
    cos, sin = model.rotary_emb(wide, layout.positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
