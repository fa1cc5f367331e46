"""Control tasks of a study: which recipes get one, and the recipe that it is fitted as.

What the labels of a control are belongs in `taprobe_core.probes.control_task`, what follows from it
in `taprobe_core.evaluation.contrasts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from taprobe_core.study.parts import Seed, StudyPart, distinct, study_fault
from taprobe_core.study.probes import ProbeRecipe

ANY_LINEAR_PROBE = "any_linear_probe"
"""Stands for every linear recipe of anchors that reads the model's states."""

ANY_ANCHOR_PROBE = "any_anchor_probe"
"""Stands for every recipe of anchors."""

_SUFFIX = "_control"
_LONGEST = 64


class Selectivity(StudyPart):
    """Which recipes are fitted to a control task too, and the seed of its labels.

    `recipes` names recipes of anchors, or `any_linear_probe` (every linear one that reads the
    model's states) or `any_anchor_probe`; an empty list asks for none. Recipes of other targets,
    and of residuals, have no control.
    """

    recipes: Annotated[tuple[str, ...], AfterValidator(distinct)] = (ANY_LINEAR_PROBE,)
    seed: Seed = 0


class ControlRecipe(ProbeRecipe):
    """A recipe whose anchors are labels of a control task. Studies derive it; none names it."""

    control_seed: Seed

    def content(self) -> dict[str, Any]:
        """What decides the scores: that of the recipe, and the seed of its labels."""
        return {**super().content(), "control_seed": self.control_seed}


def control_of(recipe: ProbeRecipe, seed: int) -> ControlRecipe:
    """Return a recipe's control: equal in everything but its labels."""
    settings: dict[str, Any] = {**dict(recipe), "control_seed": seed}
    settings["name"] = recipe.name[: _LONGEST - len(_SUFFIX)] + _SUFFIX
    return ControlRecipe(**settings)


def controls_of(
    selectivity: Selectivity, recipes: Sequence[ProbeRecipe]
) -> dict[str, ControlRecipe]:
    """Return the control of every recipe that gets one, by the name of the recipe."""
    asked = set(selectivity.recipes)
    return {
        recipe.name: control_of(recipe, selectivity.seed)
        for recipe in recipes
        if _has_control(recipe) and asked & _called(recipe)
    }


def control_fault(
    selectivity: Selectivity, recipes: Sequence[ProbeRecipe]
) -> PydanticCustomError | None:
    """Return what is wrong with the recipes that are named; None if nothing is."""
    at = ("evaluation", "selectivity", "recipes")
    able = [recipe.name for recipe in recipes if _has_control(recipe)]
    groups = (ANY_LINEAR_PROBE, ANY_ANCHOR_PROBE)
    others = {recipe.name for recipe in recipes} - set(able)
    named = [name for name in selectivity.recipes if name not in groups]
    without = [name for name in named if name in others]
    if without:
        return study_fault(
            f"{without}, which predict no anchors, or residuals: there is no control task for them",
            f"name recipes of anchors ({', '.join(able) or 'this study has none'}), or use []",
            at,
        )
    unknown = [name for name in named if name not in able]
    if unknown:
        return study_fault(
            f"{unknown}, which probes.recipes lacks",
            f"name recipes of this study ({', '.join(able)}), {' or '.join(groups)}",
            at,
        )
    return None


def _has_control(recipe: ProbeRecipe) -> bool:
    return recipe.is_binary and recipe.residualize == "none"


def _called(recipe: ProbeRecipe) -> set[str]:
    """Names under which a recipe of anchors is asked for."""
    is_linear_probe = recipe.estimator_entry.is_linear and recipe.reads_activations
    return {recipe.name, ANY_ANCHOR_PROBE, *([ANY_LINEAR_PROBE] if is_linear_probe else [])}
