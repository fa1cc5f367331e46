"""One pack through a model, once, up to the deepest block that is wanted.

Blocks known to `fused` run there when they can; all others run as the library runs them, with hooks
on the blocks, and the hook of the deepest one ends the pass. What does not belong here: which texts
make a pack (packing, extract) and what is kept of their states (pooling).

The invariant: in the library's own blocks a hidden state is bit-equal to `output_hidden_states` of
the text alone; no hook outlives a call; blocks after the deepest requested one do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import nn

from taprobe_core.activations.fused import Sink, can_fuse, run_fused
from taprobe_core.activations.packed_attention import Watcher, packed
from taprobe_core.activations.packing import Layout, lay_out, to_device
from taprobe_core.activations.pooling import pool, span_index
from taprobe_core.errors import ModelError, ModelMismatchError

Spans = torch.Tensor | Sequence[tuple[int, int]]


class _DeepestLayerReached(BaseException):
    """A signal, not a fault: no `except Exception` inside a model may take it."""


def pooled_layers(
    base_model: nn.Module, token_ids: Sequence[int], spans: Spans, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Return the mean output of each requested block over each span, in one forward pass.

    The short way for one text in a notebook; `extract` takes many texts, poolings and devices.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        token_ids: one text, BOS first where the model has one, [token].
        spans: half-open token ranges, [span, 2].
        layers: block indices from 0, in any order; layer n is `hidden_states[n + 1]` before the
            final norm. None asked, none run.

    Returns:
        For each layer [span, d_model], float32, on the block's device.

    Raises:
        SpanError: a span is empty or outside the text.
        ModelMismatchError: a layer beyond the model's depth, or a text that it cannot take.
        ModelError: the blocks are not found, or the model is in training mode.
    """
    if not layers:
        return {}
    faults = input_faults(base_model, {"text": token_ids}, layers)
    if faults:
        raise ModelMismatchError(faults[0], type(base_model).__name__, MISMATCH_FIX)
    index = span_index(spans, len(token_ids))
    pooled: dict[int, torch.Tensor] = {}

    def keep(layer: int, hidden: torch.Tensor) -> None:
        if layer in layers:
            pooled[layer] = pool(hidden, index.to(hidden.device), ["mean"])["mean"]

    run_pack(base_model, [token_ids], max(layers), keep)
    return pooled


def run_pack(
    base_model: nn.Module,
    texts: Sequence[Sequence[int]],
    deepest: int,
    sink: Sink,
    watcher: Watcher | None = None,
    *,
    is_fused: bool | None = None,
) -> None:
    """Run texts through the model as one pack, none reading another.

    On an accelerator the work is queued, not awaited.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        texts: token ids of each text, BOS first where the model has one.
        deepest: last block to run.
        sink: gets the output of each block, [token, d_model] of the whole pack.
        watcher: gets the queries and keys of each block.
        is_fused: whether `fused` runs the blocks; None where it can.

    Raises:
        ModelError: the blocks are not found, do not run in order, give states of an unknown shape,
            or attend by something other than the library's attention interface.
    """
    device = next(base_model.parameters()).device
    layout = lay_out([len(text) for text in texts], device)
    flat = torch.tensor([token for text in texts for token in text])
    input_ids = to_device(flat, device)
    if is_fused is None:
        is_fused = can_fuse(base_model)
    with torch.inference_mode():
        if is_fused:
            run_fused(base_model, input_ids, layout, deepest, sink, watcher)
        else:
            _run_library(base_model, input_ids, layout, deepest, sink, watcher)


def _run_library(
    base_model: nn.Module,
    input_ids: torch.Tensor,
    layout: Layout,
    deepest: int,
    sink: Sink,
    watcher: Watcher | None,
) -> None:
    name = type(base_model).__name__
    takes = signature(base_model.forward).parameters.values()
    if not hasattr(base_model, "config") or all(each.kind != each.VAR_KEYWORD for each in takes):
        raise ModelError(
            "a model without a configuration, or whose forward takes no attention arguments",
            name,
            "use a base transformer of the transformers library",
        )
    with ExitStack() as hooks:
        hooks.enter_context(packed(base_model))
        for layer, block in enumerate(find_blocks(base_model)[: deepest + 1]):
            keep = _keeper(layer, len(input_ids), sink, is_deepest=layer == deepest)
            hooks.callback(block.register_forward_hook(keep).remove)
        try:
            # The cache would make the library look for packs in `position_ids`, and mask them.
            base_model(
                input_ids=input_ids[None],
                position_ids=layout.positions,
                use_cache=False,
                packed_layout=layout,
                packed_watcher=watcher,
            )
        except _DeepestLayerReached:
            if len(layout.attended) == deepest + 1:
                return
            raise ModelError(
                f"{len(layout.attended)} of {deepest + 1} blocks attended within texts",
                name,
                "use an architecture whose attention goes through transformers' AttentionInterface",
            ) from None
    raise ModelError(
        f"block {deepest} did not run", name, "use a model whose forward runs its blocks in order"
    )


def _keeper(
    layer: int, n_tokens: int, sink: Sink, *, is_deepest: bool
) -> Callable[[nn.Module, Any, Any], None]:
    def keep(block: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:2] != (1, n_tokens):
            raise ModelError(
                f"block {layer} gives states of shape {list(hidden.shape)} for {n_tokens} tokens",
                type(block).__name__,
                "use a model whose blocks return [batch, token, d_model]",
            )
        sink(layer, hidden[0])
        if is_deepest:
            raise _DeepestLayerReached

    return keep


def find_blocks(base_model: nn.Module) -> nn.ModuleList:
    """Return the list of blocks of a base transformer: its `layers` or `h`.

    Raises:
        ModelError: there is no such list, or the model would drop out states.
    """
    name = type(base_model).__name__
    if base_model.training:
        raise ModelError("the model is in training mode", name, "call eval() after loading it")
    for attribute in ("layers", "h"):
        blocks = getattr(base_model, attribute, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks
    raise ModelError(
        "no list of blocks named layers or h",
        name,
        "load the base transformer, without LM head, of a decoder-only model",
    )


MISMATCH_FIX = "correct n_layers, layers or tokenizer of this model in the study"


def input_faults(
    base_model: nn.Module, token_ids: Mapping[str, Sequence[int]], layers: Sequence[int]
) -> list[str]:
    """Return why the model cannot take these texts or layers; an empty list when it can.

    Checked before the first pass: on an accelerator a token id beyond the vocabulary ends the
    process, and a position beyond the trained ones gives plausible nonsense.

    Args:
        base_model: decoder-only transformer without LM head.
        token_ids: name of a text to its token ids.
        layers: block indices.

    Raises:
        ModelError: the blocks are not found, or the model is in training mode.
    """
    depth = len(find_blocks(base_model))
    config = getattr(base_model, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    positions = getattr(config, "max_position_embeddings", None)
    beyond = sorted({layer for layer in layers if not 0 <= layer < depth})
    faults = [f"layers {beyond}, but the blocks are 0 to {depth - 1}"] if beyond else []
    for name, ids in token_ids.items():
        if not ids:
            faults.append(f"{name} has no tokens")
        elif vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
            faults.append(
                f"{name} has token id {max(ids)}, but the vocabulary ends at {vocab_size - 1}"
            )
        if positions is not None and len(ids) > positions:
            faults.append(f"{name} has {len(ids)} tokens, but the model takes {positions}")
    return faults
