"""Whether a stage's modules changed without its code version: `python -m tools.code_versions`.

A stored artifact is found again by its fingerprint, in which the stage's code version stands for
the code. So whoever changes what a stage computes raises its version, and whoever does not says so
in a line. `RECORD` keeps the digest of every module that decides results, as last looked at.

    python -m tools.code_versions                 what changed, and which stages it concerns
    python -m tools.code_versions --write         record it, once those stages' versions are raised
    python -m tools.code_versions --neutral WHY   record it: results are the same, and why

A digest is that of the syntax tree without docstrings: comments and layout do not count. Modules
that decide no result (store, study, tables, command line, pictures, checks) are left out, so a
change there is for the author to judge.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "core" / "pipeline" / "stage_modules.json"
STAGE_FILES = "taprobe_core.pipeline.stages"

_COMPUTING = ("extract", "fit", "fit_rows", "inputs")
"""Modules of `pipeline` that compute for stages, beside each stage's own file: another stage's file
stands in the fingerprint as upstream."""

_LEFT_OUT = (
    *("cli", "demo", "errors", "keys", "pipeline", "store", "study", "tables"),
    *("evaluation.tripwires", "report.canvas", "report.plots"),
)


@cache
def stage_modules(stage: str) -> frozenset[str]:
    """Modules that decide what a stage computes: its own file and all that this imports."""
    own = f"{STAGE_FILES}.{stage}"
    todo = [own if _path(own) else f"{STAGE_FILES}.sweep"]
    found: set[str] = set()
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += [each for each in _imports(module) if not _is_left_out(each)]
    return frozenset(found)


def _is_left_out(module: str) -> bool:
    name = module.removeprefix("taprobe_core.")
    if name.startswith("pipeline."):
        return name.removeprefix("pipeline.") not in _COMPUTING
    return any(name == each or name.startswith(f"{each}.") for each in _LEFT_OUT)


def _path(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def _imports(module: str) -> tuple[str, ...]:
    path = _path(module)
    found: list[str] = []
    if path is None:
        return ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taprobe_core"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append(full if _path(full) else str(node.module))
    return tuple(found)


def digest(module: str) -> str:
    """SHA-256 of a module's syntax tree, docstrings left out."""
    path = _path(module)
    assert path is not None, module  # noqa: S101
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def look(code_versions: Mapping[str, str]) -> dict[str, object]:
    """What the record should say now, `neutral` lines apart.

    Args:
        code_versions: stage -> its code version.
    """
    modules = sorted(frozenset().union(*(stage_modules(stage) for stage in code_versions)))
    return {
        "code_versions": dict(sorted(code_versions.items())),
        "modules": {module: digest(module) for module in modules},
    }


def unexplained(record: Mapping[str, Mapping[str, str]], now: Mapping[str, object]) -> list[str]:
    """Lines about stages whose modules changed while their code version did not.

    Args:
        record: as it was last written.
        now: `look`, of today.
    """
    before, after = record["modules"], now["modules"]
    assert isinstance(after, dict)  # noqa: S101
    versions = now["code_versions"]
    assert isinstance(versions, dict)  # noqa: S101
    lines = []
    for stage, version in versions.items():
        changed = [m for m in sorted(stage_modules(stage)) if before.get(m) != after[m]]
        if changed and record["code_versions"].get(stage) == version:
            lines.append(f"{stage} (code version {version}): {', '.join(changed)} changed")
    return lines


def today() -> dict[str, object]:
    """`look` at the stages of this checkout."""
    from taprobe_core.pipeline import STAGES

    return look({stage: STAGES.code_version(stage) for stage in STAGES})


def main() -> int:
    """Compare with the record; write it where the change is explained."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help="record raised versions")
    parser.add_argument("--neutral", metavar="WHY", help="record a change that moves no result")
    asked = parser.parse_args()
    record, now = json.loads(RECORD.read_text()), today()
    lines = unexplained(record, now)
    for line in lines:
        print(line)
    if lines and not asked.neutral:
        print("raise the code versions and pass --write, or pass --neutral and say why")
        return 1
    if asked.write or asked.neutral:
        neutral = [*record["neutral"], *([asked.neutral] if asked.neutral else [])]
        RECORD.write_text(json.dumps({**now, "neutral": neutral}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
