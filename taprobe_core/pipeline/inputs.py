"""What probes read, from the store: activations, attention scores, and the rows joined of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import polars as pl

from taprobe_core.errors import ConfigError
from taprobe_core.keys import Site
from taprobe_core.pipeline.plan import Plan, text_partition
from taprobe_core.store import ArtifactKey
from taprobe_core.study import Pooling, ProbeRecipe

if TYPE_CHECKING:
    import numpy as np
    import torch

    from taprobe_core.probes.features import ProbeData


def read_shards(
    plan: Plan, site: Site, setting: str, poolings: Sequence[Pooling] | None = None
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Read one site and setting's activations, one problem at a time, and no other layer's.

    Args:
        plan: the plan.
        site: model and layer.
        setting: the setting.
        poolings: those to read; None for all of the study.

    Yields:
        problem id, and its tensors by pooling (`activations.ActivationShard`), in the number type
        they are stored in, on the CPU.

    Raises:
        MissingArtifactError: they are not extracted yet.
        CorruptArtifactError: a tensor differs from its manifest.
    """
    from taprobe_core.activations.tasks import ACTIVATIONS_FILE, tensor_name

    index = plan.read("activations", (str(site), setting), "shards")
    wanted = poolings or plan.study.activations.poolings
    for (problem_id,), rows in index.group_by("problem_id", maintain_order=True):
        found: dict[str, torch.Tensor] = {}
        for pooling, version in rows.select("pooling", "shard_fingerprint").iter_rows():
            if pooling not in wanted:
                continue
            partition = text_partition(site.model, setting, problem_id)
            key = ArtifactKey("activation_shards", partition, version)
            names = [pooling, "offsets"] if pooling == "tokens" else [pooling]
            stored = [tensor_name(site.layer, name) for name in names]
            tensors = plan.store.inspect(key).read_some_tensors(ACTIVATIONS_FILE, stored)
            found |= dict(zip(names, tensors.values(), strict=True))
        yield int(str(problem_id)), found


def read_attention(
    plan: Plan, site: Site, setting: str
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Read one site and setting's attention mass, one problem at a time, and no other layer's.

    Yields:
        problem id, and the tensors of its shard (`activations.AttentionShard`), on the CPU.

    Raises:
        MissingArtifactError: it is not extracted yet.
        CorruptArtifactError: a tensor differs from its manifest.
    """
    index = plan.read("vertical_attention", (str(site), setting), "shards")
    for problem_id, version in index.select("problem_id", "shard_fingerprint").iter_rows():
        partition = text_partition(site.model, setting, problem_id)
        key = ArtifactKey("attention_shards", partition, version)
        yield problem_id, attention_tensors(plan, key, site.layer)


def attention_tensors(plan: Plan, key: ArtifactKey, layer: int) -> dict[str, torch.Tensor]:
    """Read the tensors of one layer of a text's attention."""
    from taprobe_core.activations.tasks import ATTENTION_FILE, tensor_name

    artifact, prefix = plan.store.inspect(key), tensor_name(layer, "")
    names = [name for name in artifact.tensors(ATTENTION_FILE) if name.startswith(prefix)]
    found = artifact.read_some_tensors(ATTENTION_FILE, names)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_activations(
    plan: Plan, site: Site, setting: str, pooling: Pooling = "mean"
) -> dict[int, np.ndarray]:
    """Read one pooling of one site and setting's activations.

    Returns:
        problem id -> [sentence, d_model], float32, in sentence order; for `tokens` [token, d_model]
        of all sentences.

    Raises:
        ConfigError: the study does not keep this pooling.
        MissingArtifactError: they are not extracted yet.
        CorruptArtifactError: a shard differs from its manifest.
    """
    return _read_poolings(plan, site, setting, [pooling])[pooling]


def _read_poolings(
    plan: Plan, site: Site, setting: str, poolings: Sequence[Pooling]
) -> dict[Pooling, dict[int, np.ndarray]]:
    kept = plan.study.activations.poolings
    for pooling in poolings:
        if pooling not in kept:
            raise ConfigError(
                f"no pooling {pooling!r}",
                f"study {plan.study.name}, activations.poolings",
                f"add it there, or use one of {', '.join(kept)}",
            )
    found: dict[Pooling, dict[int, np.ndarray]] = {pooling: {} for pooling in poolings}
    for problem_id, tensors in read_shards(plan, site, setting, poolings):
        for pooling in poolings:
            found[pooling][problem_id] = tensors[pooling].float().numpy()
    return found


def read_probe_data(
    plan: Plan, model: str, setting: str, site: Site | None, recipes: Sequence[ProbeRecipe] = ()
) -> ProbeData:
    """Join labels, spans, sentences and what recipes read of a site into one matrix set.

    Args:
        plan: the plan.
        model: the model.
        setting: the setting.
        site: whose activations and attention are read; None for neither.
        recipes: read what these read; none of the study's: the pooling `mean`, if it is kept.

    Raises:
        MissingArtifactError: an upstream artifact is not there yet.
    """
    from taprobe_core.probes.features import join_features

    poolings = sorted({pooling for recipe in recipes for pooling in recipe.poolings_read})
    if not recipes and site is not None and "mean" in plan.study.activations.poolings:
        poolings = ["mean"]
    looks = any("vertical_attention" in recipe.features for recipe in recipes)
    return join_features(
        plan.read("labels", (model, setting), "labels"),
        plan.read("spans", (model, setting), "spans"),
        plan.read("rollouts", (model, setting), "sentences"),
        _read_poolings(plan, site, setting, poolings) if site is not None and poolings else None,
        _read_attention(plan, site, setting) if site is not None and looks else None,
    )


def _read_attention(plan: Plan, site: Site, setting: str) -> dict[str, pl.DataFrame]:
    """The simple score, and the scores of heads where the study's attention is full."""
    artifact = plan.open("vertical_attention", (str(site), setting))
    tables = {"scores": artifact.read_table("scores.parquet")}
    if "vertical.parquet" in artifact.manifest.files:
        vertical = artifact.read_table("vertical.parquet")
        tables["vertical"] = vertical
    return tables
