"""TransformerLens and nnsight, each in its best documented way; a row says so where one is absent.

TransformerLens 4: `TransformerBridge.boot_transformers(hf_model=...)`, then `run_with_cache` with
a names filter and nothing else kept (`output_attentions=False`, `return_type=None`). Its attention
is its own and builds every score; `stop_at_layer` stops before a block, so it cannot spare the head
when the last block is wanted. nnsight 0.8: `NNsight(model).trace`, with the pooling inside the
trace, and `tracer.stop()` after the deepest layer.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.extraction.reading import Collector, each_text, ids_of
from benchmarks.extraction.texts import Text
from benchmarks.extraction.timing import Job, Variant

ROWS = {
    "transformer_lens": ("TransformerLens", "TransformerLens, stop_at_layer"),
    "nnsight": ("nnsight, full trace", "nnsight, tracer.stop()"),
}


def version(module: str) -> str | None:
    """Version of an optional library; None where it is not installed."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


class Peers:
    """The two libraries on one causal language model.

    Args:
        causal: the model; each library gets modules of its own with the same weights.
        wanted: modules to run; the others are reported as left out.
    """

    def __init__(self, causal: Any, wanted: tuple[str, ...]) -> None:
        self._causal = causal
        self._device: torch.device = next(causal.parameters()).device
        self._wanted = wanted
        self._loaded: dict[str, Any] = {}

    def variants(self, job: Job) -> list[Variant]:
        """Return two rows a library, runnable or not."""
        rows = []
        for module, (full, stopped) in ROWS.items():
            absent = self._absent(module)
            for name, is_stopped in ((full, False), (stopped, True)):
                note = absent
                if not note and is_stopped and module == "transformer_lens":
                    is_last = max(job.layers) == self._causal.config.num_hidden_layers - 1
                    note = "cannot stop behind the last block" if is_last else ""
                way = partial(self._way(module), is_stopped=is_stopped)
                rows.append(Variant(name, None if note else partial(each_text, way), note))
        return rows

    def _absent(self, module: str) -> str:
        if version(module) is None:
            return "not installed"
        return "" if module in self._wanted else "left out on request"

    def _way(self, module: str) -> Callable[..., dict[int, torch.Tensor]]:
        return self._lens if module == "transformer_lens" else self._nnsight

    def _lens(
        self, text: Text, job: Job, folder: Path, *, is_stopped: bool
    ) -> dict[int, torch.Tensor]:
        bridge = self._once("transformer_lens", self._bridge)
        collector = Collector(text, job)
        names = {layer: f"blocks.{layer}.hook_out" for layer in job.layers}
        _, cache = bridge.run_with_cache(
            ids_of(text, self._device),
            names_filter=list(names.values()),
            return_cache_object=False,
            return_type=None,
            use_cache=False,
            output_attentions=False,
            **({"stop_at_layer": max(job.layers) + 1} if is_stopped else {}),
        )
        for layer, name in names.items():
            collector.take(layer, cache[name][0])
        return collector.finish(folder)

    def _nnsight(
        self, text: Text, job: Job, folder: Path, *, is_stopped: bool
    ) -> dict[int, torch.Tensor]:
        network = self._once("nnsight", self._network)
        collector = Collector(text, job)
        ids = ids_of(text, self._device)
        # nnsight runs the body of the block from its source, so each way is spelled out.
        if is_stopped:
            with network.trace(ids, use_cache=False) as tracer:
                for layer in job.layers:
                    collector.take(layer, network.model.layers[layer].output[0])
                tracer.stop()
        else:
            with network.trace(ids, use_cache=False):
                for layer in job.layers:
                    collector.take(layer, network.model.layers[layer].output[0])
        return collector.finish(folder)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._loaded[name] = make()
        return self._loaded[name]

    def _network(self) -> Any:
        return importlib.import_module("nnsight").NNsight(self._twin())

    def _twin(self) -> Any:
        """The model's modules anew, with the same weights: both libraries change what they wrap."""
        shared = (*self._causal.parameters(), *self._causal.buffers())
        return copy.deepcopy(self._causal, {id(tensor): tensor for tensor in shared})

    def _bridge(self) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        bridge_class = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
        words = models.WordLevel({"a": 0, "b": 1}, unk_token="a")  # noqa: S106
        with tempfile.TemporaryDirectory() as folder:
            # The bridge wants a tokenizer, and reads it again from where it came from.
            names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "b")
            tokenizer_class: Any = PreTrainedTokenizerFast
            made = tokenizer_class(tokenizer_object=Tokenizer(words), **names)
            made.save_pretrained(folder)
            return bridge_class.boot_transformers(
                "local",
                hf_model=self._twin(),
                tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
                dtype=self._causal.dtype,
            )
