"""The settings that stage 3 crosses, each for the estimators and targets that read it.

Which values there are belongs in `study.sweep`. Invariant: two grid points of a kind are two fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from taprobe_core.store.canonical import canonical_json
from taprobe_core.study.probes import ProbeRecipe, Target, TokenProbe
from taprobe_core.study.sweep import Tuning

_ATTENTION = ("n_heads", "width", "depth", "learning_rate", "weight_decay", "loss")

TUNED: Mapping[str, tuple[str, ...]] = {
    "linear": ("regularization",),
    "mlp": ("hidden", "early_stopping"),
    "attention": _ATTENTION,
    "multimax": (*_ATTENTION, "training"),
    "rolling_multimax": (*_ATTENTION, "training", "window"),
}
"""Estimator -> what stage 3 varies of it; of these, `loss` for continuous targets alone."""


def grid(kind: ProbeRecipe, target: Target, tuning: Tuning) -> Iterator[dict[str, Any]]:
    """Yield every combination of the settings that a kind reads for a target, last one fastest."""
    names = [name for name in TUNED[kind.estimator] if name != "loss" or target != "anchor_binary"]
    for values in product(*(getattr(tuning, name) for name in names)):
        yield dict(zip(names, values, strict=True))


def tuned(kind: ProbeRecipe, settings: Mapping[str, Any]) -> ProbeRecipe:
    """Return a kind with settings of a grid; empty settings leave it as it is."""
    if not settings:
        return kind
    if kind.reads_tokens:
        values = kind.token_probe.model_dump(mode="json") | dict(settings)
        return kind.model_copy(
            update={"token_probe": TokenProbe.model_validate_json(canonical_json(values))}
        )
    values = kind.model_dump(mode="json") | dict(settings)
    return ProbeRecipe.model_validate_json(canonical_json(values))
