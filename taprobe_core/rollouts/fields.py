"""Typed access to one JSON object of a dataset file: every fault is noted, none stops the reading.

A null counts as absent. A value of the wrong type or out of range is a fault: it is neither
repaired nor dropped. Only what rounding did to a number is undone: one that is beyond its range by
`ROUNDING` at most is taken for the bound. Which fields a file has belongs in `parse`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taprobe_core.errors import SchemaError
from taprobe_core.rollouts.strict_json import Unusable

ABSENT = object()
"""Stands for a key that an object lacks, as opposed to null."""

ROUNDING = 1e-6
"""How far beyond its range a number may be by rounding, even if it was computed in float32.

A share of at most a thousand rollouts that is wrong by a rollout is wrong by 1e-3 or more."""

_LISTED = 20
_INDEX = re.compile(r"[0-9]{1,9}")


class Fields:
    """One JSON object, read field by field.

    Every reader returns a value that keeps its promise; where there is none it notes a fault and
    returns an empty one, so that reading goes on to the next fault.

    Args:
        row: the object.
        at: its JSON path, for example `$[3]`.
        faults: list that faults are added to, each as `path: found X, want Y`.
    """

    def __init__(self, row: Mapping[str, Any], at: str, faults: list[str]) -> None:
        self.row = row
        self.at = at
        self.faults = faults

    def fault(self, key: str, found: Any, want: str) -> None:
        """Note that `key` holds `found` where `want` is wanted."""
        self.faults.append(f"{self.at}.{key}: found {shown(found)}, want {want}")

    def text(self, key: str) -> str | None:
        """Return an optional text."""
        value = self.row.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(key, value, "a text or null")
            return None
        return value if self._is_unicode(key, value) else None

    def required_text(self, key: str) -> str:
        """Return a text that is not blank."""
        value = self.row.get(key, ABSENT)
        if not isinstance(value, str) or not value.strip():
            self.fault(key, value, "a text that is not blank")
            return ""
        return value if self._is_unicode(key, value) else ""

    def texts(self, key: str) -> list[str]:
        """Return an optional list of texts."""
        value = self.row.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fault(key, value, "a list of texts or null")
            return []
        return [item for item in value if self._is_unicode(key, item)]

    def flag(self, key: str) -> bool | None:
        """Return an optional truth value."""
        value = self.row.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.fault(key, value, "true, false or null")
        return None

    def number(self, key: str, low: float, high: float) -> float | None:
        """Return an optional number in [low, high]; beyond by rounding alone it is the bound."""
        value = self.row.get(key)
        if value is None:
            return None
        if _is_number(value) and low - ROUNDING <= value <= high + ROUNDING:
            return min(max(float(value), low), high)
        bounds = f"in [{low:g}, {high:g}]" if high < sys.float_info.max else f"of at least {low:g}"
        self.fault(key, value, f"a number {bounds} or null")
        return None

    def indices(self, key: str) -> list[int]:
        """Return an optional list of indices, each a whole number or the text of one."""
        value = self.row.get(key)
        if value is None:
            return []
        if isinstance(value, list) and all(map(_is_index, value)):
            return [int(item) for item in value]
        self.fault(key, value, "a list of sentence indices or null")
        return []

    def _is_unicode(self, key: str, value: str) -> bool:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fault(key, value, f"whole characters (half of a pair at char {error.start})")
            return False
        return True


def read_object(value: Any, at: str, faults: list[str]) -> Fields:
    """Return the fields of `value`; noting a fault where it is no object."""
    if isinstance(value, dict):
        return Fields(value, at, faults)
    faults.append(f"{at}: found {shown(value)}, want an object")
    # The absent fields of what is no object are not faults of their own.
    return Fields({}, at, [])


def shown(value: Any) -> str:
    """Return `value` for a message: short, on one line, in ASCII."""
    if value is ABSENT:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, Unusable):
        return value.found
    if isinstance(value, dict):
        return "an object"
    try:
        text = ascii(value)
    except RecursionError:  # what can just be read may nest too deeply to be shown
        return "a list"
    return text if len(text) <= 60 else f"{text[:57]}..."


def raise_faults(faults: Sequence[str], path: Path) -> None:
    """Raise one error for all faults of one file; do nothing where there is none.

    Raises:
        SchemaError: lists the first twenty faults and counts the others.
    """
    if not faults:
        return
    more = len(faults) - _LISTED
    raise SchemaError(
        f"{len(faults)} field(s) break the dataset's layout",
        str(path),
        "correct the file or fetch it again, or leave its problem out with rollouts.exclude_ids",
        [*faults[:_LISTED], *([f"... and {more} more"] if more > 0 else [])],
    )


def _is_number(value: Any) -> bool:
    # A bool is an int to Python.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    is_whole = isinstance(value, int | str) and not isinstance(value, bool)
    return is_whole and _INDEX.fullmatch(str(value)) is not None
