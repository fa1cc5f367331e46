"""Commits in a batch: killed or failing at every step, each is whole or absent, and none of them
is spoilt by another's fault."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.errors import ArtifactError, ConfigError
from taprobe_core.store import ArtifactKey, FileCommit, Store, commit_files, write_json
from taprobe_core.store.disk import hold_lock

OLD, NEW = "0" * 20, "1" * 20
PARTITIONS = [("m@L00", "7"), ("m@L01", "7"), ("m@L01", "8")]
"""As in `store_steps`."""
CONTENT = b"0123456789" * 500
MAX_STEPS = 150

Ask = Callable[..., dict[str, Any]]


def key_of(at: int, version: str = NEW) -> ArtifactKey:
    return ArtifactKey("shards", PARTITIONS[at], version)


def commit_of(at: int, version: str = NEW, content: bytes = CONTENT) -> FileCommit:
    key = key_of(at, version)
    return FileCommit(key, "a.bin", [content[:7], content[7:]], {"at": at}, "1", {"k": [at]})


def check_state(root: Path, scenario: str) -> set[int]:
    """Every version is whole, pointers name one of them; which of the batch are there."""
    store, found = Store(root), set()
    for key in store.keys(None):
        assert store.open(key).file("a.bin").read_bytes() == CONTENT
    for at in range(len(PARTITIONS)):
        is_there = store.find(key_of(at)) is not None
        found |= {at} if is_there else set()
        old = key_of(at, OLD) if scenario == "batch_next" else None
        assert store.current("shards", PARTITIONS[at]) in ([old, key_of(at)] if is_there else [old])
        if is_there:
            manifest = store.inspect(key_of(at)).manifest
            assert manifest.sequence == (2 if old else 1)
            assert (manifest.provenance, manifest.config) == ({"at": at}, {"k": [at]})
    return found


def rerun(ask: Ask, root: Path, scenario: str) -> None:
    assert ask(root, scenario, "kill", 10**6)["code"] == 0
    assert check_state(root, scenario) == set(range(len(PARTITIONS)))
    assert [path for path in root.rglob(".tmp-*")] == []  # noqa: C416
    assert [path for path in root.rglob(".lock.owner")] == []  # noqa: C416
    store = Store(root)
    assert all(verdict.is_sound for verdict in store.verify())
    for at, partition in enumerate(PARTITIONS):
        assert store.current("shards", partition) == key_of(at)


STEPS = [
    "open .lock",
    "os.mkdir .tmp-**",
    "open a.bin",
    "open manifest.json",
    "open .tmp-CURRENT*",
    "before fsync a.bin",
    "after fsync .tmp-**",
    "os.rename .tmp-**",
    "os.rename .tmp-CURRENT*",
    "after fsync 7",
    "os.remove .lock.owner",
]


@pytest.mark.parametrize("scenario", ["batch", "batch_next"])
def test_killed_at_every_step(ask: Ask, folder: Path, scenario: str) -> None:
    steps: list[str] = []
    for n in range(1, MAX_STEPS):
        root = folder / str(n)
        answer = ask(root, scenario, "kill", n)
        if answer["code"] == 0:
            assert answer["step"] == answer["error"] == ""
            break
        assert answer["code"] == -signal.SIGKILL, answer
        steps.append(answer["step"])
        check_state(root, scenario)
        rerun(ask, root, scenario)
    else:
        pytest.fail("the child never came through")
    assert set(STEPS) <= set(steps), steps


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("scenario", ["batch", "batch_next"])
def test_a_failing_disk_at_every_step(ask: Ask, folder: Path, scenario: str, code: int) -> None:
    wanted = "ArtifactError" if code == errno.EIO else "DiskFullError"
    for n in range(1, MAX_STEPS):
        root = folder / str(n)
        answer = ask(root, scenario, code, n)
        assert answer["code"] == 0, answer
        if not answer["step"]:
            break
        assert answer["error"] == wanted, answer
        assert "Fix:" in answer["message"]
        assert len(check_state(root, scenario)) >= len(PARTITIONS) - 1
        assert list(root.rglob(".tmp-*")) == []
        rerun(ask, root, scenario)
    assert n > len(PARTITIONS) * len(STEPS)


def test_nothing_gets_a_name_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def noting(name: str, real: Any) -> Any:
        def call(*args: Any) -> None:
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])  # noqa: PTH115
            calls.append((name, target))
            real(*args)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    commit_files(Store(tmp_path), map(commit_of, range(3)))
    stage = tmp_path / "shards"
    for partition in PARTITIONS:
        here = str(stage.joinpath(*partition))
        named = calls.index(("rename", f"{here}/{NEW}"))
        before = [path for name, path in calls[:named] if name == "fsync"]
        staged = {path.removeprefix(f"{here}/.tmp-{NEW}") for path in before if here in path}
        endings = {path.partition("/")[2] for path in staged if not path.startswith(here)}
        assert {"", "a.bin", "manifest.json"} <= endings
        assert any(path.startswith(f"{here}/.tmp-CURRENT") for path in before)
        assert {str(stage / partition[0]), str(stage), str(tmp_path)} <= set(before)
        pointed = calls.index(("replace", f"{here}/CURRENT"))
        assert pointed > named
        assert ("fsync", here) in calls[pointed:]


def test_what_exists_is_left_as_it_is_and_made_current(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit_files(store, [commit_of(0), commit_of(1)])
    commit_files(store, [commit_of(1, OLD)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("a.bin")}
    commit_files(store, map(commit_of, range(3)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [store.current("shards", each) for each in PARTITIONS] == list(map(key_of, range(3)))


def test_a_partition_named_twice_gets_both_versions_in_turn(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit_files(store, [commit_of(0, OLD), commit_of(1), commit_of(0)])
    assert [store.open(key_of(0, each)).manifest.sequence for each in (OLD, NEW)] == [1, 2]
    assert store.current("shards", PARTITIONS[0]) == key_of(0)


def test_a_held_lock_is_waited_for_and_holds_up_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path, lock_timeout_s=30)
    here = tmp_path.joinpath("shards", *PARTITIONS[0])
    here.mkdir(parents=True)
    with hold_lock(here, 0.0):
        waiting = threading.Thread(target=commit_files, args=(store, map(commit_of, range(3))))
        waiting.start()
        deadline = time.monotonic() + 30
        while store.find(key_of(2)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [store.find(key_of(at)) is None for at in range(3)] == [True, False, False]
    waiting.join(30)
    assert store.open(key_of(0)).file("a.bin").read_bytes() == CONTENT


def test_one_fault_is_raised_and_the_others_are_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    outside = FileCommit(ArtifactKey("shards", ("..",), NEW), "a.bin", [b"1"], {}, "", {})
    torn = FileCommit(key_of(0), "a.safetensors", [b"\xff" * 30], {}, "", {})
    unfit = FileCommit(key_of(2), "a.bin", [b"1"], {"x": float("nan")}, "", {})
    with pytest.raises(ConfigError, match=r"\.\."):
        commit_files(store, [outside, commit_of(1), unfit])
    assert set(store.keys()) == {key_of(1)}
    with pytest.raises(ArtifactError, match="does not read back: file is not safetensors"):
        commit_files(store, [torn, commit_of(2)])
    assert set(store.keys()) == {key_of(1), key_of(2)}
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_a_stream_that_breaks_leaves_nothing_half_done(tmp_path: Path) -> None:
    def stream() -> Iterator[FileCommit]:
        yield commit_of(0)
        raise EOFError

    store = Store(tmp_path)
    with pytest.raises(EOFError):
        commit_files(store, stream())
    assert list(store.keys()) == []
    assert list(tmp_path.rglob(".tmp-*")) == []
    store.commit(key_of(0), lambda path: write_json(path / "v.json", 1), provenance={})
