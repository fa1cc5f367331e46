"""Which bytes a model and setting's rollouts are: the files that are read, and one hash of them.

Nothing is parsed here (`read`), and what the files are compared with is the caller's to say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from taprobe_core.errors import DataError, SourceUnavailableError
from taprobe_core.rollouts.read import listed_problems
from taprobe_core.rollouts.sources import FILE_NAMES, RolloutSource, problem_path
from taprobe_core.store import UNPINNED, PinnedSource
from taprobe_core.study.config import Model, Rollouts

_THREADS = 8

HashFiles = Callable[[Mapping[str, Path | None], Mapping[str, Sequence[str]]], Mapping[str, str]]
"""Takes files, and folders' listings, by name inside a source; see `store.pins.Pins.check`."""


def only_hash(
    files: Mapping[str, Path | None], listings: Mapping[str, Sequence[str]]
) -> Mapping[str, str]:
    """Hash files and compare them with nothing; see `HashFiles`."""
    return UNPINNED.check(PinnedSource("dataset", {}, Path(), ""), files, listings)


def content_digest(
    source: RolloutSource,
    model: Model,
    rollouts: Rollouts,
    setting: str,
    hash_files: HashFiles = only_hash,
) -> str:
    """Return a sha256 that changes whenever what `read_rollouts` reads changes.

    Where the source's identity names a revision, the digest is over identity, place and chosen ids,
    and nothing is fetched: its files are compared when they are. Otherwise it is over (problem id,
    file name, sha256 of the bytes) of the chosen problems, so that a mirror may move.

    Args:
        source: opened source.
        model: gives `rollouts_dir`.
        rollouts: the study's `rollouts`.
        setting: folder below the sampling folder.
        hash_files: gives the files' hashes, or refuses them.

    Raises:
        DataError: the problems cannot be listed, or `hash_files` refuses a file.
    """
    place = (model.rollouts_dir, rollouts.sampling, setting)
    chosen = listed_problems(source, model, rollouts, setting)
    identity = source.identity()
    if "revision" in identity:
        return _sha256(json.dumps([identity, place, chosen], sort_keys=True))
    listings = problem_listing(source, model, rollouts, setting)
    digests = hash_files(_files(source, place, chosen), listings)
    rows = [
        (problem_id, name, digests[str(problem_path(*place, problem_id, name))])
        for problem_id in chosen
        for name in FILE_NAMES
    ]
    return _sha256(json.dumps(rows))


def problem_listing(
    source: RolloutSource, model: Model, rollouts: Rollouts, setting: str
) -> dict[str, list[str]]:
    """Return the problem folders that decide which problems are chosen, by the folder they are in.

    Empty where the study names its problems.

    Raises:
        DataError: the problems cannot be listed.
    """
    place = (model.rollouts_dir, rollouts.sampling, setting)
    if rollouts.problem_ids is not None:
        return {}
    return {"/".join(place): [f"problem_{each}" for each in source.list_problems(*place)]}


def source_files(
    source: RolloutSource, model: Model, rollouts: Rollouts, setting: str
) -> dict[str, Path | None]:
    """Return every file that `read_rollouts` reads, fetched, by its name inside the source.

    None stands for a file that its problem does not have.

    Raises:
        DataError: the problems cannot be listed.
        SourceUnavailableError: the source cannot be reached.
    """
    place = (model.rollouts_dir, rollouts.sampling, setting)
    return _files(source, place, listed_problems(source, model, rollouts, setting))


def _files(
    source: RolloutSource, place: tuple[str, str, str], chosen: Sequence[int]
) -> dict[str, Path | None]:
    def fetch(problem_id: int) -> list[tuple[str, Path | None]]:
        return [
            (str(problem_path(*place, problem_id, name)), _fetched(source, place, problem_id, name))
            for name in FILE_NAMES
        ]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pair for pairs in pool.map(fetch, chosen) for pair in pairs)


def _fetched(
    source: RolloutSource, place: tuple[str, str, str], problem_id: int, name: str
) -> Path | None:
    try:
        return source.fetch(*place, problem_id, name)
    except SourceUnavailableError:
        raise
    except DataError:
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
