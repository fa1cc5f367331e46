"""Contracts of a sweep: its configurations, what they ask for, and what comes of them.

A configuration is named by `config_id`; `model`, `layer` and `setting` say where its recipes are
fitted. `skill` is the share of the way from chance to the best that can be reached. A null is a
value that is not defined, or not there yet.
"""

from __future__ import annotations

from math import inf

import polars as pl

from taprobe_core.study.targets import target_settings
from taprobe_core.tables.contract import FINITE, Contract, at_least, column, within
from taprobe_core.tables.results import PROTOCOLS

SWEEP_STAGES = ("stage1", "stage2", "stage3")
SWEEP_ROLES = ("baseline", "candidate", "companion")
SWEEP_STATUS_NAMES = ("done", "missing")
STABILITY_SOURCES = ("seeds", "halves", "settings", "validation_test", "bootstrap")

_ID = {
    "stage": column(pl.Enum(SWEEP_STAGES)),
    "config_id": column(pl.String),
}
_PLACE = {
    "model": column(pl.String),
    "layer": column(pl.Int64, at_least(0)),
    "setting": column(pl.String),
}
_FACTORS = {
    **_PLACE,
    "target": column(pl.String),
    **{
        setting.name: column(
            pl.Int64 if setting.is_whole else pl.Float64,
            at_least(setting.low) if setting.high == inf else within(setting.low, setting.high),
            nullable=True,
        )
        for setting in target_settings().values()
    },
    "drop_last_sentence": column(pl.Boolean),
    "pooling": column(pl.String),
    "residualize": column(pl.String),
    "attention": column(pl.String, nullable=True),
}
SWEEP_FACTORS = tuple(_FACTORS)
"""Factors that every stage of a sweep may have, in the order of columns."""

_NUMBER = column(pl.Float64, FINITE, nullable=True)
_P = column(pl.Float64, within(0, 1), nullable=True)
_N = column(pl.Int64, at_least(0))

SWEEP_CONFIGURATIONS = Contract(
    {
        **_ID,
        **_FACTORS,
        "kind": column(pl.String, nullable=True),
        "tuning": column(pl.String, nullable=True),
        "factors": column(pl.String),
        "duplicate_of": column(pl.String, nullable=True),
    },
    ordered=True,
    unique=["config_id"],
    name="sweep_configurations",
)
"""One row per configuration, in the order of expansion; `factors` is the canonical JSON that the id
is a hash of. `duplicate_of` is an earlier one of the stage that is judged by the same fits."""

SWEEP_RECIPES = Contract(
    {
        **_ID,
        **_PLACE,
        "kind": column(pl.String),
        "role": column(pl.Enum(SWEEP_ROLES)),
        "target": column(pl.String),
        "residualize": column(pl.String),
        "recipe": column(pl.String),
    },
    ordered=True,
    unique=["config_id", "recipe"],
    name="sweep_recipes",
)
"""One row per configuration and recipe that it asks for; `recipe` is the name of the fit, equal for
equal content."""

SWEEP_LEADERBOARD = Contract(
    {
        "stage": _ID["stage"],
        "target": column(pl.String),
        "rank": column(pl.Int64, at_least(1), nullable=True),
        "config_id": column(pl.String),
        "status": column(pl.Enum(SWEEP_STATUS_NAMES)),
        "n_tried": _N,
        "kind": column(pl.String, nullable=True),
        "recipe": column(pl.String, nullable=True),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "metric": column(pl.String, nullable=True),
        "score": _NUMBER,
        "val_value": _NUMBER,
        "val_skill": _NUMBER,
        "test_value": _NUMBER,
        "test_skill": _NUMBER,
        "test_chance": _NUMBER,
        "test_seed_sd": _NUMBER,
        "n_problems": column(pl.Int64, at_least(0), nullable=True),
        "n_undefined": column(pl.Int64, at_least(0), nullable=True),
        "n_seeds": column(pl.Int64, at_least(0), nullable=True),
        "n_kinds": _N,
        **{name: part for name, part in _FACTORS.items() if name != "target"},
        "tuning": column(pl.String, nullable=True),
        "factors": column(pl.String),
        "duplicate_of": column(pl.String, nullable=True),
    },
    ordered=True,
    unique=["config_id"],
    name="sweep_leaderboard",
)
"""One row per configuration of every stage, best first within stage and target. `rank` is null for
what is missing, undefined or a duplicate, and these stand last. `kind` is the one of `n_kinds`
candidates that validation prefers; `n_tried` counts the configurations that have a rank."""

SWEEP_SHORTLIST = Contract(
    {
        "rank": column(pl.Int64, at_least(1)),
        **_ID,
        "target": column(pl.String),
        "target_rank": column(pl.Int64, at_least(1)),
        "rank_by": column(pl.String),
        "score": column(pl.Float64, FINITE),
        "n_tried": column(pl.Int64, at_least(1)),
        "n_missing": _N,
        "kind": column(pl.String),
        "recipe": column(pl.String),
        "factors": column(pl.String),
        "reason": column(pl.String),
    },
    ordered=True,
    unique=["config_id"],
    name="sweep_shortlist",
)
"""One row per configuration that goes on, in order. `n_tried` had a rank for the target, and
`n_missing` were not there to be ranked."""

SWEEP_DELTAS = Contract(
    {
        **_ID,
        "target": column(pl.String),
        "kind": column(pl.String),
        "recipe": column(pl.String),
        "baseline": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "metric": column(pl.String),
        "n_problems": _N,
        "n_better": _N,
        "delta": _NUMBER,
        "delta_low": _NUMBER,
        "delta_high": _NUMBER,
        "t_low": _NUMBER,
        "t_high": _NUMBER,
        "p_sign_flip": _P,
        "p_wilcoxon": _P,
        "interval_note": column(pl.String, nullable=True),
        "n_tests": _N,
        "p_holm": _P,
        "q_bh": _P,
    },
    ordered=True,
    unique=["config_id", "recipe", "baseline"],
    name="sweep_deltas",
)
"""One row per configuration, candidate and baseline, on test problems, seeds averaged within them.
A fit to residuals is compared with `chance` too: position may say nothing of what position left.
The `n_tests` distinct comparisons of a stage are one family."""

SWEEP_STABILITY = Contract(
    {
        "stage": _ID["stage"],
        "target": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "source": column(pl.Enum(STABILITY_SOURCES)),
        "n_configurations": _N,
        "n_comparisons": _N,
        "rank_correlation": column(pl.Float64, within(-1, 1), nullable=True),
        "rank_correlation_low": column(pl.Float64, within(-1, 1), nullable=True),
        "rank_correlation_high": column(pl.Float64, within(-1, 1), nullable=True),
        "p_winner_changes": _P,
        "n_winners": column(pl.Int64, at_least(1), nullable=True),
        "mean_sd": _NUMBER,
    },
    ordered=True,
    unique=["stage", "target", "source"],
    name="sweep_stability",
)
"""One row per stage, target and source of change: Spearman's correlation between two rankings of
the same configurations (mean, least and greatest over `n_comparisons`), and how often they have
different winners. `n_winners` counts the distinct best ones; `mean_sd` is the mean over
configurations of the standard deviation of skill over seeds or resamples."""

SWEEP_CHOICES = Contract(
    {
        "stage": _ID["stage"],
        "target": column(pl.String),
        "setting": column(pl.String),
        "protocol": column(pl.Enum(PROTOCOLS)),
        "n_candidates": column(pl.Int64, at_least(1)),
        "n_folds": column(pl.Int64, at_least(1)),
        "n_chosen": column(pl.Int64, at_least(1)),
        "most_chosen": column(pl.String),
        "skill": _NUMBER,
        "best_skill": _NUMBER,
        "n_problems": _N,
    },
    ordered=True,
    unique=["stage", "target", "setting"],
    name="sweep_choices",
)
"""One row per stage, target and setting: the test skill of choosing, fold by fold, on that fold's
own validation problems, beside the best test skill of any one candidate, which is optimistic."""
