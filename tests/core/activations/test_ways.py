"""Which way a model's texts go: what is understood in packs, all else as the library runs it, alone
and in packs, past windows, chunks and original rotary lengths, against eager attention."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from taprobe_core.activations import forward as forward_module
from taprobe_core.activations.extraction import extract
from taprobe_core.activations.forward import run_pack, ways_of
from taprobe_core.activations.fused import can_fuse
from taprobe_core.activations.tasks import ExtractOptions, TextTask
from taprobe_core.activations.trial import (
    Ways,
    choose_ways,
    difference,
    last_new_kind,
    trial_lengths,
)
from taprobe_core.activations.understood import Understanding, understand
from taprobe_core.attention.mass import sentence_mass, sentence_mass_of, tail_mass, tail_mass_of
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.errors import ModelError, NonFiniteError
from taprobe_core.study.parts import Pooling

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LENGTHS = (97, 30, 41)
POOLINGS: tuple[Pooling, ...] = ("mean", "last", "max", "boundary", "tokens")


def model_of(
    config: transformers.PreTrainedConfig, *, seed: int = 3, attention: str = "sdpa"
) -> nn.Module:
    """A random model whose attention is far from flat."""
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.15)
        else:
            parameter.data += torch.randn_like(parameter) * (1.5 if "sink" in name else 0.2)
    return model.requires_grad_(False)


def tasks_of(
    lengths: Sequence[int], *, depth: int = 3, weighed: Sequence[int] = ()
) -> list[TextTask]:
    return [
        TextTask(
            at,
            [1, *((7 * at + 11 * place + place * place % 13) % 90 for place in range(1, n))],
            [(1, 5), (5, n // 2), (n // 2 - 2, n)],
            tuple(range(depth)),
            tuple(weighed),
        )
        for at, n in enumerate(lengths)
    ]


def eager(
    model: nn.Module, tokens: Sequence[int], *, attentions: bool = True
) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
    """Block outputs and attention weights of a text alone, by transformers and hooks of our own."""
    blocks = model.layers if hasattr(model, "layers") else model.h
    states: list[torch.Tensor] = []
    hooks = [
        each.register_forward_hook(
            lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for each in blocks
    ]
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_attentions=attentions, use_cache=False)
    model.config._attn_implementation = before
    for hook in hooks:
        hook.remove()
    return states, [each[0] for each in out.attentions] if attentions else []


def check(
    model: nn.Module,
    lengths: Sequence[int] = LENGTHS,
    *,
    weighed: Sequence[int] = (0, 2),
    budget: int | None = 4096,
) -> None:
    """States of every pooling and full attention of a pack are those of eager texts alone."""
    depth = len(model.layers if hasattr(model, "layers") else model.h)
    tasks = tasks_of(lengths, depth=depth, weighed=weighed)
    options = ExtractOptions(POOLINGS, "float32", AttentionMode("full"), budget)
    found = {item.problem_id: item for item in extract(model, tasks, options)}
    for task in tasks:
        states, weights = eager(model, task.token_ids, attentions=bool(weighed))
        for layer in task.layers:
            kept = found[task.problem_id].shards[layer].tensors
            expected = {
                "mean": torch.stack([states[layer][a:b].mean(0) for a, b in task.spans]),
                "last": torch.stack([states[layer][b - 1] for _, b in task.spans]),
                "max": torch.stack([states[layer][a:b].amax(0) for a, b in task.spans]),
                "boundary": torch.stack([states[layer][a - 1] for a, _ in task.spans]),
                "tokens": torch.cat([states[layer][a:b] for a, b in task.spans]),
            }
            for pooling, each in expected.items():
                assert float((kept[pooling] - each).norm() / each.norm()) < 1e-5, (layer, pooling)
        for layer in task.attention_layers:
            mass = found[task.problem_id].attention[layer].tensors
            exact = sentence_mass_of(weights[layer].double(), task.spans)
            torch.testing.assert_close(mass["mass"], exact.mass, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mass["bos_mass"], exact.bos_mass, atol=1e-4, rtol=1e-4)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 3.0, 9.0, 40.0],
    "original_max_position_embeddings": 40,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 40,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
T = transformers
LONG = {
    "mistral, window 33": lambda: T.MistralConfig(**SIZES, sliding_window=33),
    "mixtral, window 33": lambda: T.MixtralConfig(**SIZES, sliding_window=33, num_local_experts=2),
    "qwen2, window 25 from block 2": lambda: T.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=25, max_window_layers=2
    ),
    "starcoder2, window 20": lambda: T.Starcoder2Config(**SIZES, sliding_window=20),
    "gemma 3, window 16": lambda: T.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16),
    "gemma 2, window 16, capped scores": lambda: T.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=16, attn_logit_softcapping=2.0
    ),
    "gpt-oss, sinks": lambda: T.GptOssConfig(
        **SIZES, head_dim=8, sliding_window=20, num_local_experts=2, num_experts_per_tok=1
    ),
    "cohere 2, window 20": lambda: T.Cohere2Config(**SIZES, sliding_window=20),
    "olmo 3, window 20": lambda: T.Olmo3Config(**SIZES, sliding_window=20),
    "phi 3, longrope": lambda: T.Phi3Config(
        **SIZES, pad_token_id=0, rope_parameters=LONGROPE, original_max_position_embeddings=40
    ),
    "qwen3, yarn": lambda: T.Qwen3Config(**SIZES, head_dim=8, rope_parameters=YARN),
    "llama, dynamic": lambda: T.LlamaConfig(
        **{**SIZES, "max_position_embeddings": 100}, rope_parameters=DYNAMIC
    ),
    "llama 4, chunks of 16": lambda: T.Llama4TextConfig(
        **SIZES,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=16,
        moe_layers=[1],
    ),
    "bloom, alibi": lambda: T.BloomConfig(vocab_size=90, hidden_size=32, n_layer=3, n_head=4),
    "falcon, alibi": lambda: T.FalconConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True
    ),
    "gpt neo, local": lambda: T.GPTNeoConfig(
        vocab_size=90,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=12,
        attention_types=[[["global", "local"], 1]],
    ),
    "modernbert decoder, window 16": lambda: T.ModernBertDecoderConfig(
        **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
        sliding_window=16,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        cls_token_id=1,
        sep_token_id=2,
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_states_and_attention_past_every_length_are_eager_ones(name: str) -> None:
    config = LONG[name]()
    is_eager = any(word in name for word in ("gemma 2", "sinks", "bloom", "gpt neo"))
    model = model_of(config, attention="eager" if is_eager else "sdpa")
    depth = len(model.layers if hasattr(model, "layers") else model.h)
    check(model, weighed=(0, depth - 1))


@pytest.mark.parametrize("window", [29, 30, 31])
def test_a_text_as_long_as_the_window_is_packed_and_right(window: int) -> None:
    model = model_of(T.MistralConfig(**SIZES, sliding_window=window))
    check(model, (30, 24, 12))
    assert ways_of(model, 30) == (("library",) if window < 30 else ("fused", "packed", "library"))


@pytest.mark.parametrize(
    ("make", "attends"),
    [
        (
            lambda: T.JambaConfig(
                **SIZES,
                num_experts=2,
                attn_layer_period=3,
                attn_layer_offset=1,
                mamba_d_state=4,
                mamba_dt_rank=4,
                use_mamba_kernels=False,
            ),
            (1,),
        ),
        (lambda: T.Lfm2Config(**SIZES, full_attn_idxs=[1], conv_L_cache=3), (1,)),
    ],
)
def test_state_that_is_no_attention_stays_in_its_text(make: Any, attends: tuple[int]) -> None:
    model = model_of(make())
    check(model, weighed=())
    tasks = tasks_of(LENGTHS[:1], weighed=attends)
    options = ExtractOptions(attention=AttentionMode("light"))
    (item,) = extract(model, tasks, options)
    assert item.attention[1].tensors["tail_mass"].shape == (4, 4, 3)
    with pytest.raises(ModelError, match="block 0 gives no attention weights"):
        list(extract(model, tasks_of(LENGTHS[:1], weighed=(0,)), options))


def test_a_long_text_leaves_nothing_behind_in_dynamic_rotary_factors() -> None:
    sizes = {**SIZES, "max_position_embeddings": 40}
    model = model_of(T.LlamaConfig(**sizes, rope_parameters=DYNAMIC))
    texts = [task.token_ids for task in tasks_of((60, 90, 60))]
    found: list[list[torch.Tensor]] = [[], [], []]
    for text, states in zip(texts, found, strict=True):
        run_pack(model, [text], 2, lambda _, hidden, to=states: to.append(hidden.clone()))
    fresh = model_of(T.LlamaConfig(**sizes, rope_parameters=DYNAMIC))
    expected, _ = eager(fresh, texts[2])
    for one, two in zip(found[2], expected, strict=True):
        assert float((one - two).norm() / two.norm()) < 1e-5
    assert not model.rotary_emb.inv_freq.is_inference()


UNKNOWN = {
    "model type": lambda: T.StableLmConfig(**SIZES),
    "longrope": lambda: T.Phi3Config(
        **SIZES, pad_token_id=0, rope_parameters=LONGROPE, original_max_position_embeddings=40
    ),
    "dynamic": lambda: T.Qwen2Config(**SIZES, rope_parameters=DYNAMIC),
    "bidirectional": lambda: T.Gemma3TextConfig(
        **SIZES, head_dim=8, use_bidirectional_attention=True
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_takes_no_pack(name: str) -> None:
    model = model_of(UNKNOWN[name]())
    assert understand(model).reason is not None
    assert ways_of(model, 5) == ("library",)
    assert not can_fuse(model)


def test_attention_that_says_it_is_not_causal_takes_no_pack() -> None:
    model = model_of(T.LlamaConfig(**SIZES))
    assert understand(model).reason is None
    model.layers[1].self_attn.is_causal = False
    assert understand(model).reason == "LlamaAttention is not causal"
    with pytest.raises(ModelError, match="attention that is not causal in LlamaAttention"):
        run_pack(model, [[1, 2, 3]], 1, lambda *_: None, way="packed")


def test_an_argument_that_packs_do_not_know_is_refused_and_found_by_the_trial(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of(T.Qwen3Config(**SIZES, head_dim=8))
    attention = model.layers[2].self_attn
    forward = attention.forward
    attention.forward = lambda *a, **k: forward(*a, **k, s_aux=torch.ones(4))
    with pytest.raises(ModelError, match="attention with s_aux, which packs do not know"):
        run_pack(model, [[1, 2, 3]], 2, lambda *_: None, way="packed")
    with caplog.at_level(logging.WARNING):
        assert choose_ways(model, 20, 2) == Ways("library")
    assert "packed attention refused: attention with s_aux" in caplog.text


def test_attention_to_later_tokens_has_no_mass() -> None:
    model = model_of(UNKNOWN["bidirectional"]())
    check(model, weighed=())
    options = ExtractOptions(attention=AttentionMode("full"))
    with pytest.raises(ModelError, match="block 1 attends to later tokens"):
        list(extract(model, tasks_of((30,), weighed=(1,)), options))


def test_several_streams_are_refused_by_their_shape() -> None:
    config = T.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=90,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 4,
    )
    with pytest.raises(ModelError, match=r"block 0 gives states of shape \[4, 1, 30, 32\]"):
        list(extract(model_of(config), tasks_of((30,))))


def test_packs_that_differ_from_the_library_are_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leaking(*args: Any, **kwargs: Any) -> Any:
        layout = lay_out(*args, **kwargs)
        return type(layout)(((0, layout.bounds[-1][1]),), layout.blocks, layout.positions)

    lay_out = forward_module.lay_out
    model = model_of(T.Qwen3Config(**SIZES, head_dim=8))
    assert choose_ways(model, 50, 2) == Ways("packed")
    monkeypatch.setattr(forward_module, "lay_out", leaking)
    with caplog.at_level(logging.WARNING):
        assert choose_ways(model, 50, 2) == Ways("library")
    assert "packed attention differ from the library's by" in caplog.text
    check(model, weighed=())


def test_a_trial_reaches_past_what_the_job_reaches() -> None:
    known = Understanding(None, 300, (300, 2000))
    assert trial_lengths(known, 250) == (150, 61, 45)
    assert trial_lengths(known, 310) == (310, 150, 61, 45)
    assert trial_lengths(known, 9000) == (2250, 337, 150, 61, 45)
    assert trial_lengths(known, 7) == (7,)


def test_a_trial_runs_as_far_as_the_last_new_kind_of_block() -> None:
    kinds = ["full_attention"] * 6 + ["sliding_attention"] + ["full_attention"]
    config = T.Qwen2Config(
        **{**SIZES, "num_hidden_layers": 8},
        use_sliding_window=True,
        sliding_window=16,
        layer_types=kinds,
    )
    assert last_new_kind(model_of(config).layers) == 6
    assert last_new_kind(model_of(T.LlamaConfig(**{**SIZES, "num_hidden_layers": 8})).layers) == 3
    assert last_new_kind(model_of(T.LlamaConfig(**SIZES)).layers) == 2


def test_a_difference_is_of_stretches_and_not_of_a_long_text() -> None:
    reference = torch.ones(1000, 4)
    late = reference.clone()
    late[990:] += 0.5
    assert difference([late], [reference]) == pytest.approx(0.5)
    single = reference.clone()
    single[500] += 3
    assert difference([single], [reference]) == 0
    assert difference([single], [reference], is_exact=True) == pytest.approx(3)
    both = reference.clone()
    both[3] = torch.nan
    assert difference([both], [both.clone()]) == 0
    assert difference([both], [reference], is_exact=True) == torch.inf


def test_mass_of_weights_is_that_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 40, 4, 8).unbind()
    spans = [(1, 9), (9, 30), (25, 38)]
    scores = torch.einsum("qhd,khd->hqk", query, key) / 3
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    for one, two in zip(
        sentence_mass_of(weights, spans), sentence_mass(query, key, spans, 1 / 3), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    for one, two in zip(
        tail_mass_of(weights, spans, 5), tail_mass(query, key, spans, 1 / 3, 5), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "value", "fix"),
    [
        (torch.float32, torch.nan, r"its weight layers\.1\.mlp\.up_proj\.weight holds values"),
        (torch.float16, torch.nan, r"its weight layers\.1\.mlp\.up_proj\.weight holds values"),
        (torch.float16, 6e4, "float16 overflows above 65504"),
        (torch.float32, 3e38, "overflows at 3e38 alone"),
    ],
)
def test_the_advice_for_what_is_not_finite_names_the_cause(
    dtype: torch.dtype, value: float, fix: str
) -> None:
    model = model_of(T.LlamaConfig(**SIZES)).to(dtype)
    model.layers[1].mlp.up_proj.weight[5] = value
    model.layers[1].mlp.down_proj.weight[:, 5] = 1e3
    with pytest.raises(NonFiniteError) as caught:
        list(extract(model, tasks_of((30,))))
    assert caught.match("layer 1, mean, sentence")
    assert caught.match(fix)
