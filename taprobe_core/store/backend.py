"""What the store needs from the place that keeps its artifacts.

`LocalBackend` in `local` is the one implementation; an object store can be another. The contract
of commits, hashes and errors belongs in `artifacts`: a backend only keeps bytes. Invariant: a
version is absent or whole, and is never edited in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from taprobe_core.store.fingerprint import ArtifactKey

POINTER = "CURRENT"
"""Name of a partition's pointer; in a key it stands for the fingerprint."""

NOT_REGULAR = -1
"""Stands for the size of a link, a device or a pipe, which no artifact may hold."""


class Backend(Protocol):
    """A place for immutable versions, with one pointer and one lock per partition.

    Keys reach a backend checked. Methods let `OSError` through; the store names folder and fix.
    """

    def where(self, stage: str, partition: tuple[str, ...], name: str = "") -> str:
        """Say in words where a partition, or something in it, is."""
        ...

    def folder(self, key: ArtifactKey) -> Path:
        """Local folder of a version, whether or not its files have been fetched."""
        ...

    def fetch(self, key: ArtifactKey, name: str) -> None:
        """Make sure that one file of a version is in its local folder."""
        ...

    def sizes(self, key: ArtifactKey) -> dict[str, int] | None:
        """Bytes of every file of a version by relative path, -1 if not regular; None if absent."""
        ...

    def manifest_bytes(self, key: ArtifactKey) -> bytes:
        """Bytes of a version's manifest, without fetching its files."""
        ...

    def stages(self) -> list[str]:
        """Names of the stages that have a partition, sorted."""
        ...

    def partitions(self, stage: str) -> Iterator[tuple[str, ...]]:
        """Partitions of a stage, sorted; also those without a version."""
        ...

    def versions(self, stage: str, partition: tuple[str, ...]) -> list[str]:
        """Fingerprints of the versions of one partition, sorted."""
        ...

    def pointer(self, stage: str, partition: tuple[str, ...]) -> str | None:
        """What the pointer says, unchecked, at most some hundred characters; None if absent."""
        ...

    def lock(
        self, stage: str, partition: tuple[str, ...], timeout_s: float
    ) -> AbstractContextManager[None]:
        """Hold the partition's one lock, and clear what dead writers left.

        The operating system releases a dead owner's lock.

        Raises:
            BusyArtifactError: not free within `timeout_s`; names the owner's host, pid and run.
        """
        ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where that is not known."""
        ...

    def staging(self, key: ArtifactKey) -> AbstractContextManager[Path]:
        """Give an empty local folder that no reader sees, gone afterwards. Needs the lock."""
        ...

    def publish(self, key: ArtifactKey, folder: Path) -> None:
        """Make a staged folder durable, then visible, then current. Needs the lock."""
        ...

    def point(self, key: ArtifactKey) -> None:
        """Make an existing version current, durably. Needs the lock."""
        ...

    def unpoint(self, stage: str, partition: tuple[str, ...]) -> None:
        """Remove the pointer, durably. Needs the lock."""
        ...

    def remove(self, key: ArtifactKey) -> None:
        """Make a version invisible at once, then delete it. Needs the lock."""
        ...
