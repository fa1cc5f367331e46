"""What a sweep cannot have beside the rest of its study, each with the edit to make.

The values of the part alone belong in `sweep`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from pydantic_core import PydanticCustomError

from taprobe_core.study.activations import Attention, Pooling
from taprobe_core.study.fields import study_fault
from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.sweep import Sweep
from taprobe_core.study.targets import target_settings

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
    """Return the first fault of a sweep beside the rest of its study, or None.

    Args:
        sweep: the part.
        recipes: the study's `probes.recipes`, as written.
        poolings: the study's `activations.poolings`.
        attention: the study's.
        protocols: the study's `splits.protocols`.
        drops_last_sentence: the study's `labels.drop_last_sentence`.
    """
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
