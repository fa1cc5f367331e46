from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from taprobe_core.errors import (
    BusyArtifactError,
    ConfigError,
    CorruptArtifactError,
    MissingArtifactError,
)
from taprobe_core.store import ArtifactKey, LocalBackend, Store, fingerprint, write_json
from taprobe_core.store import artifacts as artifacts_module


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(
    store: Store,
    stage: str,
    version: int,
    upstream: tuple[ArtifactKey, ...] = (),
    partition: tuple[str, ...] = ("p",),
) -> ArtifactKey:
    key = ArtifactKey(stage, partition, fingerprint(stage, str(version), {}, []))
    store.commit(
        key,
        lambda folder: write_json(folder / "v.json", version),
        provenance={"version": version},
        upstream=upstream,
    )
    return key


def folder(tmp_path: Path, key: ArtifactKey) -> Path:
    return tmp_path / "store" / str(key)


def test_verify_gives_one_verdict_per_artifact(store: Store, tmp_path: Path) -> None:
    source = put(store, "rollouts", 1)
    good, bad = put(store, "labels", 1, (source,)), put(store, "labels", 2, (source,))
    (folder(tmp_path, bad) / "v.json").write_bytes(b"3\n")
    verdicts = {verdict.key: verdict for verdict in store.verify()}
    assert verdicts.keys() == {source, good, bad}
    assert [key for key, verdict in verdicts.items() if not verdict.is_sound] == [bad]
    assert isinstance(verdicts[bad].error, CorruptArtifactError)
    assert verdicts[bad].is_discardable
    assert not verdicts[good].is_discardable
    assert [verdict.key for verdict in store.verify("rollouts")] == [source]
    store.discard(bad)
    assert all(verdict.is_sound for verdict in store.verify())


def test_verify_reads_the_bytes_again(store: Store, tmp_path: Path) -> None:
    key = put(store, "labels", 1)
    path = folder(tmp_path, key) / "v.json"
    before = path.stat()
    store.open(key)
    path.write_bytes(b"9\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [verdict.is_sound for verdict in store.verify()] == [False]


def test_a_missing_upstream_is_unsound_but_not_discardable(store: Store) -> None:
    source = put(store, "rollouts", 1)
    key = put(store, "labels", 1, (source,))
    store.discard(source)
    (verdict,) = store.verify()
    assert (verdict.key, verdict.is_sound, verdict.is_discardable) == (key, False, False)
    assert isinstance(verdict.error, MissingArtifactError)
    assert str(source) in str(verdict.error)
    put(store, "rollouts", 1)
    assert all(verdict.is_sound for verdict in store.verify())


def test_a_broken_pointer_has_its_own_verdict(store: Store, tmp_path: Path) -> None:
    key = put(store, "labels", 1)
    (folder(tmp_path, key).parent / "CURRENT").write_text("../../x")
    sound, broken = store.verify()
    assert (sound.key, sound.is_sound) == (key, True)
    assert broken.key == key._replace(fingerprint="CURRENT")
    assert broken.is_discardable
    store.discard(broken.key)
    assert all(verdict.is_sound for verdict in store.verify())
    assert store.current("labels", ("p",)) is None
    put(store, "labels", 1)
    assert store.current("labels", ("p",)) == key


def test_a_version_pruned_while_verifying_is_passed_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sorted([put(store, "labels", 1), put(store, "labels", 2)])
    verdicts = store.verify()
    assert next(verdicts).key == first
    store.discard(second)
    assert list(verdicts) == []


def test_lineage_is_a_tree_with_provenance(store: Store) -> None:
    rollouts = put(store, "rollouts", 1)
    labels, spans = put(store, "labels", 2, (rollouts,)), put(store, "spans", 3, (rollouts,))
    probes = put(store, "probes", 4, (labels, spans))
    tree = store.lineage(probes)
    assert (tree.key, tree.provenance["version"]) == (probes, 4)
    assert [node.key for node in tree.upstream] == [labels, spans]
    assert tree.upstream[0].upstream[0] is tree.upstream[1].upstream[0]
    lines = tree.render()
    assert [line.split("  ")[-1] for line in lines[4:]] == ["(see above)"]
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 2, 4, 2, 4]
    assert [str(key) in line for key, line in zip((probes, labels, rollouts, spans), lines)] == (  # noqa: B905
        [True] * 4
    )


def test_lineage_names_what_is_missing(store: Store) -> None:
    source = put(store, "rollouts", 1)
    key = put(store, "labels", 1, (source,))
    store.discard(source)
    tree = store.lineage(key)
    assert [(node.key, node.is_missing) for node in tree.upstream] == [(source, True)]
    assert tree.render()[1] == f"  {source}  missing"
    with pytest.raises(MissingArtifactError):
        store.lineage(source)


def test_an_artifact_that_is_its_own_ancestor_is_refused(store: Store) -> None:
    second = ArtifactKey("labels", ("p",), fingerprint("labels", "2", {}, []))
    first = put(store, "labels", 1, (second,))
    put(store, "labels", 2, (first,))
    with pytest.raises(CorruptArtifactError, match="own ancestor"):
        store.lineage(first)


def test_usage_counts_by_stage(store: Store, tmp_path: Path) -> None:
    keys = [put(store, "labels", 1), put(store, "labels", 2), put(store, "spans", 1)]
    (tmp_path / "store" / "labels" / "p" / ".tmp-old").mkdir()
    sizes = [sum(p.stat().st_size for p in folder(tmp_path, key).iterdir()) for key in keys]
    assert store.usage().to_dicts() == [
        {
            "stage": "labels",
            "n_artifacts": 2,
            "n_current": 1,
            "n_files": 4,
            "size_bytes": sizes[0] + sizes[1],
        },
        {
            "stage": "spans",
            "n_artifacts": 1,
            "n_current": 1,
            "n_files": 2,
            "size_bytes": sizes[2],
        },
    ]
    assert Store(tmp_path / "none").usage().schema["size_bytes"] == pl.Int64


def test_prune_keeps_the_newest_of_each_partition(store: Store) -> None:
    keys = [put(store, "labels", version) for version in range(5)]
    other = [put(store, "labels", version, partition=("q",)) for version in range(2)]
    expected = sorted(keys[:2])
    assert store.prune(3, dry_run=True) == expected
    assert len(list(store.keys())) == 7
    assert store.prune() == expected
    assert set(store.keys()) == {*keys[2:], *other}
    assert store.prune() == []


def test_prune_keeps_what_is_current(store: Store) -> None:
    keys = [put(store, "labels", version) for version in range(4)]
    store.adopt(keys[0])
    for dry_run in (True, False):
        assert store.prune(1, dry_run=dry_run) == sorted(keys[1:3])
    assert store.current("labels", ("p",)) == keys[0]


def test_prune_keeps_whatever_a_kept_manifest_refers_to(store: Store) -> None:
    rollouts = [put(store, "rollouts", version) for version in range(4)]
    spans = put(store, "spans", 0, (rollouts[0],))
    labels = put(store, "labels", 0, (spans,))
    put(store, "spans", 1, (rollouts[3],))
    assert store.prune(1) == sorted(rollouts[1:3])
    assert all(verdict.is_sound for verdict in store.verify())
    assert [node.key for node in store.lineage(labels).upstream] == [spans]


def test_prune_does_not_trust_the_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(datetime):
        year_now = 2030

        @classmethod
        def now(cls, tz: object = None) -> datetime:
            cls.year_now -= 1
            return datetime(cls.year_now, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(artifacts_module, "datetime", Backwards)
    keys = [put(store, "labels", version) for version in range(4)]
    times = [store.open(key).manifest.created_at for key in keys]
    assert times == sorted(times, reverse=True)
    for index, key in enumerate(keys):
        os.utime(store.open(key).path, (1e9 - index, 1e9 - index))
    assert [store.open(key).manifest.sequence for key in keys] == [1, 2, 3, 4]
    assert store.prune(2) == sorted(keys[:2])


def test_prune_leaves_unreadable_versions_to_discard(store: Store, tmp_path: Path) -> None:
    keys = [put(store, "labels", version) for version in range(4)]
    (folder(tmp_path, keys[0]) / "manifest.json").write_text("{")
    assert store.prune(1) == sorted(keys[1:3])
    assert keys[0] in store.keys()  # noqa: SIM118


def test_prune_clears_what_dead_writers_left(store: Store, tmp_path: Path) -> None:
    put(store, "labels", 1)
    for name in (".tmp-dead", ".tmp-CURRENT-1"):
        (tmp_path / "store" / "labels" / "p" / name).mkdir()
        (tmp_path / "store" / "labels" / "p" / name / "x").write_text("x")
    (tmp_path / "store" / "labels" / "p" / ".tmp-file").write_text("x")
    assert store.prune(dry_run=True) == []
    assert len(list(tmp_path.rglob(".tmp-*"))) == 3
    assert store.prune() == []
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_prune_passes_over_a_partition_that_is_being_written(store: Store) -> None:
    keys = [put(store, "labels", version) for version in range(2)]
    quiet = [put(store, "spans", version) for version in range(2)]
    with store.locked(keys[0]):
        assert store.prune(1) == quiet[:1]
        with pytest.raises(BusyArtifactError, match=rf"pid {os.getpid()}"):
            Store(store.open(keys[0]).path.parents[2], lock_timeout_s=0.05).adopt(keys[0])
    assert store.prune(1) == keys[:1]


def test_prune_spares_what_became_current_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [put(store, "labels", version) for version in range(3)]
    real = LocalBackend.stages

    def stages(backend: LocalBackend) -> list[str]:
        store.adopt(keys[0])
        return real(backend)

    listed = list(store.keys())
    monkeypatch.setattr(store, "keys", lambda stage: iter(listed))
    monkeypatch.setattr(LocalBackend, "stages", stages)
    assert store.prune(1) == [keys[1]]
    assert store.open(keys[0]).key == store.current("labels", ("p",))


@pytest.mark.parametrize("keep", [0, -1])
def test_prune_refuses_to_keep_nothing(store: Store, keep: int) -> None:
    put(store, "labels", 1)
    with pytest.raises(ConfigError, match="keep"):
        store.prune(keep)
