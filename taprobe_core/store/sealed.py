"""Folders that the library makes beside the store, sealed with a manifest when they are made.

`manifest.json` names every other file of the folder with its sha256. It is written before the
folder gets its name, so that a folder without one was not made here or has lost it. When the files
are compared with it belongs in `pins`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from taprobe_core.errors import CorruptArtifactError
from taprobe_core.store.disk import write_bytes
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.local import file_sizes
from taprobe_core.store.manifest import MANIFEST_NAME

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
