"""Waivers: failed checks that a study goes on in spite of, each named, with its reason.

A waiver stands in the study, where it is reviewed and kept with everything else that decides a
result. It changes no value, so it is part of no fingerprint but the report's, which shows it. What
the checks look at belongs in `pipeline.stages`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from taprobe_core.study.parts import StudyPart, study_fault

CheckName = Literal[
    "rollouts_schema",
    "no_trace_on_two_sides",
    "passages_differ_across_problems",
    "labels_schema",
    "spans_cover",
    "activations_finite",
    "vertical_attention_sound",
    "receiver_heads_from_training",
    "split_coverage",
    "shuffled_labels_at_chance",
    "one_problem_is_memorised",
]
"""Every check there is."""

_DIMENSIONS: Mapping[CheckName, tuple[str, str]] = {
    "activations_finite": ("site", "setting"),
    "vertical_attention_sound": ("site", "setting"),
    "split_coverage": ("site", "trial"),
    "shuffled_labels_at_chance": ("site", "setting"),
    "one_problem_is_memorised": ("site", "setting"),
}
"""Check -> the dimensions of the cells that it looks at, where they are not model and setting."""


def checked_dimensions(check: CheckName) -> tuple[str, str]:
    """Return the dimensions of the cells that a check looks at."""
    return _DIMENSIONS.get(check, ("model", "setting"))


def _reason(value: str) -> str:
    if not value.strip():
        raise study_fault("an empty reason", "say why the study may go on")
    return value


class Waiver(StudyPart):
    """One failed check that does not stop what comes after it.

    `cell` is written as messages write it: its keys in the order of the dimensions, with `/`.
    """

    check: CheckName
    cell: Annotated[str, Field(min_length=1)]
    reason: Annotated[str, AfterValidator(_reason)]


def waiver_fault(
    waivers: Sequence[Waiver], keys: Mapping[str, tuple[str, ...]]
) -> PydanticCustomError | None:
    """Return what is wrong with a study's waivers, or None."""
    seen = set()
    for index, waiver in enumerate(waivers):
        first, second = checked_dimensions(waiver.check)
        cells = [f"{one}/{two}" for one in keys[first] for two in keys[second]]
        if waiver.cell not in cells:
            return study_fault(
                f"no cell `{waiver.cell}` of {first} and {second}, which {waiver.check} looks at",
                f"{_guess(waiver.cell, cells)}write {first}/{second}, for example {cells[0]}",
                ("waivers", index, "cell"),
            )
        if (waiver.check, waiver.cell) in seen:
            return study_fault(
                f"{waiver.check} of {waiver.cell} waived twice",
                "keep one of the two",
                ("waivers", index),
            )
        seen.add((waiver.check, waiver.cell))
    return None


def _guess(found: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(found, known, n=1)
    return f"did you mean `{near[0]}`? " if near else ""
