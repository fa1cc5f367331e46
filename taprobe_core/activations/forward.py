"""One pack through a model, once, up to the deepest block that is wanted.

Three ways lead through the blocks: `fused`, spelled out by this library; `packed`, the library's
own blocks with this library's attention; `library`, all as the library runs it, one text a pass.
The first two are for models whose attention is understood. What does not belong here: which texts
make a pack (`packing`), which way is trusted (`trial`) and what is kept of the states (`pooling`).

The invariant: by the last way, and on a CPU by every way, a hidden state is bit-equal to
`output_hidden_states` of the text alone; no hook outlives a call; blocks after the deepest
requested one do not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import nn

from taprobe_core.activations.fused import Sink, can_fuse, run_fused
from taprobe_core.activations.library_way import (
    DeepestLayerReached,
    check_order,
    failing_by_name,
    keeper,
    kind_of,
    run_text,
)
from taprobe_core.activations.packed_attention import Watcher, packed
from taprobe_core.activations.packing import Layout, lay_out, to_device
from taprobe_core.activations.pooling import pool, span_index
from taprobe_core.activations.understood import find_blocks, understand
from taprobe_core.errors import ModelError, ModelMismatchError

Spans = torch.Tensor | Sequence[tuple[int, int]]

Way = Literal["fused", "packed", "library", "eager"]
"""Through the blocks: `eager` is the library's with its reference attention, whatever the model was
loaded with."""


LIBRARY_WAYS = frozenset({"library", "eager"})
"""Ways that take one text a pass."""


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
        ModelError: the blocks are not found, the model is in training mode, or fails on the text.
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
    way: Way | None = None,
) -> None:
    """Run texts through the model as one pack, none reading another.

    On an accelerator the work is queued, not awaited, but for texts that go the library's way.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        texts: token ids of each text, BOS first where the model has one.
        deepest: last block to run.
        sink: gets the output of each block, [token, d_model] of the whole pack.
        watcher: gets the queries and keys of each block; not by the library's way, whose attention
            may be more than these say (`library_way.weigh_text`).
        way: through the blocks; None for the first that `ways_of` names.

    Raises:
        ModelError: the blocks are not found, do not run in order, give states of an unknown shape,
            or attend otherwise than the way asked for can.
    """
    if way is None:
        way = ways_of(base_model, max(map(len, texts)))[0]
    device = next(base_model.parameters()).device
    with torch.inference_mode():
        if way in LIBRARY_WAYS:
            ids = [_ids(text, device) for text in texts]
            _run_each(base_model, ids, deepest, sink, is_eager=way == "eager")
            return
        layout = lay_out([len(text) for text in texts], device)
        input_ids = _ids([token for text in texts for token in text], device)
        if way == "fused":
            run_fused(base_model, input_ids, layout, deepest, sink, watcher)
        else:
            _run_packed(base_model, input_ids, layout, deepest, sink, watcher)


def ways_of(base_model: nn.Module, n_tokens: int) -> tuple[Way, ...]:
    """Return the ways that a text may go by what is known of the model, the fastest first.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        n_tokens: of the text.

    Raises:
        ModelError: the blocks are not found, or the model is in training mode.
    """
    known = understand(base_model)
    if known.reason is not None or (known.window is not None and n_tokens > known.window):
        return ("library",)
    return ("fused", "packed", "library") if can_fuse(base_model) else ("packed", "library")


def _ids(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(tokens), device)


def _run_each(
    base_model: nn.Module,
    texts: Sequence[torch.Tensor],
    deepest: int,
    sink: Sink,
    *,
    is_eager: bool,
) -> None:
    """Run each text alone, and show the sink their states one after another."""
    blocks = find_blocks(base_model)
    if len(texts) == 1:
        run_text(base_model, blocks, texts[0], deepest, sink, is_eager=is_eager)
        return
    states: list[list[torch.Tensor]] = [[] for _ in range(deepest + 1)]
    for text in texts:
        run_text(
            base_model,
            blocks,
            text,
            deepest,
            lambda layer, hidden: states[layer].append(hidden.clone()),
            is_eager=is_eager,
        )
    for layer, each in enumerate(states):
        sink(layer, torch.cat(each))


def _run_packed(
    base_model: nn.Module,
    input_ids: torch.Tensor,
    layout: Layout,
    deepest: int,
    sink: Sink,
    watcher: Watcher | None,
) -> None:
    ran: list[int] = []
    with ExitStack() as hooks:
        hooks.enter_context(packed(base_model))
        for layer, block in enumerate(find_blocks(base_model)[: deepest + 1]):
            keep = keeper(layer, len(input_ids), sink, ran, is_deepest=layer == deepest)
            hooks.callback(block.register_forward_hook(keep).remove)
        try:
            # The cache would make the library look for packs in `position_ids`, and mask them.
            with failing_by_name(base_model):
                base_model(
                    input_ids=input_ids[None],
                    position_ids=layout.positions,
                    use_cache=False,
                    packed_layout=layout,
                    packed_watcher=watcher,
                )
        except DeepestLayerReached:
            pass
    check_order(ran, deepest, base_model)
    if layout.attended != ran:
        raise ModelError(
            f"{len(layout.attended)} of {deepest + 1} blocks attended within texts",
            kind_of(base_model),
            "use an architecture whose attention goes through transformers' AttentionInterface",
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
