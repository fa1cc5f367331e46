"""The file that remembers what a source held: one for each source, `pins/<noun>-<digest>.json`.

Turns pins into bytes and back. What is compared with them, and when, belongs in `pins`. Invariant:
a file that parses is one that was written here; a damaged one is refused and never taken for new.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from taprobe_core.errors import CorruptArtifactError
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
