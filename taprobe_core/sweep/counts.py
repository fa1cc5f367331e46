"""How many fits a loop over configurations, folds and seeds makes, and how many are distinct.

Counting what is still to be done belongs in `sheets` and the store. Source of the loop: the
earlier script system, which fits every recipe of every configuration at every fold and seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from taprobe_core.study.targets import TARGETS
from taprobe_core.sweep.factors import Configuration
from taprobe_core.sweep.space import SweepSpace
from taprobe_core.sweep.uses import uses_of


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
