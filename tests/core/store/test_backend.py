from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import pytest

from taprobe_core.errors import CorruptArtifactError
from taprobe_core.store import ArtifactKey, Backend, Store, fingerprint, write_json
from taprobe_core.store.local import file_sizes

Place = tuple[str, tuple[str, ...]]


class Bucket:
    """An object store in memory: whole objects by name, no folders, no renames, files on demand.

    Shows that the protocol asks for nothing that only a file system has: a version becomes visible
    when its manifest, put last, is there.
    """

    def __init__(self, cache: Path) -> None:
        self.objects: dict[str, bytes] = {}
        self.pointers: dict[Place, str] = {}
        self.fetched: list[str] = []
        self._cache = cache
        self._lock = Lock()

    def where(self, stage: str, partition: tuple[str, ...], name: str = "") -> str:
        return "bucket://" + "/".join((stage, *partition, name))

    def folder(self, key: ArtifactKey) -> Path:
        return self._cache / str(key)

    def fetch(self, key: ArtifactKey, name: str) -> None:
        path = self.folder(key) / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.objects[f"{key}/{name}"])
            self.fetched.append(name)

    def sizes(self, key: ArtifactKey) -> dict[str, int] | None:
        prefix = f"{key}/"
        found = {
            name.removeprefix(prefix): len(body)
            for name, body in self.objects.items()
            if name.startswith(prefix)
        }
        return found if "manifest.json" in found else None

    def manifest_bytes(self, key: ArtifactKey) -> bytes:
        try:
            return self.objects[f"{key}/manifest.json"]
        except KeyError:
            raise FileNotFoundError(2, "no such object", str(key)) from None

    def _keys(self) -> list[ArtifactKey]:
        names = sorted(name for name in self.objects if name.endswith("/manifest.json"))
        parts = [name.split("/")[:-1] for name in names]
        return [ArtifactKey(stage, tuple(rest[:-1]), rest[-1]) for stage, *rest in parts]

    def stages(self) -> list[str]:
        return sorted({key.stage for key in self._keys()})

    def partitions(self, stage: str) -> Iterator[tuple[str, ...]]:
        yield from sorted({key.partition for key in self._keys() if key.stage == stage})

    def versions(self, stage: str, partition: tuple[str, ...]) -> list[str]:
        return [key.fingerprint for key in self._keys() if key[:2] == (stage, partition)]

    def pointer(self, stage: str, partition: tuple[str, ...]) -> str | None:
        return self.pointers.get((stage, partition))

    @contextmanager
    def lock(self, stage: str, partition: tuple[str, ...], timeout_s: float) -> Iterator[None]:
        assert self._lock.acquire(timeout=timeout_s or 1)
        try:
            yield
        finally:
            self._lock.release()

    def free_bytes(self) -> int | None:
        return None

    @contextmanager
    def staging(self, key: ArtifactKey) -> Iterator[Path]:
        with TemporaryDirectory() as name:
            yield Path(name)

    def publish(self, key: ArtifactKey, folder: Path) -> None:
        for name in sorted(file_sizes(folder), key=lambda name: name == "manifest.json"):
            self.objects[f"{key}/{name}"] = (folder / name).read_bytes()
            if name != "manifest.json":
                self.fetch(key, name)
        self.fetched.clear()
        self.point(key)

    def point(self, key: ArtifactKey) -> None:
        self.pointers[key.stage, key.partition] = key.fingerprint

    def unpoint(self, stage: str, partition: tuple[str, ...]) -> None:
        self.pointers.pop((stage, partition), None)

    def remove(self, key: ArtifactKey) -> None:
        for name in sorted(self.sizes(key) or {}, key=lambda name: name != "manifest.json"):
            del self.objects[f"{key}/{name}"]


def key_of(n: int) -> ArtifactKey:
    return ArtifactKey("labels", ("m@L16", "7"), fingerprint("labels", str(n), {}, []))


def put(store: Store, n: int) -> None:
    def write(folder: Path) -> None:
        write_json(folder / "v.json", n)
        write_json(folder / "large.json", [n] * 100)

    store.commit(key_of(n), write, provenance={})


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(tmp_path / "cache")


def test_a_store_over_objects_keeps_the_same_promises(bucket: Bucket, tmp_path: Path) -> None:
    backend: Backend = bucket
    store = Store(backend)
    for n in range(5):
        put(store, n)
    put(store, 1)
    assert store.current("labels", ("m@L16", "7")) == key_of(1)
    assert sorted(store.prune(3)) == [key_of(0)]
    assert sorted(store.keys()) == sorted(key_of(n) for n in range(1, 5))
    assert all(verdict.is_sound for verdict in store.verify())
    assert store.usage().row(0) == ("labels", 4, 1, 12, sum(map(len, bucket.objects.values())))
    assert store.lineage(key_of(1)).render()[0].startswith(str(key_of(1)))
    store.discard(key_of(1))
    assert store.current("labels", ("m@L16", "7")) is None
    assert store.find(key_of(1)) is None


def test_only_files_that_are_read_are_fetched(bucket: Bucket, tmp_path: Path) -> None:
    put(Store(bucket), 1)
    elsewhere = Bucket(tmp_path / "other cache")
    elsewhere.objects, elsewhere.pointers = bucket.objects, bucket.pointers
    artifact = Store(elsewhere).find(key_of(1))
    assert artifact is not None
    assert elsewhere.fetched == []
    assert artifact.read_json("v.json") == 1
    assert elsewhere.fetched == ["v.json"]


def test_fetched_bytes_are_checked(bucket: Bucket, tmp_path: Path) -> None:
    put(Store(bucket), 1)
    elsewhere = Bucket(tmp_path / "other cache")
    elsewhere.objects = bucket.objects | {f"{key_of(1)}/v.json": b"9\n"}
    with pytest.raises(CorruptArtifactError, match=r"v\.json"):
        Store(elsewhere).open(key_of(1))
