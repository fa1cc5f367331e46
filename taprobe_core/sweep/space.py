"""The configurations of each stage, and the recipes that each asks for.

Stage 1 follows from the study alone, the later ones from the shortlist of the stage before. What is
a candidate, a baseline or a companion is decided here alone. What a configuration and a recipe are
belongs in `recipes`, who is shortlisted in `shortlist`, which settings an estimator has and their
values in `study.estimators`.

Invariants: expansion is a pure function; its order is that of the study, the last factor fastest.
Two grid points of a kind are two fits. A configuration is judged by recipes that read what it
varies, or counts as the duplicate of one that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import polars as pl

from taprobe_core.errors import ConfigError
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.study import Study
from taprobe_core.study.estimators import Tuning
from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.sweep import OFF, AttentionVariant, Sweep
from taprobe_core.study.targets import TARGETS, Target, target_settings
from taprobe_core.sweep.recipes import Configuration, RecipeUse, Role, SweptRecipe


def grid(kind: ProbeRecipe, target: Target, tuning: Tuning) -> Iterator[dict[str, Any]]:
    """Yield every combination of the settings that a kind reads for a target, last one fastest."""
    is_binary = TARGETS[target].is_binary
    names = [
        each.name
        for each in kind.estimator_entry.settings
        if each.is_tuned and not (each.only_continuous and is_binary)
    ]
    for values in product(*(getattr(tuning, name) for name in names)):
        yield dict(zip(names, values, strict=True))


def tuned(kind: ProbeRecipe, settings: Mapping[str, Any]) -> ProbeRecipe:
    """Return a kind with settings of a grid; empty settings leave it as it is."""
    if not settings:
        return kind
    part = kind.estimator_entry.part
    values = kind.model_dump(mode="json")
    changed = settings if part is None else {part: values[part] | dict(settings)}
    return ProbeRecipe.model_validate_json(canonical_json(values | dict(changed)))


@dataclass(frozen=True)
class SweepSpace:
    """A sweep beside its study, which together decide what it expands to."""

    sweep: Sweep
    study: Study

    @property
    def kinds(self) -> tuple[ProbeRecipe, ...]:
        """The study's recipes; the sweep fills in target, pooling and residualisation."""
        return self.study.probes.recipes

    @property
    def variants(self) -> tuple[AttentionVariant, ...]:
        """Attention of stage 2; `off` alone without kinds that read attention."""
        return self.sweep.variants(self.kinds, self.study.attention)

    def stage1(self) -> tuple[Configuration, ...]:
        """Every configuration of stage 1."""
        sweep, study = self.sweep, self.study
        return tuple(
            Configuration(
                stage="stage1",
                model=site.model,
                layer=site.layer,
                setting=setting,
                pooling=pooling,
                residualize=residualize,
                **target,
            )
            for setting, site, pooling, target, residualize in product(
                study.settings, study.sites, sweep.poolings, _targets(sweep), sweep.residualize
            )
        )

    def stage2(self, shortlist: pl.DataFrame) -> tuple[Configuration, ...]:
        """Every configuration of stage 2: those of a shortlist of stage 1 with each variant."""
        return tuple(
            replace(parent, stage="stage2", attention=variant.label)
            for parent, _ in _listed(shortlist, "stage1")
            for variant in self.variants
        )

    def stage3(self, shortlist: pl.DataFrame) -> tuple[Configuration, ...]:
        """Every configuration of stage 3: the shortlisted kind of each finalist, tuned."""
        return tuple(
            replace(parent, stage="stage3", kind=kind, tuning=canonical_json(values))
            for parent, kind in _listed(shortlist, "stage2")
            for values in grid(self._kind(kind), parent.target, self.sweep.tuning)
        )

    def _kind(self, name: str) -> ProbeRecipe:
        found = next((kind for kind in self.kinds if kind.name == name), None)
        if found is None:
            raise ConfigError(
                f"kind {name!r} of a shortlist is not in the study",
                "probes.recipes",
                "make the shortlist again for this study",
            )
        return found


def _targets(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every target with the factors that are its own, the last fastest."""
    first = sweep.drop_last_sentence[0]
    for target in sweep.targets:
        factors = TARGETS[target].factors
        fixed = {each.name: each.default for each in TARGETS[target].settings if not each.factor}
        for values in product(*(getattr(sweep, field) for field in factors.values())):
            own = dict(zip(factors, values, strict=True))
            yield {"target": target, "drop_last_sentence": first, **fixed, **own}


def _listed(shortlist: pl.DataFrame, stage: str) -> list[tuple[Configuration, str]]:
    rows = shortlist.sort("rank").select("stage", "factors", "kind").iter_rows()
    found = [(Configuration.of(of, factors), kind) for of, factors, kind in rows]
    others = sorted({parent.stage for parent, _ in found} - {stage})
    if others:
        raise ConfigError(
            f"a shortlist of {', '.join(others)} where one of {stage} is needed",
            "sweep_shortlist",
            f"give the shortlist that was made of {stage}",
        )
    return found


def uses_of(space: SweepSpace, configuration: Configuration) -> tuple[RecipeUse, ...]:
    """Return the recipes of a configuration, in the order of the study's.

    Pooled states are read in the configuration's pooling; with `tokens`, the kinds that read them
    come along with the mean, if it is swept too. From stage 2 on, attention is judged by the kinds
    that read it, and stage 3 by the one kind that it tunes. Where a candidate is also fitted to
    residuals, that fit is judged and the plain one comes along.
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
    """Map configurations of a stage that are judged by the fits of an earlier one to that one."""
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


def recipes_of(
    space: SweepSpace, configurations: Iterable[Configuration]
) -> dict[str, SweptRecipe]:
    """Return what configurations ask for by name, every recipe once, in the order of expansion."""
    return {use.swept.name: use.swept for each in configurations for use in uses_of(space, each)}


def _role(
    space: SweepSpace, kind: ProbeRecipe, configuration: Configuration, variant: AttentionVariant
) -> Role | None:
    """What a kind is to a configuration, or None."""
    looks = "vertical_attention" in kind.features
    if looks and variant.mode == "off":
        return None
    if kind.name in space.study.evaluation.baselines:
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
) -> Iterator[RecipeUse]:
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
    is_also = (
        kind.name in named
        if named is not None
        else kind.name not in space.study.evaluation.baselines
    )
    levels = {"none": None, configuration.residualize if is_also else "none": None}
    for level in levels:
        yield RecipeUse(
            kind.name,
            role,
            SweptRecipe(
                plain.model_copy(update={"residualize": level}),
                configuration.drop_last_sentence,
                variant if looks else None,
                space.study.attention.mode if looks else "off",
            ),
        )


def _is_residual(use: RecipeUse) -> bool:
    return use.swept.template.residualize != "none"
