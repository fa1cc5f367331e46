"""Where dataset files are found: one interface over a hub repository and a local folder.

Both have the dataset's own layout, `<rollouts_dir>/<sampling>/<setting>/problem_<id>/<file>`, and
the embedded demo world is a local folder of it. A source lists problems and hands out paths; it
never looks into a file, which belongs in `parse`.

A hub repository is read at one commit, one needed file at a time: it holds some 90 GB, so nothing
is fetched as a whole. Files land in the hub client's own cache (`HF_HOME`), the endpoint is its own
(`HF_ENDPOINT`), and `HF_HUB_OFFLINE` is obeyed. Offline, the listing is what the cache holds, which
may be less than the repository.

Invariants: no path made from the study leaves the source's root. Whatever the client raises leaves
here as one of our errors, and only a certain "there is no such file" is a plain DataError; every
doubt is a SourceUnavailableError, so that a lost connection can never pass for a bad problem.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, cast

from huggingface_hub import HfApi, RepoFolder, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import silent_tqdm

from taprobe_core.errors import ConfigError, DataError, SourceUnavailableError
from taprobe_core.study.config import DemoSource, HubSource, PolicySource, Rollouts, resolve_folder

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


def open_source(rollouts: Rollouts, demo_folder: Path | None = None) -> RolloutSource:
    """Open the source that a study names; nothing is fetched yet.

    Args:
        rollouts: the study's `rollouts`.
        demo_folder: the demo world's rollouts; needed when the source is the demo.

    Raises:
        ConfigError: the source is the demo and there is no demo folder.
    """
    source = rollouts.source
    if isinstance(source, HubSource):
        # Deferred: a mirror or the demo should not pay for the hub client's import.
        from taprobe_core.rollouts.sources import HubRollouts

        return HubRollouts(source.repo, source.revision)
    if isinstance(source, DemoSource | PolicySource):
        if demo_folder is None:
            raise ConfigError(
                "the demo world has not been written",
                "rollouts.source.kind",
                "write it with `ensure_demo_world` and pass its folder",
            )
        stated = source.model_dump(mode="json")
        return FolderRollouts(demo_folder, {key: str(value) for key, value in stated.items()})
    return FolderRollouts(resolve_folder(source.folder))


def max_rollouts(rollouts: Rollouts) -> int:
    """Return the most rollouts a sentence can have: the bound for reconstructing counts."""
    source = rollouts.source
    if isinstance(source, DemoSource | PolicySource):
        return source.n_rollouts
    return PUBLISHED_ROLLOUTS


def checked_path(part: str) -> str:
    """Return `part` in normal form if it is a relative path that stays below its root.

    Raises:
        ConfigError: it is empty or absolute, or holds `..`, a backslash or a NUL.
    """
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
    """Return the error that says which of a source's folders is missing, and what stands there.

    Args:
        parts: rollouts_dir, sampling and setting, in this order.
        folders: lists the folders at a path below the root; None where there is no folder.
        root: the source's root, for the message.
    """
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


_LOG = logging.getLogger(__name__)


class HubRollouts:
    """Rollouts in a hub dataset repository.

    Args:
        repo: repository id, `owner/name`.
        revision: commit sha; None: the main branch's, resolved on first use and kept.

    Raises:
        ConfigError: `repo` is not a repository id.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ConfigError(
                f"{repo!r} is not a repository id", "rollouts.source.repo", "write owner/name"
            ) from error
        self.repo = repo
        self._pinned = revision
        self._listed: dict[PurePosixPath, list[int]] = {}

    @cached_property
    def revision(self) -> str:
        """The commit that everything is read at.

        Raises:
            SourceUnavailableError: offline or cut off, and no earlier resolution in the cache.
        """
        if self._pinned is not None:
            return self._pinned
        with self._translated("resolve the main branch", self._download_command("main", "*")):
            return str(HfApi().resolve_revision(self.repo, repo_type="dataset").resolved)

    def identity(self) -> dict[str, str]:
        """Return kind, repository and commit."""
        return {"kind": "hub", "repo": self.repo, "revision": self.revision}

    def list_problems(self, rollouts_dir: str, sampling: str, setting: str) -> list[int]:
        """Return the ids of all problems at the commit; offline, of those in the cache."""
        parts = [checked_path(part) for part in (rollouts_dir, sampling, setting)]
        path = PurePosixPath(*parts)
        if path not in self._listed:
            listing = self._list_cached if constants.is_offline_mode() else self._list_remote
            self._listed[path] = listing(parts)
        return list(self._listed[path])

    def fetch(
        self, rollouts_dir: str, sampling: str, setting: str, problem_id: int, name: str
    ) -> Path:
        """Return the cached path of one problem's file, downloading it if needed."""
        path = problem_path(rollouts_dir, sampling, setting, problem_id, name)
        where = f"{self.repo}@{self.revision}:{path.parent}"
        if self._known_absent(path):
            raise absent_file(problem_id, name, where)
        command = self._download_command(self.revision, path.parent)
        try:
            with self._translated(f"fetch {path}", command):
                local = hf_hub_download(
                    self.repo,
                    str(path),
                    repo_type="dataset",
                    revision=self.revision,
                    tqdm_class=cast(Any, silent_tqdm),
                )
        except RemoteEntryNotFoundError:
            raise absent_file(problem_id, name, where) from None
        return Path(local)

    def _list_remote(self, parts: list[str]) -> list[int]:
        names = self._folders(PurePosixPath(*parts))
        if names is None:
            raise missing_level(parts, self._folders, f"{self.repo}@{self.revision}")
        return problem_ids(names)

    def _folders(self, path: PurePosixPath) -> list[str] | None:
        try:
            with self._translated(
                f"list {path}", self._download_command(self.revision, path / "*")
            ):
                entries = HfApi().list_repo_tree(
                    self.repo,
                    path_in_repo=str(path) if path.parts else None,
                    repo_type="dataset",
                    revision=self.revision,
                )
                found = [entry.path for entry in entries if isinstance(entry, RepoFolder)]
        except RemoteEntryNotFoundError:
            return None
        return sorted(PurePosixPath(folder).name for folder in found)

    def _list_cached(self, parts: list[str]) -> list[int]:
        path = PurePosixPath(*parts)
        storage = repo_folder_name(repo_id=self.repo, repo_type="dataset")
        snapshot = Path(constants.HF_HUB_CACHE) / storage / "snapshots" / self.revision
        if not (snapshot / path).is_dir():
            command = self._download_command(self.revision, path / "*")
            raise SourceUnavailableError(
                "offline, and the hub cache does not hold this folder",
                f"{self.repo}@{self.revision}:{path}",
                _way_out(command),
            )
        ids = FolderRollouts(snapshot).list_problems(*parts)
        _LOG.warning(
            "offline: %d problem(s) of %s are in the cache; the repository may hold more",
            len(ids),
            path,
        )
        return ids

    def _known_absent(self, path: PurePosixPath) -> bool:
        cached = try_to_load_from_cache(
            self.repo, str(path), revision=self.revision, repo_type="dataset"
        )
        # The client remembers a 404 at a commit by a sentinel that is neither a path nor None.
        return cached is not None and not isinstance(cached, str)

    def _download_command(self, revision: str, folder: PurePosixPath | str) -> str:
        includes = " ".join(f'--include "{folder}/{name}"' for name in FILE_NAMES)
        return f"hf download {self.repo} --repo-type dataset --revision {revision} {includes}"

    @contextmanager
    def _translated(self, action: str, command: str) -> Iterator[None]:
        try:
            yield
        except RemoteEntryNotFoundError:
            raise
        except RepositoryNotFoundError as error:
            raise DataError(
                "no such dataset repository, or no access to it",
                self.repo,
                "correct rollouts.source.repo; for a private or gated one run `hf auth login`",
            ) from error
        except RevisionNotFoundError as error:
            raise DataError(
                "the repository has no such revision",
                f"{self.repo}@{self._pinned}",
                "give rollouts.source.revision a commit sha of this repository, or null",
            ) from error
        except (RevisionResolutionError, HTTPError, OSError) as error:
            raise SourceUnavailableError(
                f"cannot {action}: {_first_line(error)}", self.repo, _way_out(command)
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _way_out(command: str) -> str:
    if constants.is_offline_mode():
        return f"unset HF_HUB_OFFLINE, or where there is a network run `{command}`"
    return (
        "check the connection and HF_ENDPOINT and run again, or use what is cached with "
        f"HF_HUB_OFFLINE=1 after `{command}`"
    )
