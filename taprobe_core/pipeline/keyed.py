"""Keys and commits of one study's artifacts: what every plan is built on.

A key is a hash of the stage's code version, a slice of the study and the keys upstream. Which slice
and which keys belong to a stage is said in `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taprobe_core.pipeline.sources import Sources
from taprobe_core.store import Artifact, ArtifactKey, Store, fingerprint
from taprobe_core.study import Study

CODE_VERSIONS: Mapping[str, str] = {
    "rollouts": "2",
    "labels": "2",
    "spans": "1",
    "activation_shards": "4",
    "activations": "3",
    "attention_shards": "3",
    "vertical_attention": "2",
    "receiver_heads": "2",
    "fits": "4",
    "probe_fits": "2",
    "deferral_plans": "1",
    "evaluation": "4",
    "leaderboard": "2",
    "study_report": "4",
    "sweep_stage1": "1",
    "sweep_shortlist_stage2": "1",
    "sweep_stage2": "1",
    "sweep_shortlist_stage3": "1",
    "sweep_stage3": "1",
    "sweep_leaderboard": "1",
    "sweep_paired_deltas": "1",
    "sweep_stability": "1",
}
"""Raised by hand when a stage's results change; every fingerprint below it then changes too."""


class KeyedSources(Sources):
    """Sources of a study beside the store of its artifacts.

    Args:
        study: the study.
        store: where the artifacts stand.
        data_root: folder for what is built beside the store.
    """

    def __init__(self, study: Study, store: Store, data_root: Path) -> None:
        super().__init__(study, data_root)
        self.store = store
        self._configs: dict[ArtifactKey, Mapping[str, Any]] = {}

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
            code_version=CODE_VERSIONS[key.stage],
            config=self.config_of(key),
        )

    def config_of(self, key: ArtifactKey) -> Mapping[str, Any]:
        """The slice of the study that a key of this plan stands for."""
        return self._configs[key]

    def _key(
        self,
        stage: str,
        partition: tuple[str, ...],
        config: Mapping[str, Any],
        *upstream: ArtifactKey,
    ) -> ArtifactKey:
        upstream_prints = [key.fingerprint for key in upstream]
        key = ArtifactKey(
            stage, partition, fingerprint(stage, CODE_VERSIONS[stage], config, upstream_prints)
        )
        self._configs[key] = config
        return key
