"""Threads of one process that commit: side by side in different partitions, in turn in one."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from taprobe_core.errors import BusyArtifactError
from taprobe_core.store import ArtifactKey, Store, fingerprint, write_json, write_tensors
from taprobe_core.store.disk import hold_lock

N_THREADS = 8
N_LAYERS = 12
N_PROBLEMS = 10


def shard_key(layer: int, problem: int) -> ArtifactKey:
    partition = (f"m@L{layer:02d}", "correct_base_solution", f"problem_{problem}")
    return ArtifactKey(
        "activation_shards", partition, fingerprint("activation_shards", "1", {}, [])
    )


def shard(layer: int, problem: int) -> torch.Tensor:
    return torch.full((5, 16), layer + problem / 16, dtype=torch.float16)


def test_threads_commit_different_partitions_side_by_side(tmp_path: Path) -> None:
    store = Store(tmp_path)
    # Passed only by that many threads that are writing at the same time.
    meeting = threading.Barrier(N_THREADS, timeout=30)

    def commit(at: int) -> None:
        layer, problem = at % N_LAYERS, at // N_LAYERS

        def write(folder: Path) -> None:
            if at < N_THREADS:
                meeting.wait()
            write_tensors(folder / "activations.safetensors", {"mean": shard(layer, problem)})

        store.commit(shard_key(layer, problem), write, provenance={"layer": layer})

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(commit, range(N_LAYERS * N_PROBLEMS)))

    fresh = Store(tmp_path)
    assert len(list(fresh.keys())) == N_LAYERS * N_PROBLEMS
    assert all(verdict.is_sound for verdict in fresh.verify())
    for layer in range(N_LAYERS):
        for problem in range(N_PROBLEMS):
            key = shard_key(layer, problem)
            found = fresh.open(key).read_tensors("activations.safetensors")["mean"]
            assert torch.equal(found, shard(layer, problem))
            assert fresh.open(key).manifest.provenance == {"layer": layer}
            assert fresh.current(key.stage, key.partition) == key
    assert leftovers(tmp_path) == []


def test_threads_commit_versions_of_one_partition_in_turn(tmp_path: Path) -> None:
    n_versions, n_askers = 20, 2
    store = Store(tmp_path)
    inside: list[int] = []
    written: list[int] = []

    def commit(at: int) -> None:
        version = at % n_versions

        def write(folder: Path) -> None:
            inside.append(version)
            write_json(folder / "v.json", version)
            assert inside == [version]
            written.append(inside.pop())

        key = ArtifactKey("labels", ("p",), fingerprint("labels", str(version), {}, []))
        assert store.commit(key, write, provenance={}).read_json("v.json") == version

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(commit, range(n_versions * n_askers)))

    assert sorted(written) == list(range(n_versions))
    fresh = Store(tmp_path)
    assert all(verdict.is_sound for verdict in fresh.verify())
    manifests = [fresh.open(key).manifest for key in fresh.keys(None)]
    assert sorted(each.sequence for each in manifests) == list(range(1, n_versions + 1))
    by_sequence = sorted(manifests, key=lambda each: each.sequence)
    assert [fresh.open(each.key).read_json("v.json") for each in by_sequence] == written
    assert fresh.current("labels", ("p",)) in {each.key for each in manifests}
    assert leftovers(tmp_path) == []


def test_a_failing_thread_disturbs_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def commit(layer: int) -> None:
        def write(folder: Path) -> None:
            write_json(folder / "v.json", layer)
            if layer % 3 == 0:
                raise RuntimeError(f"layer {layer}")

        store.commit(shard_key(layer, 0), write, provenance={})

    with ThreadPoolExecutor(N_THREADS) as pool:
        errors = [each.exception() for each in [pool.submit(commit, n) for n in range(N_LAYERS)]]
    assert [error is not None for error in errors] == [n % 3 == 0 for n in range(N_LAYERS)]
    assert {key.partition[0] for key in store.keys(None)} == {
        f"m@L{n:02d}" for n in range(N_LAYERS) if n % 3
    }
    assert all(verdict.is_sound for verdict in store.verify())
    assert leftovers(tmp_path) == []


def leftovers(root: Path) -> list[Path]:
    return [*root.rglob(".tmp-*"), *root.rglob(".lock.owner")]


def deleting(path: Path, real: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A `flock` before whose first call somebody deletes the file."""

    def flock(descriptor: int, operation: int) -> None:
        if not seen:
            seen.append(descriptor)
            path.unlink()
        real(descriptor, operation)

    seen: list[int] = []
    return flock


def test_a_lock_deleted_before_it_is_taken_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", deleting(tmp_path / ".lock", fcntl.flock))
    busy = pytest.raises(BusyArtifactError, match=f"pid {os.getpid()}")
    with hold_lock(tmp_path, 5.0), busy, hold_lock(tmp_path, 0.0):
        pass
    with hold_lock(tmp_path, 0.0):
        assert (tmp_path / ".lock").stat().st_size == 0
