"""Attention mass between sentences: against eager attention, brute force, and its own bounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taprobe_core.attention.mass import sentence_mass, tail_mass
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.errors import ConfigError, ModelMismatchError, SpanError

Spans = list[tuple[int, int]]


def weights(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax weights [head, query, key] and lse [head, token], the direct way, in float64."""
    groups = query.shape[1] // key.shape[1]
    keys = key.double().repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(1)
    scores.masked_fill_(future, -torch.inf)
    return scores.softmax(dim=-1), scores.logsumexp(dim=-1).float()


def members(spans: Spans, like: Tensor) -> Tensor:
    member = like.new_zeros(len(spans), like.shape[-1])
    for row, (start, end) in enumerate(spans):
        member[row, start:end] = 1
    return member


def peaked(
    n_tokens: int, n_heads: int, n_kv_heads: int, d_head: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Queries and keys whose mean greatest weight is about 0.7."""
    generator = torch.Generator().manual_seed(seed)
    query = 6 * torch.randn(n_tokens, n_heads, d_head, generator=generator)
    return query, torch.randn(n_tokens, n_kv_heads, d_head, generator=generator), d_head**-0.5


CAPTURE = "capture_for_test"


@pytest.fixture
def captured() -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Queries, keys and scale of every layer of a model set to the attention CAPTURE."""
    calls: list[tuple[Tensor, Tensor, float]] = []

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        calls.append((query[0].transpose(0, 1), key[0].transpose(0, 1), kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(CAPTURE, capture)
    yield calls
    AttentionInterface._global_mapping.pop(CAPTURE)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "make", [lambda: LlamaModel(LlamaConfig(**SIZES)), lambda: Qwen2Model(Qwen2Config(**SIZES))]
)
@torch.no_grad()
def test_mass_is_that_of_eager_attention_weights(
    make: Callable[[], Any], captured: list[tuple[Tensor, Tensor, float]]
) -> None:
    torch.manual_seed(1)
    model = make().eval()
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.mul_(40)  # random weights alone give nearly even attention
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 150))
    spans = [(3, 9), (9, 10), (10, 41), (44, 90), (90, 131)]
    model.set_attn_implementation("eager")
    eager = model(tokens, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(CAPTURE)
    model(tokens, use_cache=False)
    assert len(captured) == len(eager) == 2
    assert eager[1].amax(dim=-1).mean() > 0.4
    for (query, key, scale), attention in zip(captured, eager, strict=True):
        by_query = members(spans, attention) @ attention[0]
        mass, bos_mass = sentence_mass(query, key, spans, scale, query_block=64, key_block=32)
        tail = tail_mass(query, key, spans, scale, 4)
        lengths = torch.tensor([end - start for start, end in spans])
        expected = by_query @ members(spans, attention).T
        # Per query token, so that a long sentence is held to the same accuracy as a short one.
        assert ((mass - expected).abs() / lengths[:, None]).max() < 1e-5
        assert ((bos_mass - by_query[..., 0]).abs() / lengths).max() < 1e-5
        rows = attention[0, :, -4:]
        torch.testing.assert_close(tail.mass, rows @ members(spans, attention).T, atol=1e-5, rtol=0)
        torch.testing.assert_close(tail.bos_mass, rows[..., 0], atol=1e-5, rtol=0)


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, Spans]:
    """Spans with gaps, single tokens, overlaps and any order; token 0 may or may not be in one."""
    n_tokens = draw(st.integers(2, 70))
    starts = draw(st.lists(st.integers(0, n_tokens - 1), min_size=1, max_size=9))
    return n_tokens, [(at, draw(st.integers(at + 1, min(n_tokens, at + 25)))) for at in starts]


@settings(max_examples=60, deadline=None)
@given(
    texts(),
    st.integers(1, 80),
    st.integers(1, 80),
    st.booleans(),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
)
def test_mass_is_exact_whatever_the_blocks_and_spans(
    text: tuple[int, Spans],
    query_block: int,
    key_block: int,
    gives_lse: bool,
    heads: tuple[int, int],
) -> None:
    n_tokens, spans = text
    query, key, scale = peaked(n_tokens, *heads, seed=n_tokens)
    attention, lse = weights(query, key, scale)
    member = members(spans, attention)
    mass, bos_mass = sentence_mass(
        query,
        key,
        torch.tensor(spans),
        scale,
        lse=lse if gives_lse else None,
        query_block=query_block,
        key_block=key_block,
    )
    assert mass.dtype == bos_mass.dtype == torch.float32
    per_token = member.sum(dim=1)
    assert ((mass - member @ attention @ member.T).abs() / per_token[:, None]).max() < 1e-5
    assert ((bos_mass - (member @ attention)[..., 0]).abs() / per_token).max() < 1e-5


def test_rows_of_a_covered_text_sum_to_its_tokens() -> None:
    query, key, scale = peaked(400, 8, 2)
    spans = [(1, 2), *((at, min(at + 23, 400)) for at in range(2, 400, 23))]
    mass, bos_mass = sentence_mass(query, key, spans, scale)
    lengths = torch.tensor([float(end - start) for start, end in spans])
    torch.testing.assert_close(mass.sum(-1) + bos_mass, lengths.expand(8, -1), atol=1e-4, rtol=1e-6)
    assert torch.equal(mass, mass.tril())


def test_rounded_inputs_are_not_rounded_again() -> None:
    query, key, scale = (each for each in peaked(200, 4, 2))
    query, key = query.bfloat16(), key.bfloat16()
    spans = [(1, 60), (60, 130)]
    attention, _ = weights(query, key, scale)
    member = members(spans, attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mass, _ = sentence_mass(query, key, spans, scale)
    torch.testing.assert_close(mass.double(), member @ attention @ member.T, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("last_n", [1, 4, 50])
def test_tail_is_the_last_rows_of_the_weights(last_n: int) -> None:
    query, key, scale = peaked(30, 4, 2)
    spans = [(1, 9), (9, 27), (27, 29)]
    attention, _ = weights(query, key, scale)
    tail = tail_mass(query, key, spans, scale, last_n)
    rows = attention[:, max(0, 30 - last_n) :]
    expected = rows @ members(spans, attention).T
    torch.testing.assert_close(tail.mass.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tail.bos_mass.double(), rows[..., 0], atol=1e-5, rtol=0)
    first = max(0, 30 - last_n)
    assert tail.is_after.tolist() == [[at >= end for _, end in spans] for at in range(first, 30)]


def test_a_tail_beyond_all_sentences_still_sees_them() -> None:
    query, key, scale = peaked(300, 2, 1)
    attention, _ = weights(query, key, scale)
    tail = tail_mass(query, key, [(5, 20)], scale, 3)
    expected = attention[:, -3:, 5:20].sum(-1, keepdim=True)
    torch.testing.assert_close(tail.mass.double(), expected, atol=1e-5, rtol=0)
    assert tail.is_after.all()


class _Record(TorchDispatchMode):
    """Largest tensor made, and how often a number was asked back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self.n_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.n_syncs += func.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        if isinstance(made, Tensor):
            self.most_bytes = max(self.most_bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("gives_lse", [True, False])
def test_blocks_stay_small_and_the_device_is_never_asked(gives_lse: bool) -> None:
    n_tokens, n_heads = 1536, 4
    query, key, scale = peaked(n_tokens, n_heads, 2, d_head=8)
    lse = torch.full((n_heads, n_tokens), 50.0) if gives_lse else None
    spans = [(at, at + 12) for at in range(1, n_tokens - 12, 12)]
    with _Record() as record:
        made = sentence_mass(query, key, spans, scale, lse=lse, query_block=32, key_block=128)
    assert record.n_syncs == 0
    block = 4 * n_heads * 32 * 128
    assert record.most_bytes <= max(query.nbytes, made.mass.nbytes, block) < 4 * n_tokens**2 / 30


@pytest.mark.parametrize(
    ("spans", "where"), [([], "sentence 0"), ([(1, 2), (3, 3)], "sentence 1"), ([(5, 9)], "0")]
)
def test_spans_that_are_empty_or_outside_are_refused(spans: Spans, where: str) -> None:
    query, key, scale = peaked(8, 2, 1)
    with pytest.raises(SpanError, match="empty or outside") as error:
        sentence_mass(query, key, spans, scale)
    assert where in str(error.value.where)


@pytest.mark.parametrize("fault", ["cached keys", "heads", "lse"])
def test_tensors_of_another_text_are_refused(fault: str) -> None:
    query, key, scale = peaked(8, 4, 3 if fault == "heads" else 2)
    key = key[1:] if fault == "cached keys" else key
    lse = torch.zeros(8, 4) if fault == "lse" else None
    with pytest.raises(ModelMismatchError, match=r"query \[8, 4, 16\], key"):
        sentence_mass(query, key, [(1, 8)], scale, lse=lse)


def test_a_mode_is_checked() -> None:
    with pytest.raises(ConfigError, match="off, light, full"):
        AttentionMode("some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="last_n = 0"):
        AttentionMode("light", last_n=0)


@contextmanager
def waiting_refused() -> Iterator[None]:
    """CUDA calls that wait for the device raise; other tests are not touched, whatever happens."""
    try:
        with warnings.catch_warnings():
            # PyTorch 2.11 warns that the mode is a prototype, after it has been set.
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("gives_lse", [True, False])
def test_on_an_accelerator_mass_is_exact_small_and_never_waits(gives_lse: bool) -> None:
    torch.cuda.synchronize()
    query, key, scale = (
        x.cuda().bfloat16() if isinstance(x, Tensor) else x for x in peaked(700, 10, 2, 128)
    )
    spans = [(at, at + 19) for at in range(30, 640, 19)]
    attention, lse = weights(query, key, scale)
    member = members(spans, attention)
    mass, _ = sentence_mass(query, key, spans, scale, lse=lse if gives_lse else None)
    assert ((mass - member @ attention @ member.T).abs() / 19).max() < 5e-5

    n_tokens = 8192
    query = torch.randn(n_tokens, 40, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(n_tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    lse = torch.full((40, n_tokens), 9.0, device="cuda")
    spans = [(at, at + 20) for at in range(60, 7900, 20)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with waiting_refused():
        sentence_mass(query, key, spans, scale, lse=lse if gives_lse else None)
        tail_mass(query, key, spans, scale, 4)
    assert torch.cuda.max_memory_allocated() - before < (0.6 if gives_lse else 1.2) * 2**30
