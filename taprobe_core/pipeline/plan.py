"""From a study to the fingerprint of every artifact it will hold, before anything is computed.

A `Plan` answers one question for every stage and cell: under which key does, or will, its artifact
stand in the store? What goes into the key of a cell is said by its stage, which `open_plan` hands
over; the keys of parts (fits, shards), which several stages share, are said here. Finding what the
study names belongs in `sources`, making artifacts in `stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from taprobe_core.keys import Site
from taprobe_core.pipeline.fit_rows import WHOLE, View
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.sources import Sources
from taprobe_core.pipeline.stage import Stages
from taprobe_core.store import Artifact, ArtifactKey, Manifest, Store, fingerprint
from taprobe_core.study import SPEED_ONLY, ProbeRecipe, Study


class Plan(Sources):
    """Keys and commits of one study's artifacts in one store.

    Args:
        study: the study.
        store: where the artifacts stand.
        data_root: folder for what is built beside the store.
        stages: every stage there is (`stages.STAGES`).
    """

    def __init__(self, study: Study, store: Store, data_root: Path, stages: Stages[Plan]) -> None:
        super().__init__(study, data_root)
        self.store = store
        self.stages = stages
        self._configs: dict[ArtifactKey, Mapping[str, Any]] = {}

    @cache
    def key(self, stage: str, cell: Cell = ()) -> ArtifactKey:
        """Key of a cell's artifact: of its stage's code version, slice of the study and upstream.

        Args:
            stage: any stage, even one that the study does not ask for.
            cell: its partition keys; none for a stage with one artifact per study.
        """
        config = self.stages[stage].config(self, cell)
        return self._key(stage, cell or (self.study.name,), config, self.upstream(stage, cell))

    def upstream(self, stage: str, cell: Cell) -> list[ArtifactKey]:
        """Keys of what a cell is made from, in the order in which its fingerprint has them."""
        keyed_by = self.stages[stage].keyed_by
        if keyed_by is not None:
            return list(keyed_by(self, cell))
        parents = self.stages.parent_cells(self.study, stage, cell)
        return [self.key(parent, each) for parent, each in parents]

    def open(self, stage: str, cell: Cell = ()) -> Artifact:
        """Open a cell's artifact.

        Raises:
            MissingArtifactError: it is not there yet.
            CorruptArtifactError: its manifest is damaged.
        """
        return self.store.open(self.key(stage, cell))

    def read(self, stage: str, cell: Cell, table: str) -> pl.DataFrame:
        """Read a table of a cell's artifact.

        Raises:
            MissingArtifactError: the artifact is not there yet.
            CorruptArtifactError: its bytes differ from its manifest.
        """
        return self.open(stage, cell).read_table(f"{table}.parquet")

    def part_keys(self, manifest: Manifest) -> list[ArtifactKey]:
        """Keys of the parts that an index lists; none for an artifact that is no index."""
        stage = self.stages.get(manifest.stage)
        if stage is None or stage.part is None:
            return []
        return [key for key in manifest.upstream_keys if key.stage == stage.part.name]

    def is_complete(self, stage: str, cell: Cell) -> bool:
        """Whether the store holds a cell's artifact, at today's fingerprint, and all its parts.

        A part that is gone (discarded as corrupt, say) leaves the index in place, but the cell has
        to run again.
        """
        artifact = self.store.find(self.key(stage, cell))
        if artifact is None:
            return False
        parts = self.part_keys(artifact.manifest)
        return all(self.store.backend.sizes(key) is not None for key in parts)

    def commit(
        self,
        key: ArtifactKey,
        write: Callable[[Path], None],
        provenance: Mapping[str, Any],
        upstream: Sequence[ArtifactKey] = (),
        estimate_bytes: int = 0,
    ) -> Artifact:
        """Commit an artifact of this plan; its manifest also gets code version and config slice.

        Arguments and errors are those of `Store.commit`.
        """
        return self.store.commit(
            key,
            write,
            provenance=provenance,
            upstream=upstream,
            estimate_bytes=estimate_bytes,
            code_version=self.stages.code_version(key.stage),
            config=self.config_of(key),
        )

    def config_of(self, key: ArtifactKey) -> Mapping[str, Any]:
        """The slice of the study that a key of this plan stands for."""
        return self._configs[key]

    def _key(
        self,
        name: str,
        partition: tuple[str, ...],
        config: Mapping[str, Any],
        upstream: Sequence[ArtifactKey] = (),
    ) -> ArtifactKey:
        version = self.stages.code_version(name)
        found = fingerprint(name, version, config, [key.fingerprint for key in upstream])
        key = ArtifactKey(name, partition, found)
        self._configs[key] = config
        return key

    @cache
    def fit(
        self, site: Site, setting: str, recipe: ProbeRecipe, seed: int, view: View = WHOLE
    ) -> ArtifactKey:
        """Key of one recipe's fits over all folds.

        A recipe that reads nothing of the model's states is shared by all sites of the model, and a
        deterministic one by all seeds: each is solved once.

        Args:
            site: model and layer.
            setting: the setting.
            recipe: one of `Study.recipes`, whose target is filled in.
            seed: of a stochastic recipe.
            view: which rows and scores it sees; a sweep varies them.
        """
        scope = str(site) if recipe.reads_activations else site.model
        name = f"{recipe.name}@s{seed:02d}" if recipe.is_stochastic else recipe.name
        return self._key(
            "fits",
            (scope, setting, name),
            {
                "recipe": recipe.content(),
                "tie_rule": self.study.labels.tie_rule,
                "folds": self.folds_config(),
                "seed": seed if recipe.is_stochastic else None,
                "keep": self.study.probes.keep,
                **(self.precision_config() if recipe.is_stochastic else {}),
                **view.content(self.study.attention.mode),
            },
            self.fit_inputs(site, setting, recipe),
        )

    def fit_inputs(self, site: Site, setting: str, recipe: ProbeRecipe) -> list[ArtifactKey]:
        """Keys of what a recipe's fits are computed from."""
        of_model, of_site = (site.model, setting), (str(site), setting)
        keys = [self.key("labels", of_model), self.key("spans", of_model)]
        if recipe.poolings_read:
            keys.append(self.key("activations", of_site))
        if "vertical_attention" in recipe.features:
            keys.append(self.key("vertical_attention", of_site))
        return keys

    def shard(
        self,
        kind: str,
        model: str,
        setting: str,
        problem_id: int,
        input_sha256: str,
        tensors: Sequence[str],
    ) -> ArtifactKey:
        """Key of an artifact of one text: its own tokens and spans, the model, what it holds.

        Args:
            kind: `activation_shards` or `attention_shards`.
            model: the model.
            setting: the setting.
            problem_id: the problem.
            input_sha256: `texts.input_sha256`.
            tensors: names of those that it holds. They decide no value, so that of two artifacts
                which differ in them alone, equal tensors are equal.
        """
        decides = self.text_config(kind, model)
        # A pooling's values do not depend on the others that are kept.
        decides.pop("poolings", None)
        config = {**decides, "input_sha256": input_sha256, "tensors": sorted(tensors)}
        return self._key(kind, text_partition(model, setting, problem_id), config)

    def text_config(self, kind: str, model: str) -> dict[str, Any]:
        """What decides what is kept of a text, beside the text and the layer."""
        spec, attention = self.model(model), self.study.attention
        chosen = spec.attn_implementation
        kept = (
            self.study.activations.model_dump(mode="json", exclude=set(SPEED_ONLY))
            if kind == "activation_shards"
            else {
                "mode": attention.mode,
                "last_n": attention.last_n if attention.mode == "light" else None,
            }
        )
        return {
            "checkpoint": dict(self.checkpoint(model)),
            "dtype": spec.dtype,
            **({"attn_implementation": chosen} if chosen != "sdpa" else {}),
            **kept,
        }

    def folds_config(self) -> dict[str, Any]:
        """What decides the folds of every cell."""
        return {
            "problem_ids": list(self.problem_ids()),
            **self.study.splits.model_dump(mode="json"),
        }

    def precision_config(self) -> dict[str, str]:
        """What of the precision decides scores; nothing where products are exact."""
        precision = self.study.probes.precision
        return {"precision": precision} if precision != "float32" else {}


def text_partition(model: str, setting: str, problem_id: object) -> tuple[str, ...]:
    """The partition of the artifacts of one text."""
    return (model, setting, f"problem_{problem_id}")
