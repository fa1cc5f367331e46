"""A text through a model as the library runs it: alone, with the library's own attention and masks.

In: any decoder-only model of transformers, whatever its attention is, with hooks on its blocks.
Out: each block's output, and where asked for the attention weights that its eager attention makes.
What does not belong here: packs, and attention that this library computes (`packed_attention`).

The invariant: a text's result depends on its own tokens alone, whatever ran before; no hook and no
setting outlives a call; blocks after the deepest requested one do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from taprobe_core.errors import ModelError, TaprobeError

Sink = Callable[[int, torch.Tensor], None]
"""Gets a layer and its hidden states [token, d_model]."""

Weigher = Callable[[int, torch.Tensor], None]
"""Gets a layer and its attention weights [head, token, token], queries before keys."""

EAGER = "eager"
"""Attention spelled out as matrix products, the library's own reference."""


class DeepestLayerReached(BaseException):
    """A signal, not a fault: no `except Exception` inside a model may take it."""


def run_text(
    base_model: nn.Module,
    blocks: nn.ModuleList,
    input_ids: torch.Tensor,
    deepest: int,
    sink: Sink,
    *,
    is_eager: bool = False,
) -> None:
    """Run one text, showing each block's output to the sink.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        blocks: its blocks.
        input_ids: int64 [token], on the device of the embedding.
        deepest: last block to run.
        sink: gets every block's output up to the deepest.
        is_eager: attend by the library's reference, whatever the model was loaded with.

    Raises:
        ModelError: the model fails on the text, its blocks do not run once each and in order, or
            they give states of an unknown shape.
    """
    ran: list[int] = []
    with ExitStack() as stack:
        if is_eager:
            stack.enter_context(attending(base_model, EAGER))
        for layer, block in enumerate(blocks[: deepest + 1]):
            hook = keeper(layer, len(input_ids), sink, ran, is_deepest=layer == deepest)
            stack.callback(block.register_forward_hook(hook).remove)
        call(base_model, input_ids)
    check_order(ran, deepest, base_model)


def weigh_text(
    base_model: nn.Module,
    blocks: nn.ModuleList,
    input_ids: torch.Tensor,
    layers: frozenset[int],
    weigher: Weigher,
) -> None:
    """Run one text by eager attention, showing the attention weights of some layers.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        blocks: its blocks.
        input_ids: int64 [token], on the device of the embedding.
        layers: blocks whose weights are wanted, at least one.
        weigher: gets each one's weights.

    Raises:
        ModelError: the model fails on the text, or one of the blocks makes no attention weights, or
            several kinds of them, or attends to later tokens.
    """
    if implementation_of(base_model) is None:
        raise _no_mass(base_model, min(layers), "has no attention of transformers")
    weights = _Weights(base_model, len(input_ids), max(layers), weigher)
    with ExitStack() as stack:
        stack.enter_context(attending(base_model, EAGER))
        for layer in sorted(layers):
            for module in _attentions(blocks[layer]):
                hook = module.register_forward_hook(partial(weights.collect, layer))
                stack.callback(hook.remove)
            done = blocks[layer].register_forward_hook(partial(weights.hand_over, layer))
            stack.callback(done.remove)
        call(base_model, input_ids)


class _Weights:
    """The attention weights of the block that runs, until it is done."""

    def __init__(self, model: nn.Module, n_tokens: int, deepest: int, weigher: Weigher) -> None:
        self._model = model
        self._shape = (n_tokens, n_tokens)
        self._deepest = deepest
        self._weigher = weigher
        self._found: dict[int, torch.Tensor] = {}

    def collect(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        """A hook on a part of the block that attends."""
        for part in output if isinstance(output, tuple) else (output,):
            if not isinstance(part, torch.Tensor) or part.dim() != 4:
                continue
            if part.shape[0] == 1 and part.shape[-2:] == self._shape:
                before = self._found.setdefault(layer, part)
                if before is not part:
                    raise _no_mass(self._model, layer, "attends more than once")

    def hand_over(self, layer: int, block: nn.Module, args: Any, output: Any) -> None:
        """A hook on the block."""
        weights = self._found.pop(layer, None)
        if weights is None:
            raise _no_mass(self._model, layer, "gives no attention weights")
        if weights[0].triu(1).any():
            raise _no_mass(self._model, layer, "attends to later tokens")
        self._weigher(layer, weights[0])
        if layer == self._deepest:
            raise DeepestLayerReached


def _no_mass(base_model: nn.Module, layer: int, why: str) -> ModelError:
    return ModelError(
        f"block {layer} {why}, so there is no attention mass between its tokens",
        kind_of(base_model),
        "choose other attention layers, or set attention.mode to off; activations can be had",
    )


def _attentions(block: nn.Module) -> Iterator[nn.Module]:
    for module in block.modules():
        if module is not block and "attention" in type(module).__name__.lower():
            yield module


def call(base_model: nn.Module, input_ids: torch.Tensor, **more: Any) -> Any:
    """Run the model on one text by itself, and leave its rotary factors as they were at the start.

    Args:
        base_model: decoder-only transformer.
        input_ids: int64 [token].
        more: arguments of its forward; `use_cache` is off where it is known.

    Returns:
        What the model returns; None where a hook ended the pass.

    Raises:
        ModelError: the model fails, other than for lack of memory.
    """
    takes = signature(base_model.forward).parameters.values()
    names = {each.name for each in takes}
    if "use_cache" in names or any(each.kind == each.VAR_KEYWORD for each in takes):
        more["use_cache"] = False
    reset_rotary(base_model)
    try:
        with failing_by_name(base_model):
            return base_model(input_ids=input_ids[None], **more)
    except DeepestLayerReached:
        return None
    finally:
        reset_rotary(base_model)


def reset_rotary(base_model: nn.Module) -> None:
    """Set rotary factors that grow with the longest text so far back to where they start.

    Args:
        base_model: any model; one whose factors do not grow is left alone.
    """
    for module in base_model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {"": kinds}
        for layer_type, kind in by_layer.items():
            if "dynamic" not in str(kind):
                continue
            prefix = f"{layer_type}_" if layer_type else ""
            factors: Any = getattr(module, f"{prefix}inv_freq")
            original: Any = getattr(module, f"{prefix}original_inv_freq")
            # Outlives the pass: a tensor made in inference mode could not be trained beside.
            with torch.inference_mode(mode=False):
                setattr(module, f"{prefix}inv_freq", original.to(factors.device, copy=True))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@contextmanager
def attending(base_model: nn.Module, implementation: str) -> Iterator[None]:
    """Let the model's blocks attend by an implementation known to transformers.

    Args:
        base_model: a model; its configuration is set back afterwards.
        implementation: its name.
    """
    config: Any = base_model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def failing_by_name(base_model: nn.Module) -> Iterator[None]:
    """Turn what a model's own code raises into a `ModelError`, but for what the device may raise.

    Args:
        base_model: the model that runs.
    """
    try:
        yield
    except (TaprobeError, RuntimeError):
        raise
    except Exception as error:
        raise failure(base_model, error) from error


def failure(base_model: nn.Module, error: Exception) -> ModelError:
    """Return the error that says which model failed on a text, and why.

    Args:
        base_model: the model.
        error: what its code raised.
    """
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return ModelError(
        f"a model whose own code fails on a text ({type(error).__name__}: {reason})",
        kind_of(base_model),
        "use another architecture or version of transformers; this one cannot run the model one "
        "text at a time, without a cache",
    )


def implementation_of(base_model: nn.Module) -> str | None:
    """Return the attention that a model of transformers was loaded with; None for another model."""
    return getattr(getattr(base_model, "config", None), "_attn_implementation", None)


def kind_of(base_model: nn.Module) -> str:
    """Return what a message calls a model: its class, and its type in the configuration."""
    kind = getattr(getattr(base_model, "config", None), "model_type", None)
    name = type(base_model).__name__
    return f"{name} ({kind})" if kind else name


def keeper(
    layer: int, n_tokens: int, sink: Sink, ran: list[int], *, is_deepest: bool
) -> Callable[[nn.Module, Any, Any], None]:
    """Return a hook that shows a block's output to the sink, and ends the pass at the deepest.

    Args:
        layer: of the block.
        n_tokens: tokens of the call.
        sink: gets the output.
        ran: gets the layer.
        is_deepest: whether no later block is wanted.
    """

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        shape = list(getattr(hidden, "shape", ()))
        if len(shape) != 3 or shape[:2] != [1, n_tokens]:
            raise ModelError(
                f"block {layer} gives states of shape {shape} for {n_tokens} tokens",
                type(block).__name__,
                "use a model whose blocks return one residual stream, [batch, token, d_model]",
            )
        ran.append(layer)
        sink(layer, hidden[0])
        if is_deepest:
            raise DeepestLayerReached

    return keep


def check_order(ran: list[int], deepest: int, base_model: nn.Module) -> None:
    """Refuse a pass whose blocks did not run once each and in order.

    Args:
        ran: layers in the order in which they ran.
        deepest: the last that was wanted.
        base_model: for the message.

    Raises:
        ModelError: they did not.
    """
    if ran == list(range(deepest + 1)):
        return
    absent = sorted({*range(deepest + 1)} - {*ran})
    what = f"block {absent[0]} did not run" if absent else f"blocks ran in the order {ran}"
    raise ModelError(
        what, kind_of(base_model), "use a model whose forward runs its blocks once each, in order"
    )
