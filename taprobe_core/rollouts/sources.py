"""Where dataset files are found: one interface over a hub repository and a local folder.

Both have the dataset's own layout, `<rollouts_dir>/<sampling>/<setting>/problem_<id>/<file>`, and
the embedded demo world is a local folder of it. A source lists problems and hands out paths; it
never looks into a file, which belongs in `parse`.

Invariant: no path made from the study leaves the source's root.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from taprobe_core.errors import ConfigError, DataError
from taprobe_core.study.config import DemoSource, PolicySource, Rollouts

FILE_NAMES = ("problem.json", "base_solution.json", "chunks_labeled.json")
"""The files that every problem must have."""

PUBLISHED_ROLLOUTS = 100
"""Rollouts per sentence in the published dataset."""

# Eighteen digits fit Int64; a leading zero would make two folders of one problem.
_PROBLEM = re.compile(r"problem_(0|[1-9][0-9]{0,17})")
_LEVELS = ("models.<key>.rollouts_dir", "rollouts.sampling", "settings")


class RolloutSource(Protocol):
    """A place that holds the dataset's files."""

    def identity(self) -> dict[str, str]:
        """Return what names this source in provenance, without touching file contents.

        An identity with a `revision` promises that the files under it never change.
        """

    def list_problems(self, rollouts_dir: str, sampling: str, setting: str) -> list[int]:
        """Return all problem ids of one model and setting, ascending.

        Raises:
            ConfigError: a part leads out of the source.
            DataError: one of the folders does not exist; says which, and what is there.
        """

    def fetch(
        self, rollouts_dir: str, sampling: str, setting: str, problem_id: int, name: str
    ) -> Path:
        """Return a readable local path of one problem's file; safe to call from threads.

        Raises:
            ConfigError: a part leads out of the source.
            DataError: the problem has no such file.
            SourceUnavailableError: whether it has one cannot be told.
        """


class FolderRollouts:
    """Rollouts in a local folder of the dataset's layout.

    Args:
        folder: the folder that holds `<rollouts_dir>` folders.
        identity: what names this source in provenance; default: a mirror at `folder`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._identity = identity or {"kind": "mirror", "folder": str(folder)}

    def identity(self) -> dict[str, str]:
        """Return kind and folder; a folder has no revision, so its bytes must be hashed."""
        return dict(self._identity)

    def list_problems(self, rollouts_dir: str, sampling: str, setting: str) -> list[int]:
        """Return the ids of all `problem_<id>` folders, ascending."""
        parts = [checked_path(part) for part in (rollouts_dir, sampling, setting)]
        names = self._folders(PurePosixPath(*parts))
        if names is None:
            raise missing_level(parts, self._folders, str(self.folder))
        return problem_ids(names)

    def fetch(
        self, rollouts_dir: str, sampling: str, setting: str, problem_id: int, name: str
    ) -> Path:
        """Return the path of one problem's file."""
        path = self.folder / problem_path(rollouts_dir, sampling, setting, problem_id, name)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise absent_file(problem_id, name, str(path.parent)) from None
        except OSError as error:  # no right to search the folder, links in a circle
            raise DataError(
                f"the file cannot be reached ({error.strerror})",
                str(path),
                "make its folder readable for this user, or leave the problem out: "
                f"rollouts.exclude_ids: [{problem_id}]",
            ) from error
        return path

    def _folders(self, path: PurePosixPath) -> list[str] | None:
        folder = self.folder / path
        try:
            return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(
                f"the folder cannot be listed ({error.strerror})",
                str(folder),
                "make the folder readable for this user",
            ) from error


def max_rollouts(rollouts: Rollouts) -> int:
    """Return the most rollouts a sentence can have: the bound for reconstructing counts."""
    source = rollouts.source
    if isinstance(source, DemoSource | PolicySource):
        return source.n_rollouts
    return PUBLISHED_ROLLOUTS


def checked_path(part: str) -> str:
    """Return `part` in normal form if it is a relative path that stays below its root."""
    path = PurePosixPath(part)
    leaves = path.is_absolute() or bool(PureWindowsPath(part).anchor) or ".." in path.parts
    if leaves or not path.parts or "\\" in part or "\0" in part:
        raise ConfigError(
            f"{part!r} is not a folder inside the rollouts",
            "models.<key>.rollouts_dir, rollouts.sampling or settings",
            "give a relative folder name without '..'",
        )
    return str(path)


def problem_path(
    rollouts_dir: str, sampling: str, setting: str, problem_id: int, name: str
) -> PurePosixPath:
    """Return the path of one problem's file below a source's root.

    Raises:
        ConfigError: a part leads out of the root.
    """
    parts = [checked_path(part) for part in (rollouts_dir, sampling, setting, name)]
    return PurePosixPath(*parts[:3], f"problem_{problem_id}", parts[3])


def problem_ids(names: Iterable[str]) -> list[int]:
    """Return the ids of the names of form `problem_<id>`, ascending; other names are ignored."""
    return sorted(int(match[1]) for name in names if (match := _PROBLEM.fullmatch(name)))


def absent_file(problem_id: int, name: str, where: str) -> DataError:
    """Return the error for a file that its problem lacks."""
    return DataError(
        f"problem {problem_id} has no {name}",
        where,
        f"add the file, or leave the problem out: rollouts.exclude_ids: [{problem_id}]",
    )


def missing_level(
    parts: Sequence[str], folders: Callable[[PurePosixPath], Sequence[str] | None], root: str
) -> DataError:
    """Return the error that says which of a source's folders is missing, and what stands there."""
    path = PurePosixPath()
    there = folders(path)
    if there is None:
        return DataError(
            "no such folder", root, "correct rollouts.source.folder, or put the dataset there"
        )
    for key, part in zip(_LEVELS, parts, strict=True):
        below = folders(path / part)
        if below is None:
            shown = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if there[10:] else "")
            close = difflib.get_close_matches(part, there, n=1)
            meant = f": did you mean {close[0]!r}?" if close else ""
            return DataError(
                f"no folder {part!r} (there is: {shown or 'nothing'})",
                f"{root}/{path}" if path.parts else root,
                f"correct {key}{meant}",
            )
        path, there = path / part, below
    return DataError("the folder vanished while it was read", f"{root}/{path}", "run again")
