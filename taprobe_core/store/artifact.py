"""One committed artifact, for reading.

Turns a file name into checked bytes. Finding and committing artifacts belongs in `artifacts`.
Invariant: no file is parsed before its sha256 was compared with the manifest in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

from taprobe_core.errors import MissingArtifactError
from taprobe_core.store.disk import disk_errors
from taprobe_core.store.files import read_json, read_table, read_tensors
from taprobe_core.store.fingerprint import ArtifactKey
from taprobe_core.store.integrity import check_file
from taprobe_core.store.manifest import Manifest

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
        record = self.manifest.files.get(name)
        if record is None:
            raise MissingArtifactError(
                f"no file {name!r}, only {', '.join(self.manifest.files)}",
                str(self.path),
                "name one of these files",
            )
        with disk_errors(str(self.path)):
            self.fetch(name)
            check_file(self.path / name, record, use_cache=use_cache)
        return self.path / name

    def read_table(self, name: str) -> pl.DataFrame:
        """Read a Parquet file; errors as `file`."""
        return self._read(name, read_table)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a safetensors file onto the CPU; errors as `file`."""
        return self._read(name, read_tensors)

    def read_json(self, name: str) -> Any:
        """Read a JSON file; errors as `file`."""
        return self._read(name, read_json)

    def _read(self, name: str, read: Callable[[Path], T]) -> T:
        path = self.file(name)
        try:
            return read(path)
        except (FileNotFoundError, NotADirectoryError):
            # Only a prune, or somebody's hand, takes a file away between its hash and its reading.
            raise MissingArtifactError(
                f"file {name!r} was removed while it was read",
                str(self.path),
                "run the stage again",
            ) from None
