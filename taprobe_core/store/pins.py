"""What goes in is hashed: files of datasets, checkpoints and tokenizers, pinned at first use.

Turns the files that decide a result into their hashes, and refuses them where they are not those of
the first use. A pin is a sha256; size, inode and times of last change only say whether a file has
to be read again, so a second use costs a `stat` a file. A file of a hub cache is compared with the
name of its blob as well, and what the library made with the manifest it then wrote (`sealed`).

What a source is and what a change of it means for names belongs to those who read it. Invariants:
no hash is returned that differs from a pin, except while changes are accepted; pins of two
processes that begin at the same time agree. Pins may be lost: the next use pins anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from taprobe_core.errors import ArtifactError, CorruptArtifactError
from taprobe_core.store.disk import TEMPORARY, disk_errors, make_folder, replace_text, sync_path
from taprobe_core.store.lock import hold_lock
from taprobe_core.store.pin_changes import Change, faults_of, find_changes, is_held, merge
from taprobe_core.store.pin_file import Acceptance, PinFile, read_pin_file
from taprobe_core.store.pin_reading import Found, PinnedSource, look

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
