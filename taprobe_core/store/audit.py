"""Look at a whole store: verify it, follow lineage, count bytes.

Turns the keys of a store into verdicts, trees and figures. Reading one artifact belongs in
`reader`, deleting in `upkeep`. Invariant: nothing is written, and no hash is taken from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import (
    ArtifactError,
    CorruptArtifactError,
    MissingArtifactError,
    StaleArtifactError,
)
from taprobe_core.store.backend import POINTER
from taprobe_core.store.disk import disk_errors
from taprobe_core.store.fingerprint import ArtifactKey
from taprobe_core.store.manifest import DISCARD
from taprobe_core.store.told import told

if TYPE_CHECKING:
    from taprobe_core.store.reader import StoreReader


@dataclass(frozen=True)
class Verdict:
    """What `verify` found about one artifact, or about one broken pointer."""

    key: ArtifactKey
    is_sound: bool
    error: ArtifactError | None = None

    @property
    def is_discardable(self) -> bool:
        """Whether `discard` helps: its own bytes are wrong, not an upstream artifact's."""
        return isinstance(self.error, CorruptArtifactError | StaleArtifactError)


@dataclass(frozen=True)
class Lineage:
    """An artifact and, as a tree, everything it was made from.

    Attributes:
        key: its name.
        provenance: as committed; empty if missing.
        created_at: when it was committed, UTC; None if missing.
        upstream: one node for each artifact that it was made from.
    """

    key: ArtifactKey
    provenance: Mapping[str, Any]
    created_at: datetime | None
    upstream: tuple[Lineage, ...]

    @property
    def is_missing(self) -> bool:
        """Whether the artifact is not in the store any more."""
        return self.created_at is None

    def render(self) -> list[str]:
        """Draw the tree, one line per node; a node drawn before is only named again."""
        return list(_draw(self, "", set()))


def verify(store: StoreReader, stage: str | None = None) -> Iterator[Verdict]:
    """Check every artifact: manifest, files, full hashes, and that each upstream artifact exists.

    A version pruned meanwhile is passed over. A broken pointer gives a verdict of its own, whose
    key has `CURRENT` for a fingerprint.

    Args:
        store: the store.
        stage: only this stage; None for all.

    Yields:
        One verdict per artifact, in the order of `Store.keys`.
    """
    walk = told(store.keys(stage), "artifacts hashed")
    for (name, partition), keys in groupby(walk, key=lambda key: key[:2]):
        for key in keys:
            error = _fault(store, key)
            if error is None or store.backend.sizes(key) is not None:
                yield Verdict(key, error is None, error)
        try:
            store.current(name, partition)
        except CorruptArtifactError as error:
            yield Verdict(ArtifactKey(name, partition, POINTER), False, error)


def lineage(store: StoreReader, key: ArtifactKey) -> Lineage:
    """Return the tree of what `key` was made from, from manifests alone.

    An upstream artifact that is gone becomes a node with `is_missing`. Equal keys are one object.

    Raises:
        MissingArtifactError: `key` itself is gone.
        CorruptArtifactError: a manifest is broken, or an artifact is its own ancestor.
        StaleArtifactError: a manifest is of another schema version.
    """
    return _node(store, key, {}, ())


def usage(store: StoreReader) -> pl.DataFrame:
    """Count what each stage keeps on disk, manifests included, temporary files not.

    Returns:
        One row per stage, sorted: `stage`, `n_artifacts`, `n_current` (versions that a pointer
        names), `n_files`, `size_bytes`.
    """
    counts: dict[str, list[int]] = {}
    for key in told(store.keys(None), "artifacts counted"):
        sizes = store.backend.sizes(key) or {}
        is_current = store.backend.pointer(key.stage, key.partition) == key.fingerprint
        row = counts.setdefault(key.stage, [0, 0, 0, 0])
        for column, amount in enumerate((1, is_current, len(sizes), sum(sizes.values()))):
            row[column] += amount
    names = ("n_artifacts", "n_current", "n_files", "size_bytes")
    return pl.DataFrame(
        [(stage, *row) for stage, row in counts.items()],
        schema={"stage": pl.String, **dict.fromkeys(names, pl.Int64)},
        orient="row",
    )


def _fault(store: StoreReader, key: ArtifactKey) -> ArtifactError | None:
    try:
        artifact = store.inspect(key)
        for name in artifact.manifest.files:
            artifact.file(name, use_cache=False)
        with disk_errors(str(artifact.path)):
            upstream = artifact.manifest.upstream_keys
            lost = [str(each) for each in upstream if store.backend.sizes(each) is None]
    except ArtifactError as error:
        return error
    if not lost:
        return None
    return MissingArtifactError(
        f"missing upstream: {', '.join(lost)}", str(artifact.path), "run those stages again"
    )


def _node(
    store: StoreReader,
    key: ArtifactKey,
    known: dict[ArtifactKey, Lineage],
    path: tuple[ArtifactKey, ...],
) -> Lineage:
    if key in path:
        raise CorruptArtifactError(
            f"artifact is its own ancestor: {' <- '.join(map(str, path))}",
            store.backend.where(*key),
            DISCARD,
        )
    if key not in known:
        try:
            manifest = store.inspect(key).manifest
        except MissingArtifactError:
            if not path:
                raise
            known[key] = Lineage(key, {}, None, ())
        else:
            nodes = [_node(store, each, known, (*path, key)) for each in manifest.upstream_keys]
            known[key] = Lineage(key, manifest.provenance, manifest.created_at, tuple(nodes))
    return known[key]


def _draw(node: Lineage, indent: str, drawn: set[ArtifactKey]) -> Iterator[str]:
    if node.created_at is None:
        yield f"{indent}{node.key}  missing"
        return
    if node.key in drawn:
        yield f"{indent}{node.key}  (see above)"
        return
    drawn.add(node.key)
    yield f"{indent}{node.key}  {node.created_at:%Y-%m-%dT%H:%M:%SZ}"
    for each in node.upstream:
        yield from _draw(each, indent + "  ", drawn)
