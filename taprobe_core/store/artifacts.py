"""The store: the only writer of artifacts.

Turns a key and a `write(folder)` callback into an immutable, fingerprinted, hash-checked artifact.
What an artifact means belongs to its stage, where bytes live to a `Backend`, reading to `reader`.
Invariant: a reader sees one whole version or none, whatever kills the writer, and the bytes it gets
have the sha256 that the manifest says.

A commit: reuse what exists; lock; look again; check free space; write to a temporary folder; hash;
manifest; fsync; rename; swap the pointer; fsync. `docs/artifacts.md` gives the format byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from taprobe_core.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from taprobe_core.store import upkeep
from taprobe_core.store.artifact import Artifact
from taprobe_core.store.backend import Backend
from taprobe_core.store.disk import check_room, disk_errors, write_bytes
from taprobe_core.store.draft import Draft
from taprobe_core.store.fingerprint import ArtifactKey, check_key
from taprobe_core.store.integrity import describe_files, remember_sha256
from taprobe_core.store.local import LocalBackend, file_sizes
from taprobe_core.store.manifest import MANIFEST_NAME, parse_manifest, render_manifest
from taprobe_core.store.reader import StoreReader

DEFAULT_LOCK_TIMEOUT_S = 3600.0


class Store(StoreReader):
    """Immutable artifacts by key.

    Args:
        backend: where artifacts live; a path means a local folder, made by the first commit.
        lock_timeout_s: how long a second writer of a partition waits for the first, in seconds.
    """

    def __init__(
        self, backend: Backend | Path, *, lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S
    ) -> None:
        super().__init__(LocalBackend(backend) if isinstance(backend, Path) else backend)
        self._lock_timeout_s = lock_timeout_s

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
        draft = Draft(key, code_version, config or {}, provenance, sources).checked()
        reused = self._adopt(key)
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
        return self._adopt(check_key(key))

    def _adopt(self, key: ArtifactKey) -> Artifact | None:
        found = self._usable(key)
        with self._errors(key):
            if found is None or self._is_current(key):
                return found
            with self.locked(key):
                return self._point_if_usable(key)

    def discard(self, key: ArtifactKey) -> None:
        """Delete one version, sound or not; if it was current, nothing is current afterwards.

        A key whose fingerprint is `CURRENT` (see `verify`) deletes only the pointer.

        Raises:
            MissingArtifactError: there is no such version.
            BusyArtifactError: another process holds the partition for too long.
        """
        upkeep.discard(self, key)

    def prune(self, keep: int = 3, dry_run: bool = False) -> list[ArtifactKey]:
        """Delete old versions that nothing kept refers to; see `upkeep.prune`."""
        return upkeep.prune(self, keep, dry_run=dry_run)

    def locked(
        self, key: ArtifactKey, timeout_s: float | None = None
    ) -> AbstractContextManager[None]:
        """Hold the lock of the partition of `key`; for maintenance."""
        seconds = self._lock_timeout_s if timeout_s is None else timeout_s
        return self._backend.lock(key.stage, key.partition, seconds)

    def _write(self, draft: Draft, write: Callable[[Path], None], estimate_bytes: int) -> Artifact:
        key = draft.key
        check_room(self._where(key), estimate_bytes, self._backend.free_bytes)
        with self._backend.staging(key) as folder:
            write(folder)
            files = describe_files(folder, file_sizes(folder))
            rendered = render_manifest(draft.body(files, self.next_sequence(key)))
            write_bytes(folder / MANIFEST_NAME, rendered)
            # Parsed back, so that a fresh artifact is the very thing that a later `open` returns.
            manifest = parse_manifest(rendered, str(folder))
            self._backend.publish(key, folder)
        artifact = self._artifact(key, manifest)
        for name, record in manifest.files.items():
            remember_sha256(artifact.path / name, record.sha256)
        return artifact

    def _point_if_usable(self, key: ArtifactKey) -> Artifact | None:
        found = self._usable(key)
        if found is not None and not self._is_current(key):
            self._backend.point(key)
        return found

    def next_sequence(self, key: ArtifactKey) -> int:
        """Number of the next version in the partition of `key`; needs its lock."""
        taken = [0]
        for version in self._backend.versions(key.stage, key.partition):
            try:
                taken.append(self._manifest(key._replace(fingerprint=version)).sequence)
            except (MissingArtifactError, CorruptArtifactError, StaleArtifactError):
                continue
        return 1 + max(taken)

    def _errors(self, key: ArtifactKey, estimate_bytes: int = 0) -> AbstractContextManager[None]:
        where = self._backend.where(key.stage, key.partition)
        return disk_errors(where, estimate_bytes, self._backend.free_bytes)
