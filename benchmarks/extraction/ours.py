"""This project's extraction, end to end: passes, pooling, transfer, and every text committed.

All layers of a text go through one `Store.commit`: staged, hashed, manifest, fsync, rename. As in
the pipeline, on an accelerator threads commit while the device works on; on a CPU, which has
nothing to spare, the next pass waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.extraction.texts import Text
from benchmarks.extraction.timing import Job, Rows, Variant
from taprobe_core.activations.extraction import Extracted, extract
from taprobe_core.activations.schedule import N_WRITERS, each_ahead
from taprobe_core.activations.tasks import (
    ACTIVATIONS_FILE,
    ExtractOptions,
    tensor_name,
    text_tensors,
    write_text,
)
from taprobe_core.store import ArtifactKey, Store
from taprobe_core.study.parts import Pooling

NAME = "ours"


class Ours:
    """The engine on one model, or on copies of it on several devices.

    Args:
        models: base models without head.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = list(models)
        self.device = next(models[0].parameters()).device
        self._dtype = str(next(models[0].parameters()).dtype).removeprefix("torch.")

    def variants(self, job: Job) -> list[Variant]:
        """Return the ways that can do a job."""
        if not job.is_pooled:
            return [Variant(NAME, self._states)]
        if self.device.type == "cpu":
            other = Variant("ours, a plain file a text", self._plain)
        else:
            other = Variant("ours, nothing written", partial(self.run, is_written=False))
        return [Variant(NAME, self.run), other]

    def run(
        self,
        texts: Sequence[Text],
        job: Job,
        folder: Path,
        *,
        is_written: bool = True,
        poolings: tuple[Pooling, ...] = ("mean",),
        token_budget: int | None = None,
    ) -> Rows:
        """Extract the texts and commit each into a store in `folder`.

        Returns:
            The means as they are stored, of other poolings the first, if the job is checked.
        """
        options = ExtractOptions(
            poolings=poolings,
            storage=job.storage,  # type: ignore[arg-type]
            token_budget=token_budget,
        )
        rows: Rows = {}
        commit = partial(commit_text, Store(folder / "store")) if is_written else lambda item: None
        items = extract(self._models, [text.task(job.layers) for text in texts], options)
        n_threads = N_WRITERS if self.device.type == "cuda" else 0
        for item, _ in each_ahead(commit, items, n_threads):
            if job.is_checked:
                rows[item.problem_id] = {
                    layer: shard.tensors[poolings[0]] for layer, shard in item.shards.items()
                }
        return rows

    def _plain(self, texts: Sequence[Text], job: Job, folder: Path) -> Rows:
        """Write what the other ways write: no hash, no manifest, no fsync."""
        options = ExtractOptions(storage=job.storage)  # type: ignore[arg-type]
        rows: Rows = {}
        for item in extract(self._models, [text.task(job.layers) for text in texts], options):
            means = {layer: shard.tensors["mean"] for layer, shard in item.shards.items()}
            named = {f"layer_{layer}": each for layer, each in means.items()}
            save_file(named, folder / f"problem_{item.problem_id}.safetensors")
            if job.is_checked:
                rows[item.problem_id] = means
        return rows

    def on(self, models: Sequence[nn.Module]) -> Ours:
        """Return the same on other models."""
        return Ours(models)

    def _states(self, texts: Sequence[Text], job: Job, folder: Path) -> Rows:
        """Every token state but the first token's, which no sentence holds."""
        options = ExtractOptions(poolings=("tokens",), storage=self._dtype)  # type: ignore[arg-type]
        tasks = [text.task(job.layers, spans=[(1, len(text))]) for text in texts]
        return {
            item.problem_id: {layer: each.tensors["tokens"] for layer, each in item.shards.items()}
            for item in extract(self._models, tasks, options)
        }


def commit_text(store: Store, item: Extracted) -> None:
    """Commit a text as the pipeline does, under a key of its own."""
    partition = ("model", "setting", f"problem_{item.problem_id}")
    digest = hashlib.sha256("/".join(partition).encode()).hexdigest()[:32]
    tensors = text_tensors(item.shards)
    ranges = {
        tensor_name(layer, pooling): shard.ranges[pooling]
        for layer, shard in item.shards.items()
        for pooling in shard.ranges
    }
    store.commit(
        ArtifactKey("activation_shards", partition, digest),
        partial(write_text, file=ACTIVATIONS_FILE, tensors=tensors),
        provenance={"torch": torch.__version__, "ranges": ranges},
        estimate_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        code_version="1",
        config={"tensors": sorted(tensors)},
    )
