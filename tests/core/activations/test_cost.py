"""Operations and bytes against what runs and is written; the measured rate on a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from taprobe_core.activations.cost import (
    attention_bytes,
    attention_scores_flop,
    bytes_of,
    bytes_text,
    cost_line,
    duration_text,
    flop_text,
    pass_flop,
)
from taprobe_core.activations.gemm_rate import (
    BlockShape,
    block_weights,
    is_known,
    sustained_gemm_rate,
)

CPU = torch.device("cpu")
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"head_dim": 12},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 16},
}
WIDE = BlockShape(d_model=5120, d_mlp=13_824, n_heads=40, n_kv_heads=8, d_head=128, gated=True)


def config_of(kind: str) -> Any:
    return AutoConfig.for_model(kind, **CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shape_has_the_weights_of_the_models_own_block(kind: str) -> None:
    config = config_of(kind)
    model = AutoModel.from_config(config)
    block = (model.h if kind == "gpt2" else model.layers)[0]
    matrices = [each.numel() for each in block.parameters() if each.dim() == 2]
    assert len(BlockShape.of(config).products) == len(matrices) + (2 if kind == "gpt2" else 0)
    assert block_weights(BlockShape.of(config)) == sum(matrices)
    assert is_known(config)


def test_what_is_not_stated_or_not_known() -> None:
    gpt2 = BlockShape.of(config_of("gpt2"))
    assert (gpt2.d_mlp, gpt2.n_kv_heads, gpt2.d_head, gpt2.gated) == (128, 4, 8, False)
    assert not is_known(AutoConfig.for_model("mixtral"))
    for width in (4096, 100):
        assumed = BlockShape.assumed(width)
        assert block_weights(assumed) == 12 * width**2
        assert assumed.d_attn == width


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pass_takes_what_it_runs_less_the_masked_half_of_attention(kind: str) -> None:
    config, n_tokens, n_blocks = config_of(kind), 11, 2
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros(1, n_tokens, dtype=torch.long), use_cache=False)
    shape = BlockShape.of(config)
    masked = 2 * n_blocks * n_tokens**2 * shape.d_attn
    assert pass_flop(shape, [n_tokens], n_blocks) == counter.get_total_flops() - masked


@given(st.lists(st.integers(1, 9000), max_size=5), st.integers(0, 48))
def test_passes_add_up_exactly(lengths: list[int], n_blocks: int) -> None:
    flop = pass_flop(WIDE, lengths, n_blocks)
    assert isinstance(flop, int)
    assert flop == n_blocks * sum(pass_flop(WIDE, [length], 1) for length in lengths)


def test_fourteen_billion_weights() -> None:
    # 48 blocks, 20 texts of 3,885 tokens: about 2.2 PFLOP by hand.
    assert 48 * block_weights(WIDE) == pytest.approx(13.2e9, rel=0.01)
    assert pass_flop(WIDE, [3885] * 20, 48) == pytest.approx(2.2e15, rel=0.02)
    # The scores once more are a quarter of both attention products' full squares.
    full = attention_scores_flop(WIDE, [4096], [0], 48)
    assert full == 48 * 4096**2 * WIDE.d_attn
    assert attention_scores_flop(WIDE, [4096], [160], 1) == 4096**2 * 40 * (128 + 10)
    assert attention_scores_flop(WIDE, [4096], [160], 1, n_queries=4) == 8 * 4096 * 40 * (128 + 4)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_bytes_are_those_of_the_tensors(storage: str) -> None:
    dtype = getattr(torch, storage)
    for pooling in ("mean", "last", "max", "boundary"):
        assert bytes_of(pooling, 7, 90, 16, storage) == torch.zeros(7, 16, dtype=dtype).nbytes
    offsets = torch.zeros(8, dtype=torch.int64)
    states = torch.zeros(90, 16, dtype=dtype)
    assert bytes_of("tokens", 7, 90, 16, storage) == states.nbytes + offsets.nbytes


def test_bytes_of_attention() -> None:
    n_tokens = torch.zeros(7, dtype=torch.int32)
    full = (torch.zeros(3, 7, 7), torch.zeros(3, 7), n_tokens)
    light = (torch.zeros(3, 4, 7), torch.zeros(3, 4), n_tokens)
    assert attention_bytes("full", 3, 7, 4) == sum(tensor.nbytes for tensor in full)
    assert attention_bytes("light", 3, 7, 4) == sum(tensor.nbytes for tensor in light)
    assert attention_bytes("off", 3, 7, 4) == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            cost_line(20, 58_213, 1631 * 10**12, {"mean": 1_395_864_371}),
            "20 texts, 58,213 tokens, 1,631 TFLOP; mean 1.3 GiB",
        ),
        (
            cost_line(1, 90, 10**10, {"mean": 900, "tokens": 20_480}),
            "1 text, 90 tokens, 10 GFLOP; mean 900 B, tokens 20 KiB",
        ),
        (cost_line(2, 90, 10**17, {}), "2 texts, 90 tokens, 100 PFLOP"),
    ],
)  # fmt: skip
def test_the_cost_in_one_line(line: str, said: str) -> None:
    assert line == said


def test_quantities_have_three_digits() -> None:
    assert [flop_text(flop) for flop in (0, 5e6, 9.994e9, 99.96e9, 1e12, 9.9e15, 1e16)] == [
        "0 MFLOP", "5 MFLOP", "9.99 GFLOP", "100 GFLOP", "1 TFLOP", "9,900 TFLOP", "10 PFLOP",
    ]  # fmt: skip
    assert bytes_text(3 * 2**40) == "3.0 TiB"
    assert bytes_text(1023 * 2**20) == "1,023 MiB"
    assert [duration_text(seconds) for seconds in (0.4, 59.6, 3599.6)] == [
        "0 s", "1 min 00 s", "1 h 00 min",
    ]  # fmt: skip


class FakeDevice:
    """Multiplies at a fixed rate on a clock of its own, and takes only so many rows."""

    def __init__(self, flop_per_s: float, max_rows: int = 10**9) -> None:
        self.flop_per_s, self.max_rows = flop_per_s, max_rows
        self.now = 0.0
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def linear(self, rows: torch.Tensor, weight: torch.Tensor) -> None:
        if len(rows) > self.max_rows:
            raise torch.OutOfMemoryError
        self.calls.append((rows, weight))
        self.now += 2 * rows.shape[0] * weight.numel() / self.flop_per_s


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDevice]:
    def made(*arguments: Any) -> FakeDevice:
        device = FakeDevice(*arguments)
        monkeypatch.setattr("torch.nn.functional.linear", device.linear)
        return device

    return made


def test_a_rate_is_the_work_of_whole_blocks_over_their_time(
    fake: Callable[..., FakeDevice],
) -> None:
    device = fake(5e9)
    shape = BlockShape(64, 192, 4, 2, 16, gated=True)
    rate = sustained_gemm_rate(
        CPU, torch.bfloat16, shape, seconds=0.3, n_rows=100, clock=lambda: device.now
    )
    assert rate == pytest.approx(5e9)
    assert device.now >= 0.3
    assert len(device.calls) % len(shape.products) == 0
    multiplied = [tuple(weight.T.shape) for _, weight in device.calls[:7]]
    assert multiplied == list(shape.products)
    for rows, weight in device.calls[:7]:
        assert rows.dtype == weight.dtype == torch.bfloat16
        assert rows.shape == (100, weight.shape[1])
        assert rows.ne(0).float().mean() > 0.9
        assert 0.9 < weight.float().std() * weight.shape[1] ** 0.5 < 1.1


def test_a_wide_block_is_narrowed_on_a_cpu_and_a_slow_one_measured_once(
    fake: Callable[..., FakeDevice],
) -> None:
    device = fake(1e9)
    rate = sustained_gemm_rate(CPU, torch.float32, WIDE, clock=lambda: device.now)
    assert rate == pytest.approx(1e9)
    assert [tuple(weight.T.shape) for _, weight in device.calls] == [
        (1024, 1024), (1024, 256), (1024, 256), (1024, 1024), (1024, 2752), (1024, 2752),
        (2752, 1024),
    ]  # fmt: skip


def test_short_memory_halves_the_rows(fake: Callable[..., FakeDevice]) -> None:
    device = fake(1e9, 600)
    shape = BlockShape.assumed(8)
    measured = sustained_gemm_rate(
        CPU, torch.float32, shape, seconds=1e-3, n_rows=2000, clock=lambda: device.now
    )
    assert measured == pytest.approx(1e9)
    assert {len(rows) for rows, _ in device.calls} == {500}
    device = fake(1e9, 255)
    with pytest.raises(torch.OutOfMemoryError):
        sustained_gemm_rate(CPU, torch.float32, shape, n_rows=2000, clock=lambda: device.now)


def test_this_machine_has_a_rate_and_keeps_its_random_state() -> None:
    before = torch.random.get_rng_state()
    rate = sustained_gemm_rate(CPU, torch.float32, BlockShape.assumed(64), seconds=0.02)
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.random.get_rng_state(), before)
