"""Compare a file of a hub cache with the name that the hub gave its bytes.

A cache's `snapshots/<commit>/<file>` is a link to `blobs/<name>`. A large file's blob is named by
the sha256 of its bytes; a small one by git: sha1 of "blob <size>", a NUL and the bytes. An endpoint
that is no git server names by the plain sha1. Any other name says nothing about the bytes, and a
cache copied without links has no names at all. Source: huggingface_hub, "Understand caching".
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


def blob_of(path: Path) -> Path | None:
    """Return the blob that a file of a hub cache is a link to; None where it is no such link."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    return blob if blob.parent.name == "blobs" else None


def blob_fault(path: Path, sha256: str) -> str | None:
    """Return how a file's bytes contradict the name of its blob, or None.

    Args:
        path: a file of a hub cache, or any other file.
        sha256: of its bytes.

    Raises:
        OSError: the file cannot be read.
    """
    blob = blob_of(path)
    if blob is None:
        return None
    if _SHA256.fullmatch(blob.name):
        return None if blob.name == sha256 else f"their sha256 is {sha256}"
    if _SHA1.fullmatch(blob.name):
        content = blob.read_bytes()
        head = b"blob %d\0" % len(content)
        names = [
            hashlib.sha1(part, usedforsecurity=False).hexdigest()
            for part in (head + content, content)
        ]
        return None if blob.name in names else f"git would name them {names[0]}"
    return None
