"""Extraction over tables: order, shards, progress, and every way to fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import polars as pl
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from taprobe_core import tables
from taprobe_core.activations.extraction import Extracted, extract
from taprobe_core.activations.forward import pooled_layers
from taprobe_core.activations.pooling import finite_faults, mass_faults, shape_faults
from taprobe_core.activations.schedule import run_ahead
from taprobe_core.activations.tasks import ExtractOptions, TextTask, tasks_of
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.checkpoints import replicate
from taprobe_core.errors import ModelError, ModelMismatchError, NonFiniteError, SpanError
from taprobe_core.spans import input_sha256
from taprobe_core.study.parts import Pooling, Storage

LOUD = 9
TEXTS_IN = {
    11: ([0, 5, 6, 7, 8, 10], [(1, 3), (3, 6)]),
    4: ([0, *range(10, 30)], [(2, 9), (8, 15), (15, 21)]),
    30: ([0, 5, 6, LOUD, 7], [(1, 3), (3, 5)]),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=32,
    )
    return Qwen2Model(config).eval()


def texts_and_spans() -> tuple[pl.DataFrame, pl.DataFrame]:
    texts = [
        {
            "problem_id": problem_id,
            "text": "x",
            "text_view": "base",
            "token_ids": token_ids,
            "n_tokens": len(token_ids),
            "bos_token_id": 0,
            "input_sha256": input_sha256(token_ids, ranges),
        }
        for problem_id, (token_ids, ranges) in TEXTS_IN.items()
    ]
    spans = [
        {
            "problem_id": problem_id,
            "sentence_idx": at,
            "start_char": at,
            "end_char": at + 1,
            "start_token": start,
            "end_token": end,
            "n_tokens": end - start,
        }
        for problem_id, (_, ranges) in TEXTS_IN.items()
        for at, (start, end) in enumerate(ranges)
    ]
    types = {"token_ids": pl.List(pl.Int32), "text_view": pl.Enum(["base", "flattened"])}
    return (
        tables.check_table(pl.DataFrame(texts, schema_overrides=types), tables.TEXTS, "test"),
        tables.check_table(pl.DataFrame(spans), tables.SPANS, "test"),
    )


TEXTS, SPANS = texts_and_spans()


def run(
    model: nn.Module, layers: dict[int, list[int]], storage: Storage = "float32"
) -> list[Extracted]:
    tasks = tasks_of(TEXTS, SPANS.sample(fraction=1, shuffle=True, seed=2), layers)
    return list(extract(model, tasks, ExtractOptions(storage=storage)))


def test_shards_are_the_pooled_layers_of_each_text(model: nn.Module) -> None:
    layers = {11: [2, 0], 4: [1], 30: []}
    items = run(model, layers)
    assert [item.problem_id for item in items] == [4, 11]
    for problem_id, shards, *_ in items:
        token_ids, ranges = TEXTS_IN[problem_id]
        expected = pooled_layers(model, token_ids, ranges, layers[problem_id])
        assert sorted(shards) == sorted(layers[problem_id])
        for layer, shard in shards.items():
            assert (shard.problem_id, shard.layer, shard.dtype) == (problem_id, layer, "float32")
            assert shard.input_sha256 == input_sha256(token_ids, ranges)
            assert torch.equal(shard.tensors["mean"], expected[layer])
            assert shard.max_abs == float(expected[layer].abs().max())
            assert not shard.tensors["mean"].is_inference()
    means = {
        item.problem_id: shard.tensors["mean"] for item in items for shard in item.shards.values()
    }
    assert finite_faults(means) == []
    assert shape_faults(means, {4: 3, 11: 2}) == []


def test_float16_is_the_rounded_float32(model: nn.Module) -> None:
    layers = {problem_id: [1] for problem_id in TEXTS_IN}
    for half, full in zip(run(model, layers, "float16"), run(model, layers), strict=True):
        assert half.shards[1].dtype == "float16"
        assert torch.equal(half.shards[1].tensors["mean"], full.shards[1].tensors["mean"].half())


def test_the_longest_runs_first_and_progress_counts_tokens(model: nn.Module) -> None:
    readings: Iterator[float] = iter([100.0, 102.0, 103.0, 104.0])
    layers = {problem_id: [0] for problem_id in TEXTS_IN}
    items = list(extract(model, tasks_of(TEXTS, SPANS, layers), clock=lambda: next(readings)))
    assert [item.problem_id for item in items] == [4, 11, 30]
    assert items[0].progress.render() == ("1/3 texts, 21/32 tokens (65 %), 10 tokens/s, 1 s left")
    assert items[-1].progress.eta_s == 0
    assert items[-1].progress.elapsed_s == 4


def test_a_text_is_yielded_before_the_next_one_runs(model: nn.Module) -> None:
    lengths: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    work = extract(model, tasks_of(TEXTS, SPANS, {4: [1], 11: [1]}))
    assert lengths == []
    assert next(work).problem_id == 4
    assert lengths == [21]
    assert next(work).problem_id == 11
    assert lengths == [21, 6]


def test_nothing_to_do_is_no_work(model: nn.Module) -> None:
    assert run(model, {}) == run(model, {4: []}) == []


def test_a_loud_text_stays_float32_and_the_others_do_not(model: nn.Module) -> None:
    with torch.no_grad():
        model.embed_tokens.weight[LOUD] *= 1e8
    items = run(model, {30: [1], 11: [1]}, "float16")
    shards = {item.problem_id: item.shards[1] for item in items}
    assert (shards[30].dtype, shards[11].dtype) == ("float32", "float16")
    assert shards[30].max_abs > 65504
    assert torch.isfinite(shards[30].tensors["mean"]).all()


def test_what_is_not_finite_names_problem_layer_and_sentence(model: nn.Module) -> None:
    with torch.no_grad():
        model.embed_tokens.weight[LOUD, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"problem 30, layer 0, mean, sentence \d"):
        run(model, {30: [2, 0]})
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    (item,) = run(model, {4: [0]})
    assert torch.isfinite(item.shards[0].tensors["mean"]).all()
    with pytest.raises(NonFiniteError, match="problem 4, layer 1, mean, sentence 0"):
        run(model, {4: [0, 1]})


def test_all_that_the_model_lacks_is_told_before_the_first_pass(model: nn.Module) -> None:
    model.config.vocab_size, model.config.max_position_embeddings = 20, 18
    with pytest.raises(ModelMismatchError) as caught:
        extract(model, tasks_of(TEXTS, SPANS, {4: [0, 7], 11: [1]}))
    for fault in ("layers [7]", "problem 4 has token id 29", "problem 4 has 21 tokens"):
        assert fault in caught.value.what
    assert "problem 11" not in caught.value.what


def test_a_problem_without_text_or_spans_is_refused(model: nn.Module) -> None:
    with pytest.raises(SpanError, match=r"problems \[5, 11\] have no text or no spans"):
        tasks_of(TEXTS, SPANS.filter(pl.col("problem_id") != 11), {5: [0], 11: [0]})


def test_a_span_outside_its_text_names_the_problem(model: nn.Module) -> None:
    spans = SPANS.with_columns(end_token=pl.col("end_token") + 1)
    with pytest.raises(SpanError, match="problem 11, sentence 1"):
        extract(model, tasks_of(TEXTS, spans, {11: [0]}))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_problem_and_its_tokens(
    model: nn.Module, error: RuntimeError
) -> None:
    def fail(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 10:
            raise error

    model.layers[1].register_forward_pre_hook(fail)
    assert len(run(model, {11: [2]})) == 1
    with pytest.raises(ModelError, match="out of memory on a text of 21 tokens") as caught:
        run(model, {11: [2], 4: [2]})
    assert caught.value.where == "problem 4"
    assert "dtype" in str(caught.value.fix)


def test_any_other_runtime_error_is_not_renamed(model: nn.Module) -> None:
    def fail(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise RuntimeError("device-side assert triggered")

    model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(model, {11: [0]})


def many_tasks(**wanted: tuple[int, ...]) -> list[TextTask]:
    generator = torch.Generator().manual_seed(4)
    return [
        TextTask(
            problem_id,
            torch.randint(0, 40, (length,), generator=generator).tolist(),
            [(1, 3), (3, length - 2), (length - 4, length)],
            **wanted,
        )
        for problem_id, length in enumerate((31, 8, 20, 13, 9, 27, 11))
    ]


ALL: tuple[Pooling, ...] = ("mean", "last", "max", "boundary", "tokens")


@pytest.mark.parametrize("mode", ["light", "full"])
@pytest.mark.parametrize("token_budget", [24, 40, 10_000])
def test_packs_devices_and_order_change_no_bit(
    model: nn.Module, mode: str, token_budget: int
) -> None:
    tasks = many_tasks(layers=(0, 2), attention_layers=(1, 2))
    attention = AttentionMode(mode)  # type: ignore[arg-type]
    alone = {
        item.problem_id: item
        for task in tasks
        for item in extract(model, [task], ExtractOptions(ALL, "float32", attention))
    }
    options = ExtractOptions(ALL, "float32", attention, token_budget)
    packed = list(extract([model, replicate(model, torch.device("cpu"))], tasks[::-1], options))
    assert sorted(item.problem_id for item in packed) == sorted(alone)
    for item in packed:
        for kind in ("shards", "attention"):
            found, expected = getattr(item, kind), getattr(alone[item.problem_id], kind)
            assert sorted(found) == sorted(expected) != []
            for layer, shard in found.items():
                for name, tensor in shard.tensors.items():
                    assert torch.equal(tensor, expected[layer].tensors[name]), (name, layer)


def test_a_pass_runs_no_block_below_what_its_texts_want(model: nn.Module) -> None:
    ran: list[int] = []
    for at, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda *_, at=at: ran.append(at))
    shallow, deep = many_tasks()[:2]
    tasks = [replace(shallow, layers=(0,)), replace(deep, attention_layers=(1,))]
    items = {
        item.problem_id: item
        for item in extract(model, tasks, ExtractOptions(attention=AttentionMode("full")))
    }
    assert ran == [0, 0, 1]
    assert sorted(items[0].shards) == [0]
    assert (items[1].shards, sorted(items[1].attention)) == ({}, [1])


def test_short_memory_makes_packs_smaller_and_says_so(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    tasks = many_tasks(layers=(1,))
    roomy = {item.problem_id: item for item in extract(model, tasks)}
    model.layers[0].register_forward_pre_hook(fail)
    with caplog.at_level("WARNING"):
        tight = list(extract(model, tasks, ExtractOptions(token_budget=100)))
    assert "out of memory on a pack of 5 texts, 100 tokens: going on with" in caplog.text
    assert len(tight) == 7
    for item in tight:
        expected = roomy[item.problem_id].shards[1].tensors["mean"]
        assert torch.equal(item.shards[1].tensors["mean"], expected)


def test_lanes_run_ahead_with_the_same_results(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """What keeps accelerators busy, with a CPU in their place."""
    tasks = many_tasks(layers=(0, 2))
    expected = {item.problem_id: item.shards for item in extract(model, tasks)}
    pair = [model, replicate(model, torch.device("cpu"))]
    packs = [tasks[:3], tasks[3:4], tasks[4:]]
    options = ExtractOptions(storage="float32")
    found = {task.problem_id: shards for task, shards, *_ in run_ahead(pair, packs, options)}
    assert sorted(found) == sorted(expected)
    for problem_id, shards in found.items():
        for layer, shard in shards.items():
            mean = expected[problem_id][layer].tensors["mean"]
            assert torch.equal(shard.tensors["mean"].half(), mean)

    def fail(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > 31:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    for each in pair:
        each.layers[0].register_forward_pre_hook(fail)
    with caplog.at_level("WARNING"):
        tight = {task.problem_id: shards for task, shards, *_ in run_ahead(pair, packs, options)}
    assert "out of memory on a pack of 3 texts, 59 tokens" in caplog.text
    assert sorted(tight) == sorted(expected)


def test_an_error_in_a_lane_ends_the_run_and_its_threads(model: nn.Module) -> None:
    tasks = many_tasks(layers=(1,))
    before = threading.active_count()

    def fail(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] == 13:
            raise torch.AcceleratorError("device-side assert triggered")

    hook = model.layers[0].register_forward_pre_hook(fail)
    packs = [[task] for task in tasks]
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        list(run_ahead([model], packs, ExtractOptions()))
    hook.remove()
    stopped = run_ahead([model], packs, ExtractOptions())
    next(stopped)
    stopped.close()
    assert threading.active_count() == before


def test_the_boundary_of_a_sentence_at_token_0_is_the_state_of_token_0(model: nn.Module) -> None:
    task = replace(many_tasks(layers=(1,), attention_layers=(1,))[0], spans=[(0, 3), (3, 4)])
    options = ExtractOptions(("boundary", "tokens"), "float32", attention=AttentionMode("full"))
    (item,) = extract(model, [task], options)
    tensors = item.shards[1].tensors

    assert torch.equal(tensors["boundary"], tensors["tokens"][[0, 2]])
    # Token 0 is the first sentence's here, and counts once.
    assert mass_faults(item.attention[1].tensors, task.spans, len(task.token_ids)) == []
