"""The store: the only writer of artifacts, and the reader that checks what it reads.

Turns a key and a `write(folder)` callback into an immutable, fingerprinted, hash-checked artifact.
What an artifact means belongs to its stage; where bytes live belongs to a `Backend`. Invariant: a
reader sees one whole version or none, whatever kills the writer; the bytes it gets have the sha256
that the manifest says.

A commit: reuse what exists; lock; look again; check free space; write to a temporary folder; hash;
manifest; fsync; rename; swap the pointer; fsync. `docs/artifacts.md` gives the format byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from taprobe_core.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from taprobe_core.store import audit
from taprobe_core.store.artifact import Artifact
from taprobe_core.store.backend import POINTER, Backend
from taprobe_core.store.disk import disk_errors, disk_full
from taprobe_core.store.draft import Draft
from taprobe_core.store.fingerprint import (
    ArtifactKey,
    check_key,
    check_partition,
    is_fingerprint,
)
from taprobe_core.store.integrity import check_sizes, is_known_bad, remember_sha256
from taprobe_core.store.local import LocalBackend
from taprobe_core.store.manifest import (
    DISCARD,
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    render_manifest,
)

DEFAULT_LOCK_TIMEOUT_S = 3600.0


class Store:
    """Immutable artifacts by key.

    Args:
        backend: where artifacts live; a path means a local folder, made by the first commit.
        lock_timeout_s: how long a second writer of a partition waits for the first, in seconds.
    """

    def __init__(
        self, backend: Backend | Path, *, lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S
    ) -> None:
        self._backend = LocalBackend(backend) if isinstance(backend, Path) else backend
        self._lock_timeout_s = lock_timeout_s

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
            return self._usable(key)
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
        where = self._where(check_key(key))
        with disk_errors(where):
            manifest = self._manifest(key)
            sizes = self._backend.sizes(key)
            if sizes is None:
                raise _missing(where)
            check_sizes(manifest, sizes, where)
            return self._artifact(key, manifest)

    def commit(
        self,
        key: ArtifactKey,
        write: Callable[[Path], None],
        *,
        provenance: Mapping[str, Any],
        upstream: Sequence[ArtifactKey] = (),
        estimate_bytes: int = 0,
        code_version: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Return the artifact of `key`, writing it if it does not exist.

        While one process writes, others that want the same partition wait and then reuse its
        result. Whatever stops the writer, earlier versions stay readable and no part of the new one
        shows.

        Args:
            key: name; see `fingerprint`.
            write: makes the files in the empty folder it is given; not called on reuse.
            provenance: free JSON mapping: revisions, device, dtype. Checked before `write` and read
                after it, so `write` may add what it measured.
            upstream: artifacts that this one is made from; `prune` keeps them while it is kept.
            estimate_bytes: expected size; twice as much must be free.
            code_version: version of the stage's code, recorded.
            config: slice of the study, recorded.

        Raises:
            ConfigError: `key`, or a key in `upstream`, is not a name inside the store.
            BusyArtifactError: another process holds the partition for too long.
            StaleArtifactError: there is one of another schema version; it is left alone.
            DiskFullError: no space, before or during the write.
            ArtifactError: the store cannot be written, or a file of the artifact is unfit.
        """
        check_key(key)
        sources = [check_key(each) for each in upstream]
        draft = Draft(key, code_version, config or {}, provenance, sources)
        draft.check()
        reused = self.adopt(key)
        if reused is not None:
            return reused
        with self._errors(key, estimate_bytes), self.locked(key):
            return self._point_if_usable(key) or self._write(draft, write, estimate_bytes)

    def adopt(self, key: ArtifactKey) -> Artifact | None:
        """Find an artifact and make it its partition's current version; None if there is none.

        Raises:
            StaleArtifactError: of another schema version.
            BusyArtifactError: another process holds the partition for too long.
            ArtifactError: the store cannot be read, or the pointer not be moved.
        """
        found = self._usable(key)
        with self._errors(key):
            if found is None or self._is_current(key):
                return found
            with self.locked(key):
                return self._point_if_usable(key)

    def current(self, stage: str, partition: Sequence[str]) -> ArtifactKey | None:
        """Return the version that was committed or adopted last, or None.

        Raises:
            ConfigError: not a name inside the store.
            CorruptArtifactError: the pointer names no version; lists the versions that exist.
        """
        parts = tuple(partition)
        check_partition(stage, parts)
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

    def discard(self, key: ArtifactKey) -> None:
        """Delete one version, sound or not; if it was current, nothing is current afterwards.

        A key whose fingerprint is `CURRENT` (see `verify`) deletes only the pointer.

        Raises:
            MissingArtifactError: there is no such version.
            BusyArtifactError: another process holds the partition for too long.
        """
        audit.discard(self, key)

    def verify(self, stage: str | None = None) -> Iterator[audit.Verdict]:
        """Check every artifact with full hashes; see `audit.verify`."""
        return audit.verify(self, stage)

    def lineage(self, key: ArtifactKey) -> audit.Lineage:
        """Return what an artifact was made from, back to the sources; see `audit.lineage`."""
        return audit.lineage(self, key)

    def usage(self) -> pl.DataFrame:
        """Count artifacts, files and bytes by stage; see `audit.usage`."""
        return audit.usage(self)

    def prune(self, keep: int = 3, dry_run: bool = False) -> list[ArtifactKey]:
        """Delete old versions that nothing kept refers to; see `audit.prune`."""
        return audit.prune(self, keep, dry_run=dry_run)

    def locked(
        self, key: ArtifactKey, timeout_s: float | None = None
    ) -> AbstractContextManager[None]:
        """Hold the lock of the partition of `key`; for maintenance."""
        seconds = self._lock_timeout_s if timeout_s is None else timeout_s
        return self._backend.lock(key.stage, key.partition, seconds)

    def _write(self, draft: Draft, write: Callable[[Path], None], estimate_bytes: int) -> Artifact:
        key = draft.key
        free = self._backend.free_bytes()
        if free is not None and free < 2 * estimate_bytes:
            raise disk_full(
                self._where(key), 2 * estimate_bytes, lambda: free, "checked before writing"
            )
        with self._backend.staging(key) as folder:
            write(folder)
            rendered = render_manifest(draft.manifest(folder, self._next_sequence(key)))
            (folder / MANIFEST_NAME).write_bytes(rendered)
            # Parsed back, so that a fresh artifact is the very thing that a later `open` returns.
            manifest = parse_manifest(rendered, str(folder))
            self._backend.publish(key, folder)
        artifact = self._artifact(key, manifest)
        for name, record in manifest.files.items():
            remember_sha256(artifact.path / name, record.sha256)
        return artifact

    def _usable(self, key: ArtifactKey) -> Artifact | None:
        try:
            artifact = self.inspect(key)
        except (MissingArtifactError, CorruptArtifactError):
            return None
        with disk_errors(str(artifact.path)):
            files = artifact.manifest.files.items()
            is_bad = any(is_known_bad(artifact.path / name, record) for name, record in files)
        return None if is_bad else artifact

    def _point_if_usable(self, key: ArtifactKey) -> Artifact | None:
        found = self._usable(key)
        if found is not None and not self._is_current(key):
            self._backend.point(key)
        return found

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
        manifest = parse_manifest(raw, f"{where}/{MANIFEST_NAME}")
        if manifest.key != key:
            raise CorruptArtifactError(
                f"manifest belongs to {manifest.key}",
                where,
                f"put the folder back to its place, or {DISCARD}",
            )
        return manifest

    def _artifact(self, key: ArtifactKey, manifest: Manifest) -> Artifact:
        return Artifact(key, self._backend.folder(key), manifest, partial(self._backend.fetch, key))

    def _next_sequence(self, key: ArtifactKey) -> int:
        taken = [0]
        for version in self._backend.versions(key.stage, key.partition):
            try:
                taken.append(self._manifest(key._replace(fingerprint=version)).sequence)
            except (MissingArtifactError, CorruptArtifactError, StaleArtifactError):
                continue
        return 1 + max(taken)

    def _where(self, key: ArtifactKey) -> str:
        return self._backend.where(*key)

    def _errors(self, key: ArtifactKey, estimate_bytes: int = 0) -> AbstractContextManager[None]:
        where = self._backend.where(key.stage, key.partition)
        return disk_errors(where, estimate_bytes, self._backend.free_bytes)


def _missing(where: str) -> MissingArtifactError:
    return MissingArtifactError(
        "artifact was never built, or has been pruned", where, "run the stage again"
    )
