"""Pins: what goes in is hashed once, remembered, and refused when it is something else."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from taprobe_core.errors import (
    ArtifactError,
    CorruptArtifactError,
    DataError,
    DiskFullError,
    ModelError,
)
from taprobe_core.store import PinnedSource, Pins, disk, pins
from taprobe_core.store import pin_file as pin_file_module
from taprobe_core.store.local import seal_folder, sealed_files
from taprobe_core.store.pin_file import ABSENT, NO_FILE, UNREADABLE


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def settle(folder: Path) -> None:
    """Wait until what was just written is old enough for its times to be trusted."""
    del folder
    time.sleep(0.03)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(f"text of {name}")
    settle(folder)
    return folder


def source(folder: Path, **changes: object) -> PinnedSource:
    return PinnedSource("dataset", {"kind": "x", "folder": str(folder)}, folder, "undo", **changes)


def files(folder: Path, names: str = "abc") -> dict[str, Path | None]:
    return {name: folder / name for name in names}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(pin_file_module, "file_sha256", counted)
    return read


def test_the_first_use_hashes_and_the_second_only_stats(
    place: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Pins(tmp_path / "pins").check(source(place), files(place))
    assert first == {name: sha256(f"text of {name}") for name in "abc"}
    assert sorted(hashed) == ["a", "b", "c"]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pins").glob("*.json")}

    def no_lock(*_: object) -> None:
        raise AssertionError("a second use has nothing to write")

    monkeypatch.setattr(pins, "hold_lock", no_lock)
    assert Pins(tmp_path / "pins").check(source(place), files(place)) == first
    assert len(hashed) == 3
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pins").glob("*.json")} == before


def test_a_file_touched_but_equal_is_read_once_more_and_stays(
    place: Path, tmp_path: Path, hashed: list[str]
) -> None:
    Pins(tmp_path / "pins").check(source(place), files(place))
    os.utime(place / "a")
    settle(place)
    for _ in range(2):
        Pins(tmp_path / "pins").check(source(place), files(place))
    assert hashed[3:] == ["a"]


def test_equal_size_and_restored_time_do_not_hide_a_change(place: Path, tmp_path: Path) -> None:
    Pins(tmp_path / "pins").check(source(place), files(place))
    stat = (place / "a").stat()
    (place / "a").write_text("text of z")
    os.utime(place / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="a: expected sha256"):
        Pins(tmp_path / "pins").check(source(place), files(place))


def test_a_change_in_the_tick_of_the_first_use_is_seen(place: Path, tmp_path: Path) -> None:
    # Written now: its time may be that of a second change too, so it is not trusted.
    (place / "a").write_text("new")
    Pins(tmp_path / "pins").check(source(place), files(place))
    (pin_file,) = (tmp_path / "pins").glob("*.json")
    hints = {n: pin["hint"] for n, pin in json.loads(pin_file.read_text())["files"].items()}
    assert hints["a"] is None
    assert hints["b"] is not None


def other_bytes(folder: Path) -> None:
    (folder / "b").write_text("text of q")


def cut(folder: Path) -> None:
    (folder / "b").write_text("text")


def removed(folder: Path) -> None:
    (folder / "b").unlink()


def made_a_folder(folder: Path) -> None:
    (folder / "b").unlink()
    (folder / "b").mkdir()


CHANGES = {
    "other bytes": (other_bytes, "b: expected sha256 "),
    "cut": (cut, "(9 and 4 bytes)"),
    "removed": (removed, "b: deleted"),
    "a folder": (made_a_folder, "found no file"),
}


@pytest.mark.parametrize(("spoil", "said"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("error", [DataError, ModelError])
def test_a_change_is_named_and_refused_until_it_is_accepted(
    place: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    said: str,
    error: type[DataError | ModelError],
) -> None:
    folder, asked = tmp_path / "pins", source(place, error=error)
    first = Pins(folder).check(asked, files(place))
    assert Pins(folder).accepted_identity(asked) == {}
    spoil(place)
    for _ in range(2):
        with pytest.raises(error) as refused:
            Pins(folder).check(asked, files(place))
        assert said in refused.value.what
        assert "dataset changed since " in refused.value.what
        assert ": 1 file (b: " in refused.value.what
        assert refused.value.where == str(place)
        assert "taprobe check STUDY --accept" in (refused.value.fix or "")
    accepting = Pins(folder, is_accepting=True)
    now = accepting.check(asked, files(place))
    (recorded,) = (change for _, change in accepting.accepted)
    assert (recorded.name, recorded.old, recorded.new) == ("b", first["b"], now["b"])
    assert Pins(folder).check(asked, files(place)) == now
    (pin_file,) = folder.glob("*.json")
    kept = json.loads(pin_file.read_text())["accepted"]
    assert [(row["name"], row["old"], row["new"]) for row in kept] == [("b", *recorded_pair(kept))]
    identity = Pins(folder).accepted_identity(asked)
    assert set(identity) == {"accepted_sha256"}
    assert Pins(folder).accepted_identity(asked, "a") == {}


def recorded_pair(rows: list[dict[str, str]]) -> tuple[str, str]:
    return rows[0]["old"], rows[0]["new"]


def test_the_first_identity_comes_back_with_the_first_bytes(place: Path, tmp_path: Path) -> None:
    asked, folder = source(place), tmp_path / "pins"
    first = Pins(folder).check(asked, files(place))
    for text in ("text of q", "text of b"):
        (place / "b").write_text(text)
        Pins(folder, is_accepting=True).check(asked, files(place))
    assert Pins(folder).check(asked, files(place)) == first
    assert Pins(folder).accepted_identity(asked) == {}


def test_what_is_asked_for_later_is_pinned_then(place: Path, tmp_path: Path) -> None:
    ledger = Pins(tmp_path / "pins")
    ledger.check(source(place), files(place, "a"))
    (place / "b").write_text("changed before anybody read it")
    ledger.check(source(place), files(place, "ab"))
    (place / "b").write_text("changed after")
    ledger.check(source(place), files(place, "a"))
    with pytest.raises(DataError, match="b: expected"):
        ledger.check(source(place), files(place, "ab"))


def test_a_file_that_was_absent_and_comes_is_a_change(place: Path, tmp_path: Path) -> None:
    ledger = Pins(tmp_path / "pins")
    assert ledger.check(source(place), {**files(place), "d": place / "d"})["d"] == ABSENT
    (place / "d").write_text("new")
    with pytest.raises(DataError, match="1 file \\(d: added\\)"):
        ledger.check(source(place), {**files(place), "d": place / "d"})


def test_a_listing_is_compared_by_name(tmp_path: Path, place: Path) -> None:
    ledger = Pins(tmp_path / "pins")
    ledger.check(source(place), {}, {"at": ["p1", "p2"]})
    ledger.check(source(place), {}, {"at": ["p1", "p2"], "elsewhere": ["q"]})
    with pytest.raises(DataError, match="2 files \\(at/p1: deleted; at/p3: added\\)"):
        ledger.check(source(place), {}, {"at": ["p2", "p3"]})
    Pins(tmp_path / "pins", is_accepting=True).check(source(place), {}, {"at": ["p2", "p3"]})
    ledger.check(source(place), {}, {"at": ["p2", "p3"]})


def test_many_changes_are_counted_and_five_named(tmp_path: Path) -> None:
    place = tmp_path / "many"
    place.mkdir()
    names = [f"f{number}" for number in range(8)]
    for name in names:
        (place / name).write_text("x")
    asked = {name: place / name for name in names}
    Pins(tmp_path / "pins").check(source(place), asked)
    for name in names[:7]:
        (place / name).write_text("y")
    with pytest.raises(DataError) as refused:
        Pins(tmp_path / "pins").check(source(place), asked)
    assert ": 7 files (f0: " in refused.value.what
    assert "f4: " in refused.value.what
    assert "f5" not in refused.value.what
    assert "and 2 more" in refused.value.what


def test_what_cannot_be_read_is_never_pinned_and_never_passes_for_the_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "broken disk")

    ledger = Pins(tmp_path / "pins")
    with monkeypatch.context() as patch:
        patch.setattr(pin_file_module, "file_sha256", broken)
        assert ledger.check(source(place), files(place, "a")) == {"a": UNREADABLE}
    assert ledger.check(source(place), files(place, "a")) == {"a": sha256("text of a")}
    os.utime(place / "a")
    monkeypatch.setattr(pin_file_module, "file_sha256", broken)
    with pytest.raises(DataError, match=r"a: expected sha256 .* found unreadable"):
        ledger.check(source(place), files(place, "a"))


def test_a_place_in_any_script_is_remembered(place: Path, tmp_path: Path) -> None:
    folder = place.rename(tmp_path / "daten größer 数据")
    settle(folder)
    ledger = Pins(tmp_path / "pins")
    ledger.check(source(folder), files(folder))
    assert [verdict.faults for verdict in ledger.verify()] == [()]
    (folder / "a").write_text("new")
    with pytest.raises(DataError):
        ledger.check(source(folder), files(folder))


def test_what_a_dead_writer_left_goes(place: Path, tmp_path: Path) -> None:
    (tmp_path / "pins").mkdir()
    (tmp_path / "pins" / ".tmp-dead").write_text("half")
    Pins(tmp_path / "pins").check(source(place), files(place))
    assert not (tmp_path / "pins" / ".tmp-dead").exists()


def test_lost_pins_are_made_anew(place: Path, tmp_path: Path) -> None:
    ledger = Pins(tmp_path / "pins")
    first = ledger.check(source(place), files(place))
    for path in (tmp_path / "pins").glob("*.json"):
        path.unlink()
    assert ledger.check(source(place), files(place)) == first


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"format": "taprobe-pins"}']
)
def test_damaged_pins_are_refused_with_their_place(
    place: Path, tmp_path: Path, content: bytes
) -> None:
    ledger = Pins(tmp_path / "pins")
    ledger.check(source(place), files(place))
    (pin_file,) = (tmp_path / "pins").glob("*.json")
    pin_file.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="remove the file") as refused:
        ledger.check(source(place), files(place))
    assert refused.value.where == str(pin_file)
    assert [verdict.where for verdict in ledger.verify() if verdict.faults] == [str(pin_file)]


def test_a_read_only_folder_is_said_and_does_not_stop_reading(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def read_only(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(pins, "make_folder", read_only)
    hashes = Pins(tmp_path / "pins").check(source(place), files(place))
    assert hashes["a"] == sha256("text of a")
    assert "hashed, but not pinned" in caplog.text
    assert not (tmp_path / "pins").exists()
    with pytest.raises(ArtifactError):
        Pins(tmp_path / "pins", is_accepting=True).check(source(place), files(place))


def test_a_full_disk_is_one_of_the_stores_errors(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_bytes", full)
    with pytest.raises(DiskFullError):
        Pins(tmp_path / "pins").check(source(place), files(place))
    monkeypatch.undo()
    assert not list((tmp_path / "pins").glob("*.json"))
    assert Pins(tmp_path / "pins").check(source(place), files(place))["a"] == sha256("text of a")


def pin_in_a_process(place: Path, folder: Path, text: str, at: float, said: object) -> None:
    time.sleep(max(0.0, at - time.time()))
    try:
        for name in "abc":
            Pins(folder).check(source(place), files(place, name))
        outcome = "pinned"
    except DataError:
        outcome = "refused"
    said.put(outcome)  # type: ignore[attr-defined]


def test_processes_that_pin_at_once_lose_no_pin(place: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    said, at = context.Queue(), time.time() + 0.2
    workers = [
        context.Process(target=pin_in_a_process, args=(place, tmp_path / "pins", "", at, said))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    outcomes = [said.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert outcomes == ["pinned"] * 4
    (pin_file,) = (tmp_path / "pins").glob("*.json")
    assert set(json.loads(pin_file.read_text())["files"]) == {"a", "b", "c"}
    assert not [path for path in (tmp_path / "pins").iterdir() if path.name.startswith(".tmp")]


def test_of_two_that_find_different_bytes_the_second_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other process pins between this one's look and its lock.
    other = Pins(tmp_path / "pins")
    real = pins.make_folder

    def meanwhile(folder: Path) -> None:
        monkeypatch.setattr(pins, "make_folder", real)
        (place / "a").write_text("of the other")
        other.check(source(place), files(place, "a"))

    monkeypatch.setattr(pins, "make_folder", meanwhile)
    with pytest.raises(DataError, match="a: expected sha256"):
        Pins(tmp_path / "pins").check(source(place), files(place, "a"))


def test_a_sealed_folder_is_compared_with_its_manifest_at_the_first_use(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "in").mkdir(parents=True)
    (made / "in" / "a").write_text("a")
    (made / "in" / "b").write_text("b")
    seal_folder(made)
    asked = source(made, expected=sealed_files(made), absence="is_made_again")
    (made / "in" / "a").write_text("x")
    (made / "in" / "b").unlink()
    (made / "in" / "c").write_text("c")
    with pytest.raises(DataError) as refused:
        Pins(tmp_path / "pins").check(asked, {"in/a": made / "in/a"}, {"in": ["a", "c"]})
    assert "since it was made: 3 files (in/b: deleted; in/c: added; in/a: expected sha256" in (
        refused.value.what
    )
    Pins(tmp_path / "pins", is_accepting=True).check(
        asked, {"in/a": made / "in/a"}, {"in": ["a", "c"]}
    )
    Pins(tmp_path / "pins").check(asked, {"in/a": made / "in/a"}, {"in": ["a", "c"]})
    assert Pins(tmp_path / "pins").accepted_identity(asked)
    (made / "manifest.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match=r"it is made again"):
        Pins(tmp_path / "other").check(asked, {"in/a": made / "in/a"})


def blob(folder: Path, content: bytes, name: str) -> Path:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "snapshots" / "c0ffee").mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / name).write_bytes(content)
    link = folder / "snapshots" / "c0ffee" / "file"
    link.symlink_to(f"../../blobs/{name}")
    return link


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


NAMES = {
    "large": lambda content: hashlib.sha256(content).hexdigest(),
    "small": git_name,
    "of a server that is no git": lambda content: hashlib.sha1(
        content, usedforsecurity=False
    ).hexdigest(),
}


@pytest.mark.parametrize("name_of", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_hub_blob_is_compared_with_its_own_name(
    tmp_path: Path, name_of: Callable[[bytes], str], is_pinned: bool
) -> None:
    content = b"0.5, 0.25\n"
    link = blob(tmp_path / "cache", content, name_of(content))
    ledger = Pins(tmp_path / "pins" if is_pinned else None)
    assert ledger.check(source(tmp_path), {"file": link})["file"] == sha256(content.decode())
    other = tmp_path / "other"
    spoiled = blob(other, b"0.5, 0.26\n", name_of(content))
    for is_accepting in (False, True):
        strict = Pins(tmp_path / "new" if is_pinned else None, is_accepting)
        with pytest.raises(DataError) as refused:
            strict.check(source(other), {"file": spoiled})
        named = other / "blobs" / name_of(content)
        assert refused.value.where == str(named)
        assert f"delete {named} and download it again" in (refused.value.fix or "")


@pytest.mark.parametrize("name", ["1", "0" * 39, "g" * 64, "0" * 32])
def test_a_blob_whose_name_is_no_hash_is_only_pinned(tmp_path: Path, name: str) -> None:
    link = blob(tmp_path / "cache", b"any", name)
    ledger = Pins(tmp_path / "pins")
    ledger.check(source(tmp_path), {"file": link})
    (tmp_path / "cache" / "blobs" / name).write_bytes(b"new")
    with pytest.raises(DataError, match="file: expected sha256"):
        ledger.check(source(tmp_path), {"file": link})


def test_verify_reads_what_times_say_is_unchanged(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Pins(tmp_path / "pins")
    ledger.check(source(place), {**files(place), "d": place / "d"})
    assert [(v.noun, v.where, v.faults) for v in ledger.verify()] == [("dataset", str(place), ())]
    # A disk that rots tells no time: the pin's hint is made that of the changed file.
    (place / "a").write_text("text of y")
    settle(place)
    (pin_file,) = (tmp_path / "pins").glob("*.json")
    content = json.loads(pin_file.read_text())
    stat = (place / "a").stat()
    state = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    content["files"]["a"]["hint"] = state
    pin_file.write_text(json.dumps(content))
    ledger.check(source(place), files(place))
    (verdict,) = ledger.verify()
    assert [fault.split(":")[0] for fault in verdict.faults] == ["a"]
    assert NO_FILE not in verdict.faults[0]


def test_verify_misses_only_what_does_not_come_again(place: Path, tmp_path: Path) -> None:
    ledger = Pins(tmp_path / "pins")
    for noun, absence in (("h", "is_fetched_again"), ("m", "is_made_again"), ("f", "is_change")):
        asked = PinnedSource(noun, {}, place, "undo", DataError, absence)  # type: ignore[arg-type]
        ledger.check(asked, files(place, "a"))
    (place / "a").unlink()
    assert {v.noun: len(v.faults) for v in ledger.verify()} == {"h": 0, "m": 1, "f": 1}
    for name in "bc":
        (place / name).unlink()
    place.rmdir()
    assert {v.noun: len(v.faults) for v in ledger.verify()} == {"h": 0, "m": 0, "f": 1}
