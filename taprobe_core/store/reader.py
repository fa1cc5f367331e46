"""The half of the store that never writes.

Turns a key into a checked artifact, and a store into its keys, verdicts, lineage and figures.
Committing belongs in `artifacts`. Invariant: nothing here makes, moves or locks anything, so it
also serves a store on a read-only disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import polars as pl

from taprobe_core.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from taprobe_core.store import audit
from taprobe_core.store.artifact import Artifact
from taprobe_core.store.backend import NOT_REGULAR, POINTER, Backend
from taprobe_core.store.disk import disk_errors
from taprobe_core.store.fingerprint import (
    ArtifactKey,
    check_key,
    check_partition,
    is_fingerprint,
)
from taprobe_core.store.integrity import check_sizes, is_known_bad
from taprobe_core.store.manifest import DISCARD, MANIFEST_NAME, Manifest, parse_manifest


class StoreReader:
    """Reads artifacts by key.

    Args:
        backend: where artifacts live.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def backend(self) -> Backend:
        """Where the artifacts live."""
        return self._backend

    def find(self, key: ArtifactKey) -> Artifact | None:
        """Return a committed artifact without hashing its files, or None.

        Its manifest parses, its files have the sizes that the manifest says, and this process has
        not found other bytes in them. Reading through the result still checks every hash.

        Raises:
            ConfigError: `key` is not a name inside the store.
            ArtifactError: the store cannot be read.
        """
        try:
            return self._usable(check_key(key))
        except StaleArtifactError:
            return None

    def open(self, key: ArtifactKey) -> Artifact:
        """Return a committed artifact after comparing the sha256 of every file, once per process.

        Raises:
            ConfigError: `key` is not a name inside the store.
            MissingArtifactError: never built, or pruned.
            StaleArtifactError: of another schema version.
            CorruptArtifactError: manifest or files are not what was committed; names the file.
            ArtifactError: the store cannot be read.
        """
        artifact = self.inspect(key)
        for name in artifact.manifest.files:
            artifact.file(name)
        return artifact

    def inspect(self, key: ArtifactKey) -> Artifact:
        """Return a committed artifact after every check but the hashes; errors as `open`."""
        artifact = self._inspect(check_key(key))
        if artifact is None:
            raise _missing(self._where(key))
        return artifact

    def current(self, stage: str, partition: Sequence[str]) -> ArtifactKey | None:
        """Return the version that was committed or adopted last, or None.

        Raises:
            ConfigError: not a name inside the store.
            CorruptArtifactError: the pointer names no version; lists the versions that exist.
        """
        check_partition(stage, partition)
        parts = tuple(partition)
        where = self._backend.where(stage, parts, POINTER)
        with disk_errors(where):
            named = self._backend.pointer(stage, parts)
            while named is not None:
                versions = self._backend.versions(stage, parts)
                if is_fingerprint(named) and named in versions:
                    return ArtifactKey(stage, parts, named)
                # The pointer may have moved, and its old version been pruned, in between.
                refused, named = named, self._backend.pointer(stage, parts)
                if named == refused:
                    raise CorruptArtifactError(
                        f"pointer names {named!r}, which is no version of this partition; "
                        f"there are: {', '.join(versions) or 'none'}",
                        where,
                        "run the stage again; it points to the version that it needs",
                    )
        return None

    def keys(self, stage: str | None = None) -> Iterator[ArtifactKey]:
        """Yield the key of every version, sorted; of one stage if `stage` is given."""
        if stage is not None:
            check_partition(stage, ())
        return self._keys(stage)

    def _keys(self, stage: str | None) -> Iterator[ArtifactKey]:
        with disk_errors(self._backend.where(stage or "", ())):
            for each in self._backend.stages() if stage is None else [stage]:
                for partition in self._backend.partitions(each):
                    for version in self._backend.versions(each, partition):
                        yield ArtifactKey(each, partition, version)

    def verify(self, stage: str | None = None) -> Iterator[audit.Verdict]:
        """Check every artifact with full hashes; see `audit.verify`."""
        return audit.verify(self, stage)

    def lineage(self, key: ArtifactKey) -> audit.Lineage:
        """Return what an artifact was made from, back to the sources; see `audit.lineage`."""
        return audit.lineage(self, key)

    def usage(self) -> pl.DataFrame:
        """Count artifacts, files and bytes by stage; see `audit.usage`."""
        return audit.usage(self)

    def _inspect(self, key: ArtifactKey) -> Artifact | None:
        where = self._where(key)
        with disk_errors(where):
            sizes = self._backend.sizes(key)
            if sizes is None:
                return None
            if sizes.get(MANIFEST_NAME) == NOT_REGULAR:
                raise CorruptArtifactError(
                    f"a link on the way to its {MANIFEST_NAME}, or no regular file", where, DISCARD
                )
            manifest = self._manifest(key)
            check_sizes(manifest, sizes, where)
            return self._artifact(key, manifest)

    def _usable(self, key: ArtifactKey) -> Artifact | None:
        try:
            artifact = self._inspect(key)
        except (MissingArtifactError, CorruptArtifactError):
            return None
        if artifact is None:
            return None
        with disk_errors(str(artifact.path)):
            files = artifact.manifest.files.items()
            is_bad = any(is_known_bad(artifact.path / name, record) for name, record in files)
        return None if is_bad else artifact

    def _is_current(self, key: ArtifactKey) -> bool:
        return self._backend.pointer(key.stage, key.partition) == key.fingerprint

    def _manifest(self, key: ArtifactKey) -> Manifest:
        where = self._where(key)
        try:
            raw = self._backend.manifest_bytes(key)
        except (FileNotFoundError, NotADirectoryError):
            if self._backend.sizes(key) is None:
                raise _missing(where) from None
            raise CorruptArtifactError(
                f"no {MANIFEST_NAME}, which every artifact has", where, DISCARD
            ) from None
        manifest = _parsed(raw, f"{where}/{MANIFEST_NAME}")
        if manifest.key != key:
            raise CorruptArtifactError(
                f"manifest belongs to {manifest.key}",
                where,
                f"put the folder back to its place, or {DISCARD}",
            )
        return manifest

    def _artifact(self, key: ArtifactKey, manifest: Manifest) -> Artifact:
        return Artifact(key, self._backend.folder(key), manifest, partial(self._backend.fetch, key))

    def _where(self, key: ArtifactKey) -> str:
        return self._backend.where(*key)


@lru_cache(maxsize=4096)
def _parsed(raw: bytes, where: str) -> Manifest:
    """A manifest's bytes, parsed once a process: a run asks for the same ones again and again."""
    return parse_manifest(raw, where)


def _missing(where: str) -> MissingArtifactError:
    return MissingArtifactError(
        "artifact was never built, or has been pruned", where, "run the stage again"
    )
