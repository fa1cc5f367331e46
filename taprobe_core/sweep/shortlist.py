"""From a leaderboard to the configurations that go on, and what a whole sweep is worth.

The best of many configurations on test is optimistic, and so is a shortlist's, whose validation
problems are test problems of other folds. What a sweep is worth is therefore measured fold by fold:
each fold chooses by its own validation problems alone, and the choice is read on its test problems.
Ranking belongs in `boards`, the rule of choosing in `evaluation.selection`, what the next stage
makes of a list in `space`.

Invariants: nothing without a rank goes on, and values of different targets are never compared,
unless the study asks for the rule of the earlier script system. No test value influences a fold's
choice, and no fold sees another's validation values.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.evaluation.selection import choose
from taprobe_core.evaluation.summary import normalised_skill
from taprobe_core.study.sweep import Shortlists
from taprobe_core.sweep.boards import FIT, PLACE, measured
from taprobe_core.sweep.recipes import Stage
from taprobe_core.tables.contract import check_table
from taprobe_core.tables.results import PROTOCOLS
from taprobe_core.tables.sweep import SWEEP_CHOICES, SWEEP_SHORTLIST


def shortlist(board: pl.DataFrame, stage: Stage, rule: Shortlists) -> pl.DataFrame:
    """Choose the configurations of a stage of a leaderboard that go on.

    Of stage 1 these are the best `to_stage2` of each target, of stage 2 the best `to_stage3` in
    all. Targets take turns: the best of each, then the second of each. Under `test_primary` those
    of stage 2 are compared with one another, as the earlier script system did.

    Returns:
        `tables.SWEEP_SHORTLIST`.

    Raises:
        NotEnoughDataError: no configuration of the stage has a rank.
    """
    mine = board.filter(stage=stage).with_columns(
        (pl.col("status") == "missing").sum().over("target").cast(pl.Int64).alias("n_missing")
    )
    ranked = mine.filter(pl.col("rank").is_not_null()).rename({"rank": "target_rank"})
    if ranked.is_empty():
        raise NotEnoughDataError(
            f"none of {mine.height} configurations has a rank",
            f"{stage} of the sweep",
            f"fit and evaluate {stage} first",
        )
    listed = ranked.sort("target_rank", "target")
    if stage == "stage1":
        listed = listed.filter(pl.col("target_rank") <= rule.to_stage2)
    elif rule.rank_by == "test_primary":
        listed = ranked.sort(["score", "config_id"], descending=[True, False]).head(rule.to_stage3)
    else:
        listed = listed.head(rule.to_stage3)
    reason = pl.format(
        "{} of {} by {} ({}) for {}{}",
        "target_rank",
        "n_tried",
        pl.lit(rule.rank_by),
        pl.col("score").round(4),
        "target",
        pl.when(pl.col("n_missing") > 0)
        .then(pl.format("; {} not there to compare", "n_missing"))
        .otherwise(pl.lit("")),
    )
    said = listed.with_columns(
        pl.int_range(1, pl.len() + 1).alias("rank"),
        pl.lit(rule.rank_by).alias("rank_by"),
        reason.alias("reason"),
    )
    return check_table(
        said.select(*SWEEP_SHORTLIST.columns), SWEEP_SHORTLIST, "a sweep's leaderboard"
    )


_GROUP = ["stage", "target", "setting"]


def sweep_choices(
    configurations: pl.DataFrame, recipes: pl.DataFrame, units: pl.DataFrame, *, protocol: str
) -> pl.DataFrame:
    """Measure the choice among all candidates of a stage, target and setting.

    A candidate is a configuration with one of its kinds; a fold takes the one with the highest
    skill on its validation problems (ties: the lower name). Skills of different percentiles are
    compared as they are on the leaderboard, duplicates left out.

    Returns:
        `tables.SWEEP_CHOICES`; without a fold that has both sides there is no row.
    """
    own = configurations.filter(pl.col("duplicate_of").is_null())
    candidates = (
        recipes.filter(role="candidate")
        .join(own, on="config_id", how="semi", maintain_order="left")
        .select("stage", "target", *PLACE, "recipe")
        .unique(maintain_order=True)
        .with_columns(pl.format("{}@L{} {}", "model", "layer", "recipe").alias("candidate"))
    )
    key = [*_GROUP, "candidate", "fold", "split", "problem_id"]
    values = (
        candidates.join(measured(units, recipes, protocol), on=FIT)
        .group_by(key)
        .agg(pl.col("primary", "chance").mean())
        .sort(key)
    )
    test = values.filter(split="test")
    on_val = _skill(values.filter(split="val"), [*_GROUP, "fold", "candidate"])
    folds = on_val.join(test, on=[*_GROUP, "fold"], how="semi").drop_nulls("skill")
    chosen = choose(folds, [*_GROUP, "fold"], "skill", ["candidate"])
    tested = test.join(chosen, on=[*_GROUP, "fold", "candidate"], how="semi")
    how_often = chosen.group_by(*_GROUP, "candidate").len("n")
    alone = _skill(test, [*_GROUP, "candidate"]).group_by(_GROUP)
    parts = [
        _skill(tested, _GROUP),
        alone.agg(pl.col("skill").max().alias("best_skill")),
        tested.group_by(_GROUP).agg(pl.col("problem_id").n_unique().alias("n_problems")),
        values.group_by(_GROUP).agg(pl.col("candidate").n_unique().alias("n_candidates")),
        how_often.group_by(_GROUP).agg(pl.col("n").sum().alias("n_folds"), n_chosen=pl.len()),
        choose(how_often, _GROUP, "n", ["candidate"]).select(*_GROUP, most_chosen="candidate"),
    ]
    found = parts[0].with_columns(pl.lit(protocol, pl.Enum(PROTOCOLS)).alias("protocol"))
    for part in parts[1:]:
        found = found.join(part, on=_GROUP)
    counts = pl.col("n_problems", "n_candidates", "n_folds", "n_chosen").cast(pl.Int64)
    return check_table(
        found.with_columns(counts).sort(_GROUP).select(*SWEEP_CHOICES.columns),
        SWEEP_CHOICES,
        "results of a sweep",
    )


def _skill(values: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Skill over the problems of each key, folds averaged inside a problem."""
    means = pl.col("primary", "chance").mean()
    in_problem = values.group_by(*by, "problem_id", maintain_order=True).agg(means)
    return (
        in_problem.group_by(by, maintain_order=True)
        .agg(means)
        .select(*by, normalised_skill(pl.col("primary"), pl.col("chance")).alias("skill"))
    )
