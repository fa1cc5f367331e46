"""Look at a checkpoint folder before anything in it is loaded, and refuse what must not be.

Refused: weights that are pickles, configurations that name code, files that lead out of the folder,
Git LFS pointers and error pages in place of weights, incomplete sets. Nothing of the folder is run
to find out. What the model is belongs in `loading`; the invariant here is that a folder which
passes holds one JSON configuration and whole safetensors files, inside itself or its hub cache.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from taprobe_core.errors import ModelError, ModelMissingError, UnsafeModelError
from taprobe_core.store.integrity import file_sha256

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder that passed.

    Attributes:
        path: the folder.
        config: its `config.json`.
        files: names of the files that decide the model: configuration, index, weights.
    """

    path: Path
    config: Mapping[str, Any]
    files: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on this machine, inspected.

    Attributes:
        folder: holds `config.json` and safetensors weights.
        identity: which weights: of a hub model its repository and commit, of a folder the sha256
            over its files, of a stand-in what it is built from.
    """

    folder: Path
    identity: dict[str, str]


def stated_number(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of the named whole numbers that a model configuration states.

    A model of several parts states those of its language model under `text_config`.
    """
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for name in names:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def read_config(path: Path, remedy: str) -> Mapping[str, Any]:
    """Return a folder's `config.json`, which must name no code.

    Raises:
        UnsafeModelError: it names code.
        ModelMissingError: no such file.
        ModelError: not a JSON object.
    """
    config = read_json(path / "config.json", remedy)
    refuse_code(config, path / "config.json")
    return config


def inspect_folder(
    path: Path, remedy: str, listed: Collection[str] = frozenset()
) -> CheckpointFolder:
    """Return the checkpoint of a folder if it is whole and safe to load.

    Args:
        path: the folder.
        remedy: what repairs missing or damaged files.
        listed: names that the folder's origin holds besides.

    Raises:
        UnsafeModelError: loading would run code or read outside the folder.
        ModelMissingError: a file is missing.
        ModelError: a file is not what its name says.
    """
    config = read_config(path, remedy)
    names = {file.name for file in path.iterdir()}
    if "adapter_config.json" in names:
        raise ModelError(
            "an adapter, which is no whole model",
            str(path / "adapter_config.json"),
            "merge the adapter into its base model and name the merged folder",
        )
    if _WEIGHTS in names:
        files: tuple[str, ...] = ("config.json", _WEIGHTS)
    elif _INDEX in names:
        files = ("config.json", _INDEX, *_shards(path / _INDEX, remedy))
    else:
        raise _no_weights(path, names | set(listed), remedy)
    for name in files:
        _check_inside(path, name)
        if name.endswith(".safetensors"):
            _check_safetensors(path / name, remedy)
    return CheckpointFolder(path, config, files)


def folder_digest(folder: CheckpointFolder, hashes: Mapping[str, str] | None = None) -> str:
    """Return the sha256 over names and contents of the files that decide the model.

    Args:
        folder: the folder.
        hashes: sha256 of each of its files, by name; None reads them, once per process.
    """
    if hashes is None:
        hashes = {name: file_sha256(folder.path / name) for name in folder.files}
    listed = "".join(f"{hashes[name]}  {name}\n" for name in folder.files)
    return hashlib.sha256(listed.encode()).hexdigest()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ModelMissingError: no such file.
        ModelError: a Git LFS pointer, or not a JSON object.
    """
    if not path.is_file():
        raise ModelMissingError(f"no {path.name}", str(path.parent), remedy)
    try:
        content = path.read_bytes()
        _refuse_pointer(content, path)
        found = json.loads(content)
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"a file that is not JSON ({error})", str(path), remedy) from error
    if not isinstance(found, dict):
        raise ModelError(f"a JSON {type(found).__name__}, not an object", str(path), remedy)
    return found


def refuse_code(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a configuration that names code to run.

    Raises:
        UnsafeModelError: `auto_map` names Python files, or an `*_implementation` a hub repository
            of kernels.
    """
    for key, value in _entries(config):
        names_kernels = "_implementation" in key and isinstance(value, str) and "/" in value
        if key == "auto_map" or names_kernels:
            raise UnsafeModelError(
                f"`{key}`, which names code of the checkpoint's author",
                f"{where}, {key}",
                "use a checkpoint of an architecture that transformers has itself; "
                "code of others is never run here",
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _shards(index: Path, remedy: str) -> list[str]:
    weight_map = read_json(index, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("an index without a weight_map", str(index), remedy)
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard):
            raise UnsafeModelError(
                f"shard {shard!r}, which is not the name of a safetensors file of this folder",
                f"{index}, weight_map",
                "get the checkpoint from a source that you trust",
            )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        what = f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}"
        raise ModelMissingError(what, str(index), remedy)
    return shards


def _no_weights(path: Path, names: Collection[str], remedy: str) -> ModelError:
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        return UnsafeModelError(
            f"weights as pickles only ({', '.join(pickled[:3])}), which run code when loaded",
            str(path),
            "use a revision with safetensors weights, or convert them where running code is safe",
        )
    found = ", ".join(sorted(names)[:5])
    return ModelMissingError(f"no {_WEIGHTS} and no index, only {found}", str(path), remedy)


def _check_inside(folder: Path, name: str) -> None:
    home = folder.resolve()
    # A hub cache's snapshots/<revision>/ holds links into blobs/ of the same repository.
    allowed = home.parent.parent if home.parent.name == "snapshots" else home
    target = (folder / name).resolve()
    if not target.is_relative_to(allowed):
        raise UnsafeModelError(
            f"a link that leaves the folder, to {target}",
            str(folder / name),
            "copy the file itself into the folder",
        )


def _check_safetensors(path: Path, remedy: str) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    _refuse_pointer(head, path)
    try:
        with safe_open(path, framework="numpy"):  # reads the header and compares it with the size
            pass
    except (SafetensorError, OSError) as error:
        what = f"a file that is not whole safetensors ({error}); it begins with {head[:24]!r}"
        raise ModelError(what, str(path), remedy) from error


def _refuse_pointer(head: bytes, path: Path) -> None:
    if head.startswith(_LFS_POINTER):
        raise ModelError(
            "a Git LFS pointer in place of the file",
            str(path),
            f"run `git lfs pull` in {path.parent}, or fetch the model with `hf download`",
        )
