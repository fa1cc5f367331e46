"""A sweep of three stages: which configurations, what is fitted for them, and who goes on.

    recipes    a configuration: its factors, its id; a recipe by its content
    space      the configurations of each stage, their recipes, how many fits that makes
    values     results ─► skill, the share of the way from chance to the best
    boards     configurations ranked; status; differences from their baselines
    shortlist  who goes on, and what the choice is worth on test
    stability  how far a ranking depends on seeds, problems, settings

Everything here is a pure function of a study and of tables; running it belongs in `pipeline`. There
is no registry of what has run: status is read off what is there.
"""

from taprobe_core.sweep.boards import (
    CHANCE,
    configuration_table,
    recipe_table,
    status_table,
    sweep_leaderboard,
    sweep_paired_deltas,
    wanted_fits,
)
from taprobe_core.sweep.recipes import Configuration, RecipeUse, SweptRecipe, configuration_id
from taprobe_core.sweep.shortlist import shortlist_stage2, shortlist_stage3, sweep_choices
from taprobe_core.sweep.space import (
    FitCount,
    SweepSpace,
    count_fits,
    duplicates,
    recipes_at,
    sweep_space,
    uses_of,
)
from taprobe_core.sweep.stability import sweep_stability

__all__ = [
    "CHANCE",
    "Configuration",
    "FitCount",
    "RecipeUse",
    "SweepSpace",
    "SweptRecipe",
    "configuration_id",
    "configuration_table",
    "count_fits",
    "duplicates",
    "recipe_table",
    "recipes_at",
    "shortlist_stage2",
    "shortlist_stage3",
    "status_table",
    "sweep_choices",
    "sweep_leaderboard",
    "sweep_paired_deltas",
    "sweep_space",
    "sweep_stability",
    "uses_of",
    "wanted_fits",
]
