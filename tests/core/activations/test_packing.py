"""Packs: who stands where, and that nobody reads a neighbour, by whatever way texts are packed."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from taprobe_core.activations.forward import run_pack, ways_of
from taprobe_core.activations.packed_attention import packed
from taprobe_core.activations.packing import QUERY_BLOCK, lay_out, plan_packs, query_blocks
from taprobe_core.errors import ModelError

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
}
TEXTS = [[1, *(3 + 7 * at % 50 for at in range(n))] for n in (40, 11, 90, 25)]


def tiny(name: str) -> torch.nn.Module:
    torch.manual_seed(6)
    if name == "llama":
        return LlamaModel(LlamaConfig(**SIZES)).eval()
    return Qwen2Model(Qwen2Config(**SIZES)).eval()


def states(model: torch.nn.Module, texts: list[list[int]]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    run_pack(model, texts, 2, lambda _, hidden: found.append(hidden.clone()))
    return found


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 60))
def test_every_text_is_in_one_pack_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    assert sorted(at for pack in packs for at in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[at] for at in pack) <= budget
    if lengths:
        assert lengths[packs[0][0]] == max(lengths)


def test_a_layout_says_where_texts_lie() -> None:
    layout = lay_out([2, 3], CPU)
    assert layout.bounds == ((0, 2), (2, 5))
    assert layout.blocks.tolist() == [[0, 0, 2], [2, 2, 5]]
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert layout.longest == 3


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_blocks_of_queries_tile_every_text_the_heaviest_first(lengths: list[int]) -> None:
    edges = [0, *accumulate(lengths)]
    blocks = query_blocks(edges).tolist()
    queries = [
        (start, at, end)
        for start, first, end in blocks
        for at in range(first, min(first + QUERY_BLOCK, end))
    ]
    expected = [(a, at, b) for a, b in pairwise(edges) for at in range(a, b)]
    assert sorted(queries) == expected
    n_keys = [first - start for start, first, _ in blocks]
    assert n_keys == sorted(n_keys, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_text_has_the_same_bits_alone_and_anywhere_in_any_pack(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny(name).to(dtype)
    alone = [states(model, [text]) for text in TEXTS]
    for order in ([0, 1, 2, 3], [2, 0, 3], [3, 2, 1, 0], [1, 2]):
        together = states(model, [TEXTS[at] for at in order])
        start = 0
        for at in order:
            end = start + len(TEXTS[at])
            for layer in range(3):
                assert torch.equal(together[layer][start:end], alone[at][layer])
            start = end


def test_the_librarys_own_packing_mixes_texts_with_its_cache_and_ours_does_not() -> None:
    """The trap: with the default cache, or a mask, positions that begin anew are not noticed."""
    model = tiny("qwen2")
    flat = torch.tensor([[token for text in TEXTS for token in text]])
    positions = lay_out([len(text) for text in TEXTS], CPU).positions
    alone = torch.cat([states(model, [text])[1] for text in TEXTS])
    with torch.inference_mode():
        naive = [
            model(flat, position_ids=positions, output_hidden_states=True, **more).hidden_states[2][
                0
            ]
            for more in ({}, {"attention_mask": torch.ones_like(flat), "use_cache": False})
        ]
    for mixed in naive:
        assert float((mixed - alone).abs().max()) > 0.1 * float(alone.std())
    assert torch.equal(states(model, TEXTS)[1], alone)


def test_neither_cache_nor_mask_reaches_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny("llama"), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **kwargs: (given.append(kwargs), forward(**kwargs))
    )
    run_pack(model, TEXTS, 2, lambda *_: None, way="packed")
    assert given[0]["use_cache"] is False
    assert "attention_mask" not in given[0]


def test_the_model_attends_as_before_afterwards() -> None:
    model = tiny("qwen2")
    before = model.config._attn_implementation
    with packed(model):
        assert model.config._attn_implementation == "taprobe_packed"
        with pytest.raises(ModelError, match="packed attention without a layout, or with a mask"):
            model(torch.tensor([[1, 2]]), use_cache=False)
    assert model.config._attn_implementation == before


def test_a_text_longer_than_the_window_takes_no_pack() -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=30, max_window_layers=1)
    model = Qwen2Model(config).eval()
    assert ways_of(model, 30) == ("fused", "packed", "library")
    assert ways_of(model, 31) == ("library",)
    for way in ("fused", "packed"):
        run_pack(model, [TEXTS[1], TEXTS[3]], 2, lambda *_: None, way=way)
        with pytest.raises(ModelError, match="a window of 30 tokens"):
            run_pack(model, [TEXTS[1], TEXTS[2]], 2, lambda *_: None, way=way)
    together = states(model, [TEXTS[1], TEXTS[2]])
    alone = [states(model, [text]) for text in (TEXTS[1], TEXTS[2])]
    for layer in range(3):
        assert torch.equal(together[layer], torch.cat([each[layer] for each in alone]))
