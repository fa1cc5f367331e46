"""Links in a store are refused by name, listed once, and never written through."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.errors import (
    ArtifactError,
    CorruptArtifactError,
    MissingArtifactError,
)
from taprobe_core.store import (
    ArtifactKey,
    Store,
    fingerprint,
    reader,
    write_json,
    write_table,
    write_tensors,
)

KEY = ArtifactKey("labels", ("m", "s"), fingerprint("labels", "1", {}, []))


def write(folder: Path) -> None:
    write_json(folder / "a.json", {"a": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.commit(KEY, write, provenance={})
    return store


def moved_out(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "outside"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("part", ["", "manifest.json"], ids=["version", "manifest"])
def test_a_linked_version_is_named_refused_discarded_and_made_again(
    store: Store, tmp_path: Path, part: str
) -> None:
    path = store.backend.folder(KEY)
    moved_out(path / part if part else path, tmp_path)
    fresh = Store(tmp_path / "store")
    assert fresh.find(KEY) is None
    with pytest.raises(CorruptArtifactError, match="a link on the way to its manifest"):
        fresh.open(KEY)
    (verdict,) = fresh.verify()
    assert (verdict.key, verdict.is_sound, verdict.is_discardable) == (KEY, False, True)
    assert fresh.prune(keep=1) == []
    fresh.usage()
    fresh.discard(KEY)
    assert (tmp_path / "outside").exists()
    assert not path.exists()
    fresh.commit(KEY, write, provenance={})
    assert not path.is_symlink()
    assert fresh.open(KEY).read_json("a.json") == {"a": 1}


def test_a_commit_replaces_a_link_and_leaves_what_it_points_to(
    store: Store, tmp_path: Path
) -> None:
    path = store.backend.folder(KEY)
    moved_out(path, tmp_path)
    Store(tmp_path / "store").commit(KEY, write, provenance={})
    assert not path.is_symlink()
    assert sorted(each.name for each in (tmp_path / "outside").iterdir()) == [
        "a.json",
        "manifest.json",
    ]


@pytest.mark.parametrize("n_parts", [0, 1, 2], ids=["stage", "part", "partition"])
def test_nothing_is_read_or_written_through_a_linked_folder(
    store: Store, tmp_path: Path, n_parts: int
) -> None:
    place = Path(tmp_path / "store", KEY.stage, *KEY.partition[:n_parts])
    moved_out(place, tmp_path)
    before = sorted(path.name for path in (tmp_path / "outside").rglob("*"))
    fresh = Store(tmp_path / "store")
    assert fresh.find(KEY) is None
    with pytest.raises(CorruptArtifactError):
        fresh.open(KEY)
    assert list(fresh.keys()) == []
    with pytest.raises(ArtifactError, match="a link in place of a folder of artifacts") as refused:
        fresh.commit(KEY, write, provenance={})
    assert refused.value.where == str(place)
    assert sorted(path.name for path in (tmp_path / "outside").rglob("*")) == before


def test_a_linked_loop_is_listed_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "store" / "labels" / "again").symlink_to(tmp_path / "store" / "labels")
    (tmp_path / "store" / "labels" / "m" / "up").symlink_to("..")
    assert list(Store(tmp_path / "store").keys()) == [KEY]


def test_a_root_that_is_a_link_is_fine(store: Store, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(tmp_path / "store")
    linked = Store(tmp_path / "short")
    assert linked.open(KEY).read_json("a.json") == {"a": 1}
    assert list(linked.keys()) == [KEY]
    assert [verdict.is_sound for verdict in linked.verify()] == [True]


FORMS: dict[str, Callable[[Path], None]] = {
    "a.json": write,
    "t.parquet": lambda folder: write_table(folder / "t.parquet", _frame()),
    "t.safetensors": lambda folder: write_tensors(folder / "t.safetensors", _tensors()),
}


def _frame() -> Any:
    import polars as pl

    return pl.DataFrame({"a": [1]})


def _tensors() -> Any:
    import torch

    return {"a": torch.zeros(2)}


@pytest.mark.parametrize("name", FORMS)
def test_a_version_pruned_between_its_hash_and_its_reading_is_missing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taprobe_core.store.reader import Artifact

    store = Store(tmp_path / "store")
    artifact = store.commit(KEY, FORMS[name], provenance={})
    real = Artifact.file

    def then_pruned(self: Artifact, asked: str, **options: Any) -> Path:
        path = real(self, asked, **options)
        shutil.rmtree(self.path)
        return path

    monkeypatch.setattr(Artifact, "file", then_pruned)
    read = {"json": "read_json", "parquet": "read_table", "safetensors": "read_tensors"}
    with pytest.raises(MissingArtifactError, match="was removed while it was read"):
        getattr(artifact, read[name.split(".")[1]])(name)


def test_a_long_walk_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="taprobe_core")
    assert list(reader.reported(range(3), "artifacts hashed")) == [0, 1, 2]
    assert caplog.text == ""
    monkeypatch.setattr(reader, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(reader.reported(range(3), "artifacts hashed")) == [0, 1, 2]
    assert "2 artifacts hashed so far" in caplog.text
