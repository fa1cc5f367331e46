"""The half of the store that never writes: open, verify, follow lineage, count bytes.

Turns a key into a checked artifact, a file name into checked bytes, and the keys of a store into
verdicts, lineage and figures. Committing, pruning and discarding belong in `artifacts`.

Invariants: nothing here makes, moves or locks anything, so it also serves a store on a read-only
disk. No file is parsed before its sha256 was compared with the manifest in this process; a verdict
takes no hash from memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from taprobe_core.errors import (
    ArtifactError,
    CorruptArtifactError,
    MissingArtifactError,
    StaleArtifactError,
)
from taprobe_core.store.backend import NOT_REGULAR, POINTER, Backend
from taprobe_core.store.disk import disk_errors
from taprobe_core.store.files import as_tensor, read_json, read_table, read_tensors
from taprobe_core.store.fingerprint import ArtifactKey, check_key, check_partition, is_fingerprint
from taprobe_core.store.integrity import (
    check_file,
    check_sizes,
    is_known_bad,
    read_tensor_bytes,
)
from taprobe_core.store.manifest import (
    DISCARD,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorInfo,
    TensorsContent,
    parse_manifest,
)

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """One committed version. Each file is hash-checked before its first read in this process.

    Attributes:
        key: its name.
        path: its folder; read-only by agreement, and unchecked: see `file`.
        manifest: what it holds and what it was made from.
        fetch: makes sure that a file is in the folder; only a remote backend has work to do.
    """

    key: ArtifactKey
    path: Path
    manifest: Manifest
    fetch: Callable[[str], None] = field(repr=False, compare=False)

    def file(self, name: str, *, use_cache: bool = True) -> Path:
        """Path of a file whose bytes are those of the manifest.

        Args:
            name: relative path inside the artifact, with `/`.
            use_cache: trust a hash computed earlier in this process for the same state of the file.

        Raises:
            MissingArtifactError: no such file; names those that exist.
            CorruptArtifactError: other bytes than the manifest says.
        """
        record = self._record(name)
        with disk_errors(str(self.path)):
            self.fetch(name)
            check_file(self.path / name, record, use_cache=use_cache)
        return self.path / name

    def _record(self, name: str) -> FileRecord:
        record = self.manifest.files.get(name)
        if record is None:
            raise MissingArtifactError(
                f"no file {name!r}, only {', '.join(self.manifest.files)}",
                str(self.path),
                "name one of these files",
            )
        return record

    def read_table(self, name: str) -> pl.DataFrame:
        """Read a Parquet file; errors as `file`."""
        return self._read(name, read_table)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a safetensors file onto the CPU; errors as `file`."""
        return self._read(name, read_tensors)

    def tensors(self, name: str) -> Mapping[str, TensorInfo]:
        """What a file's tensors are, by its manifest; nothing if it is no safetensors file."""
        content = self._record(name).content
        return content.tensors if isinstance(content, TensorsContent) else {}

    def read_some_tensors(self, name: str, tensors: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read some tensors of a safetensors file, and check these alone.

        Args:
            name: relative path of the file inside the artifact.
            tensors: their names.

        Raises:
            MissingArtifactError: no such file or tensor; names those that exist.
            CorruptArtifactError: a tensor's bytes are not those of the manifest.
        """
        known = self.tensors(name)
        absent = ", ".join(sorted({*tensors} - known.keys()))
        if absent:
            raise MissingArtifactError(
                f"{name} has no tensor {absent}, only {', '.join(known)}",
                str(self.path),
                "name one of these tensors",
            )
        with disk_errors(str(self.path)), self._reading(name):
            self.fetch(name)
            found = read_tensor_bytes(self.path / name, known, tensors)
        return {
            each: as_tensor(raw, known[each].dtype, known[each].shape)
            for each, raw in found.items()
        }

    def read_json(self, name: str) -> Any:
        """Read a JSON file; errors as `file`."""
        return self._read(name, read_json)

    def _read(self, name: str, read: Callable[[Path], T]) -> T:
        path = self.file(name)
        with self._reading(name):
            return read(path)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            # Only a prune, or somebody's hand, takes a file away between its hash and its reading.
            raise MissingArtifactError(
                f"file {name!r} was removed while it was read",
                str(self.path),
                "run the stage again",
            ) from None


SECONDS_BETWEEN_LINES = 10.0


_log = logging.getLogger(__name__)


def reported(items: Iterable[T], done: str) -> Iterator[T]:
    """Yield the items; log their number every ten seconds, so that a small store stays quiet.

    Args:
        items: anything.
        done: what is done to each, for example "artifacts hashed".
    """
    said = time.monotonic()
    for n_done, item in enumerate(items):
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            _log.info("%s %s so far", f"{n_done:,}", done)
        yield item


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

    def versions(self, stage: str, partition: Sequence[str]) -> list[Artifact]:
        """Return what `find` finds of one partition, in the order of the commits."""
        check_partition(stage, partition)
        parts = tuple(partition)
        with disk_errors(self._backend.where(stage, parts)):
            names = self._backend.versions(stage, parts)
        found = [self.find(ArtifactKey(stage, parts, name)) for name in names]
        return sorted(
            (artifact for artifact in found if artifact is not None),
            key=lambda artifact: artifact.manifest.sequence,
        )

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

    def verify(self, stage: str | None = None) -> Iterator[Verdict]:
        """Check every artifact with full hashes; see `verify`."""
        return verify(self, stage)

    def lineage(self, key: ArtifactKey) -> Lineage:
        """Return what an artifact was made from, back to the sources; see `lineage`."""
        return lineage(self, key)

    def usage(self) -> pl.DataFrame:
        """Count artifacts, files and bytes by stage; see `usage`."""
        return usage(self)

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
    walk = reported(store.keys(stage), "artifacts hashed")
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
    for key in reported(store.keys(None), "artifacts counted"):
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
