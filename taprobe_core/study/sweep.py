"""The part of a study that says what is swept: the factors of three stages, and who goes on.

Stage 1 crosses the study's sites and settings with target, pooling and residualisation. Stage 2
adds ways to read attention to the best of stage 1, stage 3 tunes the best of stage 2. What a sweep
cannot have beside the rest of its study is said here too, each with the edit to make. What a factor
becomes belongs in `taprobe_core.sweep`.

Invariant: a factor that decides nothing of a probe is not crossed with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from taprobe_core.study.estimators import Tuning
from taprobe_core.study.parts import (
    Attention,
    Count,
    Pooling,
    Seed,
    StudyPart,
    distinct,
    study_fault,
)
from taprobe_core.study.probes import ProbeRecipe, Residualize
from taprobe_core.study.targets import TARGETS, Target, TargetFactors, target_settings

RankBy = Literal["validation_skill", "validation_rank", "test_primary"]


class AttentionVariant(StudyPart):
    """One way to score sentences by attention.

    `off` reads none. `full` scores a sentence by the sentences after it, `light` by the last
    `last_n` queries: tokens where the study's attention is `light`, sentences where it is `full`.
    `depth_control` is a mean over the queries, or with `sum` none. `max_tokens` was the longest
    text that the earlier script system read in full; here every text is, so it decides nothing, and
    variants that differ in it alone are one fit under two ids.
    """

    mode: Literal["off", "light", "full"]
    depth_control: Literal["mean", "sum"] = "mean"
    last_n: Count | None = None
    max_tokens: Count | None = None

    @model_validator(mode="after")
    def _has_its_own_settings(self) -> Self:
        for name, owner in (("last_n", "light"), ("max_tokens", "full")):
            if getattr(self, name) is not None and self.mode != owner:
                raise study_fault(
                    f"{name} with mode {self.mode}", f"remove it, or use mode: {owner}"
                )
        if self.mode == "light" and self.last_n is None:
            raise study_fault("light without last_n", "add `last_n: 4`")
        return self

    @property
    def label(self) -> str:
        """What tables and factors call it, for example `light_4_mean` or `full_1024_sum`."""
        size = self.last_n if self.mode == "light" else self.max_tokens
        control = None if self.mode == "off" else self.depth_control
        return "_".join(str(part) for part in (self.mode, size, control) if part is not None)

    def content(self, study_mode: str) -> dict[str, str | int]:
        """What decides the scores, given the mode of the study's attention.

        Variants of equal content are one feature. One query is its own mean and its own sum.
        """
        if self.mode == "off":
            return {"mode": "off"}
        found: dict[str, str | int] = {"mode": self.mode, "depth_control": self.depth_control}
        if self.last_n is not None:
            found |= {"last_n": self.last_n, "queries": _QUERIES[study_mode]}
            if self.last_n == 1:
                del found["depth_control"]
        return found

    def lacks(self, attention: Attention) -> str | None:
        """What the study's attention would have to be for the scores to follow from it, or None."""
        if self.mode == "off" or attention.mode == "full":
            return None
        if self.mode == "full":
            return "mode: full"
        last_n = self.last_n or 0
        if attention.mode == "light" and last_n <= attention.last_n:
            return None
        return f"mode: light with last_n: {last_n} or more, or mode: full"


_QUERIES = {"light": "tokens", "full": "sentences", "off": "none"}

OFF = AttentionVariant(mode="off")

ATTENTION_VARIANTS = (
    OFF,
    *(
        AttentionVariant(mode="light", depth_control=control, last_n=n)
        for control in ("mean", "sum")
        for n in (1, 4, 8)
    ),
    *(
        AttentionVariant(mode="full", depth_control=control, max_tokens=n)
        for control in ("mean", "sum")
        for n in (1024, 2048)
    ),
)
"""The eleven variants of the earlier script system."""


def _labels_differ(variants: tuple[AttentionVariant, ...]) -> tuple[AttentionVariant, ...]:
    distinct(tuple(variant.label for variant in variants))
    return variants


class Shortlists(StudyPart):
    """Who goes on to the next stage.

    `to_stage2` configurations of each target, and `to_stage3` of stage 2 in all, of the targets in
    turn, so that metrics of different targets are never compared. `protocol` is the one whose
    validation problems decide; null takes `lopo` where the study has it. `rank_by`:
    `validation_skill`, how far from chance to the best that can be reached; `validation_rank`, the
    rank among configurations of the same labels and setting; `test_primary`, as the earlier script
    system: the plain metric on test, which makes what follows optimistic.
    """

    rank_by: RankBy = "validation_skill"
    protocol: Literal["holdout", "lopo"] | None = None
    to_stage2: Count = 24
    to_stage3: Count = 12


def _swept(targets: tuple[str, ...]) -> tuple[str, ...]:
    fixed = [name for name in targets if not TARGETS[name].is_swept]
    if fixed:
        able = [name for name, entry in TARGETS.items() if entry.is_swept]
        raise study_fault(
            f"{', '.join(fixed)}, which no sweep varies", f"name some of {', '.join(able)}"
        )
    return targets


class Sweep(TargetFactors):
    """Factors of a campaign of three stages.

    Every recipe of `probes.recipes` is a kind: the sweep says its target, pooling and
    residualisation. `percentiles` and `drop_last_sentence` are factors of `anchor_binary`,
    `thresholds` of `exceeds_threshold`, `windows` of `windowed_change`; other targets take the
    first of `drop_last_sentence`. Pooling `tokens` stands for the kinds that read token sets.
    `residualized` names the kinds that are also fitted to residuals; null is all but the baselines.
    Kinds that read vertical attention run from stage 2 on, with each of `attention`; null takes the
    eleven published variants as far as the study's attention yields them.
    """

    targets: Annotated[
        tuple[Target, ...], Field(min_length=1), AfterValidator(distinct), AfterValidator(_swept)
    ] = (
        "anchor_binary",
        "importance_abs",
        "importance_signed",
    )
    drop_last_sentence: Annotated[
        tuple[bool, ...], Field(min_length=1), AfterValidator(distinct)
    ] = (True, False)
    poolings: Annotated[tuple[Pooling, ...], Field(min_length=1), AfterValidator(distinct)] = (
        "mean",
        "tokens",
    )
    residualize: Annotated[
        tuple[Residualize, ...], Field(min_length=1), AfterValidator(distinct)
    ] = ("none", "position", "position_plus_text")
    residualized: Annotated[tuple[str, ...], AfterValidator(distinct)] | None = None
    attention: (
        Annotated[tuple[AttentionVariant, ...], Field(min_length=1), AfterValidator(_labels_differ)]
        | None
    ) = None
    tuning: Tuning = Tuning()
    shortlists: Shortlists = Shortlists()
    stability_draws: Count = 200
    stability_seed: Seed = 0

    def variants(
        self, recipes: Sequence[ProbeRecipe], attention: Attention
    ) -> tuple[AttentionVariant, ...]:
        """The attention variants of stage 2.

        Args:
            recipes: the study's; without one that reads vertical attention there is only `off`.
            attention: the study's; what it does not yield is left out of the default.
        """
        if self.attention is not None:
            return self.attention
        if not any("vertical_attention" in recipe.features for recipe in recipes):
            return (OFF,)
        return tuple(v for v in ATTENTION_VARIANTS if v.lacks(attention) is None)


Faults = Iterator[PydanticCustomError]


def sweep_fault(
    sweep: Sweep,
    *,
    recipes: Sequence[ProbeRecipe],
    poolings: Sequence[Pooling],
    attention: Attention,
    protocols: Sequence[str],
    drops_last_sentence: bool,
) -> PydanticCustomError | None:
    """Return the first fault of a sweep beside the rest of its study, or None."""
    checks = (
        _fixed_factors(recipes),
        _twins(recipes),
        _unread(sweep, recipes, poolings),
        _unknown_kinds(sweep, recipes),
        _attention_faults(sweep, recipes, attention),
        _unknown_protocol(sweep, protocols),
        _unlabelled(sweep, drops_last_sentence),
    )
    return next((fault for check in checks for fault in check), None)


def _fixed_factors(recipes: Sequence[ProbeRecipe]) -> Faults:
    for recipe in recipes:
        fixed = [
            name for name in ("target", *target_settings()) if getattr(recipe, name) is not None
        ]
        fixed += ["residualize"] if recipe.residualize != "none" else []
        if fixed:
            yield study_fault(
                f"recipe {recipe.name} sets {', '.join(fixed)}, which the sweep varies",
                f"remove {', '.join(fixed)} from the recipe; name the values under sweep",
                ("probes", "recipes"),
            )


def _twins(recipes: Sequence[ProbeRecipe]) -> Faults:
    known: dict[str, str] = {}
    for recipe in recipes:
        varied = recipe.content() | {"pooling": None}
        content = json.dumps(varied, sort_keys=True)
        if content in known:
            yield study_fault(
                f"recipes {known[content]} and {recipe.name} differ in nothing but "
                "their names and pooling, which the sweep varies",
                "remove one of them",
                ("probes", "recipes"),
            )
        known[content] = recipe.name


def _unread(sweep: Sweep, recipes: Sequence[ProbeRecipe], kept: Sequence[Pooling]) -> Faults:
    for pooling in sweep.poolings:
        feature = "tokens" if pooling == "tokens" else "activations"
        if pooling not in kept:
            yield study_fault(
                f"pooling {pooling}, which activations.poolings lacks",
                f"add {pooling} to activations.poolings, or remove it from sweep.poolings",
                ("sweep", "poolings"),
            )
        elif not any(feature in recipe.features for recipe in recipes):
            yield study_fault(
                f"pooling {pooling}, while no recipe reads {feature}",
                f"add a recipe with features: [{feature}], or remove {pooling}",
                ("sweep", "poolings"),
            )


def _unknown_kinds(sweep: Sweep, recipes: Sequence[ProbeRecipe]) -> Faults:
    known = [recipe.name for recipe in recipes]
    unknown = sorted(set(sweep.residualized or ()) - set(known))
    if unknown:
        yield study_fault(
            f"{unknown}, which probes.recipes lacks",
            f"name recipes of this study ({', '.join(known)}), or add the missing ones",
            ("sweep", "residualized"),
        )


def _attention_faults(sweep: Sweep, recipes: Sequence[ProbeRecipe], attention: Attention) -> Faults:
    reads = any("vertical_attention" in recipe.features for recipe in recipes)
    for variant in sweep.attention or ():
        missing = variant.lacks(attention)
        if missing is not None:
            yield study_fault(
                f"attention variant {variant.label}, which needs {missing}",
                f"change the study's attention to {missing}, or remove the variant",
                ("sweep", "attention"),
            )
        elif variant.mode != "off" and not reads:
            yield study_fault(
                f"attention variant {variant.label}, while no recipe reads vertical attention",
                "add a recipe with features: [vertical_attention], or remove sweep.attention",
                ("sweep", "attention"),
            )


def _unknown_protocol(sweep: Sweep, protocols: Sequence[str]) -> Faults:
    asked = sweep.shortlists.protocol
    if asked is not None and asked not in protocols:
        yield study_fault(
            f"protocol {asked}, which splits.protocols lacks",
            f"use one of {', '.join(protocols)}, or add {asked} to splits.protocols",
            ("sweep", "shortlists", "protocol"),
        )


def _unlabelled(sweep: Sweep, drops_last_sentence: bool) -> Faults:
    if drops_last_sentence and False in sweep.drop_last_sentence:
        yield study_fault(
            "false, while the study's labels leave the last sentence out",
            "set labels.drop_last_sentence to false (the sweep drops it where it says true), or "
            "remove false",
            ("sweep", "drop_last_sentence"),
        )
