"""Where a checkpoint or a tokenizer comes from: a local folder, or a hub repository at a commit.

The hub client's own cache and variables hold (`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`), what is
cached needs no network, and only files that a model without code needs are fetched. An origin, or a
stand-in's specification, is also the source whose files `store.pins` compares with their first use;
which of them decide the model is said by those who read them (`resolve`, `tokenizer`).

Whether the files may be loaded belongs in `folder`. Invariant: whatever the client raises leaves
here as one of our errors.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants

from taprobe_core.demo import BUNDLE
from taprobe_core.demo.bundle import MANIFEST, read_manifest
from taprobe_core.errors import ConfigError, DiskFullError, ModelError, ModelMissingError
from taprobe_core.store import PinnedSource
from taprobe_core.store.integrity import file_sha256
from taprobe_core.store.local import sealed_files
from taprobe_core.study import DemoCheckpoint, PretrainedCheckpoint, resolve_folder

CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""One of the two; the second names the files with the weights."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""The first holds the tokenizer; the others may be absent."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<sha>[0-9a-f]{40}))?")


@dataclass(frozen=True)
class LocalFolder:
    """Files in a folder of this machine."""

    path: Path

    def fetch(self, names: Sequence[str], optional: Sequence[str] = ()) -> Path:
        """Return the folder; which files are wanted matters to a hub only."""
        del names, optional
        return self.path

    def listing(self) -> frozenset[str]:
        """Names of files that are not in the folder but at its origin: none."""
        return frozenset()

    @property
    def remedy(self) -> str:
        """What repairs missing or damaged files."""
        return f"copy the files into {self.path} again, or name a hub model org/name instead"


@dataclass(frozen=True)
class HubRepository:
    """Files of a hub model repository at one commit."""

    repo: str
    revision: str

    def fetch(self, names: Sequence[str], optional: Sequence[str] = ()) -> Path:
        """Return the cache's snapshot folder, after fetching what it lacks of these files.

        Nothing is asked of the network if nothing is lacking. A file that the repository is known
        not to hold is not lacking: whoever needs it says so.
        """
        with _translated(self.repo, self.revision):
            lacking = self._lacking((*names, *optional))
            folder = self._folder(names)
        if not lacking and folder is not None:
            return folder
        missing = [name for name in names if name in lacking]
        try:
            with _translated(self.repo, self.revision, missing if folder else ()):
                folder = Path(
                    hub.snapshot_download(
                        self.repo, revision=self.revision, allow_patterns=[*names, *optional]
                    )
                )
        except ModelMissingError:
            if folder is None or missing:
                raise
        else:
            # Offline the client does not know what a snapshot should hold, if nobody listed it.
            missing = [name for name in names if name in self._lacking(names)]
            if missing:
                raise _absent(self.repo, self.revision, missing, "it is offline")
        return folder

    def _folder(self, names: Sequence[str]) -> Path | None:
        """The snapshot folder, if it holds one of the files."""
        for name in names:
            found = hub.try_to_load_from_cache(self.repo, name, revision=self.revision)
            if isinstance(found, str):
                return Path(found).parent
        return None

    def _lacking(self, names: Sequence[str]) -> list[str]:
        """Those that the cache lacks, but for those that the repository is known not to hold."""
        listing = self.listing()
        return [
            name
            for name in names
            if not isinstance(
                hub.try_to_load_from_cache(self.repo, name, revision=self.revision), str
            )
            and (not listing or name in listing)
        ]

    def listing(self) -> frozenset[str]:
        """Names of the files that the repository is known to hold, fetched or not."""
        from huggingface_hub import errors

        try:
            return frozenset(
                file.path for file in hub.get_cached_repo_tree(self.repo, revision=self.revision)
            )
        except errors.CachedRepoTreeNotFoundError:
            return frozenset()

    @property
    def remedy(self) -> str:
        """The command that fetches the files."""
        return _remedy(self.repo, self.revision)


Origin = LocalFolder | HubRepository


def checkpoint_origin(checkpoint: PretrainedCheckpoint | DemoCheckpoint, model: str) -> Origin:
    """Find a checkpoint that is not built on this machine."""
    if isinstance(checkpoint, DemoCheckpoint):
        return LocalFolder(BUNDLE / checkpoint.name)
    return locate(checkpoint.path, checkpoint.revision, f"model {model}, checkpoint")


def locate(name: str, revision: str | None, where: str) -> Origin:
    """Find out what a study's `path` or `tokenizer` means."""
    folder = resolve_folder(name)
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"a revision for the local folder {folder}", where, "set its revision to null"
            )
        return LocalFolder(folder)
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ModelMissingError(
            f"no such folder: {folder}",
            where,
            "name an existing folder, or a hub repository as org/name",
        )
    if revision and match["sha"]:
        raise ConfigError(
            f"two revisions for {match['repo']}", where, "keep `revision` and write org/name alone"
        )
    repo = match["repo"]
    return HubRepository(repo, revision or match["sha"] or _main_revision(repo))


@cache
def _main_revision(repo: str) -> str:
    with _translated(repo, "main"):
        return str(hub.HfApi().resolve_revision(repo).resolved)


@contextmanager
def _translated(repo: str, revision: str, missing: Sequence[str] = ()) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise ModelMissingError(
            "no such model repository, or no access to it",
            repo,
            "correct the name; for a private or gated one accept its terms and run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelMissingError(
            "the repository has no such revision",
            f"{repo}@{revision}",
            "set revision to a commit sha of this repository, or to null",
        ) from error
    except (
        errors.RevisionResolutionError,
        errors.HFValidationError,
        errors.HTTPError,  # type: ignore[attr-defined] # of whatever library it speaks HTTP with
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            cache_folder = constants.HF_HUB_CACHE
            raise DiskFullError(
                "no space left for the checkpoint",
                cache_folder,
                "free space there, or set HF_HOME to a larger disk",
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise _absent(repo, revision, missing, reason) from error


def _absent(repo: str, revision: str, missing: Sequence[str], reason: str) -> ModelMissingError:
    named = [*missing[:3], *(["..."] if len(missing) > 3 else [])]
    return ModelMissingError(
        f"{'no ' + ', '.join(named) if named else 'not'} in the hub cache and cannot be fetched "
        f"({reason})",
        f"{repo}@{revision}",
        _remedy(repo, revision, missing),
    )


def _remedy(repo: str, revision: str, names: Sequence[str] = ()) -> str:
    command = " ".join(["hf download", repo, "--revision", revision, *names])
    if constants.is_offline_mode():
        return f"unset HF_HUB_OFFLINE, or where there is a network run `{command}`"
    return f"check the connection and HF_ENDPOINT, or run `{command}`"


def pinned_origin(origin: Origin, noun: str) -> PinnedSource:
    """Return what is pinned of a folder or of a hub repository's commit."""
    if isinstance(origin, HubRepository):
        return PinnedSource(
            noun,
            {"kind": "hub", "repo": origin.repo, "revision": origin.revision},
            Path(f"{origin.repo}@{origin.revision}"),
            origin.remedy,
            ModelError,
            "is_fetched_again",
        )
    if origin.path.parent == BUNDLE:
        return PinnedSource(
            noun,
            {
                "kind": "bundle",
                "name": origin.path.name,
                # A newer version brings other files, which are no change of these.
                "manifest_sha256": file_sha256(BUNDLE / MANIFEST),
            },
            origin.path,
            "reinstall taprobe, or restore the file from version control",
            ModelError,
            expected=lambda: _bundled(origin.path.name),
        )
    return PinnedSource(
        noun,
        {"kind": "folder", "folder": str(origin.path)},
        origin.path,
        "bring the files back as they were",
        ModelError,
    )


def pinned_stand_in(folder: Path) -> PinnedSource:
    """Return what is pinned of a stand-in checkpoint."""
    return PinnedSource(
        "checkpoint",
        {"kind": "stand_in", "folder": folder.name},
        folder,
        f"remove {folder}, which is built again",
        ModelError,
        "is_made_again",
        sealed_files(folder),
    )


def _bundled(name: str) -> Mapping[str, str]:
    """Hashes of one bundled reasoner's files, by name."""
    start = f"{name}/"
    return {
        path.removeprefix(start): sha256
        for path, sha256 in read_manifest(BUNDLE)["sha256"].items()
        if path.startswith(start)
    }
