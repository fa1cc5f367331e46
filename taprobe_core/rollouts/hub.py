"""Rollouts in a hub dataset repository, read at one commit, one needed file at a time.

The repository holds some 90 GB, so nothing is fetched as a whole. Files land in the hub client's
own cache (`HF_HOME`), the endpoint is its own (`HF_ENDPOINT`), and `HF_HUB_OFFLINE` is obeyed.
Offline, the listing is what the cache holds, which may be less than the repository.

Invariant: whatever the client raises leaves here as one of our errors, and only a certain "there is
no such file" is a plain DataError; every doubt is a SourceUnavailableError, so that a lost
connection can never pass for a bad problem.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

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
from taprobe_core.rollouts.sources import (
    FILE_NAMES,
    FolderRollouts,
    absent_file,
    checked_path,
    missing_level,
    problem_ids,
    problem_path,
)

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
        """The commit that everything is read at."""
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
