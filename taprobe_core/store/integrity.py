"""Hashes: describe files when they are committed, compare them when they are read.

Turns a folder into file records and, later, records and a folder into a verdict. Where folders live
belongs in `backend`. Invariant: no byte reaches a reader unless its file's sha256 was compared with
the manifest in this process, after the file's last change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from taprobe_core.errors import ArtifactError, CorruptArtifactError, MissingArtifactError
from taprobe_core.store.backend import NOT_REGULAR
from taprobe_core.store.files import (
    JSON_SUFFIX,
    TABLE_SUFFIX,
    TENSORS_SUFFIX,
    parse_tensor_header,
    read_json,
    tensor_header,
)
from taprobe_core.store.manifest import DISCARD, MANIFEST_NAME, FileRecord, Manifest

_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9@._-]{0,199}")

_State = tuple[int, int, int, int, int]
_checked: dict[str, tuple[_State, str]] = {}


def file_sha256(path: Path, *, use_cache: bool = True) -> str:
    """Hash a file; once per process for each state of the file.

    A state is device, inode, size, and the nanoseconds of the last change of the content and of the
    inode.

    Args:
        path: a regular file.
        use_cache: take the hash from memory where the state is known.

    Returns:
        sha256 of the bytes, 64 hex characters.
    """
    # Taken before the bytes are read: a change while reading then counts as a change afterwards.
    state = _state(path)
    known, digest = _checked.get(str(path), (None, ""))
    if not (use_cache and known == state):
        digest = _sha256(path)
        _checked[str(path)] = (state, digest)
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    """Keep a hash that this process computed from the bytes that `path` holds now."""
    _checked[str(path)] = (_state(path), digest)


def is_known_bad(path: Path, record: FileRecord) -> bool:
    """Tell whether this process has already found other bytes than the record's in this file."""
    known, digest = _checked.get(str(path), (None, ""))
    if known is None or digest == record.sha256:
        return False
    try:
        return known == _state(path)
    except FileNotFoundError:
        return False


def describe_files(folder: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Describe freshly written files for a manifest.

    Args:
        folder: where they were written.
        sizes: every file below it, by relative path, with its size in bytes.

    Returns:
        One `FileRecord` per file, as JSON values, sorted by path.

    Raises:
        ArtifactError: no file, a name that not every system can hold, a link, a file named like the
            manifest, or a file that is not what its suffix says.
    """
    if not sizes:
        raise ArtifactError(
            "the stage wrote no file", str(folder), "write at least one file in `write(folder)`"
        )
    for name, size in sizes.items():
        _check_name(name, str(folder), is_regular=size != NOT_REGULAR)
    return {name: _describe(folder / name, sizes[name]) for name in sorted(sizes)}


def describe_parts(name: str, parts: Sequence[bytes | memoryview], where: str) -> dict[str, Any]:
    """Describe a file for a manifest by what was written into it, without reading it again.

    Args:
        name: its relative path inside the artifact; no table, whose form is its library's.
        parts: its bytes, in order.
        where: the artifact's folder, where the file is, for the message.

    Returns:
        A `FileRecord`, as JSON values.

    Raises:
        ArtifactError: as `describe_files`.
    """
    _check_name(name, where, is_regular=True)
    views = [memoryview(part) for part in parts]
    size = sum(view.nbytes for view in views)
    if not name.endswith(TENSORS_SUFFIX):
        return _describe(Path(where, name), size)
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    with _reading_back(f"{where}/{name}"):
        header = parse_tensor_header(_reader(views), size, name)
    return {"size_bytes": size, "sha256": digest.hexdigest(), "content": _tensors(header)}


def _reader(views: list[memoryview]) -> Callable[[int], bytes]:
    """Give the bytes of some views like a file that is open."""
    left = list(views)

    def read(n_bytes: int) -> bytes:
        found = b""
        while left and len(found) < n_bytes:
            taken = left[0][: n_bytes - len(found)]
            found += taken
            left[0] = left[0][len(taken) :]
            if not left[0]:
                del left[0]
        return found

    return read


def _check_name(name: str, where: str, *, is_regular: bool) -> None:
    is_name = all(_FILE_PART.fullmatch(part) for part in name.split("/"))
    if not is_name or name == MANIFEST_NAME or not is_regular:
        raise ArtifactError(
            f"file {name!r} cannot be part of an artifact",
            where,
            "write regular files with names of A-Z, a-z, 0-9, '@', '.', '_' and '-'; "
            f"{MANIFEST_NAME!r} is taken",
        )


def check_sizes(manifest: Manifest, sizes: Mapping[str, int], where: str) -> None:
    """Compare the files that exist with those in the manifest, without reading them.

    Args:
        manifest: what should be there.
        sizes: what is there: every file by relative path with its size in bytes.
        where: the artifact's place, for the message.

    Raises:
        CorruptArtifactError: a missing, unexpected, truncated or longer file; lists every one.
    """
    files = manifest.files
    found = {name: size for name, size in sizes.items() if name != MANIFEST_NAME}
    faults = [f"{name}: missing" for name in sorted(files.keys() - found.keys())]
    faults += [f"{name}: unexpected" for name in sorted(found.keys() - files.keys())]
    for name in sorted(files.keys() & found.keys()):
        if found[name] == NOT_REGULAR:
            faults.append(f"{name}: not a regular file")
        elif found[name] != files[name].size_bytes:
            faults.append(f"{name}: expected {files[name].size_bytes} bytes, found {found[name]}")
    if faults:
        raise CorruptArtifactError(
            f"files differ from the manifest ({'; '.join(faults)})", where, DISCARD
        )


def check_file(path: Path, record: FileRecord, *, use_cache: bool = True) -> None:
    """Compare a file's bytes with its record.

    Raises:
        CorruptArtifactError: another hash; names the file, the expected and the found one.
        MissingArtifactError: the file is gone.
    """
    try:
        found = file_sha256(path, use_cache=use_cache)
    except FileNotFoundError:
        raise MissingArtifactError(
            f"file {path.name!r} is gone", str(path.parent), "run the stage again"
        ) from None
    if found != record.sha256:
        raise CorruptArtifactError(
            f"bytes changed since they were written (expected sha256 {record.sha256}, "
            f"found {found})",
            str(path),
            DISCARD,
        )


def _state(path: Path) -> _State:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: Path, size: int) -> dict[str, Any]:
    with _reading_back(str(path)):
        content = _content(path)
    return {"size_bytes": size, "sha256": _sha256(path), "content": content}


@contextmanager
def _reading_back(where: str) -> Iterator[None]:
    try:
        yield
    except (CorruptArtifactError, pl.exceptions.PolarsError) as error:
        found = error.what if isinstance(error, CorruptArtifactError) else str(error)
        raise ArtifactError(
            f"the stage wrote a file that does not read back: {found}",
            where,
            "write it with write_table, write_tensors or write_json",
        ) from None


def _content(path: Path) -> dict[str, Any]:
    if path.suffix == TENSORS_SUFFIX:
        return _tensors(tensor_header(path))
    if path.suffix == TABLE_SUFFIX:
        table = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        columns = {name: _type_name(dtype) for name, dtype in table.collect_schema().items()}
        n_rows = table.select(pl.len()).collect().item()
        return {"kind": "table", "n_rows": n_rows, "columns": columns}
    if path.suffix == JSON_SUFFIX:
        read_json(path)
        return {"kind": "json"}
    return {"kind": "bytes"}


def _tensors(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: {"dtype": info["dtype"], "shape": info["shape"]} for name, info in header.items()
    }
    return {"kind": "tensors", "tensors": tensors, "metadata": metadata}


def _type_name(dtype: pl.DataType) -> str:
    # str() of an Enum lists its categories only from some versions on; repr() always does.
    return repr(dtype) if isinstance(dtype, pl.Enum) else str(dtype)
