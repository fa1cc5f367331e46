"""Look at a checkpoint folder before anything in it is loaded, and refuse what must not be.

Refused: weights that are pickles, configurations that name code or an impossible model, files that
lead out of the folder or are no files, Git LFS pointers and error pages in place of weights, sets
that are incomplete or hold a tensor twice. Nothing of the folder is run
to find out. What the model is belongs in `loading`; the invariant here is that a folder which
passes holds one JSON configuration and whole safetensors files, inside itself or its hub cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from taprobe_core.checkpoints.memory import is_out_of_memory
from taprobe_core.checkpoints.origin import WEIGHT_FILES
from taprobe_core.checkpoints.reading import check_regular, read_json, refuse_pointer
from taprobe_core.checkpoints.sanity import check_config
from taprobe_core.errors import ModelError, ModelMissingError, UnsafeModelError
from taprobe_core.store.integrity import file_sha256

CONFIG = "config.json"
WEIGHTS, INDEX = WEIGHT_FILES
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")


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
    """Return a folder's `config.json`, which must name no code and be of a model that can exist.

    Raises:
        UnsafeModelError: it names code.
        ModelMissingError: no such file.
        ModelError: not a JSON object, or a number or a dtype in it that no model has.
    """
    config = read_json(path / CONFIG, remedy)
    refuse_code(config, path / CONFIG)
    check_config(config, path / CONFIG)
    return config


def files_to_load(
    path: Path, remedy: str, listed: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """Return the names of the files of a folder that are loaded, and of no others.

    The configuration, and `model.safetensors` or else the index with the shards that it names: the
    choice that transformers makes. Second copies of the weights (`consolidated.safetensors`,
    `original/`, `onnx/`, pickles) are none of them.

    Args:
        path: the folder; of the files named only the index is read.
        remedy: what repairs missing or damaged files.
        listed: names that the folder's origin holds besides.

    Raises:
        UnsafeModelError: weights as pickles only, or a shard that is no file of this folder.
        ModelMissingError: neither weights nor an index.
        ModelError: the index cannot be read.
    """
    names = {file.name for file in path.iterdir()} | set(listed)
    if WEIGHTS in names:
        return (CONFIG, WEIGHTS)
    if INDEX in names:
        return (CONFIG, INDEX, *_shards(path / INDEX, remedy))
    raise _no_weights(path, names, remedy)


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
    if (path / "adapter_config.json").exists():
        raise ModelError(
            "an adapter, which is no whole model",
            str(path / "adapter_config.json"),
            "merge the adapter into its base model and name the merged folder",
        )
    files = files_to_load(path, remedy, listed)
    _check_present(path, files, remedy)
    tensors: dict[str, str] = {}
    for name in files:
        _check_inside(path, name)
        check_regular(path / name, remedy)
        if name.endswith(".safetensors"):
            for tensor in _tensor_names(path / name, remedy):
                other = tensors.setdefault(tensor, name)
                if other != name:
                    raise ModelError(
                        f"tensor {tensor} a second time, after {other}", str(path / name), remedy
                    )
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
    return shards


def _check_present(path: Path, files: Sequence[str], remedy: str) -> None:
    missing = [name for name in files if not (path / name).exists()]
    shards = [name for name in files if name.endswith(".safetensors")]
    if missing and INDEX in files:
        what = f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}"
        raise ModelMissingError(what, str(path / INDEX), remedy)
    if missing:
        raise ModelMissingError(f"no {', '.join(missing)}", str(path), remedy)


def _no_weights(path: Path, names: Collection[str], remedy: str) -> ModelError:
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        return UnsafeModelError(
            f"weights as pickles only ({', '.join(pickled[:3])}), which run code when loaded",
            str(path),
            "use a revision with safetensors weights, or convert them where running code is safe",
        )
    found = ", ".join(sorted(names)[:5])
    return ModelMissingError(f"no {WEIGHTS} and no index, only {found}", str(path), remedy)


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


def _tensor_names(path: Path, remedy: str) -> list[str]:
    with path.open("rb") as file:
        head = file.read(64)
    refuse_pointer(head, path)
    try:
        # Opening reads the header and compares it with the size.
        with safe_open(path, framework="numpy") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"no memory to map a file of {path.stat().st_size / 2**30:.1f} GiB",
                str(path),
                "raise the process's memory limit, or use a smaller model",
            ) from error
        what = f"a file that is not whole safetensors ({error}); it begins with {head[:24]!r}"
        raise ModelError(what, str(path), remedy) from error
