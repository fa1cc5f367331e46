"""From a configuration to the recipes that are fitted for it, named by what they contain.

Equal content has an equal name, so configurations that differ in what a recipe does not read share
one fit. What a recipe means belongs in `study.probes`, which configurations there are in `space`.

Invariant: the name of a recipe is a function of its content alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from taprobe_core.store.canonical import canonical_json
from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.sweep import AttentionVariant

Role = Literal["baseline", "candidate", "companion"]
ROLES: tuple[Role, ...] = ("baseline", "candidate", "companion")

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

    Attributes:
        template: the recipe, target filled in, under the name of its kind.
        drop_last_sentence: whether the last sentence of each problem is left out of fitting and
            scoring, and of the ranking that makes anchors.
        attention: how vertical attention is scored, where the recipe reads it.
        attention_mode: mode of the study's attention.
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


class Use(NamedTuple):
    """A recipe that a configuration asks for.

    Attributes:
        kind: name of the study's recipe that it is made of.
        role: `candidate` reads what the configuration varies and is what it is judged by;
            `baseline` is what candidates are compared with; `companion` is fitted beside them, as
            the earlier script system did, and shared with other configurations.
        swept: the recipe.
    """

    kind: str
    role: Role
    swept: SweptRecipe
