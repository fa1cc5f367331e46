"""What one step of the pipeline leaves behind, for whoever watches: a person, a log, Dagster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import Artifact, ArtifactKey

_log = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes an artifact's files into the empty folder it is given."""


@dataclass(frozen=True)
class Outcome:
    """One committed artifact.

    Attributes:
        artifact: the artifact, committed now or found.
        is_reused: whether it stood in the store before.
        duration_s: seconds this step took.
    """

    artifact: Artifact
    is_reused: bool
    duration_s: float

    @property
    def key(self) -> ArtifactKey:
        """Stage, cell and fingerprint."""
        return self.artifact.key


def commit_once(
    plan: Plan,
    key: ArtifactKey,
    write: Writer,
    provenance: Mapping[str, Any],
    upstream: Sequence[ArtifactKey] = (),
) -> Outcome:
    """Return the artifact of `key`, computing it only if the store lacks it.

    Args:
        plan: the plan that the key is of.
        key: the artifact's key.
        write: computes the result and writes it into the empty folder it is given. Called only
            when needed, and under the lock of its partition: a second process that wants the same
            artifact waits for the first and reuses it. Errors leave the store as it was.
        provenance: what the manifest should say beside the key.
        upstream: keys the result was computed from.
    """
    start = time.monotonic()
    written: list[Path] = []

    def compute(folder: Path) -> None:
        write(folder)
        written.append(folder)

    artifact = plan.commit(key, compute, provenance, upstream)
    seconds = time.monotonic() - start
    if written:
        _log.info("%s %s: computed in %.1f s", key.stage, "/".join(key.partition), seconds)
    return Outcome(artifact, not written, seconds)
