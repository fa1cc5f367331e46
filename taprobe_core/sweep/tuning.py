"""The settings that stage 3 crosses, each for the estimators and targets that read it.

Which settings and values there are belongs in `study.estimators`. Invariant: two grid points of a
kind are two fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from taprobe_core.store.canonical import canonical_json
from taprobe_core.study.estimators import Tuning
from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.targets import TARGETS, Target


def grid(kind: ProbeRecipe, target: Target, tuning: Tuning) -> Iterator[dict[str, Any]]:
    """Yield every combination of the settings that a kind reads for a target, last one fastest."""
    is_binary = TARGETS[target].is_binary
    names = [
        each.name
        for each in kind.estimator_entry.settings
        if each.is_tuned and not (each.only_continuous and is_binary)
    ]
    for values in product(*(getattr(tuning, name) for name in names)):
        yield dict(zip(names, values, strict=True))


def tuned(kind: ProbeRecipe, settings: Mapping[str, Any]) -> ProbeRecipe:
    """Return a kind with settings of a grid; empty settings leave it as it is."""
    if not settings:
        return kind
    part = kind.estimator_entry.part
    values = kind.model_dump(mode="json")
    changed = settings if part is None else {part: values[part] | dict(settings)}
    return ProbeRecipe.model_validate_json(canonical_json(values | dict(changed)))
