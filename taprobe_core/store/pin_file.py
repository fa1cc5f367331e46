"""The file that remembers what a source held, and the look at a source's files that fills it.

One file for each source, `pins/<noun>-<digest>.json`; a file that has its pin already is not
hashed. What is compared with a pin, and when, belongs in `pins`, but for the name of a hub cache's
blob, which is known only while the file is looked at.

Invariant: a file of pins that parses is one that was written here; a damaged one is refused and
never taken for new.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from taprobe_core.errors import CorruptArtifactError, DataError, TaprobeError
from taprobe_core.store.files import blob_fault, blob_of
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.manifest import ManifestPart

Hint = tuple[int, int, int, int]
"""Inode, size, and nanoseconds of the last change of content and of inode."""

Absence = Literal["is_change", "is_fetched_again", "is_made_again"]
"""What it means that a pinned file is gone: a change, or nothing where it comes by itself again.

What is made again comes as a whole: one file that is gone from a folder that is there is a change.
"""


class Pin(ManifestPart):
    """One file as it was last found or accepted.

    Attributes:
        sha256: of the bytes; or a word that says why there are none.
        size_bytes: of the file; None where there are no bytes.
        first_sha256: what was pinned first, before anything was accepted.
        path: where it was found.
        hint: state in which it need not be read again; None where it has to be.
    """

    sha256: str
    size_bytes: int | None
    first_sha256: str
    path: str
    hint: Hint | None


class Acceptance(ManifestPart):
    """A change that somebody accepted; `old` and `new` are hashes, or words as in a pin."""

    name: str
    old: str
    new: str
    accepted_at: str


class PinFile(ManifestPart):
    """Everything pinned of one source.

    Attributes:
        noun: what the source is: dataset, checkpoint, tokenizer.
        source: what names it: its kind, and its folder or repository and commit.
        root: folder that its files were found in.
        absence: what a file means that is gone.
        pinned_at: when the source was first used, UTC.
        files: pins by name.
        listings: by folder, the names that were in it.
        accepted: changes, oldest first.
    """

    format: Literal["taprobe-pins"] = "taprobe-pins"
    schema_version: Literal[1] = 1
    noun: str
    source: Mapping[str, str]
    root: str
    absence: Absence
    pinned_at: str
    files: Mapping[str, Pin] = {}
    listings: Mapping[str, tuple[str, ...]] = {}
    accepted: tuple[Acceptance, ...] = ()


def read_pin_file(path: Path) -> PinFile | None:
    """Read a pin file; None where there is none. Parsed once per process for each state of it.

    Raises:
        CorruptArtifactError: it is not one.
    """
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _parsed(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@lru_cache(maxsize=256)
def _parsed(path: Path, state: Hint) -> PinFile:
    del state  # part of the cache's key
    try:
        return PinFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]
        place = ".".join(map(str, reason["loc"]))
        raise CorruptArtifactError(
            f"pins of a source that cannot be read ({place}: {reason['msg']})",
            str(path),
            "remove the file; the source is then hashed and pinned anew",
        ) from None


ABSENT, NO_FILE, UNREADABLE = "absent", "no file", "unreadable"
"""Stand for a hash where there are no bytes to be read."""

_THREADS = 4
_LARGE_BYTES = 1 << 30
_SECONDS_BETWEEN_LINES = 10.0
_SETTLED_NS = 20_000_000
"""A clock of a file system ticks this rarely: two changes within it can leave one time."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedSource:
    """A place that files come from.

    Attributes:
        noun: dataset, checkpoint or tokenizer; begins the name of its pin file.
        key: what names it, for example kind and folder.
        root: where its files are, for messages.
        remedy: what brings the expected files back.
        error: class of the refusal.
        absence: what it means that a file is gone.
        expected: sha256 by name of the files that the source had when it was made, for those not
            pinned yet; None where nobody knows.
    """

    noun: str
    key: Mapping[str, str]
    root: Path
    remedy: str
    error: type[TaprobeError] = DataError
    absence: Absence = "is_change"
    expected: Callable[[], Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Found:
    """A file as it is now; see `pin_file.Pin`."""

    sha256: str
    size_bytes: int | None
    path: str
    hint: Hint | None


def look(
    source: PinnedSource, files: Mapping[str, Path | None], pins: PinFile | None
) -> dict[str, Found]:
    """Stat every file, and read those that no pin has in their present state.

    Args:
        source: where they come from.
        files: by name; None for a file that the source does not have.
        pins: what is known already.

    Raises:
        source.error: a file of a hub cache that is not what its blob's name says.
    """
    known = {} if pins is None else pins.files
    found = {name: _stated(path, known.get(name)) for name, path in files.items()}
    unread = {name: Path(each.path) for name, each in found.items() if not each.sha256}
    n_bytes = sum(found[name].size_bytes or 0 for name in unread)
    if n_bytes >= _LARGE_BYTES:
        _log.info("%s %s: hashing %s, once", source.noun, source.root, _gigabytes(n_bytes))
    said, done = time.monotonic(), 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, sha256 in zip(unread, pool.map(_read_hash, unread.values()), strict=True):
            found[name] = replace(found[name], sha256=sha256)
            done += found[name].size_bytes or 0
            if n_bytes >= _LARGE_BYTES and time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                _log.info("%s: hashed %s of %s", source.noun, _gigabytes(done), _gigabytes(n_bytes))
            _compare_blob(source, unread[name], sha256)
    return found


def _stated(path: Path | None, pin: Pin | None) -> Found:
    """What a `stat` says of a file; with an empty hash where the file has to be read."""
    if path is None:
        return Found(ABSENT, None, "", None)
    where = str(path.absolute())
    # Before the bytes are read: a change while reading then counts as a change afterwards.
    now = time.time_ns()
    try:
        stated = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Found(ABSENT, None, where, None)
    except OSError:
        return Found(UNREADABLE, None, where, None)
    if not stat.S_ISREG(stated.st_mode):
        return Found(NO_FILE, None, where, None)
    state = (stated.st_ino, stated.st_size, stated.st_mtime_ns, stated.st_ctime_ns)
    if pin is not None and pin.hint == state:
        return Found(pin.sha256, stated.st_size, where, state)
    is_settled = now - max(stated.st_mtime_ns, stated.st_ctime_ns) > _SETTLED_NS
    return Found("", stated.st_size, where, state if is_settled else None)


def _read_hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return UNREADABLE


def _compare_blob(source: PinnedSource, path: Path, sha256: str) -> None:
    fault = blob_fault(path, sha256) if sha256 != UNREADABLE else None
    if fault is not None:
        blob = blob_of(path)
        raise source.error(
            f"{path.name}: bytes that are not those the hub's cache names them by ({fault})",
            str(blob),
            f"delete {blob} and download it again: {source.remedy}",
        )


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
