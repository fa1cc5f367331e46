"""Blocks spelled out for a CPU: the library's bits, whatever the pack, and the library's blocks
where they would not be."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
)

from taprobe_core.activations.extraction import extract
from taprobe_core.activations.forward import Way, run_pack
from taprobe_core.activations.fused import HostSteps, can_fuse
from taprobe_core.activations.passes import ways_for
from taprobe_core.activations.tasks import ExtractOptions, TextTask

DEPTH = 3
SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": DEPTH,
    "max_position_embeddings": 1024,
}
LENGTHS = (810, 17, 1, 263)
TEXTS = [[1, *((3 + 7 * at + n) % 300 for at in range(n - 1))] for n in LENGTHS]
KINDS = {
    "qwen2": (Qwen2Config, Qwen2Model),
    "llama": (LlamaConfig, LlamaModel),
    "mistral": (MistralConfig, MistralModel),
}
WAYS: tuple[Way, ...] = ("fused", "packed")
DTYPES = [torch.float32, torch.bfloat16]


def model_of(name: str, dtype: torch.dtype = torch.float32, **changed: object) -> torch.nn.Module:
    torch.manual_seed(4)
    if name == "gpt2":
        config = GPT2Config(vocab_size=300, n_embd=64, n_layer=DEPTH, n_head=4)
        return GPT2Model(config).eval().to(dtype)
    more = {"sliding_window": None} if name == "mistral" else {}
    kind, made = KINDS[name]
    model = made(kind(**{**SIZES, **more, **changed})).eval()
    for each, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in each else 0.0, 0.1)
    return model.to(dtype).requires_grad_(False)


def states(
    model: torch.nn.Module, pack: Sequence[Sequence[int]], *, way: Way
) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    run_pack(model, pack, DEPTH - 1, lambda _, h: found.append(h.clone()), way=way)
    return found


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "dtype", "threads"),
    [
        *((name, torch.float32, 1) for name in KINDS),
        *((name, torch.bfloat16, 1) for name in KINDS),
        ("qwen2", torch.float32, 2),
    ],
    indirect=["threads"],
)
@pytest.mark.usefixtures("threads")
def test_bits_are_the_librarys_and_the_same_anywhere(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    assert can_fuse(model)
    alone = [states(model, [text], way="fused") for text in TEXTS]
    for text, mine in zip(TEXTS, alone, strict=True):
        theirs = states(model, [text], way="packed")
        assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    for order in ([0, 1, 2, 3], [2, 3, 0], [1, 0]):
        together = states(model, [TEXTS[at] for at in order], way="fused")
        start = 0
        for at in order:
            end = start + LENGTHS[at]
            for layer in range(DEPTH):
                assert torch.equal(together[layer][start:end], alone[at][layer])
            start = end


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_scaled_rotary_angles_are_the_librarys(name: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    model = model_of(name, rope_parameters={**rope, "rope_theta": 10_000.0})
    mine, theirs = (states(model, TEXTS[:1], way=way) for way in WAYS)
    assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


def test_queries_and_keys_shown_are_the_librarys() -> None:
    model = model_of("qwen2")
    shown: list[list[tuple[int, torch.Tensor, torch.Tensor, object, float]]] = [[], []]
    for way, found in zip(WAYS, shown, strict=True):

        def watch(
            layer: int, query: torch.Tensor, key: torch.Tensor, lse: object, scale: float, to=found
        ) -> None:
            to.append((layer, query.clone(), key.clone(), lse, scale))

        run_pack(model, TEXTS[:2], DEPTH - 1, lambda *_: None, watch, way=way)
    for mine, theirs in zip(*shown, strict=True):
        assert (mine[0], mine[3:]) == (theirs[0], theirs[3:])
        assert torch.equal(mine[1], theirs[1])
        assert torch.equal(mine[2], theirs[2])


def test_no_block_behind_the_deepest_runs() -> None:
    model = model_of("llama")
    model.layers[2].mlp.forward = model.layers[2].self_attn.q_proj.weight = None
    seen: list[int] = []
    run_pack(model, TEXTS[:1], 1, lambda layer, _: seen.append(layer), way="fused")
    assert seen == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_of_long_sentences_equal_a_float64_reference(dtype: torch.dtype) -> None:
    model = model_of("qwen2", dtype)
    spans = [(1, 400), (400, 403), (403, 810)]
    layers = tuple(range(DEPTH))
    task = TextTask(1, TEXTS[0], spans, layers)
    options = ExtractOptions(storage="float32")
    (item,) = extract(model, [task], options)
    theirs = states(model, TEXTS[:1], way="packed")
    for layer in layers:
        exact = torch.stack([theirs[layer][a:b].double().mean(0) for a, b in spans])
        mean = item.shards[layer].tensors["mean"].double()
        assert float((mean - exact).abs().max() / exact.square().mean().sqrt()) < 1e-6


def test_gpt2_and_half_precision_run_as_the_library_runs_them() -> None:
    assert not can_fuse(model_of("gpt2"))
    assert not can_fuse(model_of("llama", torch.float16))
    mixed = model_of("llama", torch.bfloat16)
    mixed.norm.float()
    assert not can_fuse(mixed)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_the_user_is_called(when: str) -> None:
    model = model_of("llama")
    task = TextTask(1, TEXTS[1], [(1, 17)], (1,))
    plain = next(extract(model, [task])).shards[1].tensors["mean"]
    if when == "before":
        model = model_of("llama")
    handle = model.layers[0].mlp.register_forward_hook(lambda _, __, out: out * 0)
    assert not can_fuse(model)
    steered = next(extract(model, [task])).shards[1].tensors["mean"]
    assert not torch.equal(plain, steered)
    handle.remove()
    assert ways_for([model], [task]).short == "fused"
    assert torch.equal(next(extract(model, [task])).shards[1].tensors["mean"], plain)


def test_a_step_that_rounds_otherwise_is_found_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def otherwise(
        self: HostSteps, hidden: torch.Tensor, states: torch.Tensor, linear: torch.nn.Linear
    ) -> None:
        hidden.addmm_(states, linear.weight.t())

    expected = states(model_of("qwen2"), TEXTS[:1], way="packed")[DEPTH - 1][1:]
    monkeypatch.setattr(HostSteps, "add_product_", otherwise)
    model = model_of("qwen2")
    assert can_fuse(model)
    task = TextTask(1, TEXTS[0], [(1, LENGTHS[0])], (DEPTH - 1,))
    options = ExtractOptions(poolings=("tokens",), storage="float32")
    with caplog.at_level(logging.WARNING):
        (item,) = extract(model, [task], options)
    assert "fused blocks differ from the library's by" in caplog.text
    assert torch.equal(item.shards[DEPTH - 1].tensors["tokens"], expected)
