"""Build the stand-in checkpoints: real architectures of tiny size with seeded random weights.

A stand-in lets the whole data path run without a download, and is a control: what a probe reads
from a network that has learned nothing. Same specification, vocabulary and library version: same
weights. A folder appears whole or not at all, whoever else builds it at the same time.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from threading import Lock
from typing import Any

from taprobe_core.checkpoints.quiet import is_out_of_memory, quiet_transformers
from taprobe_core.errors import DiskFullError, ModelError
from taprobe_core.store.local import seal_folder
from taprobe_core.study import StandInCheckpoint

_ROW_MULTIPLE = 64
_WIDTH_OF_MLP = 3
_MAX_POSITIONS = 131_072

_seeding = Lock()
"""Threads share one random generator: one at a time may seed it and draw."""


def embedding_rows(n_vocabulary: int) -> int:
    """Return the rows of a stand-in's embedding: the vocabulary, rounded up to 64."""
    return -(-n_vocabulary // _ROW_MULTIPLE) * _ROW_MULTIPLE


def stand_in_identity(spec: StandInCheckpoint, rows: int) -> dict[str, str]:
    """Return what decides a stand-in's weights."""
    return {
        **{name: str(value) for name, value in spec.model_dump().items()},
        "embedding_rows": str(rows),
        "transformers": importlib.metadata.version("transformers"),
    }


def stand_in_folder(spec: StandInCheckpoint, rows: int, build_root: Path) -> Path:
    """Return where a stand-in is, or will be built; arguments as `build_stand_in`."""
    # Folders of an earlier layout have no manifest, and are not trusted without one.
    named = {**stand_in_identity(spec, rows), "layout": "sealed"}
    text = json.dumps(named, sort_keys=True)
    return build_root / hashlib.sha256(text.encode()).hexdigest()[:24]


def build_stand_in(spec: StandInCheckpoint, rows: int, build_root: Path) -> Path:
    """Return a stand-in's folder, building it if it is not there.

    The random state of the process stays as it is.
    """
    folder = stand_in_folder(spec, rows, build_root)
    if folder.is_dir():
        return folder
    try:
        build_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=build_root) as temporary:
            built = Path(temporary) / "checkpoint"
            _save(spec, rows, built)
            seal_folder(built)
            _publish(built, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                "no space left for a stand-in checkpoint", str(build_root), "free space there"
            ) from error
        raise ModelError(
            f"a folder that cannot be written ({error.strerror})",
            str(build_root),
            "make the folder writable, or choose another data folder",
        ) from error
    return folder


def stand_in_dimensions(spec: StandInCheckpoint) -> dict[str, int]:
    """Return the dimensions of a stand-in's blocks and its longest text, by transformers' names."""
    return {
        "hidden_size": spec.d_model,
        "intermediate_size": _WIDTH_OF_MLP * spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "max_position_embeddings": _MAX_POSITIONS,
    }


def _config(spec: StandInCheckpoint, rows: int) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    return {"qwen2": Qwen2Config, "llama": LlamaConfig}[spec.architecture](
        **stand_in_dimensions(spec),
        vocab_size=rows,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def _save(spec: StandInCheckpoint, rows: int, folder: Path) -> None:
    try:
        _draw_and_save(spec, rows, folder)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"no memory to build a stand-in of d_model {spec.d_model}, {spec.n_layers} layers and "
            f"{rows:,} embedding rows in float32",
            str(folder.parent.parent),
            "give the stand-in a smaller d_model or n_layers, or the process more memory",
        ) from error


def _draw_and_save(spec: StandInCheckpoint, rows: int, folder: Path) -> None:
    import torch
    from transformers import AutoModel

    config = _config(spec, rows)
    # Seeding the default generator alone leaves those of accelerators untouched.
    with _seeding, torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(spec.seed)
        module = AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
        module.save_pretrained(folder)


def _publish(built: Path, folder: Path) -> None:
    mode = (built / "config.json").stat().st_mode
    for file in built.iterdir():
        file.chmod(mode)  # the library lets only the owner read the weights
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another builder was first, with the same bytes
            raise
