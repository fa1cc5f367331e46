"""This project's extraction, end to end: passes, pooling, transfer, and every shard committed.

A shard a text and layer goes through `Store.commit`: staged, hashed, manifest, fsync, rename. As in
the pipeline, on an accelerator child processes commit while the device works on; on a CPU, which
has nothing to spare, threads do and the next pass waits for them.
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
from taprobe_core.activations.extraction import extract
from taprobe_core.activations.tasks import ActivationShard, ExtractOptions, shard_file
from taprobe_core.store import ArtifactKey, Committer, CommitWorkers, FileCommit, Store
from taprobe_core.study.parts import Pooling

NAME = "ours"


class Ours:
    """The engine on one model, or on copies of it on several devices.

    Args:
        models: base models without head.
        workers: child processes that commit while passes go on; None commits in step.
    """

    def __init__(self, models: Sequence[nn.Module], workers: CommitWorkers | None = None) -> None:
        self._models = list(models)
        self._workers = workers
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
        """Extract the texts and commit their shards into a store in `folder`.

        Returns:
            The means as they are stored, of other poolings the first, if the job is checked.
        """
        options = ExtractOptions(
            poolings=poolings,
            storage=job.storage,  # type: ignore[arg-type]
            token_budget=token_budget,
        )
        rows: Rows = {}
        with Committer(Store(folder / "store"), self._workers) as committer:
            for item in extract(self._models, [text.task(job.layers) for text in texts], options):
                if is_written:
                    committer.put([commit_of(shard) for shard in item.shards.values()])
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
        """Return the same on other models, with the same workers."""
        return Ours(models, self._workers)

    def _states(self, texts: Sequence[Text], job: Job, folder: Path) -> Rows:
        """Every token state but the first token's, which no sentence holds."""
        options = ExtractOptions(poolings=("tokens",), storage=self._dtype)  # type: ignore[arg-type]
        tasks = [text.task(job.layers, spans=[(1, len(text))]) for text in texts]
        return {
            item.problem_id: {layer: each.tensors["tokens"] for layer, each in item.shards.items()}
            for item in extract(self._models, tasks, options)
        }


def commit_of(shard: ActivationShard) -> FileCommit:
    """The shard as the pipeline commits it, under a key of its own."""
    partition = (f"model@L{shard.layer:02d}", "setting", f"problem_{shard.problem_id}")
    digest = hashlib.sha256("/".join(partition).encode()).hexdigest()[:32]
    name, parts = shard_file(shard)
    provenance = {
        "layer": shard.layer,
        "dtype_stored": shard.dtype,
        "max_abs": shard.max_abs,
        "torch": torch.__version__,
    }
    key = ArtifactKey("activation_shards", partition, digest)
    return FileCommit(key, name, parts, provenance, "1", {})
