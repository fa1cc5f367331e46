"""The study: the one configuration, as frozen models.

A study names everything that decides a result: the dataset and its revision, the models and their
layers, the label definition, the probe recipes, the split protocols, the deferral objectives. Each
stage's fingerprint takes exactly one slice of it. Reading YAML belongs in `study.source`; what the
values lead to belongs in the stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from taprobe_core.keys import Site, Trial
from taprobe_core.study.activations import Activations, Attention
from taprobe_core.study.fields import (
    CommitSha,
    Count,
    FolderName,
    Fraction,
    HubId,
    Index,
    LocalPath,
    Seed,
    Slug,
    StudyPart,
    distinct,
    study_fault,
)
from taprobe_core.study.models import (
    Checkpoint,
    DemoCheckpoint,
    Layers,
    Model,
    PretrainedCheckpoint,
    StandInCheckpoint,
)

__all__ = [
    "DEFAULT_RECIPES",
    "Activations",
    "Attention",
    "Checkpoint",
    "Deferral",
    "DemoCheckpoint",
    "DemoSource",
    "Evaluation",
    "HubSource",
    "Labels",
    "Layers",
    "MirrorSource",
    "Model",
    "PolicySource",
    "PretrainedCheckpoint",
    "ProbeRecipe",
    "Probes",
    "Rollouts",
    "Source",
    "Spans",
    "Splits",
    "StandInCheckpoint",
    "Study",
    "StudyPart",
    "Target",
    "resolve_folder",
]

Target = Literal["anchor_binary", "importance_abs", "importance_signed"]


class HubSource(StudyPart):
    """Rollouts in a hub dataset repository; `revision` is a commit sha, or null to resolve one."""

    kind: Literal["hub"]
    repo: HubId
    revision: CommitSha | None = None


class MirrorSource(StudyPart):
    """Rollouts in a local folder of the dataset's own layout."""

    kind: Literal["mirror"]
    folder: LocalPath


class DemoSource(StudyPart):
    """Rollouts of the bundled reasoners: the first problems, the first rollouts of each sentence.

    They are unpacked in the dataset's own layout on first use.
    """

    kind: Literal["demo"]
    n_problems: Annotated[int, Field(ge=4)] = 20
    n_rollouts: Annotated[int, Field(ge=2)] = 100


class PolicySource(StudyPart):
    """Rollouts of the policy that taught the bundled reasoners, drawn at any size on first use.

    Every model folder is a model of its own; there are no weights that said these texts.
    """

    kind: Literal["policy"]
    n_problems: Annotated[int, Field(ge=4, le=200)] = 16
    n_rollouts: Annotated[int, Field(ge=2, le=1000)] = 100
    seed: Seed = 0


Source = Annotated[
    HubSource | MirrorSource | DemoSource | PolicySource, Field(discriminator="kind")
]


class Rollouts(StudyPart):
    """Which rollouts, and what to do with a problem that cannot be read."""

    source: Source
    sampling: FolderName = "temperature_0.6_top_p_0.95"
    problem_ids: (
        Annotated[tuple[Index, ...], Field(min_length=1), AfterValidator(distinct)] | None
    ) = None
    max_problems: Count | None = None
    sample_seed: Seed = 0
    on_bad_problem: Literal["skip", "fail"] = "skip"


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


class ProbeRecipe(StudyPart):
    """Features, estimator and its settings; with the study's target, one probe.

    `features` may join `position`, `text` and `activations`. Ridge stands for the linear estimator
    on continuous targets and logistic regression on binary ones.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    features: Annotated[
        tuple[Literal["position", "text", "activations"], ...],
        Field(min_length=1),
        AfterValidator(distinct),
    ]
    estimator: Literal["linear", "mlp"] = "linear"
    regularization: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (100, 100)
    max_iter: Count = 300
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
            raise study_fault(f"recipe names repeat: {names}", "give each recipe a name of its own")
        return recipes


class Splits(StudyPart):
    """How problems are divided; the problem is the unit, a sentence never leaves its own."""

    protocols: Annotated[
        tuple[Literal["holdout", "lopo"], ...], Field(min_length=1), AfterValidator(distinct)
    ] = ("holdout", "lopo")
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.7
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: Seed = 0

    @model_validator(mode="after")
    def _room_for_test(self) -> Self:
        if self.train_fraction + self.val_fraction >= 1:
            raise study_fault(
                f"train_fraction {self.train_fraction} and val_fraction {self.val_fraction} leave "
                "no problem for test",
                "make their sum less than 1",
            )
        return self


class Evaluation(StudyPart):
    """How recipes are compared."""

    baselines: Annotated[tuple[str, ...], AfterValidator(distinct)] = (
        "position_baseline",
        "text_only_baseline",
    )
    recall_at: Annotated[tuple[Count, ...], AfterValidator(distinct)] = (5, 10)
    n_bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 2000
    bootstrap_seed: Seed = 0


class Deferral(StudyPart):
    """What a plan must keep to: a share of deferred sentences, or an error among the accepted."""

    budgets: Annotated[tuple[Fraction, ...], AfterValidator(distinct)] = (0.2,)
    errors: Annotated[tuple[Fraction, ...], AfterValidator(distinct)] = (0.05,)


class Study(StudyPart):
    """One study."""

    name: Slug
    description: str = ""
    rollouts: Rollouts
    models: Annotated[dict[Slug, Model], Field(min_length=1)]
    settings: Annotated[tuple[Slug, ...], Field(min_length=1), AfterValidator(distinct)]
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, le=9999)], ...],
        Field(min_length=1),
        AfterValidator(distinct),
    ] = (0,)
    labels: Labels = Labels()
    spans: Spans = Spans()
    activations: Activations = Activations()
    attention: Attention = Attention()
    probes: Probes = Probes()
    splits: Splits = Splits()
    evaluation: Evaluation = Evaluation()
    deferral: Deferral = Deferral()

    @model_validator(mode="after")
    def _baselines_exist(self) -> Self:
        known = [recipe.name for recipe in self.probes.recipes]
        missing = sorted(set(self.evaluation.baselines) - set(known))
        if missing:
            raise study_fault(
                f"{missing}, which probes.recipes lacks",
                f"name recipes of this study ({', '.join(known)}), or add the missing ones",
                ("evaluation", "baselines"),
            )
        return self

    @model_validator(mode="after")
    def _means_are_kept(self) -> Self:
        readers = [recipe.name for recipe in self.probes.recipes if recipe.reads_activations]
        if readers and "mean" not in self.activations.poolings:
            raise study_fault(
                f"no pooling `mean`, which the recipes {', '.join(readers)} read",
                "add mean, or remove these recipes from probes.recipes",
                ("activations", "poolings"),
            )
        return self

    @model_validator(mode="after")
    def _tokenizers_exist(self) -> Self:
        for key, model in self.models.items():
            has_own = model.tokenizer or not isinstance(model.checkpoint, StandInCheckpoint)
            if not has_own and not isinstance(self.rollouts.source, DemoSource | PolicySource):
                raise study_fault(
                    "a stand-in checkpoint without a tokenizer",
                    f"set models.{key}.tokenizer to a tokenizer folder or a hub id",
                    ("models", key, "tokenizer"),
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
