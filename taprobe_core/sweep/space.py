"""The configurations of each stage.

Stage 1 follows from the study alone, the later ones from the shortlist of the stage before. What a
configuration is belongs in `factors`, what is fitted for it in `uses`, who is shortlisted in
`shortlist`.

Invariant: expansion is a pure function; its order is that of the study, the last factor fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import polars as pl

from taprobe_core.errors import ConfigError
from taprobe_core.keys import Site
from taprobe_core.store.canonical import canonical_json
from taprobe_core.study import Study
from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.sweep import AttentionVariant, Sweep
from taprobe_core.study.targets import TARGETS
from taprobe_core.sweep.factors import Configuration
from taprobe_core.sweep.tuning import grid


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
