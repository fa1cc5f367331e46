"""What of a checkpoint folder is refused before anything in it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from taprobe_core.checkpoints.folder import folder_digest, inspect_folder, stated_number
from taprobe_core.errors import ModelError, ModelMissingError, UnsafeModelError

CONFIG = {"model_type": "qwen2", "num_hidden_layers": 2, "vocab_size": 64}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
    return folder


def with_config(**more: Any) -> Callable[[Path], None]:
    return lambda folder: _write(folder / "config.json", json.dumps(CONFIG | more).encode())


def with_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: _write(folder / name, content)


def with_index(weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        _write(folder / INDEX, json.dumps({"weight_map": weight_map}).encode())

    return change


def without_weights(*others: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for other in others:
            _write(folder / other, b"")

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    _write(file, file.read_bytes()[:-1])


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = folder.parent / f"elsewhere-{name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return change


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def test_a_whole_folder_passes(folder: Path) -> None:
    passed = inspect_folder(folder, "again")

    assert passed.files == ("config.json", "model.safetensors")
    assert passed.config == CONFIG


def test_pickles_beside_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"poison")

    assert "pytorch_model.bin" not in inspect_folder(folder, "again").files


def test_shards_are_the_files_of_the_index(folder: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    with_index({"a": shard, "b": shard})(folder)

    assert inspect_folder(folder, "again").files == ("config.json", INDEX, shard)


@pytest.mark.parametrize(
    ("change", "error", "found", "where"),
    [
        (with_config(auto_map={"AutoModel": "m.M"}), UnsafeModelError, "`auto_map`", "auto_map"),
        (with_config(text_config={"auto_map": {}}), UnsafeModelError, "`auto_map`", "auto_map"),
        (with_config(parts=[{"auto_map": {}}]), UnsafeModelError, "`auto_map`", "auto_map"),
        (
            with_config(_attn_implementation_internal="someone/kernels"),
            UnsafeModelError,
            "names code",
            "_attn_implementation_internal",
        ),
        (without_weights("pytorch_model.bin"), UnsafeModelError, "pytorch_model.bin", "model"),
        (with_index({"a": "../x.safetensors"}), UnsafeModelError, "'../x.safet", "weight_map"),
        (with_index({"a": "/x.safetensors"}), UnsafeModelError, "'/x.safet", "weight_map"),
        (with_index({"a": "C:\\x.safetensors"}), UnsafeModelError, "x.safet", "weight_map"),
        (with_index({"a": "\\\\host\\x.safetensors"}), UnsafeModelError, "host", "weight_map"),
        (with_index({"a": "model.bin"}), UnsafeModelError, "'model.bin'", "weight_map"),
        (with_index({"a": 3}), UnsafeModelError, "'3'", "weight_map"),
        (linked("model.safetensors"), UnsafeModelError, "elsewhere", "model.safetensors"),
        (linked("config.json"), UnsafeModelError, "elsewhere", "config.json"),
        (with_index({"a": "gone.safetensors"}), ModelMissingError, "1 of 1 shards", INDEX),
        (with_index({}), ModelError, "without a weight_map", INDEX),
        (with_index([1]), ModelError, "without a weight_map", INDEX),
        (without_weights("model.fp16.safetensors"), ModelMissingError, "model.fp16", "model"),
        (lambda folder: (folder / "config.json").unlink(), ModelMissingError, "no config", "model"),
        (with_file("config.json", b"{"), ModelError, "not JSON", "config.json"),
        (with_file("config.json", b"\xff\xfe"), ModelError, "not JSON", "config.json"),
        (with_file("config.json", b"[" * 100_000), ModelError, "not JSON", "config.json"),
        (with_file("config.json", b"[1]"), ModelError, "a JSON list", "config.json"),
        (with_file("config.json", POINTER), ModelError, "Git LFS pointer", "config.json"),
        (with_file("model.safetensors", POINTER), ModelError, "Git LFS", "model.safetensors"),
        (with_file("model.safetensors", b"<html>no"), ModelError, "b'<html>no'", "safetensors"),
        (with_file("model.safetensors", b""), ModelError, "not whole", "model.safetensors"),
        (with_file("model.safetensors", b"\xff" * 64), ModelError, "not whole", "safetensors"),
        (cut, ModelError, "not whole safetensors", "model.safetensors"),
        (with_file("adapter_config.json", b"{}"), ModelError, "an adapter", "adapter_config.json"),
    ],
)
def test_a_folder_is_refused_with_file_found_and_fix(
    folder: Path,
    change: Callable[[Path], None],
    error: type[ModelError],
    found: str,
    where: str,
) -> None:
    change(folder)

    with pytest.raises(ModelError) as caught:
        inspect_folder(folder, "fetch it again")
    assert type(caught.value) is error
    assert found in caught.value.what
    assert str(folder) in str(caught.value.where)
    assert str(caught.value.where).endswith(where)
    assert "\nFix: " in str(caught.value)


def test_a_file_that_cannot_be_read_is_a_model_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match=r"Permission denied[\s\S]*Fix: again"):
        inspect_folder(folder, "again")


def test_only_the_hub_knows_of_pickles_not_fetched(folder: Path) -> None:
    without_weights()(folder)

    with pytest.raises(ModelMissingError):
        inspect_folder(folder, "again")
    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin"):
        inspect_folder(folder, "again", {"pytorch_model.bin"})


def test_links_within_a_hub_cache_pass(tmp_path: Path, folder: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    folder.rename(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")

    assert inspect_folder(snapshot, "again").files == ("config.json", "model.safetensors")
    (blobs / "1").rename(tmp_path / "outside")
    (blobs / "1").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeModelError, match="leaves the folder"):
        inspect_folder(snapshot, "again")


def test_the_digest_is_of_contents_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    digest = folder_digest(inspect_folder(folder, "again"))
    listed = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert digest == hashlib.sha256(listed.encode()).hexdigest()

    (folder / "README.md").write_text("card")
    moved = folder.rename(tmp_path / "moved")
    assert folder_digest(inspect_folder(moved, "again")) == digest

    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert folder_digest(inspect_folder(moved, "again")) != digest


def test_a_change_that_keeps_size_and_time_changes_the_digest(folder: Path) -> None:
    before = folder_digest(inspect_folder(folder, "again"))
    file = folder / "config.json"
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"64", b"65"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder_digest(inspect_folder(folder, "again")) != before


def test_numbers_of_the_language_model_come_first() -> None:
    config = {"num_layers": 3, "vocab_size": 7, "text_config": {"num_hidden_layers": 5}}

    assert stated_number(config, "num_hidden_layers", "num_layers") == 5
    assert stated_number(config, "vocab_size") == 7
    assert stated_number(config, "hidden_size") is None
