"""All texts of a setting through the model, each once; a shard per text and layer as it is made.

In: texts, spans, and the layers still missing for each problem. Out: one item per text, at once, so
that the caller can commit it before the next text runs and a broken run loses one text at most.
What does not belong here: committing, and choosing the device.

The invariant: everything that can be refused is refused before the first pass; the longest text
runs first, so that one too long for the memory fails in the first minute and not in the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl
import torch
from torch import nn

from taprobe_core.activations.forward import input_faults, pooled_layers
from taprobe_core.activations.pooling import Storage, max_abs, to_storage
from taprobe_core.activations.progress import Progress
from taprobe_core.errors import ModelError, ModelMismatchError, SpanError


@dataclass(frozen=True, eq=False)
class ActivationShard:
    """Sentence means of one problem at one layer.

    Attributes:
        problem_id: the problem.
        layer: block index; the means are of its output.
        mean: [sentence, d_model] on the CPU, in sentence_idx order, finite.
        dtype: type of `mean`; float32 where float16 was asked for and could not hold it.
        max_abs: largest magnitude before the cast.
        input_sha256: `texts.input_sha256`, what the means were made from.
    """

    problem_id: int
    layer: int
    mean: torch.Tensor
    dtype: Storage
    max_abs: float
    input_sha256: str


class Extracted(NamedTuple):
    """One text's shards, and how far the extraction is with them."""

    problem_id: int
    shards: dict[int, ActivationShard]
    progress: Progress


class _Task(NamedTuple):
    problem_id: int
    token_ids: list[int]
    spans: list[tuple[int, int]]
    layers: tuple[int, ...]
    input_sha256: str


def extract(
    model: nn.Module,
    texts: pl.DataFrame,
    spans: pl.DataFrame,
    layers_by_problem: Mapping[int, Sequence[int]],
    storage: Storage,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Extracted]:
    """Run each text once and yield its shards as soon as they exist, the longest text first.

    The checks are made by the call itself, the passes by the iteration.

    Args:
        model: base transformer without LM head, in evaluation mode; its parameters name the device.
        texts: `tables.TEXTS`.
        spans: `tables.SPANS`.
        layers_by_problem: problem_id to the layers still missing; a problem without any is not run.
        storage: number type to keep.
        clock: seconds, for the progress.

    Raises:
        SpanError: a problem has no text or no spans, or a span lies outside its text.
        ModelMismatchError: a layer, token id or length that the model lacks; lists all of them.
        ModelError: out of memory; names the problem and its tokens. Blocks not found.
        NonFiniteError: a mean is NaN or infinite; names problem, layer and sentence.
    """
    tasks = _tasks(texts, spans, layers_by_problem)
    layers = sorted({layer for task in tasks for layer in task.layers})
    faults = input_faults(model, {f"problem {t.problem_id}": t.token_ids for t in tasks}, layers)
    if faults:
        raise ModelMismatchError(
            f"the model cannot take this work: {'; '.join(faults)}",
            type(model).__name__,
            "correct n_layers, layers or tokenizer of this model in the study",
        )
    return _run(model, tasks, storage, clock)


def _tasks(
    texts: pl.DataFrame, spans: pl.DataFrame, layers_by_problem: Mapping[int, Sequence[int]]
) -> list[_Task]:
    wanted = {problem_id: layers for problem_id, layers in layers_by_problem.items() if layers}
    ranges = spans.sort("sentence_idx").group_by("problem_id").agg("start_token", "end_token")
    joined = texts.filter(pl.col("problem_id").is_in(list(wanted))).join(ranges, on="problem_id")
    absent = sorted(set(wanted) - set(joined["problem_id"]))
    if absent:
        raise SpanError(
            f"problems {absent} have no text or no spans",
            "tables 'texts' and 'spans'",
            "build the spans again, or leave these problems out",
        )
    return [
        _Task(
            row["problem_id"],
            row["token_ids"],
            list(zip(row["start_token"], row["end_token"], strict=True)),
            tuple(sorted(set(wanted[row["problem_id"]]))),
            row["input_sha256"],
        )
        for row in joined.sort("n_tokens", "problem_id", descending=[True, False]).iter_rows(
            named=True
        )
    ]


def _run(
    model: nn.Module, tasks: Sequence[_Task], storage: Storage, clock: Callable[[], float]
) -> Iterator[Extracted]:
    n_tokens = sum(len(task.token_ids) for task in tasks)
    n_tokens_done = 0
    started = clock()
    for n_done, task in enumerate(tasks, 1):
        shards = _shards(model, task, storage)
        n_tokens_done += len(task.token_ids)
        progress = Progress(n_done, len(tasks), n_tokens_done, n_tokens, clock() - started)
        yield Extracted(task.problem_id, shards, progress)


def _shards(model: nn.Module, task: _Task, storage: Storage) -> dict[int, ActivationShard]:
    try:
        pooled = pooled_layers(model, task.token_ids, task.spans, task.layers)
        # A copy, also on the CPU: tensors made in inference mode refuse later changes in place.
        means = {layer: mean.to("cpu", copy=True) for layer, mean in pooled.items()}
    except SpanError as fault:
        raise SpanError(
            fault.what, f"problem {task.problem_id}, {fault.where}", fault.fix
        ) from None
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise ModelError(
            f"out of memory on a text of {len(task.token_ids)} tokens at {len(task.layers)} layers",
            f"problem {task.problem_id}",
            "free the device, use a smaller dtype or fewer layers, set activations.device to cpu, "
            "or leave the problem out with rollouts.problem_ids",
        ) from error
    return {layer: _shard(task, layer, mean, storage) for layer, mean in means.items()}


def _shard(task: _Task, layer: int, mean: torch.Tensor, storage: Storage) -> ActivationShard:
    kept, dtype = to_storage(mean, storage, where=f"problem {task.problem_id}, layer {layer}")
    return ActivationShard(task.problem_id, layer, kept, dtype, max_abs(mean), task.input_sha256)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On the CPU the allocator raises a plain RuntimeError; its text is all there is to know it by.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
