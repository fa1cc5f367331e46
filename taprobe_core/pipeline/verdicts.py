"""What checks found, kept: one small file per check and cell, beside the artifacts.

A verdict stands in a store of its own, `<data>/checks/<stage>/<cell>/<check>/<fingerprint>`, under
a hash of the check's version, what of the study it depends on, and the content of every artifact
that it read. So equal inputs are looked at once, and an input that was mended, in whatever way, is
looked at again. What a failed check stops belongs in `run`.

Invariant: a verdict is of the bytes that the store holds now. What cannot be read is a fault, and
is not kept: the next look may find it mended.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from taprobe_core.errors import CorruptArtifactError, TaprobeError, attempted
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Check, Found
from taprobe_core.store import Artifact, ArtifactKey, Store, fingerprint, write_json
from taprobe_core.study import Waiver

_log = logging.getLogger(__name__)

Status = Literal["passed", "failed", "not_run"]

_FILE = "verdict.json"


@dataclass(frozen=True)
class Verdict:
    """What one check found in one stored cell.

    Attributes:
        stage: stage of the cell.
        cell: its partition keys.
        check: name of the check.
        status: `not_run` where it could not look, for example for too few problems.
        is_blocking: whether a fault stops what comes after; otherwise it warns.
        faults: what does not hold, in words.
        note: why it was not run.
        fix: what to do about a fault.
        numbers: figures behind the verdict.
        artifact: the artifact that was looked at, as `stage/cell/fingerprint`.
        path: its folder.
        waiver: the study's waiver of this check and cell.
    """

    stage: str
    cell: Cell
    check: str
    status: Status
    is_blocking: bool
    faults: tuple[str, ...] = ()
    note: str | None = None
    fix: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    artifact: str = ""
    path: str = ""
    waiver: Waiver | None = None

    @property
    def place(self) -> str:
        """The cell as messages and waivers write it."""
        return "/".join(self.cell)

    @property
    def where(self) -> str:
        """Stage and cell."""
        return f"{self.stage} {self.place}"

    @property
    def headline(self) -> str:
        """What failed, without why."""
        return f"check {self.check} failed on {self.where}"

    @property
    def details(self) -> str:
        """Why, in words."""
        return "; ".join(self.faults)

    @property
    def apart(self) -> tuple[str, str | None]:
        """Why, in words, and where."""
        return self.details, self.path

    @property
    def is_red(self) -> bool:
        """Whether it failed and nobody waived it."""
        return self.status == "failed" and self.waiver is None

    @property
    def stops(self) -> bool:
        """Whether what comes after the cell is refused."""
        return self.is_red and self.is_blocking


def verdicts_of(
    plan: Plan, stage: str, cell: Cell, *, looks: bool = True, only: str | None = None
) -> Iterator[Verdict]:
    """Yield what each check of a stage says of a cell; nothing where the cell is not stored.

    Args:
        plan: the plan.
        stage: the stage.
        cell: one of its cells.
        looks: run a check that has not seen this content yet, and keep what it finds; without, only
            what is kept is told.
        only: name of the one check that is asked for.
    """
    checks = {
        name: check
        for name, check in plan.stages[stage].checks.items()
        if only in (None, name) and check.looks_at(plan, cell)
    }
    artifact = _stored(plan, stage, cell) if checks else None
    if artifact is None:
        return
    for name, check in checks.items():
        found = _known(plan, stage, cell, name, check, looks=looks)
        if found is not None:
            yield _verdict(plan, artifact, stage, cell, name, check, found)


def _stored(plan: Plan, stage: str, cell: Cell) -> Artifact | None:
    try:
        if not plan.is_complete(stage, cell):
            return None
        return plan.store.find(plan.key(stage, cell))
    except TaprobeError as error:
        # A cell that cannot be named here (a checkpoint that is elsewhere) holds nothing up here.
        _log.debug("%s %s has no key: %s", stage, "/".join(cell), error.what)
        return None


def _known(
    plan: Plan, stage: str, cell: Cell, name: str, check: Check[Plan], *, looks: bool
) -> Found | None:
    """What is kept, else what a look finds; a look that fails is a fault, and is not kept."""
    store = checks_store(plan)
    try:
        key = _key(plan, stage, cell, name, check)
        found = _read(store, key)
        if found is not None or not looks:
            return found
        looked = attempted(partial(check.look, plan, cell), f"{stage} {'/'.join(cell)}")
        if isinstance(looked, TaprobeError):
            raise looked
        found = looked
    except TaprobeError as error:
        where = f" in {error.where}" if error.where else ""
        fault = f"it could not look: {error.what}{where}"
        return Found((fault,), fix=error.fix) if looks else None
    _keep(store, key, found)
    return found


def checks_store(plan: Plan) -> Store:
    """The store of verdicts; a verdict that is lost is found again."""
    return Store(plan.data_root / "checks")


def _key(plan: Plan, stage: str, cell: Cell, name: str, check: Check[Plan]) -> ArtifactKey:
    read = [plan.key(stage, cell), *check.reads(plan, cell)]
    contents = [_content(plan, key) for key in read]
    version = fingerprint(name, check.version, check.settings(plan), contents)
    return ArtifactKey(stage, (*cell, name), version)


def _content(plan: Plan, key: ArtifactKey) -> str:
    """Digest of an artifact's files and its parts', as their manifests say.

    A fingerprint says what an artifact should be; one that was damaged, removed and made again has
    the same.
    """
    digest = hashlib.sha256(str(key).encode())
    manifest = plan.store.inspect(key).manifest
    for each in (
        manifest,
        *(plan.store.inspect(part).manifest for part in plan.part_keys(manifest)),
    ):
        for name, record in sorted(each.files.items()):
            digest.update(f"{name} {record.sha256}\n".encode())
    return digest.hexdigest()


def _read(store: Store, key: ArtifactKey) -> Found | None:
    kept = store.find(key)
    if kept is None:
        return None
    try:
        values = kept.read_json(_FILE)
    except CorruptArtifactError:
        return None  # looked at again, and kept in its place
    return Found(tuple(values["faults"]), values["not_run"], values["numbers"])


def _keep(store: Store, key: ArtifactKey, found: Found) -> None:
    def write(folder: Path) -> None:
        numbers = {name: float(value) for name, value in found.numbers.items()}
        write_json(
            folder / _FILE,
            {
                "faults": list(found.faults),
                "not_run": found.not_run,
                "numbers": {name: each for name, each in numbers.items() if math.isfinite(each)},
            },
        )

    store.commit(key, write, provenance={})


def _verdict(
    plan: Plan,
    artifact: Artifact,
    stage: str,
    cell: Cell,
    name: str,
    check: Check[Plan],
    found: Found,
) -> Verdict:
    status: Status = "failed" if found.faults else "not_run" if found.not_run else "passed"
    waivers = [
        waiver
        for waiver in plan.study.waivers
        if waiver.check == name and waiver.cell == "/".join(cell)
    ]
    return Verdict(
        stage=stage,
        cell=cell,
        check=name,
        status=status,
        is_blocking=check.is_blocking,
        faults=found.faults,
        note=found.not_run,
        fix=found.fix or check.fix,
        numbers=found.numbers,
        artifact=str(artifact.key),
        path=str(artifact.path),
        waiver=waivers[0] if waivers else None,
    )
