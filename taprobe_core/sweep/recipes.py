"""A configuration: the factors that a stage gives a site and setting, its id, and its recipes.

Equal content has an equal name, so configurations that differ in what a recipe does not read share
one fit. What a recipe means belongs in `study.probes`, which configurations there are in `space`.

Invariants: there is one way from factors to an id, and the order of factors does not enter it; the
name of a recipe is a function of its content alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, cast, get_args

from taprobe_core.errors import DataError
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.study.parts import Pooling
from taprobe_core.study.probes import ProbeRecipe, Residualize
from taprobe_core.study.sweep import AttentionVariant
from taprobe_core.study.targets import Target, TargetConfiguration
from taprobe_core.tables.sweep import SWEEP_FACTORS

Stage = Literal["stage1", "stage2", "stage3"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def configuration_id(stage: Stage, factors: Mapping[str, Any]) -> str:
    """Return the stage and the first 12 hex of the sha256 of `stage:` + canonical JSON of factors.

    Example:
        >>> configuration_id("stage1", {"layer": 4, "target": "importance_abs"})
        'stage1-fd83d7a95b43'
    """
    text = f"{stage}:{canonical_json(factors)}"
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class Configuration(TargetConfiguration):
    """One configuration. None stands for a factor that the stage or the target does not have.

    From stage 2 on it has the label of an attention variant; in stage 3 the kind that is tuned, and
    its settings as canonical JSON. The settings of its target are those of `TargetConfiguration`.
    """

    stage: Stage
    model: str
    layer: int
    setting: str
    target: Target
    drop_last_sentence: bool = True
    pooling: Pooling = "mean"
    residualize: Residualize = "none"
    attention: str | None = None
    kind: str | None = None
    tuning: str | None = None

    @property
    def factors(self) -> dict[str, Any]:
        """The factors that it has, as JSON values."""
        values = {name: getattr(self, name) for name in FACTORS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def id(self) -> str:
        """The configuration's id."""
        return configuration_id(self.stage, self.factors)

    @property
    def settings(self) -> dict[str, Any]:
        """What stage 3 sets of the tuned kind; empty before."""
        return cast(dict[str, Any], json.loads(self.tuning or "{}"))

    @classmethod
    def of(cls, stage: str, factors: str) -> Self:
        """Read a configuration back from its stage and the canonical JSON of its factors."""
        values = json.loads(factors)
        unknown = sorted(set(values) - set(FACTORS))
        if stage not in STAGES or unknown:
            raise DataError(
                f"stage {stage!r} with unknown factors {unknown}",
                "a sweep's table of configurations",
                "make the table again with this version",
            )
        return cls(stage=stage, **values)


FACTORS = (*SWEEP_FACTORS, "kind", "tuning")
"""Names of all factors, in the order of columns."""


Role = Literal["baseline", "candidate", "companion"]

_SHORT = {
    "text": "text",
    "activations": "activations",
    "vertical_attention": "attention",
    "causal_position": "causal",
    "position": "position",
    "tokens": "tokens",
}
_LONGEST_STEM = 51


@dataclass(frozen=True)
class SweptRecipe:
    """A recipe of a sweep, with what a recipe of the study leaves to the rest of it.

    `template` has its target filled in and the name of its kind. Without the last sentence of each
    problem, fitting, scoring and the ranking that makes anchors do without it. `attention` says how
    vertical attention is scored, where the recipe reads it.
    """

    template: ProbeRecipe
    drop_last_sentence: bool
    attention: AttentionVariant | None = None
    attention_mode: str = "off"

    @property
    def content(self) -> dict[str, Any]:
        """What decides the scores at a site and setting."""
        found = self.template.content() | {"drop_last_sentence": self.drop_last_sentence}
        if self.attention is not None:
            found["attention"] = self.attention.content(self.attention_mode)
        return found

    @cached_property
    def name(self) -> str:
        """Estimator, features and target in words, then the first 12 hex of the content's hash."""
        template = self.template
        features = "_".join(_SHORT[feature] for feature in template.features)
        stem = f"{template.estimator}_on_{features}_{template.target}"[:_LONGEST_STEM]
        digest = hashlib.sha256(canonical_json(self.content).encode()).hexdigest()
        return f"{stem.rstrip('_')}_{digest[:12]}"

    @property
    def recipe(self) -> ProbeRecipe:
        """The recipe under its own name."""
        return self.template.model_copy(update={"name": self.name})


class RecipeUse(NamedTuple):
    """A recipe that a configuration asks for, made of the study's recipe `kind`.

    A `candidate` reads what the configuration varies and is what it is judged by; a `baseline` is
    what candidates are compared with; a `companion` is fitted beside them, as the earlier script
    system did, and shared with other configurations.
    """

    kind: str
    role: Role
    swept: SweptRecipe
