"""The three file forms of an artifact: Parquet, safetensors, JSON; files of a hub cache.

Turns a table, named tensors or a JSON value into a file and back. Durability, hashes and names
belong to the store: these functions run inside its `write(folder)` callbacks, before the fsync.
Invariants: read(write(x)) is x; the same x gives the same bytes; no file can run code. Source of
the tensor format: the safetensors README (8-byte length, JSON header, raw data).

A file of a hub cache is compared with the name that the hub gave its bytes. A cache's
`snapshots/<commit>/<file>` is a link to `blobs/<name>`. A large file's blob is named by the sha256
of its bytes; a small one by git: sha1 of "blob <size>", a NUL and the bytes. An endpoint that is no
git server names by the plain sha1. Any other name says nothing about the bytes, and a cache copied
without links has no names at all. Source: huggingface_hub, "Understand caching".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from safetensors import SafetensorError

from taprobe_core.errors import ArtifactError, CorruptArtifactError, NonFiniteError
from taprobe_core.store.disk import is_system_error, write_bytes
from taprobe_core.store.fingerprint import NotJsonError, canonical_json
from taprobe_core.store.manifest import DISCARD

if TYPE_CHECKING:
    import torch


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


TABLE_SUFFIX = ".parquet"
TENSORS_SUFFIX = ".safetensors"
JSON_SUFFIX = ".json"

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Types that tensors are stored in: torch's name to that of the format."""

DTYPE_NAMES = {stored: name for name, stored in DTYPES.items()}
"""The other way round."""

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000


def write_table(path: Path, frame: pl.DataFrame) -> None:
    """Write a table as Parquet (zstd).

    Args:
        path: file to make; its name ends in `.parquet`.
        frame: any table.

    Raises:
        ArtifactError: another suffix.
    """
    _check_suffix(path, TABLE_SUFFIX)
    frame.write_parquet(path, compression="zstd")


def read_table(path: Path) -> pl.DataFrame:
    """Read a table written by `write_table`.

    Raises:
        CorruptArtifactError: the file is not Parquet.
        ArtifactError: the file cannot be read.
    """
    try:
        return pl.read_parquet(path, glob=False, hive_partitioning=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise _refusal(error, path, "Parquet") from None


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors.

    Tensors may be views, share memory or live on a device; each is written out whole. The same
    tensors and metadata give the same bytes, in whatever order they come.

    Args:
        path: file to make; its name ends in `.safetensors`.
        tensors: dense tensors of any shape, of a type in `DTYPES`.
        metadata: text kept in the file's header, for example dimension names.

    Raises:
        ArtifactError: another suffix, or a type that the format does not know.
    """
    _check_suffix(path, TENSORS_SUFFIX)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Large numbers first: with a header of a multiple of 8 bytes, all data is then aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _dtype_name(name, tensors[name]),
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    write_bytes(path, _LENGTH.pack(len(text)) + text, *(_raw(tensors[name]) for name in names))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors written by `write_tensors`, onto the CPU.

    Raises:
        CorruptArtifactError: the file is not safetensors.
        ArtifactError: the file cannot be read.
    """
    from safetensors.torch import load_file  # torch takes seconds to import

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise _refusal(error, path, "safetensors") from None
    return tensors


def as_tensor(raw: bytearray, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor whose bytes these are; it shares them.

    Args:
        raw: as safetensors keeps them.
        dtype: as safetensors names it.
        shape: of the tensor.
    """
    import torch  # torch takes seconds to import

    kind: torch.dtype = getattr(torch, DTYPE_NAMES[dtype])
    flat = torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
    return flat.reshape(tuple(shape))


def tensor_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the header of a safetensors file without its data and without torch.

    Returns:
        Mapping of tensor name to `dtype`, `shape` and `range`, its half-open range of the file's
        bytes, in the order of these; and the file's own metadata.

    Raises:
        CorruptArtifactError: the header is cut, not JSON, or its tensors are not the rest of the
            file, one after the other.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
        raw = file.read(length) if length <= min(size, _MAX_HEADER_BYTES) else b""
    start = _LENGTH.size + length
    found: dict[str, Any] = {}
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = (start + index(offset) for offset in info["data_offsets"])
            found[name] = {"dtype": info["dtype"], "shape": info["shape"], "range": (first, last)}
        edges = [start, *(edge for info in found.values() for edge in info["range"]), size]
        is_covered = edges[::2] == edges[1::2] and edges == sorted(edges)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_covered = False
    if not is_covered:
        raise CorruptArtifactError("file is not safetensors (bad header)", str(path), DISCARD)
    return found, metadata


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON value with sorted keys; tuples become lists.

    Args:
        path: file to make; its name ends in `.json`.
        obj: mappings with text keys, lists, text, finite numbers, booleans, None.

    Raises:
        NonFiniteError: a number is NaN or infinite; names its path in `obj`.
        ArtifactError: JSON cannot hold a value, or another suffix.
    """
    _check_suffix(path, JSON_SUFFIX)
    try:
        text = canonical_json(obj, indent=1)
    except NotJsonError as error:
        if error.is_nonfinite:
            raise NonFiniteError(
                f"{error.found} cannot be stored",
                f"{path.name}, {error.at}",
                "store None where a value is undefined, and say why beside it",
            ) from None
        raise ArtifactError(
            f"JSON cannot hold {error.found}", f"{path.name}, {error.at}", "convert it first"
        ) from None
    path.write_text(text + "\n", encoding="ascii")


def read_json(path: Path) -> Any:
    """Read a JSON value written by `write_json`.

    Raises:
        CorruptArtifactError: not JSON, or a number that JSON does not know.
    """
    try:
        return json.loads(
            path.read_bytes(), parse_constant=_finite_float, parse_float=_finite_float
        )
    except (ValueError, RecursionError) as error:
        raise _refusal(error, path, "JSON") from None


def _check_suffix(path: Path, suffix: str) -> None:
    # The store tells what a file holds by its suffix; a wrong one would leave it unchecked.
    if path.suffix != suffix:
        raise ArtifactError(
            f"file name {path.name!r} does not end in {suffix!r}",
            str(path.parent),
            f"add {suffix!r}",
        )


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ArtifactError(
            f"a tensor of type {dtype}", repr(name), f"convert it to {', '.join(DTYPES)}"
        )
    return DTYPES[dtype]


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch  # torch takes seconds to import

    dense = tensor.detach().cpu().contiguous()
    # As bytes, because numpy has no bfloat16.
    return dense.reshape(-1).view(torch.uint8).numpy().data


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _refusal(error: Exception, path: Path, form: str) -> ArtifactError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if is_system_error(error):
        # A disk that fails to read says nothing about the bytes; discarding them would be wrong.
        return ArtifactError(f"file cannot be read ({reason})", str(path), "check the disk")
    return CorruptArtifactError(f"file is not {form} ({reason})", str(path), DISCARD)
