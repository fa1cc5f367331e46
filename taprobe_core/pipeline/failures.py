"""What failed, kept: one small file per failed cell, beside the artifacts.

A record stands at `<data>/failures/<stage>/<cell>/<fingerprint>.json` until its cell is made. What
a failed cell stops, and going on with the others, belongs in `run`.

Invariant: a record counts only while the store lacks the very artifact that failed, so that other
inputs, another study or a version that mends the fault leave nothing to be cleared away. A cell
that has no key, for example because its checkpoint is not here, has failed without a record.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core import errors
from taprobe_core.errors import MissingArtifactError, TaprobeError, attempted
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import ArtifactKey
from taprobe_core.store.disk import disk_errors, make_folder, replace_text

_log = logging.getLogger(__name__)

_SHOWN = 10
"""Faults of one cell, and parts that failed alike, that a message lists."""


@dataclass(frozen=True)
class Fault:
    """One thing that failed in a cell.

    Attributes:
        error: what was raised.
        part: of the cell, for example a recipe or a problem; empty where the whole failed.
        trace: traceback of an error that nobody foresaw.
    """

    error: TaprobeError
    part: str = ""
    trace: str = ""

    @property
    def why(self) -> str:
        """What was found, and where."""
        return f"{self.error.what} in {self.error.where}" if self.error.where else self.error.what


@dataclass(frozen=True)
class Failure:
    """A cell that could not be made.

    Attributes:
        stage: its stage.
        cell: its partition keys.
        faults: what failed in it, at least one.
    """

    stage: str
    cell: Cell
    faults: tuple[Fault, ...]

    @property
    def place(self) -> str:
        """The cell as messages write it."""
        return "/".join(self.cell)

    @property
    def where(self) -> str:
        """Stage and cell."""
        return f"{self.stage} {self.place}".strip()

    @property
    def headline(self) -> str:
        """What failed, without why."""
        return f"{self.where} failed"

    @property
    def details(self) -> str:
        """Why, in words."""
        return "; ".join(self.lines)

    @property
    def lines(self) -> list[str]:
        """What failed and why, parts that failed alike together."""
        parts: dict[str, list[str]] = defaultdict(list)
        for each in self.faults:
            parts[each.why] += [each.part] if each.part else []
        return _first(
            [f"{', '.join(_first(of))}: {why}" if of else why for why, of in parts.items()]
        )

    @property
    def fix(self) -> str:
        """What to do about it."""
        fixes = dict.fromkeys(each.error.fix for each in self.faults[:_SHOWN] if each.error.fix)
        return "; ".join(fixes)

    @property
    def apart(self) -> tuple[str, str | None]:
        """Why, in words, and where; that is among the words where there is more than one place."""
        line, *others = self.lines
        where = self.faults[0].error.where
        return (self.details, None) if others else (line.removesuffix(f" in {where}"), where)

    @property
    def document(self) -> dict[str, Any]:
        """The failure as JSON values."""
        return {
            "stage": self.stage,
            "cell": list(self.cell),
            "faults": [
                {
                    "part": each.part,
                    "error": type(each.error).__name__,
                    "what": each.error.what,
                    "where": each.error.where,
                    "fix": each.error.fix,
                    "trace": each.trace,
                }
                for each in self.faults
            ],
        }

    @property
    def waits(self) -> bool:
        """Whether nothing is wrong with it but that what it reads is not made."""
        return all(isinstance(each.error, MissingArtifactError) for each in self.faults)


def _first(texts: list[str]) -> list[str]:
    return texts[:_SHOWN] + ([f"and {len(texts) - _SHOWN} more"] if texts[_SHOWN:] else [])


def failure_of(stage: str, cell: Cell, found: TaprobeError | Mapping[str, TaprobeError]) -> Failure:
    """Return the failure of a cell.

    Args:
        stage: its stage.
        cell: its partition keys.
        found: its error, or the errors of its parts by their name.
    """
    of_parts = {"": found} if isinstance(found, TaprobeError) else found
    faults = tuple(Fault(error, part, _trace(error)) for part, error in of_parts.items())
    return Failure(stage, cell, faults)


def _trace(error: TaprobeError) -> str:
    cause = error.__cause__
    if not isinstance(error, errors.UnexpectedError) or cause is None:
        return ""
    return "".join(traceback.format_exception(cause))


def keep_failure(plan: Plan, failure: Failure) -> None:
    """Keep the failure of a cell, in place of an earlier one of the same study.

    Raises:
        DiskFullError: no space.
        ArtifactError: the folder cannot be written.
    """
    _log.error("%s: %s", failure.headline, failure.details)
    for fault in {each.trace: each for each in failure.faults if each.trace}.values():
        _log.error("nobody foresaw that", exc_info=fault.error.__cause__)
    key = attempted(lambda: plan.key(failure.stage, failure.cell), failure.where)
    if isinstance(key, TaprobeError) or failure.waits:
        return
    document = {
        "study": plan.study.name,
        "fingerprint": key.fingerprint,
        **failure.document,
    }
    forget_failure(plan, key)
    path = _path(plan, key)
    with disk_errors(str(path.parent)):
        make_folder(path.parent)
        replace_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


def forget_failure(plan: Plan, key: ArtifactKey) -> None:
    """Remove what is kept of a cell that this study has made, or that failed anew.

    Records of other studies that share the data folder stay.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    folder = _path(plan, key).parent
    with disk_errors(str(folder)):
        for path in sorted(folder.glob("*.json")):
            kept = _read(path)
            if kept is None or kept[0] == plan.study.name or path.stem == key.fingerprint:
                path.unlink(missing_ok=True)


def failure_at(plan: Plan, stage: str, cell: Cell, *, only_kept: bool = False) -> Failure | None:
    """Return how a cell failed; None where it is there, or was not tried yet.

    Args:
        plan: the plan.
        stage: the stage.
        cell: one of its cells.
        only_kept: leave out that it has no key here.
    """
    key = attempted(lambda: plan.key(stage, cell), f"the key of {stage} {'/'.join(cell)}")
    if isinstance(key, TaprobeError):
        return None if only_kept else failure_of(stage, cell, key)
    kept = _read(_path(plan, key))
    if kept is None or plan.is_complete(stage, cell):
        return None
    return Failure(stage, cell, kept[1])


def kept_failures(plan: Plan) -> list[Failure]:
    """Return the failures of a study that are kept, in the order of its cells.

    Cells without a key, which have failed without a record, are not among them.
    """
    if not (plan.data_root / "failures").is_dir():
        return []
    found = [
        failure_at(plan, stage, cell, only_kept=True)
        for stage in plan.stages.of(plan.study)
        for cell in plan.stages.cells(plan.study, stage)
    ]
    return [failure for failure in found if failure is not None]


def _path(plan: Plan, key: ArtifactKey) -> Path:
    folder = plan.data_root.joinpath("failures", key.stage, *key.partition)
    return folder / f"{key.fingerprint}.json"


def _read(path: Path) -> tuple[str, tuple[Fault, ...]] | None:
    """A record's study and faults; None without one that can be read: the cell is tried again."""
    try:
        values = json.loads(path.read_bytes())
        faults = tuple(
            Fault(_error(each), each["part"], each["trace"]) for each in values["faults"]
        )
        return (values["study"], faults) if faults else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _error(values: Mapping[str, Any]) -> TaprobeError:
    kind: Any = getattr(errors, values["error"], None)
    is_known = isinstance(kind, type) and issubclass(kind, TaprobeError)
    return (kind if is_known else TaprobeError)(values["what"], values["where"], values["fix"])
