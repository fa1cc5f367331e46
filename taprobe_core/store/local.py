"""Artifacts in folders of a local file system, and folders beside the store sealed like them.

Turns keys into folders, `<root>/<stage>/<part>/.../<fingerprint>/`, and a staged folder into a
published one: fsync files and folder, rename, swap `CURRENT`, fsync the partition. Manifests and
hashes of artifacts belong in `artifacts`. A sealed folder's `manifest.json` names every other file
of it with its sha256 and is written before the folder gets its name, so that a folder without one
was not made here or has lost it; when files are compared with it belongs in `pins`.

Invariant: a folder named like a fingerprint is a whole version that was on the disk before it got
its name; everything else that a writer makes is called `.tmp-*` and vanishes with its writer or at
the next lock.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from taprobe_core.errors import ArtifactError, CorruptArtifactError
from taprobe_core.store.backend import NOT_REGULAR, POINTER
from taprobe_core.store.disk import (
    LOCK_NAME,
    TEMPORARY,
    hold_lock,
    make_folder,
    replace_text,
    sync_path,
    sync_tree,
    temporary_name,
    write_bytes,
)
from taprobe_core.store.fingerprint import MAX_DEPTH, ArtifactKey, is_fingerprint, is_part
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.manifest import MANIFEST_NAME

_MAX_POINTER_BYTES = 200


class LocalBackend:
    """Keeps artifacts below `root`; see `Backend` for what each method promises.

    The root is made by the first commit. A root that was there when the backend was made and has
    gone since (an unmounted disk) is not made again.

    Args:
        root: folder of the store.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._had_root = self._root.is_dir()

    @property
    def root(self) -> Path:
        """Folder of the store, absolute."""
        return self._root

    def where(self, stage: str, partition: tuple[str, ...], name: str = "") -> str:
        """Path of the partition, or of something in it."""
        folder = str(self._partition(stage, partition))
        return f"{folder}/{name}" if name else folder

    def folder(self, key: ArtifactKey) -> Path:
        """`<root>/<stage>/<part>/.../<fingerprint>`."""
        return _folder(self._root, key.stage, *key.partition, key.fingerprint)

    def sizes(self, key: ArtifactKey) -> dict[str, int] | None:
        """Bytes of every file of a version by relative path; None if absent.

        A version that is reached over a link has no regular manifest, and nothing else.
        """
        if self._link_to(key.stage, *key.partition, key.fingerprint) is not None:
            return {MANIFEST_NAME: NOT_REGULAR}
        try:
            return file_sizes(self.folder(key))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def fetch(self, key: ArtifactKey, name: str) -> None:
        """Do nothing: the files are here."""

    def manifest_bytes(self, key: ArtifactKey) -> bytes:
        """Bytes of `manifest.json`."""
        return (self.folder(key) / MANIFEST_NAME).read_bytes()

    def stages(self) -> list[str]:
        """Folders of the root that are named like a stage."""
        return [name for name in _folders(self._root) if is_part(name)]

    def partitions(self, stage: str) -> Iterator[tuple[str, ...]]:
        """Folders below a stage that hold a lock or a version."""
        yield from self._below(stage, ())

    def versions(self, stage: str, partition: tuple[str, ...]) -> list[str]:
        """Folders of a partition that are named like a fingerprint."""
        folder = self._partition(stage, partition)
        names = _folders(folder, and_links=True)
        return [name for name in names if is_fingerprint(name)]

    def pointer(self, stage: str, partition: tuple[str, ...]) -> str | None:
        """Text of `CURRENT`, at most 200 bytes of it; a link is not followed."""
        path = self._partition(stage, partition) / POINTER
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return "(not a regular file)"
            with path.open("rb", buffering=0) as file:
                return file.read(_MAX_POINTER_BYTES).decode("ascii", "backslashreplace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def lock(self, stage: str, partition: tuple[str, ...], timeout_s: float) -> Iterator[None]:
        """Hold `.lock` of the partition, made if new, and delete what dead writers left in it."""
        folder = self._writable(stage, partition)
        make_folder(folder)
        self._had_root = True
        with hold_lock(folder, timeout_s):
            with os.scandir(folder) as entries:
                left = [entry.name for entry in entries if entry.name.startswith(TEMPORARY)]
            for name in left:
                _delete(folder / name)
            yield

    def _writable(self, stage: str, partition: tuple[str, ...]) -> Path:
        """Return the folder of a partition that may be written, there or not."""
        if self._had_root and not self._root.is_dir():
            raise FileNotFoundError(2, "the store's folder is gone", str(self._root))
        link = self._link_to(stage, *partition)
        if link is not None:
            raise ArtifactError(
                "a link in place of a folder of artifacts",
                link,
                "put the folder itself there; to keep artifacts elsewhere, set TAPROBE_DATA",
            )
        return self._partition(stage, partition)

    def _link_to(self, *parts: str) -> str | None:
        """Return the first link on the way from the root to a folder, or None."""
        place = str(self._root)
        for part in parts:
            place = f"{place}/{part}"
            if os.path.islink(place):  # noqa: PTH114 (called for every artifact)
                return place
        return None

    def free_bytes(self) -> int | None:
        """Free space of the file system that holds the root."""
        return shutil.disk_usage(self._root).free

    @contextmanager
    def staging(self, key: ArtifactKey) -> Iterator[Path]:
        """Give an empty `.tmp-*` folder beside the versions, so that one rename publishes it."""
        name = temporary_name(key.fingerprint)
        folder = self._partition(key.stage, key.partition) / name
        try:
            folder.mkdir()
            yield folder
        finally:
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, key: ArtifactKey, folder: Path) -> None:
        """Flush the staged folder, rename it, swap `CURRENT`, flush the partition."""
        sync_tree(folder)
        target = self.folder(key)
        if target.exists():
            # The store publishes over a version only when that one cannot be read.
            self._withdraw(target)
        folder.rename(target)
        self.point(key)

    def point(self, key: ArtifactKey) -> None:
        """Swap `CURRENT` and flush the partition."""
        partition = self._partition(key.stage, key.partition)
        # Not swapped for itself: killed meanwhile, nothing would call for clearing the temporary.
        if self.pointer(key.stage, key.partition) != key.fingerprint:
            replace_text(partition / POINTER, key.fingerprint + "\n")
        sync_path(partition)

    def unpoint(self, stage: str, partition: tuple[str, ...]) -> None:
        """Remove `CURRENT` and flush the partition."""
        folder = self._partition(stage, partition)
        (folder / POINTER).unlink(missing_ok=True)
        sync_path(folder)

    def remove(self, key: ArtifactKey) -> None:
        """Rename a version out of sight, then delete it."""
        self._withdraw(self.folder(key))
        sync_path(self._partition(key.stage, key.partition))

    def _partition(self, stage: str, partition: tuple[str, ...]) -> Path:
        return _folder(self._root, stage, *partition)

    def _below(self, stage: str, partition: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        folder = self._partition(stage, partition)
        names = _folders(folder)
        if (folder / LOCK_NAME).exists() or any(map(is_fingerprint, names)):
            yield partition
        if len(partition) < MAX_DEPTH:
            for name in names:
                if is_part(name):
                    yield from self._below(stage, (*partition, name))

    def _withdraw(self, target: Path) -> None:
        # Deleting in place would show a reader half a version.
        hidden = target.with_name(temporary_name(target.name))
        target.rename(hidden)
        _delete(hidden)


@lru_cache(maxsize=1024)
def _folder(root: Path, *parts: str) -> Path:
    return root.joinpath(*parts)


def file_sizes(folder: Path) -> dict[str, int]:
    """Size of every file below `folder` by relative path with `/`, -1 where not a regular file.

    Raises:
        FileNotFoundError: `folder` is not there, or vanished meanwhile.
    """
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + "/")
                elif entry.is_file(follow_symlinks=False):
                    found[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    found[name] = NOT_REGULAR
    return found


def _folders(folder: Path, *, and_links: bool = False) -> list[str]:
    """Names of the folders in a folder; of links too, where they are to be refused by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) or (and_links and entry.is_symlink())
            )
    except (FileNotFoundError, NotADirectoryError):
        return []


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_FORMAT = "sha256_by_name"


def seal_folder(folder: Path) -> None:
    """Write the manifest of a folder that is complete.

    Nothing is flushed: what a power cut takes is missed by the manifest, and made again.
    """
    names = sorted(file_sizes(folder))
    files = {name: file_sha256(folder / name, use_cache=False) for name in names}
    write_bytes(folder / MANIFEST_NAME, json.dumps({_FORMAT: files}, indent=1).encode())


def sealed_files(folder: Path) -> Callable[[], Mapping[str, str]]:
    """Return a function that reads a folder's manifest: sha256 by relative path.

    It raises CorruptArtifactError where there is no manifest, or none that was written here.
    """

    def read() -> Mapping[str, str]:
        path = folder / MANIFEST_NAME
        try:
            files = json.loads(path.read_bytes())[_FORMAT]
            return {str(name): str(sha256) for name, sha256 in files.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CorruptArtifactError(
                f"the manifest cannot be read ({error})",
                str(path),
                f"remove {folder}; it is made again",
            ) from error

    return read
