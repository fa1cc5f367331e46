"""What `check --accept` and `verify` say of inputs and artifacts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from taprobe_core.store import Acceptance, PinnedSource, PinVerdict, Verdict


def acceptance_line(source: PinnedSource, change: Acceptance) -> str:
    """Say that a change of an input is accepted from now on."""
    old, new = change.old[:12], change.new[:12]
    return escape(f"accepted: {source.noun} {source.root}, {change.name}: {old} is now {new}")


def verify_lines(verdicts: Sequence[Verdict], inputs: Sequence[PinVerdict]) -> Iterator[str]:
    """Yield a line or more for everything that is not sound, and one each for the counts."""
    changed = [each for each in inputs if each.faults]
    for source in changed:
        yield f"[red]changed[/] {source.noun} {escape(source.where)}"
        yield from (f"  {escape(fault)}" for fault in source.faults)
    unsound = [each for each in verdicts if not each.is_sound]
    for verdict in unsound:
        yield f"[red]unsound[/] {verdict.key}\n  {escape(str(verdict.error))}"
    if inputs:
        yield f"{len(inputs)} inputs, {len(inputs) - len(changed)} as they were pinned"
    yield f"{len(verdicts)} artifacts, {len(verdicts) - len(unsound)} sound"


def verify_document(verdicts: Sequence[Verdict], inputs: Sequence[PinVerdict]) -> dict[str, Any]:
    """Return the same as JSON values, for a script."""
    unsound = [each for each in verdicts if not each.is_sound]
    return {
        "n_artifacts": len(verdicts),
        "unsound": [{"artifact": str(each.key), "error": str(each.error)} for each in unsound],
        "n_inputs": len(inputs),
        "changed": [asdict(each) for each in inputs if each.faults],
    }
