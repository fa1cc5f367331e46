"""Collect the faults of a study file and say all of them in one error.

A fault knows where it stands (key and line), what was found there and what to write instead.
Finding them belongs in `document` (the YAML), `environment` (the variables) and `wording` (the
values).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taprobe_core.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file down to a value."""


@dataclass(frozen=True)
class Fault:
    """One thing to correct.

    Attributes:
        path: where it stands in the study.
        line: line of the file, counted from 1; None when the fault is of the whole file.
        what: what was found, in one sentence without a full stop.
        fix: the edit to make, or the command to type.
    """

    path: KeyPath
    line: int | None
    what: str
    fix: str


def key_name(path: KeyPath) -> str:
    """Return a path as a user writes it, for example `models.tiny.layers[2]`."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as it may stand in a message: one line, printable, at most `limit` long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def fault_error(faults: Sequence[Fault], where: str) -> ConfigError:
    """Return the one error that says every fault, in the order of the file.

    Args:
        faults: at least one.
        where: the file, for the message.
    """
    ordered = sorted(faults, key=lambda fault: fault.line or 0)
    if len(ordered) == 1:
        (fault,) = ordered
        place = where if fault.line is None else f"{where}:{fault.line}"
        name = key_name(fault.path)
        return ConfigError(fault.what, f"{place}, {name}" if name else place, fault.fix)
    listed = "".join(f"\n  - {_listed(fault)}" for fault in ordered)
    return ConfigError(
        f"{len(ordered)} faults", f"{where}:{listed}", "make the edit that each line names"
    )


def _listed(fault: Fault) -> str:
    place = [f"line {fault.line}"] if fault.line is not None else []
    name = key_name(fault.path)
    head = ", ".join([*place, name] if name else place)
    said = f"{fault.what}; fix: {fault.fix}"
    return f"{head}: {said}" if head else said
