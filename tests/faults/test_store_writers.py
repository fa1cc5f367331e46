from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.errors import BusyArtifactError, MissingArtifactError
from taprobe_core.store import ArtifactKey, Store, fingerprint, write_json

CHILD = Path(__file__).with_name("store_writer.py")
KEY = ArtifactKey("labels", ("p",), fingerprint("labels", "0", {}, []))


class Child:
    """A second process that waits to be started and then says what it does."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), *map(str, arguments)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "TAPROBE_RUN_ID": "run-of-child"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # A process that stores tables alone does not pay the seconds that torch takes to import.
        assert self.hear() == {"ready": True, "has_torch": False}

    def start(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def end(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def make(*arguments: object) -> Child:
        children.append(Child(*arguments))
        return children[-1]

    yield make
    for each in children:
        each.process.kill()
        each.end()


def test_two_processes_one_computes_the_other_reuses(
    child: Callable[..., Child], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first, second = (child("commit", tmp_path / "store", 0.3, log) for _ in range(2))
    for each in (first, second):
        each.start()
    said = [[], []]  # type: list[list[dict[str, Any]]]
    for each, heard in zip((first, second), said, strict=True):
        while not heard or "value" not in heard[-1]:
            heard.append(each.hear())
    assert [heard[-1] for heard in said] == [{"value": 7}] * 2
    assert sorted(map(len, said)) == [1, 2]
    assert log.read_text() == "computed\n"
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_a_busy_partition_names_its_owner_whose_death_frees_it(
    child: Callable[..., Child], tmp_path: Path
) -> None:
    owner = child("commit", tmp_path, 60, tmp_path / "log")
    owner.start()
    staging = Path(owner.hear()["writing"])
    store = Store(tmp_path, lock_timeout_s=0.2)
    with pytest.raises(BusyArtifactError) as caught:
        store.commit(KEY, lambda folder: None, provenance={})
    for found in (f"pid {owner.process.pid}", f"host {os.uname().nodename}", "run run-of-child"):
        assert found in str(caught.value)
    assert str(tmp_path / "labels" / "p") in str(caught.value)
    assert staging.is_dir()
    assert store.find(KEY) is None

    owner.process.kill()
    assert owner.end() == -signal.SIGKILL
    assert staging.is_dir()
    made = store.commit(KEY, lambda folder: write_json(folder / "v.json", 8), provenance={})
    assert made.read_json("v.json") == 8
    assert list(tmp_path.rglob(".tmp-*")) == []
    assert not (tmp_path / "labels" / "p" / ".lock.owner").exists()


def test_interrupted_from_the_keyboard(child: Callable[..., Child], tmp_path: Path) -> None:
    owner = child("commit", tmp_path, 60, tmp_path / "log")
    owner.start()
    staging = Path(owner.hear()["writing"])
    owner.process.send_signal(signal.SIGINT)
    assert owner.end() == -signal.SIGINT
    assert not staging.exists()
    assert list(Store(tmp_path).keys()) == []


def test_an_unreadable_owner_file_is_no_obstacle(tmp_path: Path) -> None:
    store = Store(tmp_path, lock_timeout_s=0.05)
    for text in ("", "{", "[]", '{"pid": 1}'):
        with store.locked(KEY):
            (tmp_path / "labels" / "p" / ".lock.owner").write_text(text)
            with pytest.raises(BusyArtifactError, match="owner unknown"):
                store.commit(KEY, lambda folder: None, provenance={})


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    computed: list[str] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()

        def write(folder: Path) -> None:
            computed.append(threading.current_thread().name)
            write_json(folder / "v.json", 1)

        Store(tmp_path).commit(KEY, write, provenance={})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1
    assert Store(tmp_path).current("labels", ("p",)) == KEY


def test_a_reader_during_overwrites_sees_whole_versions(
    child: Callable[..., Child], tmp_path: Path
) -> None:
    n_versions = 100
    writer = child("versions", tmp_path, n_versions)
    store = Store(tmp_path)
    seen: list[int] = []
    n_pruned = 0
    writer.start()
    while not seen or seen[-1] < n_versions - 1:
        assert writer.process.poll() in (None, 0)
        key = store.current("labels", ("p",))
        if key is None:
            continue
        try:
            artifact = store.open(key)
            values = [artifact.read_json(name) for name in ("a.json", "b.json")]
        except MissingArtifactError:
            n_pruned += 1
            continue
        number = artifact.manifest.provenance["n"]
        assert values == [{"n": number, "pad": [number] * 500}] * 2
        seen.append(number)
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
    assert n_pruned < len(seen)
    assert writer.hear() == {"done": True}
