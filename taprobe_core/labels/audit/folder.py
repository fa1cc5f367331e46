"""A local rollouts folder -> findings of all its problems, and what was looked at.

What a finding is belongs in `findings`. Invariant: every problem of the study is either readable
or has a finding that says why not, in the loader's own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import polars as pl

from taprobe_core.errors import ConfigError, DataError
from taprobe_core.labels import Solutions, read_solutions
from taprobe_core.labels.audit.findings import (
    Bank,
    Finding,
    IsDissimilar,
    audit_problem,
    cut_prefix,
    unreadable,
    unusable,
)
from taprobe_core.rollouts import (
    FILE_NAMES,
    FolderRollouts,
    ProblemRecord,
    RolloutSource,
    choose_problems,
    parse_problem,
)
from taprobe_core.rollouts.fields import load_json
from taprobe_core.rollouts.parse import SHARES
from taprobe_core.rollouts.sources import problem_path
from taprobe_core.study.config import Rollouts

MAX_BANK_BYTES = 2**29
"""A bank holds 100 whole texts, each at most twice: some 10 MB in the published dataset."""

FINDINGS = {
    "kind": pl.String,
    "problem_id": pl.Int64,
    "setting": pl.String,
    "model": pl.String,
    "file": pl.String,
    "detail": pl.String,
    "n": pl.Int64,
}

COVERAGE = {
    "model": pl.String,
    "setting": pl.String,
    "n_problems": pl.Int64,
    "n_readable": pl.Int64,
    "n_sentences": pl.Int64,
    "n_repeated": pl.Int64,
    "n_banks": pl.Int64,
    "n_rollouts": pl.Int64,
}

_Place: TypeAlias = tuple[str, str, str]


class RolloutAudit(NamedTuple):
    """What an audit found, and what it looked at.

    Attributes:
        findings: kind, problem_id, setting, model (folder), file (below the rollouts folder),
            detail, n; see `Finding`.
        coverage: per model and setting: problems, those that can be read, their sentences,
            `n_repeated` sentences whose prefix a deletion by text would corrupt, rollout banks
            and rollouts read. No bank: the folder holds labels without rollouts.
    """

    findings: pl.DataFrame
    coverage: pl.DataFrame


def audit_rollouts(
    source: RolloutSource,
    rollouts: Rollouts,
    model_dirs: Sequence[str],
    settings: Sequence[str],
    is_dissimilar: IsDissimilar | None = None,
    label_field: str = SHARES[-1],
) -> RolloutAudit:
    """Audit the problems that a study reads.

    Where no problem of a model and setting has rollouts beside its labels, none are missed.

    Args:
        source: opened source; must be a local folder.
        rollouts: the study's `rollouts`: sampling folder and choice of problems.
        model_dirs: model folders.
        settings: folders below the sampling folder.
        is_dissimilar: the similarity that the labels were made with, where it is known.
        label_field: the measure that becomes the label; see `parse_problem`.

    Raises:
        ConfigError: the source is no local folder.
        DataError: one of the folders does not exist.
    """
    if not isinstance(source, FolderRollouts):
        raise ConfigError(
            "an audit reads local folders only, found a hub repository",
            "rollouts.source",
            "fetch them with `hf download REPO --repo-type dataset --local-dir FOLDER`, "
            "then name the folder: `source: {kind: mirror, folder: FOLDER}`",
        )
    findings: list[dict[str, Any]] = []
    coverage: list[dict[str, Any]] = []
    for model in model_dirs:
        for setting in settings:
            place = (model, rollouts.sampling, setting)
            problem_ids = choose_problems(source.list_problems(*place), rollouts)
            found, covered = _audit_place(source, place, problem_ids, is_dissimilar, label_field)
            findings += found
            coverage.append({"model": model, "setting": setting, **covered})
    return RolloutAudit(
        pl.DataFrame(findings, schema=FINDINGS), pl.DataFrame(coverage, schema=COVERAGE)
    )


def _audit_place(
    source: FolderRollouts,
    place: _Place,
    problem_ids: Sequence[int],
    is_dissimilar: IsDissimilar | None,
    label_field: str,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    model, _, setting = place
    has_rollouts = any(_has_rollouts(source, place, problem_id) for problem_id in problem_ids)
    covered = dict.fromkeys(list(COVERAGE)[2:], 0)
    rows = []
    for problem_id in problem_ids:
        covered["n_problems"] += 1
        record = _read_problem(source, place, problem_id, label_field)
        if isinstance(record, ProblemRecord):
            banks = _read_banks(source, place, record) if has_rollouts else None
            found = unusable(record.notes)
            found += audit_problem(record.sentences, banks, is_dissimilar)
            _count(covered, record, banks or [])
        else:
            found = record
        rows += [
            {
                **finding._asdict(),
                "problem_id": problem_id,
                "setting": setting,
                "model": model,
                "file": str(problem_path(*place, problem_id, finding.file)),
            }
            for finding in found
        ]
    return rows, covered


def _has_rollouts(source: FolderRollouts, place: _Place, problem_id: int) -> bool:
    folder = source.folder.joinpath(*place, f"problem_{problem_id}")
    return next(folder.glob("chunk_*/solutions.json"), None) is not None


def _count(covered: dict[str, int], record: ProblemRecord, banks: Sequence[Bank]) -> None:
    texts = [row["sentence"] for row in record.sentences]
    read = [bank for bank in banks if isinstance(bank, Solutions)]
    covered["n_readable"] += 1
    covered["n_sentences"] += len(texts)
    covered["n_repeated"] += sum(
        cut_prefix(texts, index) != " ".join(texts[:index]) for index in range(len(texts))
    )
    covered["n_banks"] += len(read)
    covered["n_rollouts"] += sum(bank.n_rows for bank in read)


def _read_problem(
    source: FolderRollouts, place: _Place, problem_id: int, label_field: str
) -> ProblemRecord | list[Finding]:
    """Read as the loader does; of several files that cannot be parsed it names the first."""
    files, absent = {}, []
    for name in FILE_NAMES:
        try:
            files[name] = source.fetch(*place, problem_id, name)
        except DataError as error:
            absent.append(unreadable(name, error))
    if absent:
        return absent
    try:
        return parse_problem(files, problem_id, label_field)
    except DataError as error:
        where = error.where or ""
        named = (name for name, path in files.items() if where.startswith(str(path)))
        return [unreadable(next(named, "."), error)]


def _read_banks(source: FolderRollouts, place: _Place, record: ProblemRecord) -> list[Bank]:
    return [
        _read_bank(source, place, row["problem_id"], f"chunk_{row['sentence_idx']}/solutions.json")
        for row in record.sentences
    ]


def _read_bank(source: FolderRollouts, place: _Place, problem_id: int, name: str) -> Bank:
    try:
        path = source.fetch(*place, problem_id, name)
    except DataError:
        return None
    try:
        return read_solutions(load_json(path, MAX_BANK_BYTES), str(path))
    except DataError as error:
        return error
