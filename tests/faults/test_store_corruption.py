from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from taprobe_core.errors import ArtifactError, CorruptArtifactError, StaleArtifactError
from taprobe_core.store import (
    Artifact,
    ArtifactKey,
    LocalBackend,
    Store,
    fingerprint,
    write_json,
    write_table,
)

KEY = ArtifactKey("activations", ("m@L16", "7"), fingerprint("activations", "1", {}, []))
OTHER = KEY._replace(fingerprint=fingerprint("activations", "2", {}, []))
N_FLIPS = 200


def write(folder: Path) -> None:
    from safetensors.numpy import save_file

    table = pl.DataFrame({"x": [0.5 * i for i in range(200)]})
    write_table(folder / "t.parquet", table)
    save_file({"mean": table["x"].to_numpy()}, folder / "a.safetensors")
    write_json(folder / "v.json", {"a": list(range(40))})
    (folder / "b.bin").write_bytes(bytes(range(256)))


FILES = ["t.parquet", "a.safetensors", "v.json", "b.bin", "manifest.json"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def artifact(store: Store) -> Artifact:
    return store.commit(KEY, write, provenance={"rate": 0.5, "text": "a b"})


def rewrite_in_place(path: Path, content: bytes) -> None:
    """Change bytes behind the store's back, and put the time stamps back as well."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_caught(store: Store, artifact: Artifact, name: str) -> None:
    path = artifact.path / name
    sound = path.read_bytes()
    chance = random.Random(name)
    edges = [0, 7, 8, 9, len(sound) - 1]
    for place in edges + [chance.randrange(len(sound)) for _ in range(N_FLIPS - len(edges))]:
        flipped = bytearray(sound)
        flipped[place] ^= 1 << chance.randrange(8)
        rewrite_in_place(path, bytes(flipped))
        with pytest.raises((CorruptArtifactError, StaleArtifactError)) as caught:
            store.open(KEY)
        assert name in str(caught.value)
        assert "Fix:" in str(caught.value)
        assert "verify --discard" in str(caught.value)
        if name != "manifest.json":
            assert artifact.manifest.files[name].sha256 in str(caught.value)
            with pytest.raises(CorruptArtifactError):
                artifact.file(name)
    rewrite_in_place(path, sound)
    assert store.open(KEY) == artifact


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw + b"\n",
        lambda raw: raw + b"\0" * 4096,
        lambda raw: b"<html>503</html>",
    ],
    ids=["empty", "cut", "half", "newline", "padded", "html"],
)
def test_every_other_length_is_caught(
    store: Store, artifact: Artifact, name: str, change: Callable[[bytes], bytes]
) -> None:
    path = artifact.path / name
    path.write_bytes(change(path.read_bytes()))
    assert store.find(KEY) is None
    with pytest.raises(CorruptArtifactError, match="manifest"):
        store.open(KEY)
    (verdict,) = store.verify()
    assert verdict.is_discardable


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_caught(store: Store, artifact: Artifact, name: str) -> None:
    (artifact.path / name).unlink()
    assert store.find(KEY) is None
    with pytest.raises(CorruptArtifactError) as caught:
        store.open(KEY)
    assert name in str(caught.value)


def test_every_extra_file_is_listed(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "sub").mkdir()
    (artifact.path / "sub" / "probe.pkl").write_bytes(b"\x80\x04.")
    (artifact.path / "link").symlink_to(artifact.path / "v.json")
    (artifact.path / "folder").symlink_to(artifact.path / "sub")
    (artifact.path / "v.json").unlink()
    (artifact.path / "v.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifactError) as caught:
        store.open(KEY)
    assert "folder/" not in str(caught.value)
    for fault in (
        "folder: unexpected",
        "link: unexpected",
        "sub/probe.pkl: unexpected",
        "v.json: not a regular file",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 10**5, b'{"schema_version": "1"}', b"{}"],
)
def test_a_manifest_that_is_none_is_refused(store: Store, artifact: Artifact, raw: bytes) -> None:
    (artifact.path / "manifest.json").write_bytes(raw)
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json"):
        store.open(KEY)


def edited(artifact: Artifact, **changes: object) -> bytes:
    content = json.loads((artifact.path / "manifest.json").read_bytes())
    content.update(changes)
    kept = {name: value for name, value in content.items() if value is not ...}
    return (json.dumps(kept, sort_keys=True, indent=1) + "\n").encode()


FIELDS = [
    "format", "stage", "partition", "fingerprint", "sequence", "created_at", "code_version",
    "config", "upstream", "provenance", "versions", "writer", "files", "sha256",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [..., None, {"x": 1}, ["../x"]], ids=repr)
def test_an_edited_manifest_is_refused(
    store: Store, artifact: Artifact, field: str, value: object
) -> None:
    (artifact.path / "manifest.json").write_bytes(edited(artifact, **{field: value}))
    with pytest.raises(CorruptArtifactError, match="manifest"):
        store.open(KEY)


def test_an_unknown_field_and_another_spelling_are_refused(
    store: Store, artifact: Artifact
) -> None:
    content = json.loads((artifact.path / "manifest.json").read_bytes())
    for raw in (edited(artifact, more=1), json.dumps(content).encode()):
        (artifact.path / "manifest.json").write_bytes(raw)
        with pytest.raises(CorruptArtifactError, match="manifest"):
            store.open(KEY)


@pytest.mark.parametrize("version", [0, 2, 10**6])
def test_another_schema_version_is_stale_and_left_alone(
    store: Store, artifact: Artifact, version: int
) -> None:
    raw = edited(artifact, schema_version=version, files=..., new_field=1)
    (artifact.path / "manifest.json").write_bytes(raw)
    assert store.find(KEY) is None
    actions: list[Callable[[], object]] = [
        lambda: store.open(KEY),
        lambda: store.commit(KEY, write, provenance={}),
        lambda: store.lineage(KEY),
    ]
    for action in actions:
        with pytest.raises(StaleArtifactError, match=f"version {version}, this program reads 1"):
            action()
    assert (artifact.path / "manifest.json").read_bytes() == raw
    assert store.commit(OTHER, write, provenance={}).manifest.sequence == 1


def test_an_artifact_moved_to_another_name_is_refused(store: Store, artifact: Artifact) -> None:
    shutil.copytree(artifact.path, artifact.path.with_name(OTHER.fingerprint))
    assert store.find(OTHER) is None
    with pytest.raises(CorruptArtifactError, match=f"belongs to {KEY}"):
        store.open(OTHER)
    assert store.commit(OTHER, write, provenance={}).manifest.key == OTHER


def test_an_unsound_version_is_replaced_by_the_next_commit(
    store: Store, artifact: Artifact, tmp_path: Path
) -> None:
    (artifact.path / "b.bin").write_bytes(b"cut")
    store.commit(KEY, write, provenance={})
    assert all(verdict.is_sound for verdict in store.verify())
    assert list(tmp_path.rglob(".tmp-*")) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"../../x", b"/etc/passwd", b"0" * 20, b"0" * 5000, b"\xff\0", b"manifest.json"],
)
def test_a_hostile_pointer_is_refused(store: Store, artifact: Artifact, content: bytes) -> None:
    pointer = artifact.path.parent / "CURRENT"
    pointer.write_bytes(content)
    with pytest.raises(CorruptArtifactError) as caught:
        store.current(KEY.stage, KEY.partition)
    assert f"there are: {KEY.fingerprint}" in str(caught.value)
    assert str(pointer) in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert store.open(KEY) == artifact
    store.commit(KEY, write, provenance={})
    assert store.current(KEY.stage, KEY.partition) == KEY


def test_a_pointer_that_is_a_link_is_not_followed(store: Store, artifact: Artifact) -> None:
    pointer = artifact.path.parent / "CURRENT"
    pointer.rename(pointer.with_name("secret"))
    pointer.symlink_to("secret")
    with pytest.raises(CorruptArtifactError, match="not a regular file"):
        store.current(KEY.stage, KEY.partition)


def test_reading_errors_of_the_disk_name_the_folder(
    store: Store, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalBackend, "manifest_bytes", fail)
    for action in (store.find, store.open, store.adopt, store.lineage):
        with pytest.raises(ArtifactError, match="Input/output error") as caught:
            action(KEY)
        assert str(artifact.path) in str(caught.value)
