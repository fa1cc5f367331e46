"""The recipes that each configuration asks for, and configurations that ask for the same.

What is a candidate, a baseline or a companion is decided here alone. What a recipe is called
belongs in `recipes`, which configurations there are in `space`.

Invariant: a configuration is judged by recipes that read what it varies, or counts as the duplicate
of one that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.sweep import OFF, AttentionVariant
from taprobe_core.study.targets import target_settings
from taprobe_core.sweep.factors import Configuration
from taprobe_core.sweep.recipes import Role, SweptRecipe, Use
from taprobe_core.sweep.space import SweepSpace
from taprobe_core.sweep.tuning import tuned


def uses_of(space: SweepSpace, configuration: Configuration) -> tuple[Use, ...]:
    """Return the recipes of a configuration, in the order of the study's.

    Pooled states are read in the configuration's pooling; with `tokens`, the kinds that read them
    come along with the mean, if it is swept too. From stage 2 on, attention is judged by the kinds
    that read it, and stage 3 by the one kind that it tunes. Where a candidate is also fitted to
    residuals, that fit is judged and the plain one comes along.

    Args:
        space: the sweep.
        configuration: one of its configurations.
    """
    variant = next((each for each in space.variants if each.label == configuration.attention), OFF)
    found = [
        use
        for kind in space.kinds
        if (role := _role(space, kind, configuration, variant)) is not None
        for use in _fits(space, role, kind, configuration, variant)
    ]
    candidates = [use for use in found if use.role == "candidate"]
    if not any(_is_residual(use) for use in candidates):
        return tuple(found)
    passed = {use.swept.name for use in candidates if not _is_residual(use)}
    moved = [use._replace(role="companion") if use.swept.name in passed else use for use in found]
    is_tuned = configuration.kind is not None
    return tuple(use for use in moved if not is_tuned or use.role != "companion")


def duplicates(space: SweepSpace, configurations: Sequence[Configuration]) -> dict[str, str]:
    """Map each configuration that is judged by the same fits as an earlier one to that one.

    Args:
        space: the sweep.
        configurations: of one stage.

    Returns:
        id -> id of the first that has the same candidates at the same site and setting.
    """
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for configuration in configurations:
        candidates = sorted(
            {use.swept.name for use in uses_of(space, configuration) if use.role == "candidate"}
        )
        place = (configuration.model, configuration.layer, configuration.setting)
        known = first.setdefault((*place, *candidates), configuration.id)
        if known != configuration.id:
            found[configuration.id] = known
    return found


def recipes_at(
    space: SweepSpace, configurations: Iterable[Configuration]
) -> dict[tuple[str, int, str], tuple[SweptRecipe, ...]]:
    """Return what is to be fitted at each place, every recipe once.

    Args:
        space: the sweep.
        configurations: any of its configurations; duplicates do no harm.

    Returns:
        (model, layer, setting) -> recipes, in the order of expansion.
    """
    found: dict[tuple[str, int, str], dict[str, SweptRecipe]] = {}
    for each in configurations:
        here = found.setdefault((each.model, each.layer, each.setting), {})
        for use in uses_of(space, each):
            here.setdefault(use.swept.name, use.swept)
    return {place: tuple(recipes.values()) for place, recipes in found.items()}


def _role(
    space: SweepSpace, kind: ProbeRecipe, configuration: Configuration, variant: AttentionVariant
) -> Role | None:
    """What a kind is to a configuration, or None."""
    looks = "vertical_attention" in kind.features
    if looks and variant.mode == "off":
        return None
    if kind.name in space.baselines:
        return "baseline"
    if configuration.kind is not None:
        return "candidate" if kind.name == configuration.kind else None
    is_tokens = configuration.pooling == "tokens"
    if looks:
        return "candidate"
    if kind.reads_tokens and not is_tokens:
        return None
    if "activations" in kind.features and is_tokens:
        return "companion" if "mean" in space.sweep.poolings else None
    return "candidate" if kind.reads_activations and variant.mode == "off" else "companion"


def _fits(
    space: SweepSpace,
    role: Role,
    kind: ProbeRecipe,
    configuration: Configuration,
    variant: AttentionVariant,
) -> Iterator[Use]:
    """A kind fitted to the configuration's target, and to its residuals where the sweep says so."""
    if role == "candidate":
        kind = tuned(kind, configuration.settings)
    looks = "vertical_attention" in kind.features
    pooling = "mean" if configuration.pooling == "tokens" else configuration.pooling
    plain = kind.model_copy(
        update={
            "pooling": pooling if "activations" in kind.features else "mean",
            "target": configuration.target,
            **{name: getattr(configuration, name) for name in target_settings()},
        }
    )
    named = space.sweep.residualized
    is_also = kind.name in named if named is not None else kind.name not in space.baselines
    levels = {"none": None, configuration.residualize if is_also else "none": None}
    for level in levels:
        yield Use(
            kind.name,
            role,
            SweptRecipe(
                plain.model_copy(update={"residualize": level}),
                configuration.drop_last_sentence,
                variant if looks else None,
                space.attention_mode if looks else "off",
            ),
        )


def _is_residual(use: Use) -> bool:
    return use.swept.template.residualize != "none"
