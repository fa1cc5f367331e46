"""Commits through child processes: the same artifacts, told errors, nothing left half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from taprobe_core.errors import ArtifactError, ConfigError
from taprobe_core.store import (
    ArtifactKey,
    Committer,
    CommitWorkers,
    FileCommit,
    Store,
    tensor_parts,
)
from taprobe_core.store.workers import LENGTH

FINGERPRINT = "0123456789abcdef"


def commit_of(at: int, *, provenance: object = None, size: int = 5) -> FileCommit:
    tensors = {"mean": torch.full((size, 3), float(at)), "last": torch.arange(size)}
    return FileCommit(
        ArtifactKey("activation_shards", (f"m@L{at:02d}", "correct"), FINGERPRINT),
        "activations.safetensors",
        tensor_parts(tensors, {"layer": str(at)}),
        {"layer": at, "extra": provenance},
        "7",
        {"dtype": "float32"},
    )


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, CommitWorkers]]:
    root = tmp_path_factory.mktemp("store")
    with closing(CommitWorkers(2)) as pool:
        yield root, pool


def test_a_committer_goes_ahead_and_waits_at_the_end(
    workers: tuple[Path, CommitWorkers], tmp_path: Path
) -> None:
    for children in (workers[1], None):
        store = Store(tmp_path / str(children is None))
        with Committer(store, children) as committer:
            for start in range(0, 60, 20):
                committer.put([commit_of(at) for at in range(start, start + 20)])
        assert len(list(store.keys())) == 60
        assert all(verdict.is_sound for verdict in store.verify())
        bad = FileCommit(ArtifactKey("x", ("..",), FINGERPRINT), "a.json", [b"1"], {}, "", {})
        with pytest.raises(ConfigError), Committer(store, children) as committer:
            committer.put([bad])


def test_artifacts_are_those_of_the_store_itself(workers: tuple[Path, CommitWorkers]) -> None:
    root, pool = workers
    batches = [[commit_of(at) for at in range(start, start + 6)] for start in (0, 6, 12)]
    for future in [pool.submit(root, batch) for batch in batches]:
        future.result()
    store = Store(root)
    for commit in [commit for batch in batches for commit in batch]:
        artifact = store.open(commit.key)
        tensors = artifact.read_tensors("activations.safetensors")
        at = artifact.manifest.provenance["layer"]
        assert torch.equal(tensors["mean"], torch.full((5, 3), float(at)))
        assert torch.equal(tensors["last"], torch.arange(5))
        assert (artifact.manifest.code_version, artifact.manifest.config) == (
            "7",
            {"dtype": "float32"},
        )
        assert artifact.manifest.writer.pid != os.getpid()
    assert all(verdict.is_sound for verdict in store.verify())
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    pool.submit(root, batches[0]).result()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_an_error_comes_back_as_itself_and_the_rest_is_committed(
    workers: tuple[Path, CommitWorkers],
) -> None:
    root, pool = workers
    good, bad = commit_of(40), commit_of(41)
    outside = FileCommit(
        ArtifactKey("activation_shards", ("..", "correct"), FINGERPRINT),
        bad.name,
        bad.parts,
        bad.provenance,
        bad.code_version,
        bad.config,
    )
    with pytest.raises(ConfigError, match=r"\.\."):
        pool.submit(root, [outside, good]).result()
    assert Store(root).find(good.key) is not None
    pool.submit(root, [commit_of(42)]).result()


def test_a_dead_child_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with closing(CommitWorkers(1)) as pool:
        pool.submit(tmp_path, [commit_of(0)]).result()
        os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
        with pytest.raises(ArtifactError, match="a process that commits ended"):
            pool.submit(tmp_path, [commit_of(at, size=500_000) for at in range(1, 4)]).result()
    store = Store(tmp_path)
    assert len(list(store.keys())) >= 1
    assert all(verdict.is_sound for verdict in store.verify())


def test_a_child_ends_with_its_parent_and_commits_no_cut_message(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "taprobe_core.store.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin is not None
    child.stdin.write(LENGTH.pack(5000) + b"[{")
    child.stdin.close()
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.returncode == 0
    assert child.stdout is not None
    assert child.stderr is not None
    assert (child.stdout.read(), child.stderr.read()) == (b"", b"")
    child.stdout.close()
    child.stderr.close()
    assert list(tmp_path.iterdir()) == []
