"""What goes in is hashed: files of datasets, checkpoints and tokenizers, pinned at first use.

Turns the files that decide a result into their hashes, and refuses them where they are not those of
the first use; says what of a source differs, and which pins follow when that is accepted. A pin is
a sha256; size, inode and times of last change only say whether a file has to be read again, so a
second use costs a `stat` a file. A file of a hub cache is compared with the name of its blob as
well, and what the library made with the manifest it then wrote (`local.sealed_files`).

What a source is and what a change of it means for names belongs to those who read it; looking at
files and the file of pins in `pin_file`. Invariants: no hash is returned that differs from a pin,
except while changes are accepted; pins of two processes that begin at the same time agree. Pins may
be lost: the next use pins anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from taprobe_core.errors import ArtifactError, CorruptArtifactError
from taprobe_core.store.disk import (
    TEMPORARY,
    disk_errors,
    hold_lock,
    make_folder,
    replace_text,
    sync_path,
)
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.pin_file import (
    ABSENT,
    NO_FILE,
    UNREADABLE,
    Acceptance,
    Found,
    Pin,
    PinFile,
    PinnedSource,
    look,
    read_pin_file,
)


@dataclass(frozen=True)
class Change:
    """One file, or one name of a listing, that is not as it was.

    Attributes:
        name: inside the source.
        old: hash as pinned, or a word of `pin_file`.
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
    reported = tuple(f"{change.name}/" for change in changes)
    for name, each in found.items():
        sha256, size = old.file(name)
        if sha256 not in (None, each.sha256) and not f"{name}/".startswith(reported):
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


_ACCEPT = (
    "accept the change with `taprobe check STUDY --accept`; what follows from it is then made "
    "anew, under new names"
)
_LOCK_S = 60.0
_SHOWN = 5
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinVerdict:
    """What `Pins.verify` found about one source; `faults` name each file that changed."""

    noun: str
    where: str
    faults: tuple[str, ...]


@dataclass
class Pins:
    """The pins of one data folder.

    Attributes:
        folder: holds the pin files, made at first use; None keeps nothing, so that files are only
            hashed and compared with what they carry themselves.
        is_accepting: record changes instead of refusing them.
        accepted: what this object recorded, each with its source.
    """

    folder: Path | None
    is_accepting: bool = False
    accepted: list[tuple[PinnedSource, Acceptance]] = field(default_factory=list)

    def check(
        self,
        source: PinnedSource,
        files: Mapping[str, Path | None],
        listings: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, str]:
        """Return the hash of every file, after comparing it with its pin; pin what is new.

        Args:
            source: where the files come from.
            files: by name inside the source; None for a file that the source does not have.
            listings: by folder, the names in it that decide a result.

        Returns:
            By name a sha256, or `ABSENT`, `NO_FILE`, `UNREADABLE`.

        Raises:
            source.error: files changed since they were pinned, or differ from a blob's name.
            CorruptArtifactError: the pin file is damaged.
            BusyArtifactError: another process holds the lock for too long.
            DiskFullError: no space left for the pins.
        """
        listed = {name: tuple(names) for name, names in (listings or {}).items()}
        pins = self._read(source)
        found = look(source, files, pins)
        changes = self._checked(source, pins, found, listed)
        if changes or not is_held(pins, found, listed):
            self._record(source, found, listed)
        return {name: each.sha256 for name, each in found.items()}

    def recheck(self, source: PinnedSource, prefix: str = "") -> None:
        """Compare what is pinned of a source, and is still there; errors as `check`.

        Args:
            source: whose files come by themselves again where they are gone.
            prefix: only of names that begin so.
        """
        pins = self._read(source)
        known = {} if pins is None else pins.files
        files = {name: Path(pin.path) for name, pin in known.items() if name.startswith(prefix)}
        there = {name: path for name, path in files.items() if path.exists()}
        if there:
            self.check(source, dict(there))

    def accepted_identity(self, source: PinnedSource, prefix: str = "") -> dict[str, str]:
        """Return what tells a source whose changes were accepted from the one first pinned.

        Args:
            source: whose identity is not a hash of its bytes.
            prefix: only of names that begin so.

        Returns:
            `accepted_sha256`, a hash of the files that differ; empty where none does.
        """
        pins = self._read(source)
        differing = {
            name: pin.sha256
            for name, pin in ({} if pins is None else pins.files).items()
            if name.startswith(prefix) and pin.sha256 != pin.first_sha256
        }
        if not differing:
            return {}
        return {"accepted_sha256": _sha256(json.dumps(differing, sort_keys=True))}

    def verify(self) -> Iterator[PinVerdict]:
        """Read every pinned file again, whatever its times say.

        Yields:
            One verdict a source, in the order of the pin files.
        """
        for path in sorted(self.folder.glob("*.json")) if self.folder else []:
            try:
                pins = read_pin_file(path)
            except CorruptArtifactError as error:
                yield PinVerdict("pins", str(path), (error.what,))
                continue
            if pins is not None:
                yield PinVerdict(pins.noun, pins.root, tuple(faults_of(pins)))

    def _checked(
        self,
        source: PinnedSource,
        pins: PinFile | None,
        found: Mapping[str, Found],
        listed: Mapping[str, tuple[str, ...]],
    ) -> list[Change]:
        changes = find_changes(source, pins, found, listed)
        if changes and not self.is_accepting:
            shown = "; ".join(map(str, changes[:_SHOWN]))
            more = f"; and {len(changes) - _SHOWN} more" if changes[_SHOWN:] else ""
            since = f"since {pins.pinned_at}" if pins else "since it was made"
            noun = "file" if len(changes) == 1 else "files"
            raise source.error(
                f"{source.noun} changed {since}: {len(changes)} {noun} ({shown}{more})",
                str(source.root),
                f"{source.remedy}; or {_ACCEPT}",
            )
        return changes

    def _record(
        self,
        source: PinnedSource,
        found: Mapping[str, Found],
        listed: Mapping[str, tuple[str, ...]],
    ) -> None:
        if self.folder is None:
            return
        try:
            with disk_errors(str(self.folder)), _locked(self.folder):
                pins = self._read(source)  # another process may have pinned meanwhile
                changes = self._checked(source, pins, found, listed)
                merged, new = merge(source, pins, found, listed, changes)
                text = json.dumps(merged.model_dump(mode="json"), indent=1)
                replace_text(_path(self.folder, source), text + "\n")
                sync_path(self.folder)
        except (OSError, ArtifactError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            is_read_only = isinstance(reason, OSError) and reason.errno in _READ_ONLY
            if self.is_accepting or not is_read_only:
                raise
            _log.warning(
                "%s: hashed, but not pinned: %s cannot be written (%s)",
                source.noun,
                self.folder,
                reason,
            )
            return
        self.accepted += [(source, each) for each in new]

    def _read(self, source: PinnedSource) -> PinFile | None:
        return None if self.folder is None else read_pin_file(_path(self.folder, source))


UNPINNED = Pins(None)
"""Hashes and compares with blobs' names and manifests, and remembers nothing."""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    make_folder(folder)
    with hold_lock(folder, _LOCK_S):
        for left in folder.glob(f"{TEMPORARY}*"):
            left.unlink()  # of a writer that is dead, for the lock was free
        yield


def _path(folder: Path, source: PinnedSource) -> Path:
    key = _sha256(json.dumps(dict(source.key), sort_keys=True))
    return folder / f"{source.noun}-{key[:20]}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
