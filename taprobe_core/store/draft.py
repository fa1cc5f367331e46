"""What a commit knows before its files exist, and the manifest that it becomes.

Turns a key, a config slice, provenance and a folder of fresh files into the fields of a manifest.
When that happens belongs in `artifacts`. Invariant: what cannot be stored is refused before a stage
runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from taprobe_core.errors import ArtifactError
from taprobe_core.store.canonical import NotJsonError, plain
from taprobe_core.store.fingerprint import ArtifactKey
from taprobe_core.store.lock import this_process
from taprobe_core.store.manifest import FORMAT, SCHEMA_VERSION, library_versions


@dataclass(frozen=True)
class Draft:
    """What a commit knows about an artifact before its files exist."""

    key: ArtifactKey
    code_version: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    upstream: Sequence[ArtifactKey]

    def checked(self) -> Draft:
        """Return this draft with a copy of the config as the manifest will hold it.

        Raises:
            ArtifactError: JSON cannot hold the config or the provenance; names the path.
        """
        self._plain("provenance")
        return replace(self, config=self._plain("config"))

    def body(self, files: Mapping[str, Any], sequence: int) -> dict[str, Any]:
        """Return the manifest that the draft becomes.

        Args:
            files: from `describe_files`.
            sequence: number of the version in its partition.

        Returns:
            The fields of a `Manifest` but its hash, as JSON values.

        Raises:
            ArtifactError: JSON cannot hold the provenance any more.
        """
        writer = this_process()
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "stage": self.key.stage,
            "partition": list(self.key.partition),
            "fingerprint": self.key.fingerprint,
            "sequence": sequence,
            "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "code_version": self.code_version,
            "config": self.config,
            "upstream": [str(key) for key in self.upstream],
            "provenance": self._plain("provenance"),
            "versions": library_versions(),
            "writer": {"host": writer.host, "pid": writer.pid, "run_id": writer.run_id},
            "files": files,
        }

    def _plain(self, field: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = plain(getattr(self, field))
        except NotJsonError as error:
            raise ArtifactError(
                f"a manifest cannot hold {error.found}",
                f"{field} of {self.key}, {error.at}",
                "use finite numbers, text, lists and mappings with text keys",
            ) from None
        return value
