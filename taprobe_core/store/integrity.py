"""Hashes: describe files when they are committed, compare them when they are read.

Turns a folder into file records and, later, records and a folder into a verdict. Where folders live
belongs in `backend`. Invariant: no byte reaches a reader unless its file's sha256 was compared with
the manifest in this process, after the file's last change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl

from taprobe_core.errors import ArtifactError, CorruptArtifactError, MissingArtifactError
from taprobe_core.store.backend import NOT_REGULAR
from taprobe_core.store.files import (
    JSON_SUFFIX,
    TABLE_SUFFIX,
    TENSORS_SUFFIX,
    read_json,
    tensor_header,
)
from taprobe_core.store.manifest import DISCARD, MANIFEST_NAME, FileRecord, Manifest, TensorInfo

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
        is_name = all(_FILE_PART.fullmatch(part) for part in name.split("/"))
        if not is_name or name == MANIFEST_NAME or size == NOT_REGULAR:
            raise ArtifactError(
                f"file {name!r} cannot be part of an artifact",
                str(folder),
                "write regular files with names of A-Z, a-z, 0-9, '@', '.', '_' and '-'; "
                f"{MANIFEST_NAME!r} is taken",
            )
    return {name: _describe(folder / name, sizes[name]) for name in sorted(sizes)}


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


def read_tensor_bytes(
    path: Path, tensors: Mapping[str, TensorInfo], names: Sequence[str]
) -> dict[str, bytearray]:
    """Read some tensors of a file, each hashed at its first read in this process.

    Args:
        path: a safetensors file.
        tensors: what its manifest says of them.
        names: tensors of it.

    Raises:
        CorruptArtifactError: a tensor's bytes have another hash, or the file's header is damaged.
    """
    state = _state(path)
    try:
        return _read_checked(path, tensors, names, state)
    except CorruptArtifactError:
        _checked[str(path)] = (state, "other bytes")
        raise


def _read_checked(
    path: Path, tensors: Mapping[str, TensorInfo], names: Sequence[str], state: _State
) -> dict[str, bytearray]:
    header, _ = tensor_header(path)
    found: dict[str, bytearray] = {}
    with path.open("rb", buffering=0) as file:
        for name in names:
            first, last = header.get(name, {"range": (0, 0)})["range"]
            found[name] = bytearray(last - first)
            file.seek(first)
            _fill(file, found[name])
            expected, place = tensors[name].sha256, f"{path}\n{name}"
            if _checked.get(place) == (state, expected):
                continue
            digest = hashlib.sha256(found[name]).hexdigest()
            if digest != expected:
                raise CorruptArtifactError(
                    f"bytes of tensor {name} changed since they were written (expected sha256 "
                    f"{expected}, found {digest})",
                    str(path),
                    DISCARD,
                )
            _checked[place] = (state, digest)
    return found


def _fill(file: IO[bytes], buffer: bytearray | memoryview) -> int:
    """Read until a buffer is full or the file ends; return how many bytes there were."""
    left = memoryview(buffer)
    while left and (n_read := file.readinto(left)):  # type: ignore[attr-defined]
        left = left[n_read:]
    return len(buffer) - len(left)


def _state(path: Path) -> _State:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_CHUNK_BYTES = 1 << 20
"""What is hashed twice, for its tensor and for its file, stays in the processor's cache."""


def _tensor_hashes(path: Path, ranges: Mapping[str, tuple[int, int]]) -> tuple[str, dict[str, str]]:
    """Hash a safetensors file, and each of its tensors, in one reading."""
    whole, digests = hashlib.sha256(), {}
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        whole.update(file.read(min((first for first, _ in ranges.values()), default=-1)))
        for name, (first, last) in ranges.items():
            own = hashlib.sha256()
            while first < last and (n_read := _fill(file, buffer[: last - first])):
                first += n_read
                own.update(buffer[:n_read])
                whole.update(buffer[:n_read])
            digests[name] = own.hexdigest()
    return whole.hexdigest(), digests


def _describe(path: Path, size: int) -> dict[str, Any]:
    with _reading_back(str(path)):
        if path.suffix != TENSORS_SUFFIX:
            return {"size_bytes": size, "sha256": _sha256(path), "content": _content(path)}
        header, metadata = tensor_header(path)
        digest, digests = _tensor_hashes(path, {name: header[name]["range"] for name in header})
    tensors = {
        name: {"dtype": info["dtype"], "shape": info["shape"], "sha256": digests[name]}
        for name, info in header.items()
    }
    content = {"kind": "tensors", "tensors": tensors, "metadata": metadata}
    return {"size_bytes": size, "sha256": digest, "content": content}


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
    if path.suffix == TABLE_SUFFIX:
        table = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        columns = {name: _type_name(dtype) for name, dtype in table.collect_schema().items()}
        n_rows = table.select(pl.len()).collect().item()
        return {"kind": "table", "n_rows": n_rows, "columns": columns}
    if path.suffix == JSON_SUFFIX:
        read_json(path)
        return {"kind": "json"}
    return {"kind": "bytes"}


def _type_name(dtype: pl.DataType) -> str:
    # str() of an Enum lists its categories only from some versions on; repr() always does.
    return repr(dtype) if isinstance(dtype, pl.Enum) else str(dtype)
