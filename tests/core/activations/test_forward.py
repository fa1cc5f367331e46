"""One forward pass: equal to the model's own states, stops in time, cleans up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
)

from taprobe_core.activations.forward import pooled_layers
from taprobe_core.errors import ModelError, ModelMismatchError, SpanError

DEPTH = 4
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": DEPTH,
    "max_position_embeddings": 64,
}
TOKENS = [1, *(7 + 5 * at % 50 for at in range(39))]
SPANS = [(2, 9), (9, 10), (12, 21), (20, 33)]
EACH_TOKEN = [(at, at + 1) for at in range(len(TOKENS))]


def tiny(name: str) -> nn.Module:
    torch.manual_seed(5)
    if name == "gpt2":
        config = GPT2Config(vocab_size=60, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=64)
        return GPT2Model(config).eval()
    if name == "llama":
        return LlamaModel(LlamaConfig(**SIZES)).eval()
    return Qwen2Model(Qwen2Config(**SIZES)).eval()


@contextmanager
def block_calls(blocks: nn.ModuleList) -> Iterator[list[int]]:
    """Count how often each block begins to run."""
    calls = [0] * len(blocks)

    def count(at: int) -> None:
        calls[at] += 1

    hooks = [
        block.register_forward_pre_hook(lambda *_, at=at: count(at))
        for at, block in enumerate(blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def own_states(model: nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The model's hidden states, and the last block's output by a hook (its own is normed)."""
    last: list[torch.Tensor] = []
    blocks = model.h if hasattr(model, "h") else model.layers
    hook = blocks[-1].register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        own = model(torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False)
    hook.remove()
    return [state[0] for state in own.hidden_states], last[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_states_are_bit_equal_to_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    states, last = own_states(model)
    expected = [*states[1:-1], last]
    means = pooled_layers(model, TOKENS, EACH_TOKEN, range(DEPTH))
    assert list(means) == list(range(DEPTH))
    for layer in range(DEPTH):
        assert torch.equal(means[layer], expected[layer].float())
    assert not torch.equal(last, states[-1])


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_means_equal_a_float64_reference(name: str) -> None:
    model = tiny(name)
    states, _ = own_states(model)
    means = pooled_layers(model, TOKENS, SPANS, [2, 0])
    for layer in (0, 2):
        exact = states[layer + 1].double().numpy()
        expected = np.stack([exact[start:end].mean(axis=0) for start, end in SPANS])
        np.testing.assert_allclose(means[layer].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("layers", [[0], [2, 0], [3, 1], [1, 1]])
def test_one_pass_that_ends_at_the_deepest_layer(layers: list[int]) -> None:
    model = tiny("qwen2")
    with block_calls(model.layers) as calls:
        means = pooled_layers(model, TOKENS, SPANS, layers)
    assert calls == [int(at <= max(layers)) for at in range(DEPTH)]
    assert sorted(means) == sorted(set(layers))


def test_no_layers_no_pass() -> None:
    model = tiny("qwen2")
    with block_calls(model.layers) as calls:
        assert pooled_layers(model, TOKENS, SPANS, []) == {}
    assert calls == [0] * DEPTH


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")
    before, _ = own_states(model)
    # The model keeps hooks of its own after output_hidden_states.
    hooks = [list(block._forward_hooks) for block in model.layers]
    first = pooled_layers(model, TOKENS, SPANS, [1])
    with pytest.raises(SpanError):
        pooled_layers(model, TOKENS, [(5, 5)], [1])
    again = pooled_layers(model, TOKENS, SPANS, [1])
    after, _ = own_states(model)
    assert torch.equal(first[1], again[1])
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert [list(block._forward_hooks) for block in model.layers] == hooks


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2"])
def test_text_after_the_last_span_changes_nothing(name: str) -> None:
    model = tiny(name)
    whole = pooled_layers(model, TOKENS, SPANS, range(DEPTH))
    cut = pooled_layers(model, TOKENS[: SPANS[-1][1]], SPANS, range(DEPTH))
    for layer in range(DEPTH):
        torch.testing.assert_close(whole[layer], cut[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "layers", "what"),
    [
        (TOKENS, [1, DEPTH], r"layers \[4\], but the blocks are 0 to 3"),
        (TOKENS, [-1], r"layers \[-1\]"),
        ([1, 60], [0], "token id 60, but the vocabulary ends at 59"),
        ([1] * 65, [0], "65 tokens, but the model takes 64"),
        ([], [0], "text has no tokens"),
    ],
)
def test_what_the_model_lacks_is_refused(tokens: list[int], layers: list[int], what: str) -> None:
    with pytest.raises(ModelMismatchError, match=what):
        pooled_layers(tiny("qwen2"), tokens, [(0, 1)], layers)


class Misshapen(nn.Module):
    """Blocks in `layers`, run by a forward pass of a wrong kind."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.fault = fault
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        hidden = torch.zeros(*input_ids.shape, 4)
        if self.fault == "did not run":
            return self.layers[0](hidden)
        if self.fault == "turned":
            hidden = hidden.transpose(0, 1)
        if self.fault == "twice":
            hidden = self.layers[0](hidden)
        if self.fault == "broken":
            raise IndexError("no such place")
        return self.layers[1](self.layers[0](hidden))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Misshapen("did not run").eval(), "block 1 did not run in Misshapen"),
        (lambda: Misshapen("twice").eval(), r"blocks ran in the order \[0, 0, 1\] in Misshapen"),
        (lambda: Misshapen("broken").eval(), r"fails on a text \(IndexError: no such place\)"),
        (lambda: Misshapen("turned").eval(), "block 0 gives states of shape"),
        (lambda: tiny("qwen2").train(), "training mode"),
        (lambda: nn.Linear(4, 4).eval(), "no list of blocks named layers or h in Linear"),
    ],
)
def test_a_model_of_another_kind_is_refused(make: Callable[[], nn.Module], what: str) -> None:
    model = make()
    with pytest.raises(ModelError, match=what):
        pooled_layers(model, [1, 2, 3], [(1, 3)], [1])
    for block in getattr(model, "layers", []):
        assert not block._forward_hooks
