from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.errors import CorruptArtifactError
from taprobe_core.store import ArtifactKey, Store, fingerprint

PARTITION = ("m@L16", "7")
KEYS = [ArtifactKey("labels", PARTITION, fingerprint("labels", str(n), {}, [])) for n in range(4)]
OLD, NEW, THIRD, FOURTH = KEYS
MAX_STEPS = 80

Ask = Callable[..., dict[str, Any]]


def content_of(store: Store, key: ArtifactKey) -> str:
    artifact = store.open(key)
    big = artifact.file("big.bin").read_bytes()
    assert big == key.fingerprint.encode() * 100
    assert artifact.read_json("v.json") == artifact.manifest.provenance["version"]
    return str(artifact.read_json("v.json"))


def check_state(root: Path, scenario: str) -> None:
    """Every version is whole, and the state is the one before or the one after."""
    store = Store(root)
    broken = {NEW} if scenario == "repair" and store.find(NEW) is None else set()
    found = set(store.keys()) - broken
    for key in found:
        assert content_of(store, key) == key.fingerprint
    current = None if NEW in broken else current_of(store, scenario)
    before, after, pointers = EXPECTED[scenario]
    assert before <= found <= after
    assert current in pointers


def current_of(store: Store, scenario: str) -> ArtifactKey | None:
    try:
        return store.current("labels", PARTITION)
    except CorruptArtifactError:
        # Between withdrawing an unsound version and publishing its replacement there is none.
        assert scenario == "repair"
        return None


EXPECTED: dict[str, tuple[set[ArtifactKey], set[ArtifactKey], set[ArtifactKey | None]]] = {
    "fresh": (set(), {NEW}, {None, NEW}),
    "next": ({OLD}, {OLD, NEW}, {OLD, NEW}),
    "repair": ({OLD}, {OLD, NEW}, {NEW, None}),
    "adopt": ({OLD, NEW}, {OLD, NEW}, {OLD, NEW}),
    "prune": ({FOURTH}, set(KEYS), {FOURTH}),
    "discard": ({OLD}, {OLD, NEW}, {None, NEW}),
}


def rerun(ask: Ask, root: Path, scenario: str) -> None:
    if scenario == "discard":
        store = Store(root)
        if store.find(NEW) is not None:
            store.discard(NEW)
        store.prune()
    else:
        assert ask(root, scenario, "kill", 10**6)["code"] == 0
    check_state(root, scenario)
    assert [path for path in root.rglob(".tmp-*")] == []  # noqa: C416
    assert all(verdict.is_sound for verdict in Store(root).verify())
    final = {"fresh": NEW, "next": NEW, "repair": NEW, "adopt": OLD, "prune": FOURTH}
    assert Store(root).current("labels", PARTITION) == final.get(scenario)


HARMLESS = {"os.mkdir 7"}
"""The lock library tries to make a folder that is there."""

PUBLISHING = [
    "os.mkdir .tmp-**",
    "open big.bin",
    "half a file",
    "open manifest.json",
    "before fsync big.bin",
    "after fsync manifest.json",
    "after fsync .tmp-**",
    "os.rename .tmp-**",
]
POINTING = ["open .tmp-CURRENT*", "after fsync .tmp-CURRENT*", "os.rename .tmp-CURRENT*"]
ENDING = ["before fsync 7", "after fsync 7", "os.remove .lock.owner"]
NAMED_STEPS = {
    "fresh": ["os.mkdir labels", "open .lock", *PUBLISHING, *POINTING, *ENDING],
    "next": [*PUBLISHING, *POINTING, *ENDING],
    "repair": [*PUBLISHING[:-1], "os.rename *", "os.rmdir .tmp-**", PUBLISHING[-1], *ENDING],
    "adopt": ["open .lock.owner", *POINTING, *ENDING],
    "prune": ["os.rename *", "os.rmdir .tmp-**", *ENDING],
    "discard": ["os.remove CURRENT", "os.rename *", "os.rmdir .tmp-**", *ENDING],
}


@pytest.mark.parametrize("scenario", EXPECTED)
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
    remaining = iter(steps)
    for name in NAMED_STEPS[scenario]:
        assert name in remaining, (name, steps)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("scenario", ["fresh", "next"])
def test_a_failing_disk_at_every_step(ask: Ask, folder: Path, scenario: str, code: int) -> None:
    wanted = "ArtifactError" if code == errno.EIO else "DiskFullError"
    n_steps = 0
    for n in range(1, MAX_STEPS):
        root = folder / str(n)
        answer = ask(root, scenario, code, n)
        assert answer["code"] == 0, answer
        if not answer["step"]:
            break
        n_steps += 1
        check_state(root, scenario)
        if answer["step"] in HARMLESS and not answer["error"]:
            continue
        assert answer["error"] == wanted, answer
        assert "Fix:" in answer["message"]
        if wanted == "DiskFullError":
            assert str(root / "labels" / "m@L16" / "7") in answer["message"]
            assert "bytes needed" in answer["message"]
            assert "bytes free" in answer["message"]
        assert list(root.rglob(".tmp-*")) == []
        rerun(ask, root, scenario)
    assert n_steps >= len(NAMED_STEPS[scenario])
