"""What extraction made of a text, as files to be committed under the keys of a plan.

What does not belong here: making shards (activations) and committing them (the store).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from taprobe_core.activations.extract import Extracted
from taprobe_core.activations.shards import ActivationShard, AttentionShard, shard_file
from taprobe_core.keys import Site
from taprobe_core.pipeline.plan import CODE_VERSIONS, Plan
from taprobe_core.store import ArtifactKey, FileCommit

_log = logging.getLogger(__name__)


def shard_commits(
    plan: Plan, model: str, setting: str, item: Extracted, provenance: Mapping[str, Any]
) -> list[FileCommit]:
    """Return a commit for every shard of a text.

    Args:
        plan: names the shards.
        model: the model.
        setting: the setting.
        item: from `extract`; its tensors must stay as they are until they are committed.
        provenance: what every manifest says of them.
    """

    def commit_of(
        key: ArtifactKey, shard: ActivationShard | AttentionShard, found: Mapping[str, Any]
    ) -> FileCommit:
        name, parts = shard_file(shard)
        about = {**provenance, "layer": shard.layer, **found}
        return FileCommit(key, name, parts, about, CODE_VERSIONS[key.stage], plan.config_of(key))

    commits = []
    for layer, shard in item.shards.items():
        if shard.dtype != plan.study.activations.storage:
            _log.warning(
                "%s %s problem %d, layer %d: %.3g does not fit %s, stored as float32",
                *(model, setting, item.problem_id, layer, shard.max_abs),
                plan.study.activations.storage,
            )
        sha256, site = shard.input_sha256, Site(model, layer)
        key = plan.activation_shard(site, setting, item.problem_id, sha256)
        found = {"dtype_stored": shard.dtype, "range": list(shard.range), "max_abs": shard.max_abs}
        commits.append(commit_of(key, shard, found))
    for layer, mass in item.attention.items():
        sha256, site = mass.input_sha256, Site(model, layer)
        key = plan.attention_shard(site, setting, item.problem_id, sha256)
        commits.append(commit_of(key, mass, {}))
    return commits
