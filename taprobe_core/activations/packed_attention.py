"""Causal attention inside each text of a pack, and nothing between texts.

Registered with transformers as an attention function, so that the library's own blocks call it with
queries and keys after the rotary embedding, and no mask is built. Packing through `position_ids`
alone would build a dense mask over the whole pack, and with a cache or a mask given it would let
texts read each other without a word. What does not belong here: which texts share a pack.

The invariant: a text's result has the bits that it has alone: each text's attention is computed by
itself (SDPA), or, on CUDA in half precision, by a kernel whose blocks each see one text
(`kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taprobe_core.activations.packing import Layout
from taprobe_core.devices import has_triton
from taprobe_core.errors import ModelError

_SAID_ELSEWHERE = frozenset({"position_ids", "return_dict"})
"""Arguments with a value that change nothing: the layout has the positions."""

NAME = "taprobe_packed"
"""Under which transformers knows `packed_attention`."""

Watcher = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None, float], None]
"""Gets layer, query [token, head, d_head], key [token, kv_head, d_head], log-sum-exp [head, token]
or None, and scale, of a whole pack, before its attention is used."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: Layout | None = None,
    packed_watcher: Watcher | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each text; the signature is transformers' attention interface.

    Args:
        module: the attention module; its `layer_idx` is the layer.
        query: [1, head, token, d_head], after the rotary embedding.
        key: [1, kv_head, token, d_head].
        value: like `key`.
        attention_mask: must be None; the layout says all.
        scaling: factor of the scores; None for 1 / sqrt(d_head).
        sliding_window: tokens that a query sees; None for all.
        softcap: bound of the scores; None for none.
        packed_layout: where the texts lie.
        packed_watcher: is shown queries and keys.
        is_causal: must not be false.
        more: what else a model hands to its attention; only what says nothing, or nothing that
            the layout does not say, is taken.

    Returns:
        [1, token, head, d_head], and None for the weights.

    Raises:
        ModelError: no layout, a mask, or a kind of attention that packs do not support.
    """
    if packed_layout is None or attention_mask is not None:
        raise ModelError(
            "packed attention without a layout, or with a mask",
            type(module).__name__,
            "run texts through taprobe_core.activations.extraction",
        )
    unknown = sorted(
        name
        for name, value in more.items()
        if name not in _SAID_ELSEWHERE
        and not (value is None or (isinstance(value, (bool, int, float)) and not value))
    )
    if unknown or is_causal is False or getattr(module, "is_causal", True) is False:
        raise ModelError(
            f"attention with {', '.join(unknown)}, which packs do not know"
            if unknown
            else "attention that is not causal",
            type(module).__name__,
            "run this model as the library runs it, one text a pass",
        )
    if softcap is not None or (sliding_window or packed_layout.longest) < packed_layout.longest:
        raise ModelError(
            f"attention with a window of {sliding_window} tokens or scores capped at {softcap}",
            type(module).__name__,
            "run this model as the library runs it, one text a pass",
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    packed_layout.attended.append(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if takes_kernel(query):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        from taprobe_core.activations.kernels import causal_attention

        output, lse = causal_attention(q, k, v, packed_layout, scale)
        if packed_watcher is not None:
            packed_watcher(layer, q, k, lse, scale)
        return output[None], None
    if packed_watcher is not None:
        packed_watcher(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), None, scale)
    outputs = [
        sdpa_attention_forward(
            module,
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attention_mask=None,
            scaling=scaling,
            is_causal=True,
        )[0]
        for start, end in packed_layout.bounds
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def takes_kernel(states: torch.Tensor) -> bool:
    """Whether the kernel of `kernels` takes these states."""
    is_half = states.dtype in (torch.float16, torch.bfloat16)
    d_head = states.shape[-1]
    return states.is_cuda and is_half and has_triton() and d_head % 8 == 0 and d_head <= 256


@contextmanager
def packed(base_model: nn.Module) -> Iterator[None]:
    """Let the model's own blocks call `packed_attention` within the block.

    Args:
        base_model: a transformers model; its configuration is set back afterwards.
    """
    AttentionInterface.register(NAME, packed_attention)
    config: Any = base_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
