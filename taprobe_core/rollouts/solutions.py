"""The rows of a `chunk_<i>/solutions.json` -> rollouts.

Reading the file belongs to the caller; what the rollouts mean belongs in `labels.measures`.
Invariant: a row is either kept, counted as an error or ungraded row, or named in the error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from taprobe_core.errors import DataError, SchemaError


@dataclass(frozen=True, slots=True)
class Rollout:
    """One continuation of a trace, resampled at a sentence.

    Attributes:
        answer: first boxed text; empty if the rollout gave none.
        is_correct: grade of `answer`; without meaning if `answer` is empty.
        chunk_resampled: first sentence of the continuation.
    """

    answer: str
    is_correct: bool
    chunk_resampled: str


@dataclass(frozen=True, slots=True)
class Solutions:
    """The rows of one `chunk_<i>/solutions.json`.

    Attributes:
        rollouts: graded rows, in file order.
        n_errors: rows that state a failure, left out; see `states_failure`.
        n_ungraded: rows whose `is_correct` is null, left out.
        prefixes: number of rows by `prefix_without_chunk`; rows without that key do not count.
    """

    rollouts: list[Rollout]
    n_errors: int
    n_ungraded: int
    prefixes: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Rows of the file, whatever they hold."""
        return len(self.rollouts) + self.n_errors + self.n_ungraded


_PREFIX = "prefix_without_chunk"
_FIX = "fetch the file again, or leave the problem out with rollouts.exclude_ids"


def states_failure(row: Mapping[str, Any]) -> bool:
    """Return whether a record of the generator says that its request failed.

    It does by an `error` that says something. Clients with a fixed record write the key beside
    every answer; then it holds null, false, or an empty text, list or object, or NaN, which some
    writers of tables put for null.

    Args:
        row: a base solution, or a row of a `solutions.json`.
    """
    error = row.get("error")
    if isinstance(error, str):
        return bool(error.strip())
    is_nan = getattr(error, "is_nan", False) or (isinstance(error, float) and math.isnan(error))
    return bool(error) and not is_nan


def read_solutions(rows: Any, where: str) -> Solutions:
    """Read the value of a `solutions.json`; keys that nothing here needs are not read.

    Args:
        rows: list with one object per rollout.
        where: the file, for messages.

    Raises:
        DataError: `rows` is not a list.
        SchemaError: rows lack a key or have a wrong type; lists them all.
    """
    if not isinstance(rows, list):
        raise DataError(f"rollouts are a {type(rows).__name__}, not a list", where, _FIX)
    faults = [fault for row, value in enumerate(rows) for fault in _row_faults(row, value)]
    if faults:
        raise SchemaError("rollouts have unreadable rows", where, _FIX, faults)
    kept = [row for row in rows if not states_failure(row)]
    graded = [row for row in kept if row["is_correct"] is not None]
    return Solutions(
        rollouts=[
            Rollout(row["answer"] or "", row["is_correct"], row["chunk_resampled"])
            for row in graded
        ],
        n_errors=len(rows) - len(kept),
        n_ungraded=len(kept) - len(graded),
        prefixes=Counter(row[_PREFIX] for row in rows if isinstance(row.get(_PREFIX), str)),
    )


def _row_faults(row: int, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [f"row {row} is a {type(value).__name__}, not an object"]
    if states_failure(value):
        return []
    wanted: dict[str, tuple[type, ...]] = {
        "answer": (str, type(None)),
        "is_correct": (bool, type(None)),
        "chunk_resampled": (str,),
    }
    return [
        f"row {row}: {key} is {_kind(value[key]) if key in value else 'absent'}"
        for key, types in wanted.items()
        if key not in value or not isinstance(value[key], types)
    ]


def _kind(value: Any) -> str:
    # What is not one JSON value says itself what it is.
    return getattr(value, "found", type(value).__name__)
