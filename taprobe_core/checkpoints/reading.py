"""Read the small files of a checkpoint: regular ones, of a sane size, JSON objects.

Nothing but a regular file is opened: a pipe or a device would keep the reader waiting for ever. A
size is looked at before the content is, so that no file costs more memory than its kind may.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from taprobe_core.errors import ModelError, ModelMissingError

MIB = 2**20

_MOST_BYTES = {"tokenizer.json": 256 * MIB, "model.safetensors.index.json": 128 * MIB}
_MOST_BYTES_OF_OTHERS = 16 * MIB
_LFS_POINTER = b"version https://git-lfs"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path, remedy: str) -> int:
    """Return a file's size in bytes; it is not opened.

    Args:
        path: the file, or a link to it.
        remedy: what repairs a missing or damaged one.

    Raises:
        ModelMissingError: no such file.
        ModelError: not a regular file.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ModelMissingError(f"no {path.name}", str(path.parent), remedy) from error
    except OSError as error:
        raise ModelError(
            f"a file that cannot be looked at ({error.strerror})", str(path), remedy
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ModelError(f"{kind} in place of the file", str(path), remedy)
    return found.st_size


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object of a file.

    Args:
        path: the file.
        remedy: what repairs a missing or damaged one.

    Raises:
        ModelMissingError: no such file.
        ModelError: not a regular file, larger than its kind may be, a Git LFS pointer, or not a
            JSON object.
    """
    size, most = check_regular(path, remedy), _MOST_BYTES.get(path.name, _MOST_BYTES_OF_OTHERS)
    if size > most:
        raise ModelError(
            f"{size / MIB:,.0f} MiB, where a {path.name} has {most // MIB} MiB at most",
            str(path),
            remedy,
        )
    try:
        content = path.read_bytes()
        refuse_pointer(content, path)
        found = json.loads(content)
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"a file that is not JSON ({error})", str(path), remedy) from error
    if not isinstance(found, dict):
        raise ModelError(f"a JSON {type(found).__name__}, not an object", str(path), remedy)
    return found


def refuse_pointer(head: bytes, path: Path) -> None:
    """Refuse the pointer that Git LFS leaves where the file was not fetched.

    Args:
        head: the file's first bytes.
        path: the file.

    Raises:
        ModelError: it is one.
    """
    if head.startswith(_LFS_POINTER):
        raise ModelError(
            "a Git LFS pointer in place of the file",
            str(path),
            f"run `git lfs pull` in {path.parent}, or fetch the model with `hf download`",
        )
