"""A model ready for packs: queue one, and get each text's shards when it is done.

In: texts of one pack. Out: shards on the CPU, checked and in the number type they are kept in. On
CUDA each result is copied into pinned memory, on a stream of its own that waits for it; on other
devices a copy is immediate. What does not belong here: which texts make a pack, in what order, and
what to do when memory is short (`extraction`, `schedule`).

The invariant: after a wait every tensor handed out is whole, and its source lives until then; what
leaves is finite; a value that float16 cannot hold stays float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from taprobe_core.activations.forward import LIBRARY_WAYS, run_pack
from taprobe_core.activations.fused import is_hooked
from taprobe_core.activations.library_way import weigh_text
from taprobe_core.activations.packing import to_device
from taprobe_core.activations.pooling import (
    SpanIndex,
    check_finite,
    fits,
    join_indexes,
    overflow_fix,
    pool,
    span_index,
    value_range,
)
from taprobe_core.activations.tasks import ActivationShard, AttentionShard, ExtractOptions, TextTask
from taprobe_core.activations.trial import (
    Ways,
    choose_ways,
    last_new_kind,
    trial_lengths,
    untried_ways,
)
from taprobe_core.activations.understood import find_blocks, understand
from taprobe_core.attention.mass import (
    SentenceMass,
    TailMass,
    sentence_mass,
    sentence_mass_of,
    tail_mass,
    tail_mass_of,
)
from taprobe_core.errors import NonFiniteError, TaprobeError
from taprobe_core.study.parts import Pooling


class Transfer:
    """Copies that one pack asks for."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor that holds the values of `tensor` once `wait` has returned.

        Args:
            tensor: on any device, complete in the order of its device's current stream.
        """
        # Made outside inference mode, so that whoever gets it may change it in place.
        with torch.inference_mode(False):
            if not tensor.is_cuda:
                return tensor.to("cpu", copy=True)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                tensor.device
            )
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return host

    def wait(self) -> None:
        """Wait until every copy has arrived."""
        for stream in self._streams.values():
            stream.synchronize()


_fused: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_ways: WeakKeyDictionary[nn.Module, tuple[object, Ways]] = WeakKeyDictionary()


class _Kept(NamedTuple):
    """One pooling of a pack at one layer: on the device, on the host, and its rows' ranges."""

    rows: torch.Tensor
    host: torch.Tensor
    ranges: torch.Tensor


class TextShards(NamedTuple):
    """What one text leaves behind, by layer, and why nothing is left at other layers."""

    task: TextTask
    activations: dict[int, ActivationShard]
    attention: dict[int, AttentionShard]
    faults: dict[int, TaprobeError]


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
        self._overflow_fix = partial(overflow_fix, model)
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
        self._run(model)
        for (layer, pooling), rows in self._pooled.items():
            self._fetch(layer, pooling, rows)

    def _run(self, model: nn.Module) -> None:
        texts = [task.token_ids for task in self._tasks]
        watched = frozenset(layer for task in self._tasks for layer in task.attention_layers)
        ways = _ways[model][1] if model in _ways else ways_for((model,), self._tasks)
        way = ways.of(max(map(len, texts)))
        if way == "fused" and is_hooked(model):
            way = "packed"
        if way not in LIBRARY_WAYS:
            deepest = max(task.deepest for task in self._tasks)
            run_pack(model, texts, deepest, self._keep, self._watch if watched else None, way=way)
            return
        if self._layers:
            run_pack(model, texts, max(self._layers), self._keep, way=way)
        for at, task in enumerate(self._tasks):
            if task.attention_layers:
                self._weigh(model, at)

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
                self._fetch_full(at, layer, found)
            else:
                self._fetch_tail(at, layer, tail_mass(q, k, task.spans, scale, mode.last_n))

    def _weigh(self, model: nn.Module, at: int) -> None:
        """Take the attention of one text from weights that the library's eager attention makes."""
        task, mode = self._tasks[at], self._options.attention

        def take(layer: int, weights: torch.Tensor) -> None:
            if mode.kind == "full":
                self._fetch_full(at, layer, sentence_mass_of(weights, task.spans))
            else:
                self._fetch_tail(at, layer, tail_mass_of(weights, task.spans, mode.last_n))

        device = next(model.parameters()).device
        input_ids = to_device(torch.tensor(task.token_ids), device)
        with torch.inference_mode():
            weigh_text(model, find_blocks(model), input_ids, frozenset(task.attention_layers), take)

    def _fetch_full(self, at: int, layer: int, found: SentenceMass) -> None:
        self._fetch_attention(at, layer, {"mass": found.mass, "bos_mass": found.bos_mass})

    def _fetch_tail(self, at: int, layer: int, tail: TailMass) -> None:
        tensors = {"tail_mass": tail.mass, "bos_mass": tail.bos_mass, "is_after": tail.is_after}
        self._fetch_attention(at, layer, tensors)

    def _fetch_attention(self, at: int, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._attention[at, layer] = {
            name: self._transfer.fetch(tensor) for name, tensor in tensors.items()
        }

    def results(self) -> Iterator[TextShards]:
        """Wait for the pack, and yield each text's shards.

        A layer at which a value is NaN or infinite has a `NonFiniteError` in place of its
        activations, which names problem, layer and sentence; the other layers have theirs.
        """
        self._transfer.wait()
        first_row = {"sentence": 0, "token": 0}
        for at, (task, index) in enumerate(zip(self._tasks, self._indexes, strict=True)):
            n_rows = {"sentence": len(index.starts), "token": len(index.tokens)}
            ranges = {
                unit: slice(first_row[unit], first_row[unit] + n_rows[unit]) for unit in n_rows
            }
            first_row = {unit: ranges[unit].stop for unit in ranges}
            activations: dict[int, ActivationShard] = {}
            faults: dict[int, TaprobeError] = {}
            for layer in task.layers:
                try:
                    activations[layer] = self._shard(task, layer, index, ranges)
                except NonFiniteError as fault:
                    faults[layer] = fault
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
            yield TextShards(task, activations, attention, faults)

    def _shard(
        self, task: TextTask, layer: int, index: SpanIndex, rows_of: dict[str, slice]
    ) -> ActivationShard:
        tensors: dict[str, torch.Tensor] = {}
        ranges: dict[str, tuple[float, float]] = {}
        for pooling in self._options.poolings:
            unit = "token" if pooling == "tokens" else "sentence"
            kept, rows = self._kept[layer, pooling], rows_of[unit]
            where, found = (
                f"problem {task.problem_id}, layer {layer}, {pooling}, {unit}",
                kept.ranges[rows],
            )
            check_finite(found, kept.rows[rows], where, self._overflow_fix)
            # Each pooling by itself: what is kept of one must not depend on the others asked for.
            is_as_asked = fits(found, self._options.storage)
            tensors[pooling] = (
                kept.host[rows] if is_as_asked else kept.rows[rows].to("cpu", torch.float32)
            )
            ranges[pooling] = float(found[:, 0].min()), float(found[:, 1].max())
        if "tokens" in self._options.poolings:
            tensors["offsets"] = index.offsets
        return ActivationShard(task.problem_id, layer, tensors, ranges, task.input_sha256)


def ways_for(models: Sequence[nn.Module], tasks: Sequence[TextTask]) -> Ways:
    """Return which way a job's texts go through a model, after a trial on its first such job.

    Args:
        models: equal weights; the first is tried.
        tasks: the texts of the job.

    Raises:
        ModelError: the model cannot run them, or makes no attention weights where they are wanted.
    """
    model = models[0]
    longest = max(len(task.token_ids) for task in tasks)
    deepest = min(max(task.deepest for task in tasks), last_new_kind(find_blocks(model)))
    hooked = is_hooked(model)
    known = understand(model)
    tried = (known, trial_lengths(known, longest), deepest, hooked)
    before = _ways.get(model)
    if before is None or before[0] != tried:
        ways = untried_ways(model) if hooked else choose_ways(model, longest, deepest)
        for each in models:
            _ways[each] = (tried, ways)
            _fused[each] = ways.short == "fused"
    return _ways[model][1]
