"""One text through the model, once: the pooled output of every requested block.

Hooks on the blocks pool on the device, and the hook of the deepest requested block ends the pass.
What does not belong here: which texts (extract) and how states are averaged (pooling).

The invariant: a hidden state is bit-equal to the model's own `output_hidden_states`; no hook
outlives a call; blocks after the deepest requested one do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from taprobe_core.activations.pooling import SpanIndex, bag_means, span_index
from taprobe_core.errors import ModelError, ModelMismatchError

Spans = torch.Tensor | Sequence[tuple[int, int]]


class _DeepestLayerReached(BaseException):
    """A signal, not a fault: no `except Exception` inside a model may take it."""


def pooled_layers(
    base_model: nn.Module, token_ids: Sequence[int], spans: Spans, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Return the mean output of each requested block over each span, in one forward pass.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        token_ids: one text, BOS first, [token].
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
        raise ModelMismatchError(faults[0], type(base_model).__name__, _MISMATCH_FIX)
    device = next(base_model.parameters()).device
    index = span_index(spans, len(token_ids)).to(device)
    input_ids = torch.tensor([list(token_ids)], device=device)
    pooled: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks, torch.inference_mode():
        blocks = find_blocks(base_model)
        for layer in set(layers):
            keep = _keeper(pooled, layer, index, len(token_ids), is_deepest=layer == max(layers))
            hooks.callback(blocks[layer].register_forward_hook(keep).remove)
        try:
            base_model(input_ids=input_ids, use_cache=False)
        except _DeepestLayerReached:
            return {layer: pooled[layer] for layer in sorted(pooled)}
    raise ModelError(
        f"block {max(layers)} did not run",
        type(base_model).__name__,
        "use a model whose forward pass runs its blocks in order",
    )


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


_MISMATCH_FIX = "correct n_layers, layers or tokenizer of this model in the study"


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


def _keeper(
    pooled: dict[int, torch.Tensor],
    layer: int,
    index: SpanIndex,
    n_tokens: int,
    *,
    is_deepest: bool,
) -> Callable[[nn.Module, Any, Any], None]:
    def keep(block: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:2] != (1, n_tokens):
            raise ModelError(
                f"block {layer} gives states of shape {list(hidden.shape)} for {n_tokens} tokens",
                type(block).__name__,
                "use a model whose blocks return [batch, token, d_model]",
            )
        pooled[layer] = bag_means(hidden[0], index)
        if is_deepest:
            raise _DeepestLayerReached

    return keep
