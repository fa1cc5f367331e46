"""What only an accelerator can show: kernels, fused blocks, packs, several devices."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from taprobe_core.activations.extraction import extract
from taprobe_core.activations.forward import Way, run_pack
from taprobe_core.activations.fused import can_fuse
from taprobe_core.activations.packing import lay_out
from taprobe_core.activations.pooling import pool, span_index
from taprobe_core.activations.tasks import ExtractOptions, TextTask
from taprobe_core.attention.mode import AttentionMode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HALF = [torch.float16, torch.bfloat16]
DEPTH = 6
SIZES = {
    "vocab_size": 500,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": DEPTH,
    "max_position_embeddings": 4096,
}
LENGTHS = (1300, 40, 700, 515, 2100)


def model_of(name: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    kind = {"llama": (LlamaConfig, LlamaModel), "qwen2": (Qwen2Config, Qwen2Model)}[name]
    model: torch.nn.Module = kind[1](kind[0](**SIZES))
    return model.eval().requires_grad_(False).to("cuda", dtype)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 500, (n,), generator=generator).tolist() for n in LENGTHS]


def states(
    model: torch.nn.Module, pack: list[list[int]], *, way: Way | None = None
) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    run_pack(model, pack, DEPTH - 1, lambda _, h: found.append(h.clone()), way=way)
    return found


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference (Frobenius)."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [96, 512, 5120])
def test_kernels_round_once(dtype: torch.dtype, width: int) -> None:
    from taprobe_core.activations.kernels import rms_norm, rotate_, silu_times_

    rounding = torch.finfo(dtype).eps / 2
    x, y = (torch.randn(333, width, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(width, device="cuda").to(dtype)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert off_by(rms_norm(x, weight, 1e-6), normed) < rounding
    assert off_by(silu_times_(x.clone(), y), silu(wide) * y.double()) < rounding
    heads = torch.randn(333, 5, 64, device="cuda").to(dtype)
    angle = torch.rand(333, 32, device="cuda") * 7
    one, two = heads.double().chunk(2, dim=-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    turned = torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
    assert off_by(rotate_(heads.clone(), angle.cos(), angle.sin()), turned) < rounding


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d_head", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("by_tile", [True, False])
def test_attention_equals_float64_and_no_text_reads_another(
    dtype: torch.dtype, d_head: int, by_tile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taprobe_core.activations import kernels as attention_kernel

    if not by_tile:
        monkeypatch.setattr(attention_kernel, "_HOPPER", (99, 0))
    lengths = [130, 1, 64, 700]
    layout = lay_out(lengths, torch.device("cuda"))
    draw = torch.Generator("cuda").manual_seed(3)
    query, key, value = (
        torch.randn(sum(lengths), heads, d_head, device="cuda", generator=draw).to(dtype)
        for heads in (6, 2, 2)
    )
    key[130], value[130] = float("nan"), float("nan")  # the text of one token
    scale = d_head**-0.5
    mixed, lse = attention_kernel.causal_attention(query, key, value, layout, scale)
    for start, end in (each for each in layout.bounds if each != (130, 131)):
        q = query[start:end].double()
        k, v = (each[start:end].double().repeat_interleave(3, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        exact = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        assert off_by(mixed[start:end], exact) < torch.finfo(dtype).eps
        assert float((lse[:, start:end] - scores.logsumexp(-1)).abs().max()) < 1e-5
    assert torch.isnan(mixed[130]).all()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_pooling_equals_its_definition_and_keeps_a_nan(dtype: torch.dtype) -> None:
    hidden = torch.randn(300, 700, device="cuda").to(dtype)
    spans = [(1, 2), (2, 90), (60, 97), (97, 300), (299, 300)]
    index = span_index(spans, 300).to(hidden.device)
    pooled = pool(hidden, index, ("mean", "max", "last", "boundary"))
    for at, (start, end) in enumerate(spans):
        assert off_by(pooled["mean"][at], hidden[start:end].double().mean(0)) < 1e-6
        assert torch.equal(pooled["max"][at], hidden[start:end].amax(0))
        assert torch.equal(pooled["last"][at], hidden[end - 1])
        assert torch.equal(pooled["boundary"][at], hidden[start - 1])
    hidden[70, 5] = float("nan")
    for rows in pool(hidden, index, ("mean", "max")).values():
        assert torch.isnan(rows).nonzero().tolist() == [[1, 5], [2, 5]]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_fused_blocks_are_nearer_to_float32_than_the_librarys(
    name: str, dtype: torch.dtype
) -> None:
    model = model_of(name, dtype)
    assert can_fuse(model)
    exact = states(copy.deepcopy(model).float(), texts()[:1])
    fused = states(model, texts()[:1], way="fused")
    library = states(model, texts()[:1], way="packed")
    for mine, theirs, expected in zip(fused, library, exact, strict=True):
        assert off_by(mine, expected) < 1.05 * off_by(theirs, expected) < 0.05


@pytest.mark.parametrize("way", ["fused", "packed"])
@pytest.mark.parametrize("wants_attention", [True, False])
def test_a_text_has_the_same_bits_alone_and_anywhere(way: Way, wants_attention: bool) -> None:
    model = model_of("qwen2", torch.bfloat16)
    watcher = (lambda *_: None) if wants_attention else None
    found: list[torch.Tensor] = []

    def run(pack: list[list[int]]) -> torch.Tensor:
        found.clear()
        run_pack(model, pack, DEPTH - 1, lambda _, h: found.append(h.clone()), watcher, way=way)
        return found[-1]

    alone = [run([text]) for text in texts()]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1], [1, 3, 0, 4, 2]):
        start, together = 0, run([texts()[at] for at in order])
        for at in order:
            end = start + LENGTHS[at]
            assert off_by(together[start:end], alone[at]) < 1e-2
            start = end


def tasks(**wanted: tuple[int, ...]) -> list[TextTask]:
    return [
        TextTask(at, text, [(1, 20), (20, 39)] + [(39, len(text))] * (len(text) > 40), **wanted)
        for at, text in enumerate(texts())
    ]


def test_extraction_equals_float32_on_the_cpu_within_rounding() -> None:
    model = model_of("llama", torch.bfloat16)
    poolings = ("mean", "last", "max", "boundary", "tokens")
    options = ExtractOptions(poolings, "float32", AttentionMode("full"))
    wanted = {"layers": (1, DEPTH - 1), "attention_layers": (0, 3)}
    exact = {
        item.problem_id: item
        for item in extract(copy.deepcopy(model).float().cpu(), tasks(**wanted), options)
    }
    found = list(extract(model, tasks(**wanted), options))
    assert sorted(item.problem_id for item in found) == sorted(exact)
    for item in found:
        for layer, shard in item.shards.items():
            for name in poolings:
                expected = exact[item.problem_id].shards[layer].tensors[name]
                assert off_by(shard.tensors[name], expected) < 0.03
        for layer, mass in item.attention.items():
            expected = exact[item.problem_id].attention[layer].tensors["mass"]
            assert off_by(mass.tensors["mass"], expected) < 0.02


def test_a_loud_state_stays_float32_beside_quiet_ones() -> None:
    model = model_of("qwen2", torch.bfloat16)
    loud = 499
    model.embed_tokens.weight[loud] *= 1e8  # type: ignore[operator, index, union-attr]
    quiet = [TextTask(at, [1] * 90, [(1, 50)], (2,)) for at in range(2)]
    noisy = TextTask(7, [1, loud, *[3] * 70], [(1, 4), (4, 60)], (2,))
    shards = {item.problem_id: item.shards[2] for item in extract(model, [*quiet, noisy])}
    assert [shards[at].dtype for at in (0, 1, 7)] == ["float16", "float16", "float32"]
    assert shards[7].max_abs > 65504
    assert all(bool(torch.isfinite(shard.tensors["mean"]).all()) for shard in shards.values())


def test_short_memory_makes_packs_smaller_with_equal_results(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of("qwen2", torch.bfloat16)
    wanted = [TextTask(at, texts()[4] * 1, [(1, 2000)], tuple(range(DEPTH))) for at in range(24)]
    options = ExtractOptions(("mean", "tokens"), token_budget=23 * 2100)
    expected = next(extract(model, wanted[:1], options)).shards
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 6e8) / total)
    try:
        with caplog.at_level(logging.WARNING):
            found = list(extract(model, wanted, options))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory on a pack of 23 texts" in caplog.text
    assert len(found) == 24
    for item in found:
        for layer, shard in item.shards.items():
            difference = off_by(shard.tensors["tokens"], expected[layer].tensors["tokens"])
            assert difference < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_give_the_bits_of_one() -> None:
    from taprobe_core.checkpoints import replicate

    model = model_of("qwen2", torch.bfloat16)
    wanted = tasks(layers=(0, DEPTH - 1))
    options = ExtractOptions(storage="float32", token_budget=1500)
    one = {item.problem_id: item.shards for item in extract(model, wanted, options)}
    pair = [model, replicate(model, torch.device("cuda:1"))]
    for item in extract(pair, wanted, options):
        for layer, shard in item.shards.items():
            expected = one[item.problem_id][layer].tensors["mean"]
            assert torch.equal(shard.tensors["mean"], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_model_spread_over_two_gpus_gives_the_bits_of_one() -> None:
    from accelerate import dispatch_model

    model = model_of("qwen2", torch.bfloat16)
    whole = states(model, texts()[:3])
    places = {"embed_tokens": 0, "rotary_emb": 0, "norm": 1}
    places |= {f"layers.{at}": int(at >= DEPTH // 2) for at in range(DEPTH)}
    spread = states(dispatch_model(copy.deepcopy(model), places), texts()[:3])
    for found, expected in zip(spread, whole, strict=True):
        assert torch.equal(found.cpu(), expected.cpu())
