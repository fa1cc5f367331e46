"""The store: the only writer of artifacts, and what deletes them.

Turns a key and a `write(folder)` callback into an immutable, fingerprinted, hash-checked artifact.
What an artifact means belongs to its stage, where bytes live to a `Backend`, reading and finding
what is unsound to `reader`.

A commit: reuse what exists; lock; look again; check free space; write to a temporary folder; hash;
manifest; fsync; rename; swap the pointer; fsync. `docs/artifacts.md` gives the format byte by byte.

Invariants: what cannot be stored is refused before a stage runs. A reader sees one whole version or
none, whatever kills the writer, and the bytes it gets have the sha256 that the manifest says.
Nothing that a current or a recent version was made from is ever pruned, and no order depends on a
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taprobe_core.errors import (
    ArtifactError,
    BusyArtifactError,
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    StaleArtifactError,
)
from taprobe_core.store.backend import POINTER, Backend
from taprobe_core.store.disk import check_room, disk_errors, this_process, write_bytes
from taprobe_core.store.fingerprint import (
    ArtifactKey,
    NotJsonError,
    check_key,
    check_partition,
    plain,
)
from taprobe_core.store.integrity import describe_files, remember_sha256
from taprobe_core.store.local import LocalBackend, file_sizes
from taprobe_core.store.manifest import (
    FORMAT,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    library_versions,
    parse_manifest,
    render_manifest,
)
from taprobe_core.store.reader import Artifact, StoreReader, reported

if TYPE_CHECKING:
    from taprobe_core.store.manifest import Manifest


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
        discard(self, key)

    def prune(self, keep: int = 3, dry_run: bool = False) -> list[ArtifactKey]:
        """Delete old versions that nothing kept refers to; see `prune`."""
        return prune(self, keep, dry_run=dry_run)

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


def prune(store: Store, keep: int = 3, *, dry_run: bool = False) -> list[ArtifactKey]:
    """Delete old versions, and what dead writers left.

    Kept are: in each partition the `keep` versions with the highest sequence number, the current
    one, and every version whose manifest cannot be read (see `discard`); then everything that a
    kept manifest refers to, and so on. A partition that another process is writing is passed over.

    Args:
        store: the store.
        keep: versions per partition, at least 1.
        dry_run: delete nothing.

    Returns:
        Keys that were (or would be) deleted, sorted.

    Raises:
        ConfigError: `keep` is below 1.
    """
    if keep < 1:
        raise ConfigError(f"keep is {keep}", "prune", "keep at least 1 version")
    manifests = {
        key: _manifest(store, key) for key in reported(store.keys(None), "artifacts looked at")
    }
    victims = sorted(set(manifests) - _kept(store, manifests, keep))
    if dry_run:
        return victims
    chosen = {place: list(keys) for place, keys in groupby(victims, key=lambda key: key[:2])}
    removed: list[ArtifactKey] = []
    places = [
        (stage, partition)
        for stage in store.backend.stages()
        for partition in store.backend.partitions(stage)
    ]
    for stage, partition in reported(places, "partitions gone through"):
        found = chosen.get((stage, partition), [])
        removed += _remove(store, ArtifactKey(stage, partition, POINTER), found)
    return removed


def discard(store: Store, key: ArtifactKey) -> None:
    """Delete one version; see `Store.discard`."""
    backend = store.backend
    is_pointer = key.fingerprint == POINTER
    check_partition(key.stage, key.partition)
    if not is_pointer:
        check_key(key)
    where = backend.where(*key)
    with disk_errors(where):
        named = backend.pointer(key.stage, key.partition)
        if (named if is_pointer else backend.sizes(key)) is None:
            raise MissingArtifactError("there is nothing to discard", where, "see `taprobe verify`")
        with store.locked(key):
            if is_pointer or named == key.fingerprint:
                backend.unpoint(key.stage, key.partition)
            if not is_pointer:
                backend.remove(key)


def _manifest(store: Store, key: ArtifactKey) -> Manifest | None:
    try:
        return store.inspect(key).manifest
    except (MissingArtifactError, CorruptArtifactError, StaleArtifactError):
        return None


def _kept(
    store: Store, manifests: Mapping[ArtifactKey, Manifest | None], keep: int
) -> set[ArtifactKey]:
    kept = {key for key, manifest in manifests.items() if manifest is None}
    readable = [manifest for manifest in manifests.values() if manifest is not None]
    for partition, group in groupby(readable, key=lambda each: (each.stage, each.partition)):
        newest = sorted(group, key=lambda each: each.sequence)[-keep:]
        kept |= {each.key for each in newest}
        kept.add(ArtifactKey(*partition, store.backend.pointer(*partition) or ""))
    pending: list[Iterable[ArtifactKey]] = [kept & manifests.keys()]
    while pending:
        for key in pending.pop():
            manifest = manifests.get(key)
            fresh = set(manifest.upstream_keys) - kept if manifest else set()
            kept |= fresh
            pending.append(fresh)
    return kept


def _remove(store: Store, lock: ArtifactKey, chosen: list[ArtifactKey]) -> list[ArtifactKey]:
    backend = store.backend
    removed: list[ArtifactKey] = []
    try:
        with disk_errors(backend.where(lock.stage, lock.partition)), store.locked(lock, 0.0):
            for key in chosen:
                # Another process may have adopted it since the manifests were read.
                if backend.pointer(key.stage, key.partition) != key.fingerprint:
                    backend.remove(key)
                    removed.append(key)
    except BusyArtifactError:
        return removed
    return removed
