"""Hidden states as transformers users get them: `output_hidden_states`, hooks, a layer at a time.

Every way gets one text a pass, without a key-value cache and in inference mode. Pooled rows of a
text go to one plain safetensors file: no hash, no manifest, no fsync, which is less than the
store's commit does. Where a way pools on the device, one copy a text brings the rows to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import embedding_bag

from benchmarks.extraction.texts import Text
from benchmarks.extraction.timing import Job, Rows, Variant

N_PASSES = 2
"""Layers that the layer-by-layer way runs; the figure is extrapolated to all of the job's."""


class Collector:
    """What one text gives: token states, or rows pooled on the device or on the host.

    Args:
        text: the text.
        job: what is asked.
        on_host: pool there, after a copy of all states as float32.
        by_sentence: pool there one sentence after the other, as scripts do.
    """

    def __init__(
        self, text: Text, job: Job, *, on_host: bool = False, by_sentence: bool = False
    ) -> None:
        self._text, self._job, self._on_host = text, job, on_host
        self._by_sentence = by_sentence
        self._kept: dict[int, torch.Tensor] = {}
        self._pool: Callable[[torch.Tensor], torch.Tensor] | None = None

    def take(self, layer: int, hidden: torch.Tensor) -> None:
        """Keep a block's output, [token, d_model], or its sentence means."""
        if self._by_sentence:
            host = hidden.cpu().float()
            hidden = torch.stack([host[start:end].mean(dim=0) for start, end in self._text.spans])
        elif self._job.is_pooled:
            hidden = hidden.to("cpu", torch.float32) if self._on_host else hidden.float()
            if self._pool is None:
                make = weighted if hidden.is_cuda else bagged
                self._pool = make(self._text.spans, hidden.device)
            hidden = self._pool(hidden)
        self.keep(layer, hidden)

    def keep(self, layer: int, found: torch.Tensor) -> None:
        """Keep a layer's states, or rows that were pooled elsewhere."""
        self._kept[layer] = found

    def finish(self, folder: Path) -> dict[int, torch.Tensor]:
        """Return the states, or write the rows and return them as float32 on the host."""
        if not self._job.is_pooled:
            return self._kept
        stacked = torch.stack(list(self._kept.values())).cpu()
        rows = dict(zip(self._kept, stacked, strict=True))
        storage: torch.dtype = getattr(torch, self._job.storage)
        stored = {f"layer_{layer}": each.to(storage) for layer, each in rows.items()}
        save_file(stored, folder / f"problem_{self._text.problem_id}.safetensors")
        return rows


def bagged(
    spans: Sequence[tuple[int, int]], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what averages float32 states over gapless spans in one call, in a fixed order."""
    first, last = spans[0][0], spans[-1][1]
    starts = torch.tensor([start - first for start, _ in spans], device=device)
    tokens = torch.arange(first, last, device=device)
    return lambda hidden: embedding_bag(tokens, hidden, starts, mode="mean")


def weighted(
    spans: Sequence[tuple[int, int]], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the same as one matrix product, [span, token] by [token, d_model].

    For CUDA, where bags of rows thousands wide took some 2 ms a text and layer (H200, 14B shape).
    """
    first, last = spans[0][0], spans[-1][1]
    lengths = torch.tensor([end - start for start, end in spans], device=device)
    rows = torch.repeat_interleave(
        torch.arange(len(spans), device=device), lengths, output_size=last - first
    )
    weights = torch.zeros(len(spans), last - first, device=device)
    weights[rows, torch.arange(last - first, device=device)] = 1 / lengths[rows]
    return lambda hidden: weights @ hidden[first:last]


def ids_of(text: Text, device: torch.device) -> torch.Tensor:
    """Return the ids as a batch of one."""
    return torch.tensor([text.token_ids], device=device)


@contextmanager
def hooked(blocks: nn.ModuleList, collector: Collector, layers: Sequence[int]) -> Iterator[None]:
    """Give the collector the output of these blocks while the context lasts."""

    def keep(layer: int, block: nn.Module, args: Any, output: Any) -> None:
        collector.take(layer, (output[0] if isinstance(output, tuple) else output)[0])

    handles = [blocks[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Readers:
    """The ways of transformers, on one causal language model.

    Args:
        causal: the model, with its head.
    """

    def __init__(self, causal: Any) -> None:
        self._causal = causal
        self._device: torch.device = next(causal.parameters()).device

    def variants(self, job: Job) -> list[Variant]:
        """Return the ways that can do a job; the first is the yardstick, which reads nothing."""
        ways: list[tuple[str, Callable[[Text, Job, Path], dict[int, torch.Tensor]]]] = [
            ("bare forward, base model", self._bare),
            ("HF output_hidden_states", partial(self._hidden_states, on_host=True)),
            ("HF same, base model, device pool", partial(self._hidden_states, is_base=True)),
            ("hook, full forward", self._hook),
            ("hook, base model", partial(self._hook, is_base=True)),
        ]
        if not job.is_pooled or self._device.type == "cpu":
            # Nothing to pool, or one place to pool at: the row differs by the head alone.
            ways[2] = ("HF same, base model", ways[2][1])
        variants = [Variant(name, partial(each_text, way)) for name, way in ways]
        if len(job.layers) > 1 and self._device.type != "cpu":
            # Every state crosses to the host and is pooled there: many times the rest together.
            variants[1] = replace(variants[1], is_slow=True)
            way = partial(each_text, partial(self._hidden_states, by_sentence=True))
            variants.insert(2, Variant("HF same, sentence by sentence", way, is_slow=True))
            for name, is_stacked in (("kept", False), ("stacked", True)):
                way = partial(each_text, partial(self._by_numpy, is_stacked=is_stacked))
                slow = Variant(f"HF same, {name} as float32, NumPy", way, is_slow=True)
                variants.insert(len(variants) - 3, slow)
        if len(job.layers) > 1:
            done = min(N_PASSES, len(job.layers))
            note = f"{done} of {len(job.layers)} passes run, extrapolated"
            way = partial(each_text, self._layer_by_layer)
            variants.append(
                Variant("layer by layer", way, note, done / len(job.layers), is_slow=True)
            )
        return variants

    def _bare(self, text: Text, job: Job, folder: Path) -> dict[int, torch.Tensor]:
        self._causal.model(input_ids=ids_of(text, self._device), use_cache=False)
        return {}

    def _hidden_states(
        self, text: Text, job: Job, folder: Path, *, is_base: bool = False, **where: bool
    ) -> dict[int, torch.Tensor]:
        model = self._causal.model if is_base else self._causal
        collector = Collector(text, job, **where)
        output = model(
            input_ids=ids_of(text, self._device), use_cache=False, output_hidden_states=True
        )
        for layer in job.layers:
            collector.take(layer, output.hidden_states[layer + 1][0])
        return collector.finish(folder)

    def _by_numpy(
        self, text: Text, job: Job, folder: Path, *, is_stacked: bool
    ) -> dict[int, torch.Tensor]:
        """As a script would first be written: all states to the host as float32, then `mean`."""
        output = self._causal(
            input_ids=ids_of(text, self._device), use_cache=False, output_hidden_states=True
        )
        if is_stacked:
            states = torch.stack(output.hidden_states)[:, 0].float().cpu().numpy()
        else:
            states = [each[0].to("cpu", torch.float32).numpy() for each in output.hidden_states]
        collector = Collector(text, job)
        for layer in job.layers:
            means = [states[layer + 1][start:end].mean(axis=0) for start, end in text.spans]
            collector.keep(layer, torch.from_numpy(np.stack(means)))
        return collector.finish(folder)

    def _hook(
        self, text: Text, job: Job, folder: Path, *, is_base: bool = False
    ) -> dict[int, torch.Tensor]:
        model = self._causal.model if is_base else self._causal
        collector = Collector(text, job)
        with hooked(self._causal.model.layers, collector, job.layers):
            model(input_ids=ids_of(text, self._device), use_cache=False)
        return collector.finish(folder)

    def _layer_by_layer(self, text: Text, job: Job, folder: Path) -> dict[int, torch.Tensor]:
        collector = Collector(text, job, on_host=True)
        for layer in job.layers[:N_PASSES]:
            with hooked(self._causal.model.layers, collector, [layer]):
                self._causal(input_ids=ids_of(text, self._device), use_cache=False)
        return collector.finish(folder)


def each_text(
    way: Callable[[Text, Job, Path], dict[int, torch.Tensor]],
    texts: Sequence[Text],
    job: Job,
    folder: Path,
) -> Rows:
    """Run a way on one text after another."""
    with torch.inference_mode():
        return {text.problem_id: way(text, job, folder) for text in texts}
