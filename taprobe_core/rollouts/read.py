"""From a source to the tables of one model and setting: choose problems, read, check, hash.

A problem that cannot be read is left out with its reason, or fails the whole, as the study says. A
source that cannot be reached always fails: it says nothing about a problem. Rows are ordered by
problem and sentence, whatever order the files came in. The files that decide the tables are named,
and one hash of them, without parsing any; what that is compared with is the caller's to say.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from taprobe_core import tables
from taprobe_core.errors import (
    ConfigError,
    DataError,
    NotEnoughDataError,
    SchemaError,
    SourceUnavailableError,
)
from taprobe_core.rollouts.parse import SHARES, ProblemRecord, parse_problem
from taprobe_core.rollouts.sources import (
    FILE_NAMES,
    FolderRollouts,
    RolloutSource,
    problem_path,
)
from taprobe_core.store import UNPINNED, PinnedSource
from taprobe_core.study.config import (
    DemoSource,
    HubSource,
    Model,
    PolicySource,
    Rollouts,
    resolve_folder,
)

_THREADS = 8

HashFiles = Callable[[Mapping[str, Path | None], Mapping[str, Sequence[str]]], Mapping[str, str]]
"""Takes files, and folders' listings, by name inside a source; see `store.pins.Pins.check`."""


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
        from taprobe_core.rollouts.hub import HubRollouts

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


_SHOWN = 10
"""Problems that an error lists."""

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutTables:
    """Tables of one model and setting, each keeping its contract in `tables`.

    `notes` lists values of problems that are read, null because they are not usable and no stage
    reads them.
    """

    problems: pl.DataFrame
    sentences: pl.DataFrame
    skipped: pl.DataFrame
    notes: pl.DataFrame


def choose_problems(available: Sequence[int], rollouts: Rollouts) -> list[int]:
    """Return the problems to read, ascending.

    The pool is `problem_ids` where given, else what is available, without `exclude_ids`. With
    `max_problems` below the size of the pool, that many are drawn from the sorted pool without
    replacement by `random.Random(sample_seed).sample`. A requested id that is not available stays
    in: reading it says so.

    Args:
        available: problem ids of the source, in any order.
        rollouts: the study's `rollouts`.
    """
    named = available if rollouts.problem_ids is None else rollouts.problem_ids
    pool = sorted(set(named) - set(rollouts.exclude_ids))
    wanted = rollouts.max_problems
    if wanted is None or wanted >= len(pool):
        return pool
    # Reproducibility, not secrecy.
    return sorted(random.Random(rollouts.sample_seed).sample(pool, wanted))  # noqa: S311


def listed_problems(
    source: RolloutSource, model: Model, rollouts: Rollouts, setting: str
) -> list[int]:
    """Return the problems of one model and setting that a study reads, ascending.

    Raises:
        DataError: the problems cannot be listed.
    """
    return _chosen(source, rollouts, (model.rollouts_dir, rollouts.sampling, setting))


def read_rollouts(
    source: RolloutSource,
    model: Model,
    rollouts: Rollouts,
    setting: str,
    label_field: str = SHARES[-1],
) -> RolloutTables:
    """Read the chosen problems of one model and setting.

    Args:
        source: opened source.
        model: gives `rollouts_dir`.
        rollouts: the study's `rollouts`.
        setting: folder below the sampling folder.
        label_field: the measure that becomes the label; see `parse_problem`.

    Returns:
        Tables sorted by problem_id and sentence_idx. `skipped` has a row per problem left out; it
        stays empty where `on_bad_problem` is `fail`.

    Raises:
        NotEnoughDataError: no problem is left; gives the first reasons.
        SourceUnavailableError: the source cannot be reached.
        DataError: a folder of the path does not exist; or a problem cannot be read and
            `on_bad_problem` is `fail`.
    """
    place = (model.rollouts_dir, rollouts.sampling, setting)
    available = source.list_problems(*place)
    chosen = choose_problems(available, rollouts)
    present = set(available)
    where = "/".join(place)

    def read_one(problem_id: int) -> ProblemRecord | DataError:
        try:
            if problem_id not in present:
                raise _no_such_problem(problem_id, available, where)
            files = {name: source.fetch(*place, problem_id, name) for name in FILE_NAMES}
            return parse_problem(files, problem_id, label_field)
        except SourceUnavailableError:
            raise
        except DataError as error:
            return error

    results = _in_threads(read_one, chosen)
    records = [result for result in results if isinstance(result, ProblemRecord)]
    bad = {
        problem_id: result
        for problem_id, result in zip(chosen, results, strict=True)
        if isinstance(result, DataError)
    }
    if bad and rollouts.on_bad_problem == "fail":
        raise _refused(bad)
    skipped = [_skipped_row(problem_id, error) for problem_id, error in bad.items()]
    if not records:
        raise _nothing_read(skipped, where, is_filtered=bool(rollouts.exclude_ids))
    notes = [
        {"problem_id": record.problem["problem_id"], "note": note}
        for record in records
        for note in record.notes
    ]
    return RolloutTables(
        _table([record.problem for record in records], tables.PROBLEMS, where),
        _table([row for record in records for row in record.sentences], tables.SENTENCES, where),
        _table(skipped, tables.SKIPPED, where),
        _table(notes, tables.NOTES, where),
    )


def _chosen(source: RolloutSource, rollouts: Rollouts, place: tuple[str, str, str]) -> list[int]:
    # Named problems need no listing, so that a pinned study plans without a network.
    available = source.list_problems(*place) if rollouts.problem_ids is None else []
    return choose_problems(available, rollouts)


def _in_threads(work: Callable[[int], T], items: Sequence[int]) -> list[T]:
    """Map in order; the first failure cancels what has not begun."""
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _table(rows: list[dict[str, Any]], contract: tables.Contract, where: str) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=tables.schema_of(contract))
    return tables.check_table(frame, contract, where)


def _skipped_row(problem_id: int, error: DataError) -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        "stage": "rollouts",
        "error": type(error).__name__,
        "what": _reason(error),
        "where": error.where,
        "fix": error.fix,
    }


def _refused(bad: Mapping[int, DataError]) -> DataError:
    """Return the error of the first problem that cannot be read, which names the others too."""
    (first, error), *others = bad.items()
    ids = ", ".join(str(problem_id) for problem_id, _ in others[:_SHOWN])
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    also = f"; problems {ids}{more} cannot be read either" if others else ""
    skip = "set rollouts.on_bad_problem: skip to leave out every such problem"
    exclude = "" if "exclude_ids" in (error.fix or "") else f"; rollouts.exclude_ids: [{first}]"
    return type(error)(f"{error.what}{also}", error.where, f"{error.fix}{exclude}; or {skip}")


def _reason(error: DataError) -> str:
    # Faults stand under `where`; a list of reasons shows `what` alone.
    faults = error.faults if isinstance(error, SchemaError) else ()
    return f"{error.what}: {faults[0]}" if faults else error.what


def _no_such_problem(problem_id: int, available: Sequence[int], where: str) -> DataError:
    shown = ", ".join(map(str, available[:10])) + (", ..." if available[10:] else "")
    return DataError(
        f"no problem {problem_id} (there is: {shown or 'none'})",
        where,
        f"take {problem_id} out of rollouts.problem_ids",
    )


def _nothing_read(
    skipped: Sequence[dict[str, Any]], where: str, *, is_filtered: bool
) -> NotEnoughDataError:
    if not skipped:
        return NotEnoughDataError(
            "no problem_<id> folder" + (" that is not excluded" if is_filtered else ""),
            where,
            "point the study at a folder that holds problems"
            + (", or shorten rollouts.exclude_ids" if is_filtered else ""),
        )
    reasons = "; ".join(
        f"problem {row['problem_id']}: {row['what']} in {row['where']}" for row in skipped[:3]
    )
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return NotEnoughDataError(
        f"none of {len(skipped)} problem(s) could be read ({reasons}{more})",
        where,
        f"problem {skipped[0]['problem_id']}: {skipped[0]['fix']}",
    )
