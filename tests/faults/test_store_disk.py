from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from polars.exceptions import ComputeError
from safetensors import SafetensorError

from taprobe_core.errors import ArtifactError, DiskFullError
from taprobe_core.store import (
    ArtifactKey,
    LocalBackend,
    Store,
    fingerprint,
    read_table,
    write_json,
)
from taprobe_core.store.disk import disk_errors, is_disk_full

CHILD = Path(__file__).with_name("store_limits.py")
OLD, NEW = (
    ArtifactKey("labels", ("m@L16", "7"), fingerprint("labels", str(n), {}, [])) for n in range(2)
)


def write(folder: Path) -> None:
    write_json(folder / "v.json", 1)
    (folder / "plots").mkdir()
    (folder / "plots" / "p.bin").write_bytes(b"x" * 1000)


def refuse(folder: Path) -> None:
    raise AssertionError(f"computed in {folder}")


def run_child(kind: str, root: Path) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, str(CHILD), kind, str(root)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_file_size_limit(tmp_path: Path) -> None:
    found = run_child("size", tmp_path / "store")
    assert found.pop("small") == ["ok", "", "1"]
    assert found.keys() == {"bytes", "json", "table", "tensors"}
    for name, (error, message, calls) in found.items():
        assert (name, error, calls) == (name, "DiskFullError", "1"), message
        assert "400000 bytes needed" in message
        assert str(tmp_path / "store" / "labels" / "p") in message
    assert list(tmp_path.rglob(".tmp-*")) == []
    assert all(verdict.is_sound for verdict in Store(tmp_path / "store").verify())


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder whose parents everybody may enter, unlike those of tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("depth", ["root", "partition"])
def test_read_only_store(open_folder: Path, depth: str) -> None:
    if depth == "partition":
        key = ArtifactKey("labels", ("p",), OLD.fingerprint)
        Store(open_folder).commit(key, write, provenance={})
        for name in (".lock", "CURRENT"):
            (open_folder / "labels" / "p" / name).chmod(0o444)
    folders = [open_folder, *open_folder.rglob("*/")]
    for folder in folders:
        folder.chmod(0o555)
    try:
        found = run_child("readonly", open_folder)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    for error, message, calls in found.values():
        assert (error, calls) == ("ArtifactError", "0")
        assert str(open_folder) in message
        assert "Permission denied" in message
        assert "Fix:" in message


def test_a_root_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "store", Path("/proc/taprobe")):
        store = Store(root)
        assert store.find(OLD) is None
        with pytest.raises(ArtifactError) as caught:
            store.commit(OLD, refuse, provenance={})
        assert str(root) in str(caught.value)


@pytest.mark.parametrize("is_used", [True, False])
def test_a_root_that_vanished_is_not_made_again(tmp_path: Path, is_used: bool) -> None:
    root = tmp_path / "disk"
    if not is_used:
        root.mkdir()
    store = Store(root)
    if is_used:
        store.commit(OLD, write, provenance={})
    shutil.rmtree(root)
    with pytest.raises(ArtifactError, match="folder is gone") as caught:
        store.commit(NEW, refuse, provenance={})
    assert str(root) in str(caught.value)
    assert not root.exists()


def test_too_little_space_is_found_before_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda self: 1999)
    with pytest.raises(DiskFullError, match="2000 bytes needed, 1999 bytes free") as caught:
        Store(tmp_path).commit(OLD, refuse, provenance={}, estimate_bytes=1000)
    assert str(tmp_path / "labels" / "m@L16" / "7") in str(caught.value)
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda self: 2000)
    Store(tmp_path).commit(OLD, write, provenance={}, estimate_bytes=1000)
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda self: None)
    Store(tmp_path).commit(NEW, write, provenance={}, estimate_bytes=10**18)


def test_a_real_disk_is_asked_for_space(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="bytes free"):
        Store(tmp_path).commit(OLD, refuse, provenance={}, estimate_bytes=10**18)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_inside_the_stage(tmp_path: Path, code: int) -> None:
    store = Store(tmp_path)
    store.commit(OLD, write, provenance={})

    def fill(folder: Path) -> None:
        write(folder)
        full = OSError(code, "refused", str(folder / "v.json"))
        raise RuntimeError("writer thread failed") from full

    with pytest.raises(DiskFullError, match=r"5 bytes needed, \d+ bytes free") as caught:
        store.commit(NEW, fill, provenance={}, estimate_bytes=5)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert list(tmp_path.rglob(".tmp-*")) == []
    assert store.current("labels", ("m@L16", "7")) == OLD


def test_free_space_that_cannot_be_asked_for_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[int] = [10**9]

    def free_bytes(self: LocalBackend) -> int:
        if not answers:
            raise OSError(errno.EIO, "Input/output error")
        return answers.pop()

    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalBackend, "free_bytes", free_bytes)

    with pytest.raises(DiskFullError, match="needed not estimated, bytes free not known"):
        Store(tmp_path).commit(OLD, fill, provenance={})


def test_other_errors_of_the_system_inside_the_stage(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ArtifactError, match="Input/output error") as caught:
        Store(tmp_path).commit(OLD, fail, provenance={})
    assert type(caught.value) is ArtifactError
    assert list(tmp_path.rglob(".tmp-*")) == []


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: Input/output error (os error 5)"), ComputeError("(os error 30)")],
)
def test_errors_of_the_system_that_file_libraries_wrap(error: Exception) -> None:
    with pytest.raises(ArtifactError, match="os error") as caught, disk_errors("here"):
        raise error
    assert type(caught.value) is ArtifactError
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [SafetensorError("bad header"), RuntimeError("(os error 111)")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors("here"):
        raise error
    assert caught.value is error


def test_a_disk_that_cannot_be_read_is_not_taken_for_corruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ComputeError("Input/output error (os error 5)")

    monkeypatch.setattr("polars.read_parquet", fail)
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        read_table(tmp_path / "t.parquet")
    assert type(caught.value) is ArtifactError


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), TimeoutError(110, "late"), OSError("503")]
)
def test_network_errors_pass_unchanged(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, disk_errors("here"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("text", "is_full"),
    [
        ("I/O error: No space left on device (os error 28)", True),
        ("underlying IO error: File too large (os error 27)", True),
        ("Disk quota exceeded (os error 122)", True),
        ("No space left on device", True),
        ("Permission denied (os error 13)", False),
        ("os error 280", False),
        ("layer 28", False),
    ],
)
def test_a_full_disk_is_known_by_its_text(text: str, is_full: bool) -> None:
    assert is_disk_full(ValueError(text)) is is_full


class Recorder:
    """Notes fsync and rename calls, and what the folder of the artifact held at each of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, self.noting(name, getattr(os, name)))

    def noting(self, name: str, real: Any) -> Any:
        def call(*args: Any) -> None:
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])  # noqa: PTH115
            self.calls.append((name, target))
            real(*args)

        return call


def test_order_of_fsync_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.commit(OLD, write, provenance={})
    recorder = Recorder(monkeypatch)
    partition = tmp_path / "labels" / "m@L16" / "7"
    final = store.commit(NEW, write, provenance={}).path
    calls = recorder.calls
    published, swapped = (
        calls.index(("rename", str(final))),
        calls.index(("replace", str(partition / "CURRENT"))),
    )
    before = [path for name, path in calls[:published] if name == "fsync"]
    staging = before[-1]
    assert Path(staging).parent == partition
    assert Path(staging).name.startswith(".tmp-")
    expected = {f"{staging}/{name}" for name in ("v.json", "manifest.json", "plots/p.bin", "plots")}
    assert set(before) == {staging, *expected}
    assert before.index(f"{staging}/plots") > before.index(f"{staging}/plots/p.bin")
    ((_, pointer),) = calls[published + 1 : swapped]
    assert Path(pointer).name.startswith(".tmp-CURRENT")
    assert calls[swapped + 1 :] == [("fsync", str(partition))]


def test_new_folders_are_durable_up_to_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    Store(tmp_path / "store").commit(OLD, write, provenance={})
    synced = [path for name, path in recorder.calls if name == "fsync"]
    root = tmp_path / "store"
    chain = [tmp_path, root, root / "labels", root / "labels" / "m@L16"]
    assert synced[:4] == [str(path) for path in chain]


def test_a_small_commit_needs_few_fsyncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.commit(OLD, write, provenance={})
    recorder = Recorder(monkeypatch)
    store.commit(NEW, lambda folder: write_json(folder / "v.json", 1), provenance={})
    store.commit(NEW, refuse, provenance={})
    assert [name for name, _ in recorder.calls].count("fsync") == 5
