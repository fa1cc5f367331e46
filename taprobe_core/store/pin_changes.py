"""What of a source differs from its pins, and the pins that follow when that is accepted.

Pure functions over what `pin_reading` found and `pin_file` holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.pin_file import Acceptance, Pin, PinFile
from taprobe_core.store.pin_reading import ABSENT, NO_FILE, UNREADABLE, Found, PinnedSource


@dataclass(frozen=True)
class Change:
    """One file, or one name of a listing, that is not as it was.

    Attributes:
        name: inside the source.
        old: hash as pinned, or a word of `pin_reading`.
        new: hash as found, or a word.
        sizes: bytes as pinned and as found; None where not known.
    """

    name: str
    old: str
    new: str
    sizes: tuple[int | None, int | None] = (None, None)

    def __str__(self) -> str:
        if self.new == ABSENT:
            return f"{self.name}: deleted"
        if self.old == ABSENT:
            return f"{self.name}: added"
        old, new = (
            text if " " in text or len(text) < 64 else f"sha256 {text[:12]}"
            for text in (self.old, self.new)
        )
        has_sizes = None not in self.sizes and self.sizes[0] != self.sizes[1]
        sizes = f" ({self.sizes[0]} and {self.sizes[1]} bytes)" if has_sizes else ""
        return f"{self.name}: expected {old}, found {new}{sizes}"


def find_changes(
    source: PinnedSource,
    pins: PinFile | None,
    found: Mapping[str, Found],
    listed: Mapping[str, tuple[str, ...]],
) -> list[Change]:
    """Return what differs: names that came or went, then files, without those below such names.

    Args:
        source: gives what it was made with, for what has no pin yet.
        pins: None at the first use.
        found: files by name.
        listed: names by folder.
    """
    old = _Old(source, pins)
    changes = []
    for folder, names in listed.items():
        before = old.listing(folder)
        if before is not None:
            changes += [
                Change(
                    f"{folder}/{name}" if folder else name,
                    *((ABSENT, "there") if name in names else ("there", ABSENT)),
                )
                for name in sorted({*before} ^ {*names})
            ]
    told = tuple(f"{change.name}/" for change in changes)
    for name, each in found.items():
        sha256, size = old.file(name)
        if sha256 not in (None, each.sha256) and not f"{name}/".startswith(told):
            changes.append(Change(name, sha256, each.sha256, (size, each.size_bytes)))
    return changes


class _Old:
    """What is expected of a source: its pins, else what it was made with, else nothing."""

    def __init__(self, source: PinnedSource, pins: PinFile | None) -> None:
        self._source, self._pins = source, pins
        self._made: Mapping[str, str] | None = None

    def file(self, name: str) -> tuple[str | None, int | None]:
        pin = self._pins.files.get(name) if self._pins else None
        if pin is not None:
            return pin.sha256, pin.size_bytes
        made = self._expected()
        return (None if made is None else made.get(name, ABSENT)), None

    def listing(self, folder: str) -> tuple[str, ...] | None:
        if self._pins and folder in self._pins.listings:
            return self._pins.listings[folder]
        made = self._expected()
        if made is None:
            return None
        start = f"{folder}/" if folder else ""
        below = {name[len(start) :].split("/")[0] for name in made if name.startswith(start)}
        return tuple(sorted(below))

    def _expected(self) -> Mapping[str, str] | None:
        if self._made is None and self._source.expected is not None:
            self._made = self._source.expected()
        return self._made


def is_held(
    pins: PinFile | None, found: Mapping[str, Found], listed: Mapping[str, tuple[str, ...]]
) -> bool:
    """Tell whether the pins already say all of this; arguments as in `find_changes`."""
    if pins is None:
        return False
    for name, each in found.items():
        pin = pins.files.get(name)
        if pin is None:
            if each.sha256 != UNREADABLE:
                return False
        elif each.hint is not None and (pin.hint, pin.path) != (each.hint, each.path):
            return False
    return all(pins.listings.get(folder) == names for folder, names in listed.items())


def merge(
    source: PinnedSource,
    pins: PinFile | None,
    found: Mapping[str, Found],
    listed: Mapping[str, tuple[str, ...]],
    changes: Sequence[Change],
) -> tuple[PinFile, list[Acceptance]]:
    """Return the pins with everything that was found, and what that accepts of `changes`.

    Arguments as in `find_changes`. What cannot be read is not pinned, for nobody knows its bytes.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = [
        Acceptance(name=each.name, old=each.old, new=each.new, accepted_at=now) for each in changes
    ]
    old = _Old(source, pins)
    files = dict(pins.files) if pins else {}
    for name, each in found.items():
        if each.sha256 == UNREADABLE:
            continue
        pin = files.get(name)
        first = pin.first_sha256 if pin else old.file(name)[0] or each.sha256
        files[name] = Pin(
            sha256=each.sha256,
            size_bytes=each.size_bytes,
            first_sha256=first,
            path=each.path,
            hint=each.hint,
        )
    gone = tuple(f"{change.name}/" for change in changes if change.new == ABSENT)
    kept = {name: pin for name, pin in files.items() if not name.startswith(gone)}
    merged = PinFile(
        noun=source.noun,
        source=dict(source.key),
        root=str(source.root),
        absence=source.absence,
        pinned_at=pins.pinned_at if pins else now,
        files=dict(sorted(kept.items())),
        listings={**(pins.listings if pins else {}), **listed},
        accepted=(*(pins.accepted if pins else ()), *new),
    )
    return merged, new


def faults_of(pins: PinFile) -> Iterator[str]:
    """Read every pinned file of a source and yield how each that changed differs."""
    is_there = Path(pins.root).exists()
    for name, pin in pins.files.items():
        path = Path(pin.path)
        try:
            is_file = path.is_file()
            found = file_sha256(path, use_cache=False) if is_file else NO_FILE
            size = path.stat().st_size if is_file else None
            if not path.exists():
                found = ABSENT
        except OSError:
            found, size = UNREADABLE, None
        comes_again = pins.absence == "is_fetched_again" or (
            pins.absence == "is_made_again" and not is_there
        )
        if found == pin.sha256 or (found == ABSENT and comes_again):
            continue
        yield str(Change(name, pin.sha256, found, (pin.size_bytes, size)))
