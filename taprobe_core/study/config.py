"""The study: the one configuration, as frozen models.

A study names everything that decides a result: the dataset and its revision, the models and their
layers, the label definition, the probe recipes, the split protocols, the deferral objectives. Each
stage's fingerprint takes exactly one slice of it. Reading YAML belongs in `study.source`; what the
values lead to belongs in the stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from taprobe_core.keys import LONGEST_KEY, Site, Trial
from taprobe_core.study.controls import ControlRecipe, control_fault, controls_of
from taprobe_core.study.estimators import TokenProbe
from taprobe_core.study.evaluation import Evaluation
from taprobe_core.study.models import (
    Checkpoint,
    DemoCheckpoint,
    Layers,
    Model,
    PretrainedCheckpoint,
    StandInCheckpoint,
)
from taprobe_core.study.parts import (
    Activations,
    Attention,
    CommitSha,
    Count,
    FolderName,
    Fraction,
    HubId,
    Index,
    LocalPath,
    Pooling,
    Seed,
    Slug,
    Splits,
    StudyPart,
    distinct,
    study_fault,
)
from taprobe_core.study.probes import DEFAULT_RECIPES, ProbeRecipe, Probes
from taprobe_core.study.sweep import Sweep, sweep_fault
from taprobe_core.study.targets import Target
from taprobe_core.study.waivers import Waiver, waiver_fault

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
    "Sweep",
    "Target",
    "TokenProbe",
    "Waiver",
    "resolve_folder",
]


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
    """Which rollouts, and what to do with a problem that cannot be used.

    `problem_ids` names what is read, `exclude_ids` what is not, whatever else chooses it.
    """

    source: Source
    sampling: FolderName = "temperature_0.6_top_p_0.95"
    problem_ids: (
        Annotated[tuple[Index, ...], Field(min_length=1), AfterValidator(distinct)] | None
    ) = None
    exclude_ids: Annotated[tuple[Index, ...], AfterValidator(distinct)] = ()
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
    sweep: Sweep | None = None
    waivers: tuple[Waiver, ...] = ()

    @model_validator(mode="after")
    def _names_fit_into_the_store(self) -> Self:
        for joint, at in [
            *((str(site), ("models", site.model)) for site in self.sites),
            *((str(trial), ("settings",)) for trial in self.trials),
        ]:
            if len(joint) > LONGEST_KEY:
                raise study_fault(
                    f"{joint!r}, {len(joint)} characters of at most {LONGEST_KEY}",
                    "choose a shorter name",
                    at,
                )
        return self

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
    def _controls_exist(self) -> Self:
        fault = control_fault(self.evaluation.selectivity, self.recipes)
        if fault is not None:
            raise fault
        return self

    @model_validator(mode="after")
    def _what_is_read_is_kept(self) -> Self:
        readers: dict[Pooling, list[str]] = {}
        for recipe in self.probes.recipes:
            for pooling in recipe.poolings_read:
                readers.setdefault(pooling, []).append(recipe.name)
        for pooling, names in readers.items():
            if pooling not in self.activations.poolings:
                raise study_fault(
                    f"no pooling `{pooling}`, which the recipes {', '.join(names)} read",
                    f"add {pooling}, or remove these recipes from probes.recipes",
                    ("activations", "poolings"),
                )
        looking = [r.name for r in self.probes.recipes if "vertical_attention" in r.features]
        if looking and self.attention.mode == "off":
            raise study_fault(
                f"mode off, while the recipes {', '.join(looking)} read vertical attention",
                "use light or full, or remove these recipes from probes.recipes",
                ("attention", "mode"),
            )
        return self

    @model_validator(mode="after")
    def _sweep_fits_in(self) -> Self:
        if self.sweep is not None:
            fault = sweep_fault(
                self.sweep,
                recipes=self.probes.recipes,
                poolings=self.activations.poolings,
                attention=self.attention,
                protocols=self.splits.protocols,
                drops_last_sentence=self.labels.drop_last_sentence,
            )
            if fault is not None:
                raise fault
        return self

    @model_validator(mode="after")
    def _waivers_name_cells(self) -> Self:
        keys = {
            "model": tuple(self.models),
            "setting": self.settings,
            "site": tuple(map(str, self.sites)),
            "trial": tuple(map(str, self.trials)),
        }
        fault = waiver_fault(self.waivers, keys)
        if fault is not None:
            raise fault
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
    def recipes(self) -> tuple[ProbeRecipe, ...]:
        """The recipes, each with every setting of its target filled in."""
        return tuple(
            recipe.resolved(self.probes.target, self.labels.percentile)
            for recipe in self.probes.recipes
        )

    @property
    def controls(self) -> dict[str, ControlRecipe]:
        """The control of every recipe that `evaluation.selectivity` asks for, by its name."""
        return controls_of(self.evaluation.selectivity, self.recipes)

    @property
    def fitted(self) -> tuple[ProbeRecipe, ...]:
        """All that is fitted at a site: the recipes, then their controls."""
        return (*self.recipes, *self.controls.values())

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
