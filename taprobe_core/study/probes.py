"""The parts of a study that say what is fitted: targets, features, probes and their settings.

A recipe is target × features × probe × residualisation × settings. What a target or a feature is
made of belongs in `taprobe_core.probes.targets` and `taprobe_core.probes.features`; how a probe is
solved in `taprobe_core.solvers`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from taprobe_core.study.estimators import (
    ESTIMATORS,
    Estimator,
    EstimatorEntry,
    EstimatorSettings,
    token_estimators,
)
from taprobe_core.study.parts import Pooling, StudyPart, distinct, free_name, study_fault
from taprobe_core.study.targets import (
    TARGETS,
    Target,
    TargetEntry,
    TargetSettings,
    target_settings,
    targets_with,
)

Feature = Literal[
    "text", "activations", "vertical_attention", "causal_position", "position", "tokens"
]
Residualize = Literal["none", "position", "position_plus_text"]
Precision = Literal["float32", "tf32"]


class ProbeRecipe(TargetSettings, EstimatorSettings):
    """Target, features, estimator and its settings: one probe.

    `features` may join `text`, `activations` (of one `pooling`), `vertical_attention`, `position`
    and `causal_position`; `tokens` stands alone, for the estimators that read token sets. Ridge
    stands for the linear estimator on continuous targets and logistic regression on binary ones.

    `target` is the study's unless the recipe names one: `anchor_binary` at a `percentile` of its
    own; `exceeds_threshold`, the probability that the importance is beyond `threshold` on either
    side; `windowed_change` of the success rate over `window` sentences. `weights:
    inverse_variance` lets a label count by how well it was measured. `residualize` takes from the
    target what position, or position and text, predict of it.

    An `mlp` that stops early holds out a tenth of its training rows, or with `held_out: problems`
    is watched on the fold's validation problems.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$"), AfterValidator(free_name)]
    features: Annotated[tuple[Feature, ...], Field(min_length=1), AfterValidator(distinct)]
    pooling: Pooling = "mean"
    estimator: Estimator = "linear"
    target: Target | None = None
    weights: Literal["none", "inverse_variance"] = "none"
    residualize: Residualize = "none"

    @property
    def reads_activations(self) -> bool:
        """Whether the scores depend on the site."""
        return not {"activations", "tokens", "vertical_attention"}.isdisjoint(self.features)

    @property
    def estimator_entry(self) -> EstimatorEntry:
        """What is known of the estimator."""
        return ESTIMATORS[self.estimator]

    @property
    def target_entry(self) -> TargetEntry | None:
        """What is known of the target; None before it is filled in."""
        return None if self.target is None else TARGETS[self.target]

    @property
    def is_binary(self) -> bool:
        """Whether the target is a class, so that scores are probabilities."""
        return self.target_entry is not None and self.target_entry.is_binary

    @property
    def ranks_anchors(self) -> bool:
        """Whether the scores rank anchors as they are: not those of signed targets or residuals."""
        entry = self.target_entry
        return entry is not None and entry.ranks_anchors and self.residualize == "none"

    @property
    def reads_tokens(self) -> bool:
        """Whether the estimator reads token sets."""
        return self.estimator_entry.reads_tokens

    @property
    def is_stochastic(self) -> bool:
        """Whether the scores depend on the seed; a deterministic recipe is solved once."""
        return self.estimator_entry.is_stochastic

    @property
    def poolings_read(self) -> tuple[Pooling, ...]:
        """What the recipe reads of `activations.poolings`."""
        if self.reads_tokens:
            return ("tokens",)
        return (self.pooling,) if "activations" in self.features else ()

    def content(self) -> dict[str, Any]:
        """What decides the scores: every setting that this target and estimator read, no name.

        Recipes of equal content are one fit, whatever they are called.
        """
        settings = {"features", "estimator", "target", "weights", "residualize"}
        settings |= {name for name in target_settings() if getattr(self, name) is not None}
        if "activations" in self.features:
            settings |= {"pooling"}
        part = self.estimator_entry.part
        own = self if part is None else getattr(self, part)
        read = {each.name for each in self.estimator_entry.read(own, is_binary=self.is_binary)}
        found = self.model_dump(mode="json", include=settings | (read if part is None else set()))
        return found if part is None else found | {part: own.model_dump(mode="json", include=read)}

    def resolved(self, target: Target, percentile: float) -> ProbeRecipe:
        """Return the recipe with every setting of its target filled in.

        Args:
            target: the study's, for a recipe that names none.
            percentile: that of the study's labels.
        """
        own = self.target or target
        update = {
            setting.name: percentile if setting.default is None else setting.default
            for setting in TARGETS[own].settings
            if getattr(self, setting.name) is None
        }
        return self.model_copy(update={"target": own, **update})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.reads_tokens != ("tokens" in self.features) or (
            self.reads_tokens and len(self.features) > 1
        ):
            raise study_fault(
                f"estimator {self.estimator} with features {', '.join(self.features)}",
                f"give {', '.join(token_estimators())} the features [tokens] alone, and no other "
                "estimator",
            )
        if "text" in self.features and not self.estimator_entry.reads_text:
            readers = [name for name, entry in ESTIMATORS.items() if entry.reads_text]
            raise study_fault(
                f"estimator {self.estimator} with text",
                f"use estimator: {' or '.join(readers)}, or take text out of features",
            )
        if self.pooling == "tokens":
            raise study_fault(
                "pooling: tokens", f"use features: [tokens] with {', '.join(token_estimators())}"
            )
        for name in target_settings() if self.target is not None else ():
            owners = targets_with(name)
            if getattr(self, name) is not None and self.target not in owners:
                raise study_fault(
                    f"{name} with target {self.target}",
                    f"remove it, or use target: {' or '.join(owners)}",
                )
        return self


DEFAULT_RECIPES = (
    ProbeRecipe(name="position_baseline", features=("position",)),
    ProbeRecipe(name="text_only_baseline", features=("text",)),
    ProbeRecipe(name="linear_probe", features=("activations",)),
    ProbeRecipe(name="mlp_probe", features=("activations",), estimator="mlp"),
    ProbeRecipe(name="activations_plus_position", features=("activations", "position")),
)
"""The names and settings that users of the field know."""


class Probes(StudyPart):
    """Target and recipes.

    `keep`: `probes` stores the weights of every fold beside the scores, `scores` the scores alone,
    for sweeps whose weights would fill a disk. `precision` is that of the matrix products of
    networks and token probes on CUDA: `tf32` rounds their factors to 10 bits and is several times
    as fast; linear probes and CPUs have float32 and float64 whatever it says.
    """

    target: Target = "anchor_binary"
    recipes: Annotated[tuple[ProbeRecipe, ...], Field(min_length=1)] = DEFAULT_RECIPES
    keep: Literal["probes", "scores"] = "probes"
    precision: Precision = "float32"

    @field_validator("recipes")
    @classmethod
    def _names_differ(cls, recipes: tuple[ProbeRecipe, ...]) -> tuple[ProbeRecipe, ...]:
        names = [recipe.name for recipe in recipes]
        if len(set(names)) < len(names):
            raise study_fault(f"recipe names repeat: {names}", "give each recipe a name of its own")
        return recipes
