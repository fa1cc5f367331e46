"""Vertical attention of sites, and the receiver heads of models: stored mass to committed tables.

The mass is measured by the same passes as the activations (extract); everything here follows from
its shards. What does not belong here: the tables themselves (attention_tables).

The invariant: no pass is run for mass that is stored, and a longer layer list adds its own layers
alone; only the receiver heads, which are chosen over all layers, are chosen again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import polars as pl
import torch

from taprobe_core.activations.shards import ATTENTION_FILE
from taprobe_core.attention_tables import receiver_tables, vertical_tables
from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.keys import Site
from taprobe_core.pipeline.extract import are_there, extract_missing, shard_keys
from taprobe_core.pipeline.failures import Failure, failure_of
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.skips import folds_of
from taprobe_core.pipeline.text import dataset_provenance
from taprobe_core.store import ArtifactKey, write_table

Cell = tuple[Site, str]


def read_attention(
    plan: Plan, site: Site, setting: str
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Read one site and setting's attention mass, one problem at a time.

    Yields:
        problem id, and the tensors of its shard (`activations.AttentionShard`), on the CPU.

    Raises:
        MissingArtifactError: it is not extracted yet.
        CorruptArtifactError: a shard differs from its manifest.
    """
    index = plan.store.open(plan.vertical_attention(site, setting)).read_table("shards.parquet")
    for problem_id, shard in index.select("problem_id", "shard_fingerprint").iter_rows():
        partition = (str(site), setting, f"problem_{problem_id}")
        yield problem_id, _tensors(plan, ArtifactKey("attention_shards", partition, shard))


def read_kurtosis(plan: Plan, model: str, setting: str) -> pl.DataFrame:
    """Read the kurtosis of every head of a model: `tables.HEAD_KURTOSIS` and column `layer`.

    Raises:
        MissingArtifactError: the vertical attention of a layer is not there yet.
    """
    return pl.concat(
        plan.store.open(plan.vertical_attention(site, setting))
        .read_table("kurtosis.parquet")
        .with_columns(layer=pl.lit(site.layer, pl.Int64))
        for site in plan.sites(model)
    )


def ensure_vertical_attention(plan: Plan, cells: Sequence[Cell]) -> Iterator[Outcome | Failure]:
    """Measure what the cells lack, and yield how each came out.

    Where a shard is missing, the pass that makes it also makes the activations that are missing of
    the same texts.

    Args:
        plan: the plan, of a study whose attention is on.
        cells: (site, setting) pairs in any order.

    Yields:
        One outcome per cell: the index of its shards, table `shards`, and the tables of
        `attention_tables.vertical_tables`; or its failure, which names the problems that failed.
    """
    start = time.monotonic()
    shards = {cell: attempted(partial(_shards, plan, *cell), _name(cell)) for cell in cells}
    lacking = [
        cell
        for cell, keys in shards.items()
        if not isinstance(keys, TaprobeError)
        and any(plan.store.adopt(key) is None for key in keys.values())
    ]
    faults = extract_missing(plan, lacking) if lacking else {}
    for cell, keys in shards.items():
        named = (str(cell[0]), cell[1])
        made: Outcome | TaprobeError | dict[str, TaprobeError]
        if isinstance(keys, TaprobeError):
            made = keys
        elif cell in faults and not are_there(plan, list(keys.values())):
            made = faults[cell]
        else:
            made = attempted(partial(_commit, plan, *cell, keys), _name(cell))
        if isinstance(made, Outcome):
            is_reused = made.is_reused and cell not in lacking
            yield Outcome(made.artifact, is_reused, time.monotonic() - start)
        else:
            yield failure_of("vertical_attention", named, made)
        start = time.monotonic()


def _name(cell: Cell) -> str:
    return f"vertical_attention {cell[0]}/{cell[1]}"


def _shards(plan: Plan, site: Site, setting: str) -> dict[int, ArtifactKey]:
    """Problem id -> key of its shard."""
    texts = plan.store.open(plan.spans(site.model, setting)).read_table("texts.parquet")
    keys = shard_keys(plan, site, setting, texts, "attention_shard")
    return dict(zip(texts["problem_id"], keys, strict=True))


def _tensors(plan: Plan, key: ArtifactKey) -> dict[str, torch.Tensor]:
    return plan.store.open(key).read_tensors(ATTENTION_FILE)


def _commit(plan: Plan, site: Site, setting: str, shards: Mapping[int, ArtifactKey]) -> Outcome:
    attention = plan.study.attention

    def write(folder: Path) -> None:
        index = {
            "problem_id": list(shards),
            "shard_fingerprint": [key.fingerprint for key in shards.values()],
        }
        write_table(folder / "shards.parquet", pl.DataFrame(index))
        masses = ((problem_id, _tensors(plan, key)) for problem_id, key in shards.items())
        for name, table in vertical_tables(masses, attention).items():
            write_table(folder / f"{name}.parquet", table)

    provenance = {
        **dataset_provenance(plan, site.model, setting),
        **{f"checkpoint_{name}": value for name, value in plan.checkpoint(site.model).items()},
        "layer": site.layer,
        "attention_mode": attention.mode,
    }
    upstream = [plan.spans(site.model, setting), *shards.values()]
    return commit_once(plan, plan.vertical_attention(site, setting), write, provenance, upstream)


def ensure_receiver_heads(plan: Plan, model: str, setting: str) -> Outcome:
    """Choose one model and setting's receiver heads, fold by fold, and score sentences by them.

    Tables `heads`, `receiver_scores` and `reliability`, see `attention_tables.receiver_tables`.

    Args:
        plan: the plan, of a study whose attention is `full`.
        model: the model; all the layers that the study reads of it take part.
        setting: the setting.

    Raises:
        MissingArtifactError: the vertical attention of a layer is not there yet.
        NotEnoughDataError: no head has a kurtosis in a fold's training problems.
        PlanError: a split side would be empty.
    """
    upstream = {site.layer: plan.vertical_attention(site, setting) for site in plan.sites(model)}
    attention = plan.study.attention

    def read_vertical(layer: int) -> pl.DataFrame:
        return plan.store.open(upstream[layer]).read_table("vertical.parquet")

    def write(folder: Path) -> None:
        kurtosis = read_kurtosis(plan, model, setting)
        present = tuple(kurtosis["problem_id"].unique())
        folds = folds_of(plan, model, setting, present)
        tables = receiver_tables(kurtosis, read_vertical, folds, attention)
        for name, table in tables.items():
            write_table(folder / f"{name}.parquet", table)

    provenance = {
        **dataset_provenance(plan, model, setting),
        "layers": list(upstream),
        "proximity": attention.proximity[0],
        "depth_control": attention.depth_control,
    }
    key = plan.receiver_heads(model, setting)
    return commit_once(plan, key, write, provenance, list(upstream.values()))
