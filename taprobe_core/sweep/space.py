"""The configurations of each stage, the recipes that each asks for, and how many fits that makes.

Stage 1 follows from the study alone, the later ones from the shortlist of the stage before. What is
a candidate, a baseline or a companion is decided here alone. What a configuration and a recipe are
belongs in `recipes`, who is shortlisted in `shortlist`, which settings an estimator has and their
values in `study.estimators`.

Invariants: expansion is a pure function; its order is that of the study, the last factor fastest.
Two grid points of a kind are two fits. A configuration is judged by recipes that read what it
varies, or counts as the duplicate of one that is.

Source of the loop that fits are counted against: the earlier script system, which fits every recipe
of every configuration at every fold and seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import polars as pl

from taprobe_core.errors import ConfigError
from taprobe_core.keys import Site
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
    """A sweep beside the parts of its study that decide what it expands to.

    Attributes:
        sweep: the factors.
        kinds: the study's recipes; the sweep fills in target, pooling and residualisation.
        baselines: kinds that others are compared with.
        sites: model and layer.
        settings: of the rollouts.
        variants: attention of stage 2; holds `off` alone without kinds that read attention.
        attention_mode: of the study.
    """

    sweep: Sweep
    kinds: tuple[ProbeRecipe, ...]
    baselines: tuple[str, ...]
    sites: tuple[Site, ...]
    settings: tuple[str, ...]
    variants: tuple[AttentionVariant, ...]
    attention_mode: str

    def stage1(self) -> tuple[Configuration, ...]:
        """Every configuration of stage 1."""
        sweep = self.sweep
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
                self.settings, self.sites, sweep.poolings, _targets(sweep), sweep.residualize
            )
        )

    def stage2(self, shortlist: pl.DataFrame) -> tuple[Configuration, ...]:
        """Every configuration of stage 2: those of a shortlist of stage 1 with each variant.

        Args:
            shortlist: `tables.SWEEP_SHORTLIST`.

        Raises:
            ConfigError: it lists another stage.
        """
        return tuple(
            replace(parent, stage="stage2", attention=variant.label)
            for parent, _ in _listed(shortlist, "stage1")
            for variant in self.variants
        )

    def stage3(self, shortlist: pl.DataFrame) -> tuple[Configuration, ...]:
        """Every configuration of stage 3: the shortlisted kind of each finalist, tuned.

        Args:
            shortlist: `tables.SWEEP_SHORTLIST`.

        Raises:
            ConfigError: it lists another stage, or a kind that the study lacks.
        """
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


def sweep_space(sweep: Sweep, study: Study) -> SweepSpace:
    """Put a sweep beside its study."""
    return SweepSpace(
        sweep=sweep,
        kinds=study.probes.recipes,
        baselines=study.evaluation.baselines,
        sites=study.sites,
        settings=study.settings,
        variants=sweep.variants(study.probes.recipes, study.attention),
        attention_mode=study.attention.mode,
    )


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
    is_also = kind.name in named if named is not None else kind.name not in space.baselines
    levels = {"none": None, configuration.residualize if is_also else "none": None}
    for level in levels:
        yield RecipeUse(
            kind.name,
            role,
            SweptRecipe(
                plain.model_copy(update={"residualize": level}),
                configuration.drop_last_sentence,
                variant if looks else None,
                space.attention_mode if looks else "off",
            ),
        )


def _is_residual(use: RecipeUse) -> bool:
    return use.swept.template.residualize != "none"


class FitCount(NamedTuple):
    """Numbers of fits.

    Attributes:
        n_configurations: configurations.
        n_loop: fits of a loop over configurations, recipes, folds and seeds.
        n_distinct: of these, with different content at a different place, fold and, if they depend
            on it, seed.
        n_loop_deterministic: of the loop, those that do not depend on the seed.
        n_distinct_deterministic: of the distinct ones, likewise.
        n_loop_residual: predictions of the target from position and text that a loop makes before
            residual fits, beside `n_loop`; they do not depend on the seed.
        n_distinct_residual: of these, distinct: one per setting, importance, sentences and level.
    """

    n_configurations: int
    n_loop: int
    n_distinct: int
    n_loop_deterministic: int
    n_distinct_deterministic: int
    n_loop_residual: int
    n_distinct_residual: int


def count_fits(
    space: SweepSpace, configurations: Iterable[Configuration], *, n_folds: int, n_seeds: int
) -> FitCount:
    """Count the fits of configurations.

    Args:
        space: the sweep.
        configurations: any of its configurations.
        n_folds: folds of each fit.
        n_seeds: seeds of each stochastic fit.
    """
    n_configurations = n_stochastic = n_deterministic = n_residual = 0
    places: dict[tuple[object, ...], bool] = {}
    residuals = set()
    for each in configurations:
        n_configurations += 1
        for use in uses_of(space, each):
            template = use.swept.template
            scope = each.layer if template.reads_activations else None
            key = (each.model, scope, each.setting, use.swept.name)
            places[key] = template.is_stochastic
            n_stochastic += template.is_stochastic
            n_deterministic += not template.is_stochastic
        if each.residualize != "none":
            n_residual += 1
            learned = TARGETS[TARGETS[each.target].value_of or each.target]
            own = (getattr(each, name) for name in learned.setting_names)
            shared = (each.model, each.setting, each.drop_last_sentence, each.residualize)
            residuals.add((*shared, learned.name, *own))
    n_own_stochastic = sum(places.values())
    n_own_deterministic = len(places) - n_own_stochastic
    per_loop = n_folds * n_seeds
    return FitCount(
        n_configurations=n_configurations,
        n_loop=(n_stochastic + n_deterministic) * per_loop,
        n_distinct=n_own_stochastic * per_loop + n_own_deterministic * n_folds,
        n_loop_deterministic=n_deterministic * per_loop,
        n_distinct_deterministic=n_own_deterministic * n_folds,
        n_loop_residual=n_residual * per_loop,
        n_distinct_residual=len(residuals) * n_folds,
    )
