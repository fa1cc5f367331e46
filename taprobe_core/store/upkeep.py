"""Delete artifacts: old ones, and single ones by name.

Turns manifests into the set of versions to keep, and removes the others. What is unsound is found
by `audit`. Invariant: nothing that a current or a recent version was made from is ever pruned, and
no order depends on a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from taprobe_core.errors import (
    BusyArtifactError,
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
    StaleArtifactError,
)
from taprobe_core.store.backend import POINTER
from taprobe_core.store.disk import disk_errors
from taprobe_core.store.fingerprint import ArtifactKey, check_key, check_partition
from taprobe_core.store.told import told

if TYPE_CHECKING:
    from taprobe_core.store.artifacts import Store
    from taprobe_core.store.manifest import Manifest


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
        key: _manifest(store, key) for key in told(store.keys(None), "artifacts looked at")
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
    for stage, partition in told(places, "partitions gone through"):
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
