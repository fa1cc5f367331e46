"""`python -m tools.demo`: what a maintainer meets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from taprobe_core.demo import BUNDLE
from tools.demo.__main__ import main

CPU = ["--device", "cpu"]


def test_building_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CPU) == 2
    assert "name a new folder, or pass --check" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    assert main([str(tmp_path), *CPU]) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow  # samples real texts
def test_what_is_bundled_is_what_its_build_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", *CPU]) == 0
    out = capsys.readouterr().out
    assert out.count("texts sampled again from the weights, all equal") == 2
    assert out.count("measures of 40 traces recomputed, all equal") == 2


def test_a_changed_byte_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    weights = copy / "tiny-llama" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(bytes(changed))
    assert main([str(copy), "--check", *CPU]) == 3
    err = capsys.readouterr().err
    assert "model.safetensors" in err
    assert "restore the file from version control" in err
