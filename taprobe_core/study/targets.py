"""The targets: for each its name, its settings, what it reads and how its scores are read.

All that study, content hash, fit, selection and sweep know of a target stands in its entry here;
how labels become its values stands in `taprobe_core.probes.targets` under the same name. What a
setting is called, its range and its values in a sweep stand here, too.

Invariant: every setting of `TargetSettings` belongs to a target, and every setting of an entry is
one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Annotated

from pydantic import AfterValidator, Field

from taprobe_core.errors import ConfigError
from taprobe_core.study.parts import Count, NameOf, StudyPart, distinct

Percentile = Annotated[float, Field(gt=0, lt=100)]
Threshold = Annotated[float, Field(gt=0, lt=1)]


class TargetSettings(StudyPart):
    """Settings of a recipe that some targets have and others lack; null where it is not given."""

    percentile: Percentile | None = None
    threshold: Threshold | None = None
    window: Count | None = None


class TargetFactors(StudyPart):
    """Values of the settings of targets that a sweep crosses."""

    percentiles: Annotated[
        tuple[Percentile, ...], Field(min_length=1), AfterValidator(distinct)
    ] = (85.0, 90.0, 95.0)
    thresholds: Annotated[tuple[Threshold, ...], Field(min_length=1), AfterValidator(distinct)] = (
        0.1,
    )
    windows: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(distinct)] = (4,)


@dataclass(frozen=True, kw_only=True)
class TargetConfiguration:
    """Settings of its target that a configuration of a sweep fixes; None where it has none.

    Attributes:
        percentile: of `anchor_binary`.
        threshold: of `exceeds_threshold`.
        window: of `windowed_change`, sentences.
    """

    percentile: float | None = None
    threshold: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class TargetSetting:
    """One setting of a target.

    Attributes:
        name: field of `TargetSettings` and `TargetConfiguration`, column of a sweep's tables.
        default: where a recipe gives none; None takes the one of the study's labels.
        low: no value is lower.
        high: no value is higher.
        is_whole: whether it is a whole number.
        factor: field of `TargetFactors` whose values a sweep crosses; None if it varies none, and
            the default holds.
    """

    name: str
    default: float | int | None
    low: float
    high: float = inf
    is_whole: bool = False
    factor: str | None = None


@dataclass(frozen=True)
class TargetEntry:
    """One target.

    Attributes:
        name: as studies write it.
        settings: what it has beside the target's name.
        is_binary: fitted to its positive sentences as a class; scores are probabilities, judged by
            PR-AUC. Others are fitted to their value, and judged by Spearman's correlation with it.
        ranks_anchors: whether a high score says that a sentence matters. Scores of a signed target
            do not: a large negative importance makes an anchor too. Classes do.
        is_importance: whether its value is an importance, so that the published one and the true
            one are values of the same thing.
        value_of: the target whose value it is judged by, where that is another one.
        undefined_by: the settings that decide which labelled rows it has no value of; None where
            every row has one.
        reads: columns of `tables.LABELS` beside `targets.MEASURED`, which every target may read.
        is_swept: whether a sweep may have it among its targets.
        is_swept_without_last: whether a sweep also varies if the last sentence is left out; other
            targets take the first of `drop_last_sentence`.
    """

    name: str
    settings: tuple[TargetSetting, ...] = ()
    is_binary: bool = False
    ranks_anchors: bool = True
    is_importance: bool = True
    value_of: str | None = None
    undefined_by: tuple[str, ...] | None = None
    reads: tuple[str, ...] = ()
    is_swept: bool = True
    is_swept_without_last: bool = False

    def __post_init__(self) -> None:
        if self.is_binary and not self.ranks_anchors:
            raise ConfigError(
                "a class whose scores rank nothing",
                f"the entry of target {self.name}",
                "leave ranks_anchors out, or is_binary",
            )

    @property
    def setting_names(self) -> tuple[str, ...]:
        """Names of its settings."""
        return tuple(setting.name for setting in self.settings)

    @property
    def metric(self) -> str:
        """The metric that its recipes are ranked by."""
        return "pr_auc" if self.is_binary else "spearman"

    @property
    def factors(self) -> Mapping[str, str]:
        """Factor of a configuration -> the field of `Sweep` with its values, the last fastest."""
        own = {each.name: each.factor for each in self.settings if each.factor is not None}
        return own | ({_DROP: _DROP} if self.is_swept_without_last else {})


_DROP = "drop_last_sentence"

TARGETS: dict[str, TargetEntry] = {
    entry.name: entry
    for entry in (
        TargetEntry(
            "anchor_binary",
            (TargetSetting("percentile", None, 0, 100, factor="percentiles"),),
            is_binary=True,
            value_of="importance_abs",
            is_swept_without_last=True,
        ),
        TargetEntry("importance_abs"),
        TargetEntry("importance_signed", ranks_anchors=False),
        TargetEntry(
            "exceeds_threshold",
            (TargetSetting("threshold", 0.1, 0, 1, factor="thresholds"),),
            undefined_by=(),
        ),
        TargetEntry(
            "windowed_change",
            (TargetSetting("window", 4, 1, is_whole=True, factor="windows"),),
            ranks_anchors=False,
            is_importance=False,
            undefined_by=("window",),
        ),
    )
}
"""Name -> target."""

Target = Annotated[str, NameOf(TARGETS)]
"""Name of a target."""


def target_settings() -> dict[str, TargetSetting]:
    """Return every setting that some target has, by name."""
    return {each.name: each for entry in TARGETS.values() for each in entry.settings}


def targets_with(setting: str) -> list[str]:
    """Return the names of the targets that have a setting."""
    return [name for name, entry in TARGETS.items() if setting in entry.setting_names]
