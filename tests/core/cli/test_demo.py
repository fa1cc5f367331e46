"""`taprobe demo-build`: what a user meets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.demo import BUNDLE

pytestmark = pytest.mark.timeout(400)  # samples real texts


def test_building_needs_a_folder(taprobe: Callable[..., Any]) -> None:
    said = taprobe("demo-build")
    assert said.code == 2
    assert "name a new folder, or pass --check" in said.err


def test_a_folder_with_something_else_is_left_alone(
    taprobe: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    said = taprobe("demo-build", tmp_path / "mine", "--device", "cpu")
    assert said.code == 2
    assert "the folder is not empty" in said.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_is_bundled_is_what_its_build_made(taprobe: Callable[..., Any]) -> None:
    said = taprobe("demo-build", "--check", "--device", "cpu")
    assert said.code == 0, said.err
    assert said.out.count("texts sampled again from the weights, all equal") == 2
    assert said.out.count("measures of 40 traces recomputed, all equal") == 2


def test_a_changed_byte_is_found(taprobe: Callable[..., Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    weights = copy / "tiny-llama" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(bytes(changed))
    said = taprobe("demo-build", copy, "--check", "--device", "cpu")
    assert said.code == 3
    assert "model.safetensors" in said.err
    assert "restore the file from version control" in said.err
