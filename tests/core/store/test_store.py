from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from taprobe_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
)
from taprobe_core.store import (
    Artifact,
    ArtifactKey,
    LocalBackend,
    Store,
    fingerprint,
    integrity,
    library_versions,
    write_json,
    write_table,
)

FRAME = pl.DataFrame({"problem_id": [1, 2], "text": ["ü", None]})


def key_of(version: str, stage: str = "labels", partition: tuple[str, ...] = ("m@L16", "7")) -> Any:
    return ArtifactKey(stage, partition, fingerprint(stage, version, {}, []))


A, B = key_of("a"), key_of("b")


def writing(value: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_json(folder / "value.json", value)
        write_table(folder / "table.parquet", FRAME)
        (folder / "plots").mkdir()
        (folder / "plots" / "one.bin").write_bytes(b"\0\1")

    return write


def refuse(folder: Path) -> None:
    raise AssertionError(f"computed again in {folder}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".tmp-*")]


def test_commit_then_open(store: Store, tmp_path: Path) -> None:
    assert store.find(A) is None
    made = store.commit(A, writing(1), provenance={"device": "cpu"})
    opened = Store(tmp_path / "store").open(A)
    assert opened == made == store.find(A)
    assert opened.path == tmp_path / "store" / "labels" / "m@L16" / "7" / A.fingerprint
    assert opened.read_json("value.json") == 1
    assert opened.read_table("table.parquet").equals(FRAME)
    assert opened.file("plots/one.bin").read_bytes() == b"\0\1"
    assert {path.name for path in opened.path.parent.iterdir()} == {
        A.fingerprint,
        "CURRENT",
        ".lock",
    }


def test_manifest_says_what_the_artifact_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPROBE_RUN_ID", "run-7")
    store.commit(B, writing(0), provenance={})
    manifest = store.commit(
        A,
        writing(1),
        provenance={"revision": "abc", "rates": (0.5, 1e-300)},
        upstream=[B],
        code_version="3",
        config={"k": None},
    ).manifest
    assert manifest.key == A
    assert manifest.upstream_keys == (B,)
    assert (manifest.code_version, manifest.config) == ("3", {"k": None})
    assert manifest.provenance == {"revision": "abc", "rates": [0.5, 1e-300]}
    assert manifest.sequence == 2
    assert manifest.created_at.utcoffset() is not None
    assert manifest.writer.run_id == "run-7"
    assert manifest.versions == library_versions()
    assert {"python", "polars", "torch"} <= manifest.versions.keys()
    assert list(manifest.files) == ["plots/one.bin", "table.parquet", "value.json"]
    table = manifest.files["table.parquet"].content
    assert table.model_dump() == {
        "kind": "table",
        "n_rows": 2,
        "columns": {"problem_id": "Int64", "text": "String"},
    }
    assert manifest.size_bytes == sum(record.size_bytes for record in manifest.files.values())


def test_tensor_files_are_described_tensor_by_tensor(store: Store) -> None:
    from safetensors.numpy import save_file

    values = pl.Series([1.0, 2.0, 3.0]).to_numpy().reshape(1, 3)
    sha256 = hashlib.sha256(values.tobytes()).hexdigest()

    def write(folder: Path) -> None:
        save_file({"mean": values}, folder / "a.safetensors", metadata={"dims": "span d_model"})

    content = store.commit(A, write, provenance={}).manifest.files["a.safetensors"].content
    assert content.model_dump() == {
        "kind": "tensors",
        "tensors": {"mean": {"dtype": "F64", "shape": (1, 3), "sha256": sha256}},
        "metadata": {"dims": "span d_model"},
    }


def test_provenance_may_be_completed_while_writing(store: Store) -> None:
    measured: dict[str, object] = {"device": "cpu"}

    def write(folder: Path) -> None:
        writing(1)(folder)
        measured["seconds"] = 0.25

    made = store.commit(A, write, provenance=measured)
    assert made.manifest.provenance == {"device": "cpu", "seconds": 0.25}


def test_same_key_is_reused(store: Store, tmp_path: Path) -> None:
    made = store.commit(A, writing(1), provenance={})
    assert store.commit(A, refuse, provenance={}) == made
    assert Store(tmp_path / "store").commit(A, refuse, provenance={}) == made


def test_current_is_the_version_last_asked_for(store: Store) -> None:
    assert store.current("labels", ("m@L16", "7")) is None
    store.commit(A, writing(1), provenance={})
    store.commit(B, writing(2), provenance={})
    assert store.current("labels", ["m@L16", "7"]) == B
    assert store.open(A).read_json("value.json") == 1
    store.commit(A, refuse, provenance={})
    assert store.current("labels", ("m@L16", "7")) == A
    adopted = store.adopt(B)
    assert adopted is not None
    assert adopted.key == B == store.current("labels", ("m@L16", "7"))
    assert store.adopt(key_of("c")) is None


def test_current_follows_a_pointer_that_moves_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit(B, writing(2), provenance={})
    answers = iter([A.fingerprint, B.fingerprint])
    monkeypatch.setattr(LocalBackend, "pointer", lambda *_: next(answers))
    assert store.current("labels", ("m@L16", "7")) == B


def test_a_stage_without_partitions_and_nested_partitions(store: Store) -> None:
    keys = [
        key_of("1", "labels", ()),
        key_of("1", "labels", ("a",)),
        key_of("1", "labels", ("a", "b")),
        key_of("1", "spans", ("a",)),
    ]
    for key in keys:
        store.commit(key, writing(str(key)), provenance={})
    assert list(store.keys()) == keys
    assert list(store.keys("spans")) == keys[3:]
    assert list(store.keys("probes")) == []
    for key in keys:
        assert store.open(key).read_json("value.json") == str(key)
        assert store.current(key.stage, key.partition) == key


def test_keys_pass_over_what_is_no_artifact(store: Store, tmp_path: Path) -> None:
    store.commit(A, writing(1), provenance={})
    for name in (".tmp-x", "lost+found", "labels/m@L16/.tmp-" + "0" * 20, "Labels/" + "0" * 20):
        (tmp_path / "store" / name).mkdir(parents=True)
    (tmp_path / "store" / "labels" / ("0" * 20)).write_text("a file")
    assert list(store.keys()) == [A]


def test_an_empty_or_absent_store_reads_as_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert list(store.keys()) == []
    assert store.find(A) is None
    assert store.current("labels", ()) is None
    assert store.usage().is_empty()
    assert list(store.verify()) == []
    assert store.prune() == []
    with pytest.raises(MissingArtifactError, match="never built, or has been pruned") as caught:
        store.open(A)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_an_unknown_file_name_lists_the_known_ones(store: Store) -> None:
    artifact = store.commit(A, writing(1), provenance={})
    with pytest.raises(MissingArtifactError, match=r"table\.parquet, value\.json"):
        artifact.read_table("tables.parquet")


def test_a_failing_stage_leaves_nothing(store: Store, tmp_path: Path) -> None:
    store.commit(A, writing(1), provenance={})

    class StageError(Exception):
        pass

    for error in (StageError(), KeyboardInterrupt(), SystemExit(3), ConnectionResetError(104, "x")):

        def fail(folder: Path, error: BaseException = error) -> None:
            writing(2)(folder)
            raise error

        with pytest.raises(type(error)):
            store.commit(B, fail, provenance={})
        assert leftovers(tmp_path) == []
        assert list(store.keys()) == [A]
        assert store.current("labels", ("m@L16", "7")) == A
    assert store.commit(B, writing(2), provenance={}).read_json("value.json") == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"{}"),
        (".hidden", b""),
        ("a b", b""),
        ("-rf", b""),
        ("ü", b""),
        ("x" * 201, b""),
        ("bad.json", b"[NaN]"),
        ("bad.parquet", b"PAR1"),
        ("bad.safetensors", b"12345678"),
    ],
)
def test_an_unfit_file_is_refused(store: Store, tmp_path: Path, name: str, content: bytes) -> None:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    with pytest.raises(ArtifactError) as caught:
        store.commit(A, write, provenance={})
    assert name in str(caught.value)
    assert "Fix:" in str(caught.value)
    assert list(store.keys()) == leftovers(tmp_path) == []


def test_links_and_empty_artifacts_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(ArtifactError, match="link"):
        store.commit(A, lambda f: (f / "link").symlink_to(tmp_path / "secret"), provenance={})
    with pytest.raises(ArtifactError, match="wrote no file"):
        store.commit(A, lambda folder: None, provenance={})
    assert list(store.keys()) == []


@pytest.mark.parametrize("field", ["provenance", "config"])
@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1: 2}])
def test_what_a_manifest_cannot_hold_is_refused_before_computing(
    store: Store, field: str, value: object
) -> None:
    arguments: dict[str, Any] = {"provenance": {}, "config": {}} | {field: {"a": [value]}}
    with pytest.raises(ArtifactError, match=rf"{field} of labels/.*\$\.a\[0\]"):
        store.commit(A, refuse, **arguments)


def test_hostile_keys_touch_nothing(store: Store, tmp_path: Path) -> None:
    bad = ArtifactKey("labels", ("..", ".."), "0" * 20)
    actions: list[Callable[[], object]] = [
        lambda: store.find(bad),
        lambda: store.open(bad),
        lambda: store.commit(bad, refuse, provenance={}),
        lambda: store.commit(A, refuse, provenance={}, upstream=[bad]),
        lambda: store.current(bad.stage, bad.partition),
        lambda: store.keys("../.."),
        lambda: store.discard(bad),
        lambda: store.discard(bad._replace(fingerprint="CURRENT")),
        lambda: store.lineage(bad),
    ]
    for action in actions:
        with pytest.raises(ConfigError):
            action()
    assert list(tmp_path.iterdir()) == []


def test_discard_removes_one_version_and_its_pointer(store: Store, tmp_path: Path) -> None:
    for key in (A, B):
        store.commit(key, writing(1), provenance={})
    store.discard(A)
    assert list(store.keys()) == [B] == [store.current("labels", ("m@L16", "7"))]
    store.discard(B)
    assert list(store.keys()) == []
    assert store.current("labels", ("m@L16", "7")) is None
    assert leftovers(tmp_path) == []
    for key in (B, B._replace(fingerprint="CURRENT")):
        with pytest.raises(MissingArtifactError, match="nothing to discard"):
            store.discard(key)
    assert store.commit(B, writing(3), provenance={}).read_json("value.json") == 3


def test_a_file_that_vanishes_is_missing_not_corrupt(store: Store) -> None:
    artifact = store.commit(A, writing(1), provenance={})
    store.discard(A)
    with pytest.raises(MissingArtifactError, match="is gone"):
        artifact.read_json("value.json")


def test_a_fresh_artifact_is_what_the_manifest_file_says(store: Store) -> None:
    artifact = store.commit(A, writing(1), provenance={"ünï": "\u2028"})
    content = json.loads((artifact.path / "manifest.json").read_bytes())
    assert content == artifact.manifest.model_dump(mode="json")
    assert content["format"] == "taprobe-artifact"
    assert content["schema_version"] == 1


def test_a_backend_can_be_given(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    store = Store(backend)
    assert store.backend is backend
    assert isinstance(store.commit(A, writing(1), provenance={}), Artifact)


def test_bytes_found_bad_are_replaced_by_the_next_commit(store: Store) -> None:
    artifact = store.commit(A, writing(1), provenance={})
    (artifact.path / "plots" / "one.bin").write_bytes(b"\0\2")
    assert store.find(A) is not None
    with pytest.raises(CorruptArtifactError):
        store.open(A)
    assert store.find(A) is None
    again = store.commit(A, writing(1), provenance={})
    assert store.open(A) == again
    assert again.manifest.sequence == 2


def test_each_file_is_hashed_once_per_process(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = integrity._sha256

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(integrity, "_sha256", sha256)
    names = ["one.bin", "table.parquet", "value.json"]
    store.commit(A, writing(1), provenance={})
    assert hashed == names
    store.open(A).read_json("value.json")
    assert hashed == names
    monkeypatch.setattr(integrity, "_checked", {})
    other = Store(tmp_path / "store")
    artifact = other.find(A)
    assert artifact is not None
    artifact.read_json("value.json")
    assert hashed == [*names, "value.json"]
    other.open(A).read_table("table.parquet")
    assert sorted(hashed) == sorted(names * 2)
    assert all(verdict.is_sound for verdict in other.verify())
    assert sorted(hashed) == sorted(names * 3)
