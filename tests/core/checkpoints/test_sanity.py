"""Configurations and files that no checkpoint has: refused by name, before a library sees them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from taprobe_core.checkpoints import folder as reading
from taprobe_core.checkpoints.folder import check_config, inspect_folder, read_config
from taprobe_core.checkpoints.quiet import is_out_of_memory
from taprobe_core.errors import ModelError, ModelMissingError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    save_file({"w": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "found", "field"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads: 0", "num_key_value_heads"),
        ({"hidden_size": -64}, "hidden_size: -64", "hidden_size"),
        ({"n_head": 2.5}, "n_head: 2.5", "n_head"),
        ({"vocab_size": "64"}, "vocab_size: '64'", "vocab_size"),
        ({"head_dim": True}, "head_dim: True", "head_dim"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000", "num_hidden_layers"),
        ({"intermediate_size": [64, 0]}, "intermediate_size: 0", "intermediate_size"),
        ({"text_config": {"num_heads": 0}}, "text_config.num_heads: 0", "text_config.num_heads"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 4},
            "4 num_key_value_heads do not divide",
            "num_key_value_heads",
        ),
        ({"torch_dtype": "sys"}, "torch_dtype: 'sys', which is no dtype", "torch_dtype"),
        ({"dtype": "torch.load"}, "dtype: 'torch.load'", "dtype"),
        ({"dtype": 32}, "dtype: 32", "dtype"),
        ({"text_config": {"dtype": "nn"}}, "text_config.dtype: 'nn'", "text_config.dtype"),
        ({"transformers_weights": "other.safetensors"}, "another file", "transformers_weights"),
    ],
)
def test_a_configuration_of_no_model_is_refused_by_name(
    config: dict[str, Any], found: str, field: str
) -> None:
    with pytest.raises(ModelError) as caught:
        check_config(config, Path("/m/config.json"))
    assert found in caught.value.what
    assert caught.value.where == f"/m/config.json, {field}"
    assert caught.value.fix


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_size": 64},
        {"torch_dtype": "bfloat16", "text_config": {"dtype": "float16"}, "n_embd": 768},
        {"torch_dtype": "torch.float32", "dtype": {"": "auto", "vision_config": "float8_e4m3fn"}},
        {"intermediate_size": [64, 128], "num_key_value_heads": [4, None]},
        {"vision_config": {"num_heads": 0}, "max_position_embeddings": 10_485_760},
    ],
)
def test_configurations_that_models_have_pass(config: dict[str, Any]) -> None:
    check_config(config, Path("/m/config.json"))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as each:
        each.bind(os.path.relpath(path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pipe, "a named pipe"),
        (Path.mkdir, "a folder"),
        (listening, "a socket"),
    ],
)
def test_what_is_no_file_is_not_opened(
    folder: Path,
    name: str,
    make: Callable[[Path], None],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)  # the name of a socket must be short
    (folder / name).unlink()
    make(folder / name)

    with pytest.raises(ModelError) as caught:
        inspect_folder(folder, "copy it again")
    assert caught.value.what == f"{kind} in place of the file"
    assert caught.value.where == str(folder / name)


def test_a_file_larger_than_its_kind_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "config.json").open("ab") as file:
        file.truncate(200 * reading.MIB)  # takes no room on the disk

    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(ModelError, match=r"200 MiB, where a config\.json has 16 MiB at most"):
        read_config(folder, "again")


def test_a_dangling_link_is_a_missing_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("gone.json")

    with pytest.raises(ModelMissingError, match=r"no config\.json"):
        read_config(folder, "again")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    names = ["model-1.safetensors", "model-2.safetensors"]
    (folder / "model.safetensors").unlink()
    for name in names:
        save_file({"w": np.zeros(2, np.float32), name[:7]: np.ones(1)}, folder / name)
    index = {"weight_map": {"w": names[0], "model-2": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelError, match=r"tensor w a second time, after model-1") as caught:
        inspect_folder(folder, "again")
    assert caught.value.where == str(folder / names[1])


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("size mismatch"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_failures(
    error: BaseException, is_memory: bool
) -> None:
    assert is_out_of_memory(error) == is_memory
