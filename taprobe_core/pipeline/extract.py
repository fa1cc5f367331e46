"""Activations of any set of (site, setting) cells: one pass per text, one shard per problem.

Cells are grouped by model, so the weights are loaded once; each text runs once, whatever the
number of layers that still lack it; and every (site, setting, problem) shard is committed as soon
as it exists. A kill therefore costs at most one text, and a longer layer list extracts only what
is missing.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
import transformers

from taprobe_core.activations import ActivationShard, extract
from taprobe_core.checkpoints import LoadedModel, load_base_model, pick_device, resolve_checkpoint
from taprobe_core.checkpoints.loading import ATTENTION
from taprobe_core.keys import Site
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.text import dataset_provenance
from taprobe_core.store import ArtifactKey, write_table, write_tensors

_log = logging.getLogger(__name__)

Cell = tuple[Site, str]


def ensure_activations(plan: Plan, cells: Sequence[Cell]) -> Iterator[Outcome]:
    """Extract what the cells lack and yield one outcome per cell, as it becomes complete.

    Args:
        plan: the plan.
        cells: (site, setting) pairs in any order.

    Yields:
        One outcome per cell: the index of its shards, table `shards`.

    Raises:
        MissingArtifactError: the spans are not there yet.
        ModelError: the checkpoint cannot be used, or is not as deep as the study says.
        NonFiniteError: an activation is NaN or infinite; names problem, layer and sentence.
    """
    by_model: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell[0].model].append(cell)
    for model, cells_of_model in by_model.items():
        yield from _ensure_model(plan, model, cells_of_model)


def _ensure_model(plan: Plan, model: str, cells: list[Cell]) -> Iterator[Outcome]:
    by_setting: dict[str, list[Site]] = defaultdict(list)
    for site, setting in cells:
        by_setting[setting].append(site)
    loaded: LoadedModel | None = None
    for setting, sites in by_setting.items():
        start = time.monotonic()
        artifact = plan.store.open(plan.spans(model, setting))
        texts = artifact.read_table("texts.parquet")
        missing = _missing_layers(plan, setting, sites, texts)
        if missing:
            loaded = loaded or _load(plan, model)
            spans = artifact.read_table("spans.parquet")
            _extract_setting(plan, model, setting, texts, spans, missing, loaded)
        extracted = {layer for layers in missing.values() for layer in layers}
        for site in sites:
            outcome = _commit_index(plan, site, setting, texts)
            is_reused = outcome.is_reused and site.layer not in extracted
            yield Outcome(outcome.artifact, is_reused, time.monotonic() - start)


def _shard_keys(plan: Plan, site: Site, setting: str, texts: pl.DataFrame) -> list[ArtifactKey]:
    return [
        plan.activation_shard(site, setting, problem_id, input_sha256)
        for problem_id, input_sha256 in texts.select("problem_id", "input_sha256").iter_rows()
    ]


def _missing_layers(
    plan: Plan, setting: str, sites: Sequence[Site], texts: pl.DataFrame
) -> dict[int, list[int]]:
    """Problem id -> layers that no shard holds yet; problems without any are left out."""
    missing: dict[int, list[int]] = defaultdict(list)
    for site in sites:
        keys = _shard_keys(plan, site, setting, texts)
        for problem_id, key in zip(texts["problem_id"], keys, strict=True):
            if plan.store.find(key) is None:
                missing[problem_id].append(site.layer)
    return dict(missing)


def _load(plan: Plan, model: str) -> LoadedModel:
    spec = plan.model(model)
    files = resolve_checkpoint(spec, plan.checkpoints_root)
    return load_base_model(files, spec, pick_device(plan.study.activations.device))


def _extract_setting(
    plan: Plan,
    model: str,
    setting: str,
    texts: pl.DataFrame,
    spans: pl.DataFrame,
    missing: dict[int, list[int]],
    loaded: LoadedModel,
) -> None:
    provenance = _provenance(plan, model, setting, loaded)
    storage = plan.study.activations.storage
    for problem_id, shards, progress in extract(loaded.module, texts, spans, missing, storage):
        for layer, shard in shards.items():
            key = plan.activation_shard(Site(model, layer), setting, problem_id, shard.input_sha256)
            _commit_shard(plan, key, shard, provenance)
        _log.info("activations %s %s: %s", model, setting, progress.render())


def _commit_shard(
    plan: Plan, key: ArtifactKey, shard: ActivationShard, provenance: dict[str, Any]
) -> None:
    def write(folder: Path) -> None:
        write_tensors(
            folder / "activations.safetensors",
            {"mean": shard.mean},
            {"dimensions": "sentence d_model", "layer": str(shard.layer)},
        )

    if shard.dtype != plan.study.activations.storage:
        _log.warning(
            "%s: an activation of %.3g does not fit float16, stored as float32",
            "/".join(key.partition),
            shard.max_abs,
        )
    plan.commit(
        key,
        write,
        {
            **provenance,
            "layer": shard.layer,
            "dtype_stored": shard.dtype,
            "max_abs": shard.max_abs,
        },
        estimate_bytes=shard.mean.numel() * shard.mean.element_size(),
    )


def _provenance(plan: Plan, model: str, setting: str, loaded: LoadedModel) -> dict[str, Any]:
    return {
        **dataset_provenance(plan, model, setting),
        **{f"checkpoint_{name}": value for name, value in plan.checkpoint(model).items()},
        "pooling": plan.study.activations.pooling,
        "text_view": plan.study.spans.text_view,
        "device": str(loaded.device),
        "dtype_computed": str(loaded.dtype).removeprefix("torch."),
        "attention": ATTENTION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _commit_index(plan: Plan, site: Site, setting: str, texts: pl.DataFrame) -> Outcome:
    spans = plan.spans(site.model, setting)
    shards = _shard_keys(plan, site, setting, texts)

    def write(folder: Path) -> None:
        manifests = [plan.store.open(key).manifest for key in shards]
        table = pl.DataFrame(
            {
                "problem_id": texts["problem_id"],
                "shard_fingerprint": [key.fingerprint for key in shards],
                "dtype": [str(manifest.provenance["dtype_stored"]) for manifest in manifests],
                "max_abs": [float(manifest.provenance["max_abs"]) for manifest in manifests],
            }
        )
        write_table(folder / "shards.parquet", table)

    provenance = {
        **dataset_provenance(plan, site.model, setting),
        **{f"checkpoint_{name}": value for name, value in plan.checkpoint(site.model).items()},
        "layer": site.layer,
        "pooling": plan.study.activations.pooling,
    }
    return commit_once(plan, plan.activations(site, setting), write, provenance, [spans, *shards])
