"""The parts of a study that say what is fitted: targets, features, probes and their settings.

A recipe is target × features × probe × residualisation × settings. What a target or a feature is
made of belongs in `taprobe_core.targets` and `taprobe_core.features`; how a probe is solved in
`taprobe_core.solvers`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from taprobe_core.study.activations import Pooling
from taprobe_core.study.fields import (
    Count,
    Depth,
    StudyPart,
    Width,
    distinct,
    free_name,
    study_fault,
)

Target = Literal[
    "anchor_binary",
    "importance_abs",
    "importance_signed",
    "exceeds_threshold",
    "windowed_change",
]
Feature = Literal[
    "text", "activations", "vertical_attention", "causal_position", "position", "tokens"
]
Estimator = Literal["linear", "mlp", "attention", "multimax", "rolling_multimax"]
Residualize = Literal["none", "position", "position_plus_text"]
Precision = Literal["float32", "tf32"]

TOKEN_ESTIMATORS = ("attention", "multimax", "rolling_multimax")
"""Estimators that read the set of a sentence's token states."""

UNSIGNED_TARGETS = ("anchor_binary", "importance_abs", "exceeds_threshold")
"""Targets whose scores rank anchors; a large negative signed importance makes an anchor too."""

_TARGET_SETTINGS = {
    "percentile": "anchor_binary",
    "threshold": "exceeds_threshold",
    "window": "windowed_change",
}
"""Settings that one target has and the others do not."""


class TokenProbe(StudyPart):
    """Settings of the probes that read token sets.

    A ReLU network of `depth` layers of `width` reads each token; `n_heads` heads pool a sentence.
    `window` tokens make a window of `rolling_multimax`. `training: soft` replaces the maximum over
    tokens or windows by a softmax-weighted mean while training; scores always take the maximum.
    `loss` is that of continuous targets. Training stops after `patience` epochs without a better
    loss on the fold's validation problems.
    """

    n_heads: Width = 4
    width: Width = 128
    depth: Depth = 1
    window: Count = 10
    training: Literal["hard", "soft"] = "hard"
    loss: Literal["huber", "squared"] = "huber"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 32
    max_epochs: Count = 50
    patience: Count = 5


class ProbeRecipe(StudyPart):
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
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = None
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    window: Count | None = None
    weights: Literal["none", "inverse_variance"] = "none"
    residualize: Residualize = "none"
    regularization: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)] = (100, 100)
    max_iter: Count = 300
    early_stopping: bool = True
    held_out: Literal["rows", "problems"] = "rows"
    token_probe: TokenProbe = TokenProbe()

    @property
    def reads_activations(self) -> bool:
        """Whether the scores depend on the site."""
        return not {"activations", "tokens", "vertical_attention"}.isdisjoint(self.features)

    @property
    def reads_tokens(self) -> bool:
        """Whether the estimator reads token sets."""
        return self.estimator in TOKEN_ESTIMATORS

    @property
    def is_stochastic(self) -> bool:
        """Whether the scores depend on the seed; a deterministic recipe is solved once."""
        return self.estimator != "linear"

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
        settings |= {name for name in _TARGET_SETTINGS if getattr(self, name) is not None}
        if "activations" in self.features:
            settings |= {"pooling"}
        if self.estimator == "linear":
            settings |= {"regularization"}
        if self.estimator == "mlp":
            settings |= {"hidden", "max_iter", "early_stopping"}
            settings |= {"held_out"} if self.early_stopping else set()
        if self.reads_tokens:
            settings |= {"token_probe"}
        found = self.model_dump(mode="json", include=settings)
        for name in self._unread_of_tokens() if self.reads_tokens else ():
            del found["token_probe"][name]
        return found

    def _unread_of_tokens(self) -> set[str]:
        """Settings of `token_probe` that this estimator or target does not read."""
        unread = {"window"} if self.estimator != "rolling_multimax" else set()
        unread |= {"training"} if self.estimator == "attention" else set()
        return unread | ({"loss"} if self.target == "anchor_binary" else set())

    def resolved(self, target: Target, percentile: float) -> ProbeRecipe:
        """Return the recipe with every setting of its target filled in.

        Args:
            target: the study's, for a recipe that names none.
            percentile: that of the study's labels.
        """
        own = self.target or target
        filled = {"percentile": percentile, "threshold": 0.1, "window": 4}
        update = {
            name: (filled[name] if getattr(self, name) is None else getattr(self, name))
            for name, owner in _TARGET_SETTINGS.items()
            if owner == own
        }
        return self.model_copy(update={"target": own, **update})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.reads_tokens != ("tokens" in self.features) or (
            self.reads_tokens and len(self.features) > 1
        ):
            raise study_fault(
                f"estimator {self.estimator} with features {', '.join(self.features)}",
                f"give {', '.join(TOKEN_ESTIMATORS)} the features [tokens] alone, and no other "
                "estimator",
            )
        if self.estimator == "mlp" and "text" in self.features:
            raise study_fault(
                "a network that reads text", "use estimator: linear, or take text out of features"
            )
        if self.pooling == "tokens":
            raise study_fault(
                "pooling: tokens", f"use features: [tokens] with {', '.join(TOKEN_ESTIMATORS)}"
            )
        for name, owner in _TARGET_SETTINGS.items():
            if getattr(self, name) is not None and self.target not in (owner, None):
                raise study_fault(
                    f"{name} with target {self.target}", f"remove it, or use target: {owner}"
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
