"""A model ready for packs: queue one, and get each text's shards when it is done.

In: texts of one pack. Out: shards on the CPU, checked and in the number type they are kept in. What
does not belong here: which texts make a pack, in what order, and what to do when memory is short
(extract).

The invariant: what leaves is finite; a value that float16 cannot hold stays float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from taprobe_core.activations.forward import run_pack
from taprobe_core.activations.fused import can_fuse, is_hooked
from taprobe_core.activations.options import ExtractOptions
from taprobe_core.activations.pooling import (
    Pooling,
    SpanIndex,
    Storage,
    check_finite,
    fits,
    join_indexes,
    pool,
    span_index,
    value_range,
)
from taprobe_core.activations.shards import ActivationShard, AttentionShard
from taprobe_core.activations.tasks import TextTask
from taprobe_core.activations.transfer import Transfer
from taprobe_core.attention import sentence_mass, tail_mass

_log = logging.getLogger(__name__)

FUSED_TOLERANCE = 0.05
"""Largest relative difference (Frobenius) between the states of fused blocks and the library's.

Half precision rounds both, so they drift apart: 0.011 after one block and 0.025 after four, with
random weights of 14B shape. A wrong operation is of order one in the first block. On a CPU none is
allowed: a build of PyTorch that rounds a step otherwise must not change results unnoticed."""

_TRIAL_TOKENS = 256
_TRIAL_BLOCKS = 4

_fused: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Kept(NamedTuple):
    """One pooling of a pack at one layer: on the device, on the host, and its rows' ranges."""

    rows: torch.Tensor
    host: torch.Tensor
    ranges: torch.Tensor


class TextShards(NamedTuple):
    """What one text leaves behind, by layer."""

    task: TextTask
    activations: dict[int, ActivationShard]
    attention: dict[int, AttentionShard]


class QueuedPack:
    """A pack whose work is queued on its device.

    Args:
        model: base transformer without LM head, in evaluation mode.
        tasks: the texts, in the order they lie in.
        options: what to keep.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[TextTask], options: ExtractOptions
    ) -> None:
        self._tasks = tasks
        self._options = options
        self._transfer = Transfer()
        self._kept: dict[tuple[int, Pooling], _Kept] = {}
        self._pooled: dict[tuple[int, Pooling], torch.Tensor] = {}
        self._attention: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._indexes = [span_index(task.spans, len(task.token_ids)) for task in tasks]
        shifts = [0]
        for task in tasks:
            shifts.append(shifts[-1] + len(task.token_ids))
        self._bounds = list(pairwise(shifts))
        self._joined = join_indexes(self._indexes, shifts[:-1])
        self._layers = {layer for task in tasks for layer in task.layers}
        self._index_on: dict[torch.device, SpanIndex] = {}
        watches = any(task.attention_layers for task in tasks)
        run_pack(
            model,
            [task.token_ids for task in tasks],
            max(task.deepest for task in tasks),
            self._keep,
            self._watch if watches else None,
            is_fused=is_fused(model, tasks[0].token_ids),
        )
        for (layer, pooling), rows in self._pooled.items():
            self._fetch(layer, pooling, rows)

    def _keep(self, layer: int, hidden: torch.Tensor) -> None:
        if layer not in self._layers:
            return
        device = hidden.device
        if device not in self._index_on:
            self._index_on[device] = self._joined.to(device)
        pooled = pool(hidden, self._index_on[device], self._options.poolings)
        for pooling, rows in pooled.items():
            if rows.is_cuda:
                self._fetch(layer, pooling, rows)
            else:
                # Casts and ranges of all layers together afterwards: between matrix products their
                # code and data would be out of the caches each time.
                self._pooled[layer, pooling] = rows

    def _fetch(self, layer: int, pooling: Pooling, rows: torch.Tensor) -> None:
        kept = rows.to(getattr(torch, self._options.storage))
        fetch = self._transfer.fetch
        self._kept[layer, pooling] = _Kept(rows, fetch(kept), fetch(value_range(rows)))

    def _watch(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor | None,
        scale: float,
    ) -> None:
        mode = self._options.attention
        for at, (task, (start, end)) in enumerate(zip(self._tasks, self._bounds, strict=True)):
            if layer not in task.attention_layers:
                continue
            q, k = query[start:end], key[start:end]
            if mode.kind == "full":
                text_lse = None if lse is None else lse[:, start:end]
                found = sentence_mass(q, k, task.spans, scale, lse=text_lse)
                tensors = {"mass": found.mass, "bos_mass": found.bos_mass}
            else:
                tail = tail_mass(q, k, task.spans, scale, mode.last_n)
                tensors = {
                    "tail_mass": tail.mass,
                    "bos_mass": tail.bos_mass,
                    "is_after": tail.is_after,
                }
            self._attention[at, layer] = {
                name: self._transfer.fetch(tensor) for name, tensor in tensors.items()
            }

    def results(self) -> Iterator[TextShards]:
        """Wait for the pack, and yield each text's shards.

        Raises:
            NonFiniteError: a value is NaN or infinite; names problem, layer and sentence.
        """
        self._transfer.wait()
        first_row = {"sentence": 0, "token": 0}
        for at, (task, index) in enumerate(zip(self._tasks, self._indexes, strict=True)):
            n_rows = {"sentence": len(index.starts), "token": len(index.tokens)}
            ranges = {
                unit: slice(first_row[unit], first_row[unit] + n_rows[unit]) for unit in n_rows
            }
            first_row = {unit: ranges[unit].stop for unit in ranges}
            activations = {layer: self._shard(task, layer, index, ranges) for layer in task.layers}
            attention = {
                layer: AttentionShard(
                    task.problem_id,
                    layer,
                    {
                        **self._attention[at, layer],
                        "n_tokens": (index.ends - index.starts).to(torch.int32),
                    },
                    task.input_sha256,
                )
                for layer in task.attention_layers
            }
            yield TextShards(task, activations, attention)

    def _shard(
        self, task: TextTask, layer: int, index: SpanIndex, rows_of: dict[str, slice]
    ) -> ActivationShard:
        tensors: dict[str, torch.Tensor] = {}
        dtype: Storage = self._options.storage
        ranges: list[torch.Tensor] = []
        for pooling in self._options.poolings:
            unit = "token" if pooling == "tokens" else "sentence"
            kept, rows = self._kept[layer, pooling], rows_of[unit]
            where = f"problem {task.problem_id}, layer {layer}, {pooling}, {unit}"
            check_finite(kept.ranges[rows], kept.rows[rows], where)
            ranges.append(kept.ranges[rows])
        if not all(fits(each, dtype) for each in ranges):
            dtype = "float32"
        for pooling in self._options.poolings:
            rows = rows_of["token" if pooling == "tokens" else "sentence"]
            kept = self._kept[layer, pooling]
            is_as_asked = dtype == self._options.storage
            tensors[pooling] = (
                kept.host[rows] if is_as_asked else kept.rows[rows].to("cpu", torch.float32)
            )
        if "tokens" in self._options.poolings:
            tensors["offsets"] = index.offsets
        low = min(float(each[:, 0].min()) for each in ranges)
        high = max(float(each[:, 1].max()) for each in ranges)
        return ActivationShard(
            task.problem_id, layer, tensors, dtype, (low, high), task.input_sha256
        )


def is_fused(model: nn.Module, token_ids: Sequence[int]) -> bool:
    """Whether a model's packs run through `fused`: its blocks can, and a trial agreed.

    The trial runs the start of a text through the first blocks both ways, once per model. A model
    that someone has hooked into runs as the library runs it.

    Args:
        model: base transformer without LM head.
        token_ids: a text.
    """
    if is_hooked(model):
        return False
    if model not in _fused:
        _fused[model] = can_fuse(model) and _agrees(model, token_ids[:_TRIAL_TOKENS])
    return _fused[model]


def _agrees(model: nn.Module, token_ids: Sequence[int]) -> bool:
    states: list[list[torch.Tensor]] = [[], []]
    deepest = min(_TRIAL_BLOCKS, len(model.layers)) - 1  # type: ignore[arg-type]
    for found, way in zip(states, (True, False), strict=True):
        run_pack(
            model,
            [token_ids],
            deepest,
            lambda _, hidden, found=found: found.append(  # type: ignore[misc]
                hidden.to("cpu", torch.float32, copy=True)
            ),
            is_fused=way,
        )
    difference = max(
        float(torch.linalg.norm(fused - library) / torch.linalg.norm(library))
        for fused, library in zip(*states, strict=True)
    )
    allowed = FUSED_TOLERANCE if next(model.parameters()).is_cuda else 0.0
    if difference <= allowed:
        _log.info("fused blocks agree with the library's to %.2g of the states", difference)
        return True
    _log.warning(
        "fused blocks differ from the library's by %.2g of the states (allowed %.2g); the "
        "library's run instead, slower",
        difference,
        allowed,
    )
    return False
