"""The bundled reasoners on disk: weights, tokenizers, and everything that was sampled from them.

    <folder>/manifest.json               recipe, figures, sha256 of every other file
    <folder>/<reasoner>/config.json ...  a `from_pretrained` folder, float16
    <folder>/<reasoner>/rollouts.jsonl.xz
    <folder>/<reasoner>/truth.json       importances at many more rollouts, some traces

A line of `rollouts.jsonl.xz` is one problem in one setting: the base solution, the resampled rests
per sentence, the forced answers per sentence, and the measures that were computed from them. What
does not belong here: producing these files (`build`), and the dataset's own layout (`writer`).
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from taprobe_core.demo.policy import read_answer, read_continuation, read_trace
from taprobe_core.demo.task import Reasoned, problem
from taprobe_core.errors import CorruptArtifactError, DataError
from taprobe_core.store.integrity import file_sha256

BUNDLE = Path(__file__).parent / "bundle"
"""What comes with the library."""

MANIFEST, ROLLOUTS, TRUTH = "manifest.json", "rollouts.jsonl.xz", "truth.json"

SAMPLING = "temperature_1.0_top_p_1.0"
"""The sampling folder of everything bundled."""

_UNREADABLE = (
    OSError,
    EOFError,
    lzma.LZMAError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)
"""What reading raises on bytes that no build wrote."""


class Record(NamedTuple):
    """One problem of one reasoner in one setting."""

    setting: str
    reasoned: Reasoned
    measures: list[dict[str, float]]


def read_records(folder: Path, reasoner: str) -> Iterator[Record]:
    """Read what was sampled from one reasoner, in file order."""
    path = folder / reasoner / ROLLOUTS
    try:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            yield from (_record(json.loads(line)) for line in lines)
    except _UNREADABLE as error:
        raise DataError(
            f"the rollouts cannot be read ({error})", str(path), "reinstall taprobe"
        ) from error


def write_records(path: Path, records: Iterator[Record]) -> None:
    """Write `rollouts.jsonl.xz`."""
    with lzma.open(path, "wt", encoding="utf-8", newline="\n", preset=9) as lines:
        for record in records:
            lines.write(json.dumps(_row(record)) + "\n")


def _row(record: Record) -> dict[str, Any]:
    reasoned = record.reasoned
    return {
        "setting": record.setting,
        "problem_id": reasoned.problem.id,
        "solution": reasoned.trace.thinking + reasoned.trace.ending,
        "rollouts": [[rest.text for rest in bank] for bank in reasoned.rollouts],
        "forced": [[answer.text for answer in bank] for bank in reasoned.forced],
        "measures": record.measures,
    }


def _record(row: dict[str, Any]) -> Record:
    asked = problem(row["problem_id"])
    trace = read_trace(asked, row["solution"])
    if trace is None:
        raise ValueError(f"problem {asked.id}: a base solution that the policy could not have said")
    reasoned = Reasoned(
        asked,
        trace,
        [[read_continuation(asked, text) for text in bank] for bank in row["rollouts"]],
        [[read_answer(asked, text) for text in bank] for bank in row["forced"]],
    )
    return Record(row["setting"], reasoned, row["measures"])


def first_rollouts(reasoned: Reasoned, n_rollouts: int) -> Reasoned:
    """Return the same with the first `n_rollouts` rests of each sentence."""
    return replace(reasoned, rollouts=[bank[:n_rollouts] for bank in reasoned.rollouts])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest.

    Args:
        folder: a bundle.

    Raises:
        DataError: there is none, or it is not JSON.
    """
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the manifest cannot be read ({error})", str(path), "reinstall taprobe"
        ) from error
    return found


def verify_files(folder: Path) -> None:
    """Hash every file of a bundle.

    Args:
        folder: a bundle.

    Raises:
        CorruptArtifactError: a file is missing, or its bytes are not those that were built.
    """
    for name, sha256 in read_manifest(folder)["sha256"].items():
        path = folder / name
        found = file_sha256(path, use_cache=False) if path.is_file() else "no file"
        if found != sha256:
            raise CorruptArtifactError(
                f"sha256 is {found[:12]}, the manifest says {sha256[:12]}",
                str(path),
                "reinstall taprobe, or restore the file from version control",
            )
