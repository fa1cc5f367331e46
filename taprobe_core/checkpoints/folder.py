"""Look at a checkpoint folder before anything in it is loaded, and refuse what must not be.

Refused: weights that are pickles, configurations that name code or an impossible model, files that
lead out of the folder or are no files, Git LFS pointers and error pages in place of weights, sets
that are incomplete or hold a tensor twice. Nothing of the folder is run to find out.

Nothing but a regular file is opened: a pipe or a device would keep the reader waiting for ever. A
size is looked at before the content is, so that no file costs more memory than its kind may. A
configuration is another's file: the library that reads it divides by its numbers, makes lists of
their length and looks its dtype up as an attribute, so each is looked at here first and refused by
name. Whether weights fit the configuration, and what the model is, belongs in `loading`.

Invariant: a folder which passes holds one JSON configuration and whole safetensors files, inside
itself or its hub cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from taprobe_core.checkpoints.origin import WEIGHT_FILES
from taprobe_core.checkpoints.quiet import is_out_of_memory
from taprobe_core.errors import ModelError, ModelMissingError, UnsafeModelError
from taprobe_core.store.integrity import file_sha256

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
    """Return a file's size in bytes; it is not opened."""
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
    """
    if head.startswith(_LFS_POINTER):
        raise ModelError(
            "a Git LFS pointer in place of the file",
            str(path),
            f"run `git lfs pull` in {path.parent}, or fetch the model with `hf download`",
        )


_MOST_BLOCKS = 10_000
_MOST_HEADS = 65_536
_MOST_WIDTH = 2**24
_MOST_POSITIONS = 2**40

_MOST: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _MOST_BLOCKS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
        _MOST_HEADS,
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "head_dim", "intermediate_size", "vocab_size"),
        _MOST_WIDTH,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _MOST_POSITIONS),
}
_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config", "thinker_config")
_DTYPE = re.compile(r"(torch\.)?(auto|b?float(16|32|64)?|half|double|float8_\w+|u?int\d+)")
_FIX = "correct it, or fetch the checkpoint's own config.json again"


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a configuration that no model can be built from."""
    for path, part in _parts(config):
        for name, found in part.items():
            field = f"{path}{name}"
            if name in _MOST:
                _check_size(found, field, _MOST[name], where)
            if name in ("torch_dtype", "dtype") and found is not None:
                _check_dtype(found, field, where)
            if name == "transformers_weights" and found is not None:
                raise ModelError(
                    f"{field}: {found!r}, another file than those that are checked and hashed",
                    f"{where}, {field}",
                    "name the weights model.safetensors and remove the key",
                )
        _check_heads(part, path, where)


def _parts(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration and those of its language models, with the way to each."""
    yield path, config
    for name in _LANGUAGE_MODELS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield from _parts(part, f"{path}{name}.")


def _check_size(found: Any, field: str, most: int, where: Path) -> None:
    # Some architectures list one size a block; null is the class's own default.
    for each in found if isinstance(found, list) else [found]:
        is_whole = isinstance(each, int) and not isinstance(each, bool)
        if each is not None and not (is_whole and 1 <= each <= most):
            raise ModelError(
                f"{field}: {each!r}, not a whole number from 1 to {most:,}",
                f"{where}, {field}",
                _FIX,
            )


def _check_dtype(found: Any, field: str, where: Path) -> None:
    # Some configurations give each of their parts a dtype of its own.
    for each in found.values() if isinstance(found, Mapping) else [found]:
        if not isinstance(each, str) or not _DTYPE.fullmatch(each):
            raise ModelError(
                f"{field}: {each!r}, which is no dtype",
                f"{where}, {field}",
                "name one like bfloat16, or remove the key",
            )


def _check_heads(part: Mapping[str, Any], path: str, where: Path) -> None:
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ModelError(
            f"num_attention_heads: {heads}, which {shared} num_key_value_heads do not divide",
            f"{where}, {path}num_key_value_heads",
            _FIX,
        )


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
    """Return a folder's `config.json`, which must name no code and be of a model that can exist."""
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
    """Return the checkpoint of a folder if it is whole and safe to load."""
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
    """Return the sha256 over names and contents of the files that decide the model."""
    if hashes is None:
        hashes = {name: file_sha256(folder.path / name) for name in folder.files}
    listed = "".join(f"{hashes[name]}  {name}\n" for name in folder.files)
    return hashlib.sha256(listed.encode()).hexdigest()


def refuse_code(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a configuration that names code to run."""
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
