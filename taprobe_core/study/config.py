"""The study: the one configuration, as frozen models.

A study names everything that decides a result: the dataset and its revision, the models and their
layers, the label definition, the probe recipes, the split protocols, the deferral objectives. Each
stage's fingerprint takes exactly one slice of it. Reading YAML belongs in `study.source`; what the
values lead to belongs in the stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from taprobe_core.keys import Site, Trial, check_slug

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Target = Literal["anchor_binary", "importance_abs", "importance_signed"]
Layers = Literal["all", "quartiles", "mid"] | tuple[Annotated[int, Field(ge=0)], ...]


class StudyPart(BaseModel):
    """Base of every part: frozen, unknown keys refused, no coercion, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class HubSource(StudyPart):
    """Rollouts in a hub dataset repository; `revision` is a commit sha, or null to resolve one."""

    kind: Literal["hub"]
    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None


class MirrorSource(StudyPart):
    """Rollouts in a local folder of the dataset's own layout."""

    kind: Literal["mirror"]
    folder: str


class DemoSource(StudyPart):
    """Rollouts of the embedded demo world, written in the dataset's own layout on first use."""

    kind: Literal["demo"]
    n_problems: Annotated[int, Field(ge=4, le=200)] = 16
    n_rollouts: Annotated[int, Field(ge=2, le=1000)] = 100
    seed: Annotated[int, Field(ge=0)] = 0


Source = Annotated[HubSource | MirrorSource | DemoSource, Field(discriminator="kind")]


class Rollouts(StudyPart):
    """Which rollouts, and what to do with a problem that cannot be read."""

    source: Source
    sampling: str = "temperature_0.6_top_p_0.95"
    problem_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    max_problems: Annotated[int, Field(ge=1)] | None = None
    sample_seed: Annotated[int, Field(ge=0)] = 0
    on_bad_problem: Literal["skip", "fail"] = "skip"


class StandInCheckpoint(StudyPart):
    """A tiny seeded checkpoint of random weights, built by code: a stand-in or a control."""

    kind: Literal["stand_in"]
    architecture: Literal["qwen2", "llama"]
    n_layers: Annotated[int, Field(ge=1, le=128)] = 4
    d_model: Annotated[int, Field(ge=8)] = 64
    n_heads: Annotated[int, Field(ge=1)] = 4
    n_kv_heads: Annotated[int, Field(ge=1)] = 2
    seed: Annotated[int, Field(ge=0)] = 0


class PretrainedCheckpoint(StudyPart):
    """A `from_pretrained` folder, or a hub model at a commit sha (null: resolve one)."""

    kind: Literal["pretrained"]
    path: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None


Checkpoint = Annotated[StandInCheckpoint | PretrainedCheckpoint, Field(discriminator="kind")]


class Model(StudyPart):
    """One model: where its rollouts, its weights and its tokenizer are, and which layers to read.

    `n_layers` is the depth of the checkpoint; it is stated so that partitions need no download,
    and checked against the checkpoint before the first forward pass.
    """

    rollouts_dir: str
    checkpoint: Checkpoint
    n_layers: Annotated[int, Field(ge=1, le=999)]
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    layers: Layers = "all"

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        if isinstance(self.layers, tuple):
            beyond = [layer for layer in self.layers if layer >= self.n_layers]
            if beyond or not self.layers or len(set(self.layers)) < len(self.layers):
                raise ValueError(
                    f"layers {list(self.layers)} of a model with {self.n_layers} layers: give each "
                    f"once, from 0 to {self.n_layers - 1}"
                )
        checkpoint = self.checkpoint
        if isinstance(checkpoint, StandInCheckpoint) and checkpoint.n_layers != self.n_layers:
            raise ValueError(
                f"n_layers is {self.n_layers}, its stand-in checkpoint has {checkpoint.n_layers}"
            )
        return self

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Requested block indices, ascending. Quartiles are n/4, n/2 and 3n/4; mid is n/2."""
        depth = self.n_layers
        if self.layers == "all":
            return tuple(range(depth))
        if self.layers == "mid":
            return (depth // 2,)
        if self.layers == "quartiles":
            return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
        return tuple(sorted(self.layers))


class Labels(StudyPart):
    """How published measures become targets."""

    field: Literal[
        "counterfactual_importance_accuracy",
        "resampling_importance_accuracy",
        "forced_importance_accuracy",
    ] = "counterfactual_importance_accuracy"
    percentile: Annotated[float, Field(gt=0, lt=100)] = 90.0
    tie_rule: Literal["rank", "legacy"] = "rank"
    drop_last_sentence: bool = True


class Spans(StudyPart):
    """Which text the model reads: as it wrote it, or as the rollouts' prompts joined it."""

    text_view: Literal["base", "flattened"] = "base"


class Activations(StudyPart):
    """How activations are read and kept."""

    pooling: Literal["mean"] = "mean"
    storage: Literal["float16", "float32"] = "float16"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


class ProbeRecipe(StudyPart):
    """Features, estimator and its settings; with the study's target, one probe.

    `features` may join `position`, `text` and `activations`. Ridge stands for the linear estimator
    on continuous targets and logistic regression on binary ones.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    features: Annotated[tuple[Literal["position", "text", "activations"], ...], Field(min_length=1)]
    estimator: Literal["linear", "mlp"] = "linear"
    regularization: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (100, 100)
    max_iter: Annotated[int, Field(ge=1)] = 300
    early_stopping: bool = True

    @property
    def reads_activations(self) -> bool:
        """Whether the scores depend on the site."""
        return "activations" in self.features

    @property
    def is_stochastic(self) -> bool:
        """Whether the scores depend on the seed; a deterministic recipe is solved once."""
        return self.estimator == "mlp"


DEFAULT_RECIPES = (
    ProbeRecipe(name="position_baseline", features=("position",)),
    ProbeRecipe(name="text_only_baseline", features=("text",)),
    ProbeRecipe(name="linear_probe", features=("activations",)),
    ProbeRecipe(name="mlp_probe", features=("activations",), estimator="mlp"),
    ProbeRecipe(name="activations_plus_position", features=("activations", "position")),
)
"""The names and settings that users of the field know."""


class Probes(StudyPart):
    """Target and recipes."""

    target: Target = "anchor_binary"
    recipes: Annotated[tuple[ProbeRecipe, ...], Field(min_length=1)] = DEFAULT_RECIPES

    @field_validator("recipes")
    @classmethod
    def _names_differ(cls, recipes: tuple[ProbeRecipe, ...]) -> tuple[ProbeRecipe, ...]:
        names = [recipe.name for recipe in recipes]
        if len(set(names)) < len(names):
            raise ValueError(f"recipe names repeat: {sorted(names)}")
        return recipes


class Splits(StudyPart):
    """How problems are divided; the problem is the unit, a sentence never leaves its own."""

    protocols: Annotated[tuple[Literal["holdout", "lopo"], ...], Field(min_length=1)] = (
        "holdout",
        "lopo",
    )
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.7
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _room_for_test(self) -> Self:
        if self.train_fraction + self.val_fraction >= 1:
            raise ValueError(
                f"train_fraction {self.train_fraction} and val_fraction {self.val_fraction} leave "
                "no problem for test: make their sum less than 1"
            )
        return self


class Evaluation(StudyPart):
    """How recipes are compared."""

    baselines: tuple[str, ...] = ("position_baseline", "text_only_baseline")
    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = (5, 10)
    n_bootstrap: Annotated[int, Field(ge=0)] = 2000
    bootstrap_seed: Annotated[int, Field(ge=0)] = 0


class Deferral(StudyPart):
    """What a plan must keep to: a share of deferred sentences, or an error among the accepted."""

    budgets: tuple[Fraction, ...] = (0.2,)
    errors: tuple[Fraction, ...] = (0.05,)


class Study(StudyPart):
    """One study."""

    name: str
    description: str = ""
    rollouts: Rollouts
    models: Annotated[dict[str, Model], Field(min_length=1)]
    settings: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=9999)], ...], Field(min_length=1)] = (0,)
    labels: Labels = Labels()
    spans: Spans = Spans()
    activations: Activations = Activations()
    probes: Probes = Probes()
    splits: Splits = Splits()
    evaluation: Evaluation = Evaluation()
    deferral: Deferral = Deferral()

    @model_validator(mode="after")
    def _keys_are_sound(self) -> Self:
        check_slug(self.name, "name")
        for model in self.models:
            check_slug(model, f"models.{model}")
        for setting in self.settings:
            check_slug(setting, "settings")
        for name, values in (("settings", self.settings), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} repeat: {list(values)}")
        known = {recipe.name for recipe in self.probes.recipes}
        missing = sorted(set(self.evaluation.baselines) - known)
        if missing:
            raise ValueError(
                f"evaluation.baselines names {missing}, which probes.recipes lacks ({sorted(known)})"
            )
        return self

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every model at each of its requested layers."""
        return tuple(
            Site(key, layer) for key, model in self.models.items() for layer in model.layer_indices
        )

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every setting at each seed; the trials of one setting stand together."""
        return tuple(Trial(setting, seed) for setting in self.settings for seed in self.seeds)


def resolve_folder(path: str) -> Path:
    """Return `path` with `~` expanded; a relative path is relative to the working directory."""
    return Path(path).expanduser().absolute()
